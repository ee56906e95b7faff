"""What a pre-training would take on 1 to 1,024 GPUs: time, memory, efficiency, before anything is queued.

    xcon scale RECIPE --shards DIR [--gpu-memory-gb 80 ...] [--out FILE.csv ...]
    xcon scale RUN/config.json [...]

Of a recipe a few steps are measured here, on one GPU where there is one; of a run its log is read, which may have
been written on any machine: a hundred steps on one GPU are enough. `xcon/scaling.py` has the formulas, and says
what they assume.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from xcon import commandline, config, recipes, scaling
from xcon.config import PretrainConfig
from xcon.records import atomic_write
from xcon.rehearsal import FEW, ROWS, Pace, Rehearsal, pace_of_run
from xcon.scaling import STRATEGIES, Cluster, Prediction, Strategy

PROGRAM = "xcon scale"
FORMATS = (".csv", ".json")
GPUS = tuple(2**power for power in range(11))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig(PretrainConfig):
    """A pre-training, and where it might be done."""

    out: tuple[Path, ...] = ()  # type: ignore[assignment] # no run folder
    """Also write the table here: .csv, .json; several."""
    gpus: tuple[int, ...] = GPUS
    """Numbers of GPUs to plan for."""
    strategies: tuple[Strategy, ...] = STRATEGIES
    """Strategies to plan for."""
    batch: Literal["global", "per-gpu"] = "global"
    """What --batch-size is: that of all GPUs, however many; or that of each, which with more GPUs is another
    training."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    gpu_memory_gb: float = 80.0
    """Memory of a GPU, in GB."""
    node_bandwidth: float = 200.0
    """GB/s between the GPUs of a node, bus bandwidth as nccl-tests prints it: NVLink 100 to 400, PCIe 10 to 25."""
    network_bandwidth: float = 25.0
    """GB/s between nodes, of all network cards of a node together: one of 200 Gbit/s has 25."""
    latency_us: float = 10.0
    """Microseconds of a message."""
    cpus_per_gpu: int = 8
    """Cores that decode photographs for a GPU."""
    overlap: float = 0.8
    """Share of the computing beside which an exchange goes unnoticed, in [0, 1]."""
    least_efficiency: float = 0.7
    """Below which the sentence at the end does not recommend more GPUs."""

    # Of a run's settings those that may differ from what was measured.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *PretrainConfig.MAY_CHANGE, "batch_size", "micro_batch", "gpus", "strategies", "batch", "gpus_per_node",
        "gpu_memory_gb", "node_bandwidth", "network_bandwidth", "latency_us", "cpus_per_gpu", "overlap",
        "least_efficiency",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            ValueError: names the setting.
        """
        super().__post_init__()
        config.check_at_least_one(self, "gpus_per_node", "cpus_per_gpu")
        positive = ("gpu_memory_gb", "node_bandwidth", "network_bandwidth")
        config.check_range(self, *positive, fits=lambda x: x > 0, needed="a positive number")
        config.check_not_negative(self, "latency_us")
        shares = ("overlap", "least_efficiency")
        config.check_range(self, *shares, fits=lambda x: 0 <= x <= 1, needed="a share in [0, 1]")
        if not self.gpus or min(self.gpus) < 1 or not self.strategies:
            raise ValueError("--gpus and --strategies: name at least one, GPUs from 1 on")
        for out in self.out:
            if out.suffix not in FORMATS or not out.parent.is_dir():
                raise ValueError(f"--out {out}: a name ending in {', '.join(FORMATS)} in a folder that is there")

    def cluster(self) -> Cluster:
        """Where it might be done, in bytes and seconds."""
        return Cluster(
            gpus_per_node=self.gpus_per_node,
            gpu_bytes=self.gpu_memory_gb * 1e9,
            node_bandwidth=self.node_bandwidth * 1e9,
            network_bandwidth=self.network_bandwidth * 1e9,
            latency=self.latency_us * 1e-6,
            cpus_per_gpu=self.cpus_per_gpu,
            overlap=self.overlap,
        )


def main() -> None:
    """Entry point."""
    commandline.guarded(run, PROGRAM)


def run() -> None:
    """Reads the command line, measures or reads what was measured, predicts, prints, writes."""
    cfg, measured = read_settings()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("one process is all it takes: give the command without accelerate launch or torchrun")
    rehearsal = Rehearsal(cfg, most=FEW if measured else ROWS)  # the log has a run's pace
    if measured:
        saved = config.read_config(measured / "config.json", PretrainConfig)
        pace = pace_of_run(measured, saved, rehearsal.counts())
        source = f"by the pace of {measured}"
    else:
        pace = pace_here(rehearsal)
        source = f"by the pace of this {'GPU' if torch.cuda.is_available() else 'processor, no GPU'}"
    found = plan(cfg, rehearsal.work(pace))
    show(cfg, found, source)
    for out in cfg.out:
        write(found, out)


def pace_here(rehearsal: Rehearsal) -> Pace:
    """That of this machine.

    Raises:
        ValueError: its GPU has no room for it.
    """
    try:
        return rehearsal.pace()
    except torch.OutOfMemoryError:
        rows = len(rehearsal.batch["label"])
        raise ValueError(
            f"this GPU has no room for {rows} rows at a time: give --micro-batch {max(1, rows // 2)}, or the "
            "config.json of a run elsewhere"
        ) from None


def read_settings() -> tuple[ScaleConfig, Path | None]:
    """The settings, and the run that they are of, where it is one.

    Raises:
        ValueError: no such recipe, an unknown setting, or one that the run was not measured with.
    """
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else ""
    choices = {n: (" ".join(text.split()), _widened(cfg)) for n, (text, cfg) in recipes.PRETRAIN.items()}
    measured = None
    if name.endswith(".json"):
        config.check_command(Path(name), "xcon pretrain")
        measured = Path(name).parent
        choices = {name: (f"as saved in {name}", _widened(config.read_config(Path(name), PretrainConfig)))}
    elif name and not name.startswith("-") and name not in choices:
        raise ValueError(f"no recipe {name!r}: one of {', '.join(choices)}, or the config.json of a run")
    with commandline.one_line_errors(PROGRAM):
        cfg = tyro.extras.overridable_config_cli(choices, prog=PROGRAM, args=arguments)
    config.check_used(cfg, choices[name][1])
    if measured and (changes := cfg.differences(config.read_json(measured / "config.json"))):
        raise ValueError(
            f"{measured}: measured with other settings ({'; '.join(changes)}); give the recipe instead"
        )
    return cfg, measured


def _widened(cfg: PretrainConfig) -> ScaleConfig:
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    return ScaleConfig(**{**values, "out": ()})


def plan(cfg: ScaleConfig, work: scaling.Work) -> list[Prediction]:
    """Every strategy on every number of GPUs that divides the batch; on one GPU they are all the same."""
    found = []
    for gpus in cfg.gpus:
        batch = cfg.batch_size * (gpus if cfg.batch == "per-gpu" else 1)
        if batch % gpus:
            continue
        found += [
            scaling.predict(work, cfg.cluster(), strategy, gpus, batch, reference=cfg.batch_size)
            for strategy in (cfg.strategies if gpus > 1 else cfg.strategies[:1])
        ]
    if not found:
        raise ValueError(f"--gpus {' '.join(map(str, cfg.gpus))}: none divides --batch-size {cfg.batch_size}")
    return found


def facts(p: Prediction) -> dict[str, Any]:
    """A row of the table, and where its seconds and bytes come from."""
    return {
        "gpus": p.gpus,
        "nodes": p.nodes,
        "strategy": p.strategy if p.gpus > 1 else "single",
        "batch": p.batch,
        "step_ms": round(1000 * p.step, 3),
        "images_per_s": round(p.images_per_s, 1),
        "efficiency": round(p.efficiency, 3),
        "memory_gb": round(sum(p.memory.values()) / 1e9, 3),
        "workers": p.workers,
        "fits": p.fits,
        "bound": p.bound,
        **{f"{name}_ms": round(1000 * seconds, 3) for name, seconds in p.seconds.items()},
        **{f"{name}_gb": round(size / 1e9, 3) for name, size in p.memory.items()},
    }


def show(cfg: ScaleConfig, found: Sequence[Prediction], source: str) -> None:
    """Prints the table and what to take."""
    console = Console()
    whose = "of each GPU" if cfg.batch == "per-gpu" else "of all GPUs"
    table = Table(
        title=f"A batch of {cfg.batch_size} {whose}, {source}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in ("GPUs", "nodes", "strategy", "step ms", "images/s", "effic.", "GB", "workers", "bound by"):
        left = name in ("strategy", "bound by")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    last = None
    for p in found:
        row = facts(p)
        if last not in (None, p.gpus):
            table.add_section()
        last = p.gpus
        table.add_row(
            f"{p.gpus:,}", f"{p.nodes:,}", row["strategy"], f"{row['step_ms']:,.1f}", f"{p.images_per_s:,.0f}",
            f"{p.efficiency:.0%}", f"{row['memory_gb']:.1f}", f"{p.workers:,}", p.bound,
        )  # fmt: skip
    console.print(table)
    commandline.say(scaling.recommend(found, least_efficiency=cfg.least_efficiency))


def write(found: Sequence[Prediction], out: Path) -> None:
    """Writes the table, whole or not at all."""
    rows = [facts(p) for p in found]
    with atomic_write(out) as file:
        if out.suffix == ".json":
            file.write((json.dumps(rows, indent=1) + "\n").encode())
            return
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())


if __name__ == "__main__":
    main()
