"""Looks at a machine, or at a SLURM cluster, and says what to change before a training is queued.

    xcon doctor [--shards DIR --out RUN]       # this machine
    xcon doctor --slurm                        # on a login node: the partitions, too
    sbatch --nodes=2 --gres=gpu:1 --wrap "xcon doctor --slurm"      # in a job: whether its nodes can meet, too

Ends with an `sbatch` line. Exit status 0 where nothing was found that a training would fail by, 1 where something
was, 2 for wrong usage.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xcon import commandline, disks, health, launch, network, recipes, scheduler
from xcon.health import Finding
from xcon.scheduler import Partition, Request

PROGRAM = "xcon doctor"
STYLES = {"ok": "default", "warning": "yellow", "error": "bold red"}
LAUNCH_PORT = 29500  # accelerate launch's own
ON_NODE = "SLURMD_NODENAME"  # set on the nodes of a job; not in the shell of salloc, which stays where it was


@dataclasses.dataclass(frozen=True)
class Settings:
    """Looks at a machine, or at a SLURM cluster, and says what to change before a training is queued."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = "paper"
    """Recipe of xcon pretrain or xcon finetune that is to be trained."""
    shards: Path | None = None
    """Its shard set; none: not looked at."""
    out: Path = Path("runs/pretrain")
    """Its run folder; nothing is left there."""
    slurm: bool = False
    """Ask SLURM too; within a job, let its nodes meet."""
    partition: str | None = None
    """To ask for; none: the default one, or one with GPUs."""
    nodes: int = 1
    """To ask for."""
    gpus: int | None = None
    """To ask for on each node; none: as many as it has."""

    def __post_init__(self) -> None:
        """Refuses what cannot be asked for.

        Raises:
            ValueError: names the setting.
        """
        if self.recipe not in {*recipes.PRETRAIN, *recipes.FINETUNE}:
            raise ValueError(f"RECIPE {self.recipe}: no such recipe; there are {', '.join(recipes.PRETRAIN)}")
        if self.nodes < 1:
            raise ValueError(f"--nodes {self.nodes}: at least 1 is needed")
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"--gpus {self.gpus}: 0 or more is needed")
        if self.partition and not self.slurm:
            raise ValueError(f"--partition {self.partition}: unused, give --slurm too")


def main() -> None:
    """Entry point."""
    commandline.guarded(examine, PROGRAM)


def examine() -> None:
    """Parse, look, tell, propose."""
    settings = commandline.parse(Settings, PROGRAM)
    console = Console(soft_wrap=True, highlight=False)
    partitions = scheduler.ask() if settings.slurm else []
    chosen = scheduler.choose(partitions, settings.partition, settings.nodes) if settings.slurm else None
    request = propose(settings, chosen)  # refuses what no node has
    found = []
    for finding in look(settings, partitions, chosen):
        found.append(finding)
        if not console.is_terminal:
            commandline.say(line(finding))  # at once, since a meeting that fails takes a minute
    if console.is_terminal:
        Console().print(table(found))
    script = "slurm/pretrain.sh" if settings.recipe in recipes.PRETRAIN else "slurm/finetune.sh"
    commandline.say(request.line(script, settings.recipe, settings.shards, settings.out))
    if any(finding.level == "error" for finding in found):
        raise SystemExit(1)


def propose(settings: Settings, chosen: Partition | None) -> Request:
    """What to ask for: a share of a node that SLURM has, else GPUs as this machine has them."""
    account = os.environ.get("SBATCH_ACCOUNT", "")
    if chosen is None:
        gpus = max(1, torch.cuda.device_count()) if settings.gpus is None else settings.gpus
        return Request(account=account, nodes=settings.nodes, gpus=gpus)
    named = scheduler.site() != "torch"  # where the quality of service decides
    return scheduler.propose(chosen, nodes=settings.nodes, gpus=settings.gpus, account=account, named=named)


# --------------------------------------------------------------------------------------------------------
# Looking


def look(settings: Settings, partitions: Sequence[Partition], chosen: Partition | None) -> Iterator[Finding]:
    """Everything that is found, in order."""
    job_nodes = int(os.environ.get("SLURM_NNODES", "0")) if settings.slurm else 0
    yield from health.versions()
    yield from health.devices(launch.native_precision())
    yield health.compilers()
    yield from health.launcher()
    yield from disks.run_folder(settings.out)
    yield disks.quota()
    if settings.shards:
        yield from disks.shard_set(settings.shards)
    yield disks.caches(cluster=settings.slurm)
    yield disks.models(settings.recipe, cluster=settings.slurm)
    yield scheduler.account()
    if chosen:
        yield from scheduler.describe(partitions)
        yield scheduler.preemption(chosen.name)
    yield network.name(several=job_nodes > 1 and ON_NODE in os.environ)
    yield from meetings(settings, job_nodes)


def meetings(settings: Settings, job_nodes: int) -> Iterator[Finding]:
    """Whether processes meet: of this machine, or of all nodes of this job."""
    gpus = torch.cuda.device_count()
    if job_nodes:
        number = 10000 + int(os.environ["SLURM_JOB_ID"]) % 10000  # as slurm/launch.sh has it
        head = scheduler.first_node()
        if ON_NODE in os.environ:
            yield network.port(number)
        yield network.meet_across("gloo", job_nodes, head, number)
        if gpus:
            yield network.meet_across("nccl", job_nodes, head, number)
    elif settings.slurm:
        how = 'sbatch --nodes=2 [--gres=gpu:1] --wrap "xcon doctor --slurm"'
        yield Finding("ok", "nodes", "whether they can meet is seen from within a job", how)
    else:
        yield network.port(LAUNCH_PORT)
        yield network.meet_here("gloo", 2)
        if gpus:
            yield network.meet_here("nccl", gpus)


# --------------------------------------------------------------------------------------------------------
# Telling


def line(finding: Finding) -> str:
    """A finding for a log."""
    words = f"{finding.level:8}{finding.subject}: {finding.seen}"
    return f"{words} -> {finding.do}" if finding.do else words


def table(found: Sequence[Finding]) -> Table:
    """All of them for a terminal."""
    rows = Table("", "", "found", "what to do", box=None)
    for finding in found:
        cells = (finding.level, finding.subject, finding.seen, finding.do)
        rows.add_row(*map(Text, cells), style=STYLES[finding.level])
    return rows


if __name__ == "__main__":
    main()
