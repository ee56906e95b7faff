"""What SLURM says of its partitions, and the `sbatch` line that asks one of them for a training."""

import dataclasses
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from xcon import health
from xcon.health import Finding

SHORTEST_GRACE = 60  # seconds in which a checkpoint is surely written
PATIENCE = 60.0  # seconds: a controller that is busy is asked again for some 30
SHARE = 0.9  # of a node's memory: some belongs to its system


@dataclasses.dataclass(frozen=True)
class Partition:
    """Nodes that can be asked for together; those of a partition that differ are several of these.

    Attributes:
        name: of the partition.
        default: whether jobs that name none go there.
        nodes: how many there are, alike.
        cpus, memory, gpus: of one node; memory in MB.
        gpu_kind: as in --gres=gpu:KIND:N; empty where SLURM knows none.
        hours: that a job may take at most; None: for ever.
    """

    name: str
    default: bool
    nodes: int
    cpus: int
    memory: int
    gpus: int
    gpu_kind: str
    hours: float | None


@dataclasses.dataclass(frozen=True)
class Request:
    """What a job asks SLURM for.

    Attributes:
        account, partition: empty where the job must, or need, not name one.
        nodes: how many.
        gpus, cpus, memory: on each; memory in GB.
        gpu_kind: as of `Partition`.
        hours: at most.
    """

    account: str = ""
    partition: str = ""
    nodes: int = 1
    gpus: int = 1
    gpu_kind: str = ""
    cpus: int = 16
    memory: int = 64
    hours: float = 24

    def line(self, script: str, recipe: str, shards: Path | None, out: Path) -> str:
        """The command, to be given at the top of the repository."""
        kind = f"{self.gpu_kind}:" if self.gpu_kind else ""
        words = [
            "sbatch",
            *([f"--account={self.account}"] if self.account else []),
            *([f"--partition={self.partition}"] if self.partition else []),
            f"--nodes={self.nodes}",
            *([f"--gres=gpu:{kind}{self.gpus}"] if self.gpus else []),
            *(f"--cpus-per-task={self.cpus}", f"--mem={self.memory}G"),
            f"--time={int(self.hours)}:{int(self.hours * 60) % 60:02}:00",
            *(script, recipe, "--shards", str(shards or "DIR"), "--out", str(out)),
        ]
        return shlex.join(words)


# --------------------------------------------------------------------------------------------------------
# Asking


def ask() -> list[Partition]:
    """The partitions, as `sinfo` has them.

    Raises:
        FileNotFoundError: no SLURM here.
        OSError: it does not answer.
    """
    answer = _answer("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%m|%G|%l")
    return [read_partition(line) for line in answer.splitlines() if line.strip()]


def settings() -> dict[str, str]:
    """SLURM's own settings, as `scontrol show config` has them."""
    pairs = (line.split("=", 1) for line in _answer("scontrol", "show", "config").splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def partition_settings(name: str) -> dict[str, str]:
    """Those of one partition."""
    words = _answer("scontrol", "show", "partition", "--oneliner", name).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def first_node() -> str:
    """Of this job: where slurm/launch.sh has the processes meet."""
    return _answer("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]


def _answer(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not on PATH: no SLURM here, or this is inside a container")
    done = health.answer(command, seconds=PATIENCE)
    if done.returncode:
        raise OSError(f"{shlex.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def read_partition(line: str) -> Partition:
    """Reads a line of `sinfo --format=%P|%D|%c|%m|%G|%l`."""
    name, nodes, cpus, memory, gres, limit = line.strip().split("|")
    kinds = re.findall(r"gpu:(?:([^:(),]+):)?(\d+)", gres)  # gpu:2, gpu:h200:8(S:0-1), and others beside
    return Partition(
        name=name.removesuffix("*"),
        default=name.endswith("*"),
        nodes=int(nodes),
        cpus=int(cpus.rstrip("+")),
        memory=int(memory.rstrip("+")),
        gpus=sum(int(count) for _, count in kinds),
        gpu_kind=kinds[0][0] if len(kinds) == 1 else "",
        hours=read_limit(limit),
    )


def read_limit(text: str) -> float | None:
    """Hours of a time limit as SLURM writes it: days-hours:minutes:seconds, minutes:seconds; None: none."""
    if not re.fullmatch(r"[\d:-]+", text):
        return None  # infinite, n/a
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        parts = [*parts, 0, 0][:3]
    hours, minutes, seconds = [0, 0, 0, *parts][-3:]
    return int(days or 0) * 24 + hours + minutes / 60 + seconds / 3600


# --------------------------------------------------------------------------------------------------------
# Proposing


def choose(partitions: Sequence[Partition], wanted: str | None, nodes: int) -> Partition:
    """The partition to ask: the one that is wanted, else one with GPUs, the default one if it has some.

    Of several kinds of nodes the one with the most GPUs of which there are enough.

    Raises:
        ValueError: none of that name, or none with so many nodes.
    """
    named = [p for p in partitions if wanted in (None, p.name)]
    if not named:
        raise ValueError(f"--partition {wanted}: SLURM has {', '.join(dict.fromkeys(p.name for p in partitions))}")
    enough = [p for p in named if p.nodes >= nodes]
    if not enough:
        largest = max(named, key=lambda p: p.nodes)
        raise ValueError(f"--nodes {nodes}: {largest.name} has {largest.nodes} nodes that are alike")
    return max(enough, key=lambda p: (p.gpus > 0, p.default, p.gpus))


def propose(chosen: Partition, *, nodes: int, gpus: int | None, account: str, named: bool) -> Request:
    """A request for nodes of a partition, with a node's share of cores and memory for each GPU.

    Args:
        chosen: the partition.
        nodes: how many.
        gpus: on each; None: all.
        account: that jobs are charged to; empty: none.
        named: whether jobs of the site name their partition.

    Raises:
        ValueError: more GPUs than a node has.
    """
    gpus = chosen.gpus if gpus is None else gpus
    if gpus > chosen.gpus:
        raise ValueError(f"--gpus {gpus}: a node of {chosen.name} has {chosen.gpus}")
    share = gpus / chosen.gpus if gpus else 1
    return Request(
        account=account,
        partition="" if chosen.default or not named else chosen.name,
        nodes=nodes,
        gpus=gpus,
        gpu_kind=chosen.gpu_kind,
        cpus=max(1, int(chosen.cpus * share)),
        memory=max(1, int(chosen.memory / 1024 * share * SHARE)),
        hours=min(Request.hours, chosen.hours or Request.hours),
    )


def describe(partitions: Sequence[Partition]) -> list[Finding]:
    """A line for each kind of node."""
    found = []
    for p in partitions:
        gpus = f"{p.gpus} GPU(s) {p.gpu_kind}".rstrip() if p.gpus else "no GPU"
        gpus += f", {p.cpus / p.gpus:.0f} CPUs for each" if p.gpus else ""
        limit = "no time limit" if p.hours is None else f"at most {p.hours:g} h"
        node = f"{p.cpus} CPUs, {p.memory / 1024:,.0f} GB, {gpus}"
        called = f"{p.name}{' (default)' if p.default else ''}"
        found.append(Finding("ok", "partition", f"{called}: {p.nodes} node(s) of {node}; {limit}"))
    return found


def preemption(partition: str) -> Finding:
    """Whether a job that is preempted there goes back into the queue, and how long it is given to save."""
    general, own = settings(), partition_settings(partition)
    mode = own.get("PreemptMode", general.get("PreemptMode", "OFF"))
    if general.get("PreemptType") == "preempt/none" or mode == "OFF":
        return Finding("ok", "preemption", f"jobs of {partition} are not preempted")
    grace = int(own.get("GraceTime", "0"))
    seen = f"jobs of {partition} may be preempted ({mode}), after {grace} s of grace"
    if "REQUEUE" not in mode:
        advice = "submit the same line again after it, the run goes on"
        return Finding("warning", "preemption", f"{seen}, and are not requeued", advice)
    if grace < SHORTEST_GRACE:
        advice = "give a small --checkpoint-every: the time may not do to save"
        return Finding("warning", "preemption", f"{seen}, and requeued", advice)
    return Finding("ok", "preemption", f"{seen}, and requeued")


def site() -> str:
    """The cluster, as slurm/site.sh takes it."""
    return os.environ.get("XCON_SITE", os.environ.get("SLURM_CLUSTER_NAME", "other")).lower()


def account() -> Finding:
    """Whether jobs are charged to an account where the site wants one."""
    charged = os.environ.get("SBATCH_ACCOUNT")
    if site() == "torch" and not charged:
        how = "export SBATCH_ACCOUNT=torch_pr_XXX_XXXXX; my_slurm_accounts lists yours"
        return Finding("error", "account", "none is set, and NYU Torch takes no job without", how)
    return Finding("ok", "account", f"{charged or 'none, as is usual'} (site {site()})")
