"""The planner against real processes: one is measured, two and four are predicted, then measured.

    python -m benchmarks.scale --shards DIR [--batch-size 64] [--rounds 3]

Gloo processes of this machine pre-train recipe demo's model on real batches, each with one thread; an all-reduce
among as many gives bandwidth and latency. Where there are more processes than cores, computing takes as many times
longer: they share them. Nothing hides the exchange, since gloo's threads want the same cores. Every round starts
all processes anew, in turns, for other work on the machine comes and goes; medians and ratios are printed. Memory
is that of live tensors (`live_bytes.py`), without DeepSpeed's bucket of 200 MB, which is taken whatever the model.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251 - starts the processes, gather.py uses them
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.live_bytes import LiveBytes
from xcon import recipes, scaling
from xcon.config import PretrainConfig
from xcon.rehearsal import Pace, Rehearsal
from xcon.scaling import Cluster, Work

LARGE, SMALL, TIMES = 10_000_000, 256, 7  # numbers of the all-reduces, and how often each is done


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    shards: Path
    """Shard set whose records are trained on."""
    batch_size: int = 64
    """Rows of the global batch, however many processes."""
    image_size: int = 64
    """Pixels."""
    processes: tuple[int, ...] = (2, 4)
    """Numbers of processes to predict."""
    strategies: tuple[scaling.Strategy, ...] = ("ddp", "zero2", "zero3")
    """Strategies to predict."""
    rounds: int = 3
    """Times that each is started."""

    def config(self) -> PretrainConfig:
        """Recipe demo at this size."""
        _, recipe = recipes.PRETRAIN["demo"]
        return dataclasses.replace(
            recipe, shards=self.shards, out=Path(), batch_size=self.batch_size, image_size=self.image_size,
            precision="fp32", workers=0,
        )  # fmt: skip


def main() -> None:
    """Measures in turns, predicts, prints."""
    settings = tyro.cli(Settings)
    cases = [(1, "ddp"), *((n, s) for n in settings.processes for s in settings.strategies)]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(settings.rounds):
            for processes, strategy in cases:
                found[processes, strategy].append(measured(settings, processes, strategy, Path(name) / f"{turn}"))
    show(settings, {case: medians(facts) for case, facts in found.items()})


# --------------------------------------------------------------------------------------------------------
# Measuring


def measured(settings: Settings, processes: int, strategy: str, stem: Path) -> dict[str, Any]:
    """What the first of some processes finds."""
    folder = Path(f"{stem}-{processes}-{strategy}")
    folder.mkdir()
    torch.multiprocessing.start_processes(
        work, (processes, strategy, settings, folder), nprocs=processes, start_method="fork"
    )
    return json.loads((folder / "found.json").read_text())


def work(rank: int, processes: int, strategy: str, settings: Settings, folder: Path) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    if strategy.startswith("zero"):
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": strategy[-1]}
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"  # else transformers cuts the text model in pieces
    if processes > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        os.environ |= {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    with LiveBytes() as live:
        rehearsal = Rehearsal(settings.config(), most=settings.batch_size)
        for _ in range(2):  # the second has the moments from its start on
            live.peak = live.now
            rehearsal.step(rehearsal.batch)
    found = {"bytes": live.peak, "seconds": rehearsal.seconds(rehearsal.batch)}
    if processes == 1:
        pace = rehearsal.pace()
        found |= {"pace": dataclasses.asdict(pace), "work": dataclasses.asdict(rehearsal.work(pace))}
    else:
        found |= {"large": all_reduce_seconds(LARGE), "small": all_reduce_seconds(SMALL)}
        dist.barrier()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    os._exit(0)  # as launch.finish: gloo's threads outlive their process group


def all_reduce_seconds(numbers: int) -> float:
    """Of an all-reduce of float32, the median."""
    tensor, seconds = torch.zeros(numbers), []
    for _ in range(TIMES):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def medians(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number that rounds found, in dictionaries of any depth."""
    return {
        name: medians([f[name] for f in facts])
        if isinstance(value, Mapping)
        else statistics.median(f[name] for f in facts)
        for name, value in facts[0].items()
    }


# --------------------------------------------------------------------------------------------------------
# Predicting


def predicted(
    alone: Mapping[str, Any], there: Mapping[str, Any], processes: int, strategy: str, batch: int
) -> Any:
    """The planner's word on some processes, from what one of them and an all-reduce took."""
    cores = len(os.sched_getaffinity(0))
    whole = {f.name for f in dataclasses.fields(Work) if f.type is int}
    counts = {name: int(value) if name in whole else value for name, value in alone["work"].items()}
    pace = Pace(**alone["pace"])
    shared = max(1.0, processes / cores)
    job = dataclasses.replace(
        Work(**counts),
        row_seconds=pace.row_seconds * shared,
        step_seconds=pace.step_seconds * shared,
        photo_seconds=0.0,  # the batch lies ready
        norms=0,  # torch has no synchronised BatchNorm on processors
    )
    bandwidth = 2 * (processes - 1) / processes * 4 * LARGE / (there["large"] - there["small"])
    hops = 2 * max(1, (processes - 1).bit_length())
    cluster = Cluster(
        gpus_per_node=processes, gpu_bytes=1e12, node_bandwidth=bandwidth, network_bandwidth=bandwidth,
        latency=there["small"] / hops, cpus_per_gpu=1, overlap=0.0,
    )  # fmt: skip
    return scaling.predict(job, cluster, strategy, processes, batch, reference=batch), bandwidth  # type: ignore[arg-type]


def show(settings: Settings, found: Mapping[tuple[int, str], Mapping[str, Any]]) -> None:
    """A line for each number of processes and strategy."""
    alone = found[1, "ddp"]
    title = f"batch {settings.batch_size}, {settings.image_size} px; one process: 1 in time"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("processes", "strategy", "GB/s", "time", "predicted", "ratio", "MB", "predicted", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for (processes, strategy), there in found.items():
        bucket = 4 * scaling.ZERO_BUCKET if strategy.startswith("zero") else 0
        if processes == 1:
            job = Work(**alone["work"])
            size = sum(scaling.step_bytes(job, "ddp", 1, settings.batch_size).values()) - scaling.CONTEXT
            step, bandwidth = alone["seconds"], float("nan")
        else:
            plan, bandwidth = predicted(alone, there, processes, strategy, settings.batch_size)
            step, size = plan.step, sum(plan.memory.values()) - scaling.CONTEXT - bucket
        seen = there["bytes"] - bucket
        table.add_row(
            f"{processes}", strategy, f"{bandwidth / 1e9:.2f}",
            f"{there['seconds'] / alone['seconds']:.2f}", f"{step / alone['seconds']:.2f}",
            f"{step / there['seconds']:.2f}", f"{seen / 1e6:.0f}", f"{size / 1e6:.0f}", f"{size / seen:.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    importlib.import_module("deepspeed")  # once, before processes are forked
    torch.compile(nn.Identity())
    multiprocessing.set_start_method("fork")
    main()
