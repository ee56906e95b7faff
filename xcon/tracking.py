"""What a run tells while it goes: progress for people, `metrics.jsonl` for programs, TensorBoard.

On a terminal a bar moves; in a batch log the same facts come as a line at every log step. What holds the run up is
said in a line of its own.
"""

import datetime
import json
import math
import statistics
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import pynvml
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from xcon import launch
from xcon.bottleneck import Watch
from xcon.records import atomic_write

LOG = "metrics.jsonl"
# How people read the facts of `timing`: a name, and the number with its unit.
_UNITS = {
    "images_per_s": ("{:,.0f} images/s", 1),
    "data_wait": ("data wait {:.0f} %", 100),
    "loss_share": ("loss {:.1f} %", 100),
    "gpu_use": ("GPU {:.0f} %", 100),
    "gpu_memory_gb": ("{:.1f} GB", 1),
}


class Gpu:
    """How busy the GPU of this process is, looked at once a second by a thread of its own.

    Raises:
        RuntimeError, pynvml.NVMLError: the driver does not say, as of a part of a GPU (MIG).
    """

    def __init__(self) -> None:
        self.seen = [torch.cuda.utilization()]
        self.ended = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self.ended.wait(1.0):
            self.seen.append(torch.cuda.utilization())

    def facts(self) -> dict[str, float]:
        """`gpu_use`, the mean share of the time since the last call in which a kernel ran."""
        seen, self.seen = self.seen, []
        return {"gpu_use": round(statistics.fmean(seen) / 100, 3)} if seen else {}


class Silent:
    """The tracker of the processes that do not report; a context, as the other."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self, event: str, step: int, facts: Mapping[str, Any], timing: Mapping[str, Any] | None = None
    ) -> None:
        """Does nothing."""

    def advance(self, step: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Tracker(Silent):
    """Writes the log of a run, for the main process.

    Args:
        run: the run folder.
        step: of the checkpoint resumed from; later lines of an interrupted run are dropped.
        total: steps of the whole training.
        workers: of its loader, per process; None where no loader is to be watched.
    """

    def __init__(self, run: Path, *, step: int, total: int, workers: int | None = None) -> None:
        self.log = run / LOG
        _keep_until(self.log, step)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.total = total
        self.task = self.progress.add_task(run.name, total=total, completed=step, facts="")
        self.begun, self.first = time.perf_counter(), step
        self.watch = None if workers is None else Watch(workers)
        self.gpu = self._open_gpu()
        self.progress.start()

    def write(
        self, event: str, step: int, facts: Mapping[str, Any], timing: Mapping[str, Any] | None = None
    ) -> None:
        """Adds a line to `metrics.jsonl` and shows it.

        Args:
            event: start, train, val, and end or stop.
            step: optimiser steps done.
            facts: the same in every run of the same command.
            timing: what is not; that of a train line is watched, and the GPU's is added.
        """
        if event == "train" and timing:
            timing = {**timing, **self._gpu_facts()}
        facts = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in facts.items()}
        line = {"event": event, "step": step, **facts, **({"timing": timing} if timing else {})}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for name, value in {**facts, **(timing or {})}.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{event}/{name}", value, step)
        self._show(event, step, facts, timing or {})
        if event == "train" and timing and self.watch and (said := self.watch.note(step, timing)):
            self._say(f"warning: {said}")

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self.progress.update(self.task, completed=step)

    def close(self) -> None:
        """Ends the bar and the TensorBoard file."""
        if self.gpu:
            self.gpu.ended.set()
        self.progress.stop()
        self.board.close()

    def _open_gpu(self) -> Gpu | None:
        if not launch.uses_cuda():
            return None
        try:
            return Gpu()
        except (RuntimeError, pynvml.NVMLError) as error:
            self._say(f"the log has no GPU utilisation: {error}")
            return None

    def _gpu_facts(self) -> dict[str, float]:
        """What the GPU of this process does; nothing without one."""
        if not launch.uses_cuda():
            return {}
        peak = {"gpu_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
        return {**(self.gpu.facts() if self.gpu else {}), **peak}

    def _show(self, event: str, step: int, facts: Mapping[str, Any], timing: Mapping[str, float]) -> None:
        speed = ", ".join(_with_unit(name, value) for name, value in timing.items())
        if event == "train" and self.console.is_terminal:
            loss = next((f"loss {facts[name]:.4g}, " for name in ("total", "loss") if name in facts), "")
            self.progress.update(self.task, facts=loss + speed)
            return
        text = " ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in facts.items())
        self._say(f"{event} {step}/{self.total}{self._left(step)} {text}{f' ({speed})' if speed else ''}")

    def _left(self, step: int) -> str:
        done = step - self.first
        left = (self.total - step) * (time.perf_counter() - self.begun) / done if done else 0.0
        return f" {datetime.timedelta(seconds=round(left))} left" if left else ""

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _with_unit(name: str, value: float) -> str:
    words, factor = _UNITS.get(name, (f"{name} {{:.4g}}", 1))
    return words.format(factor * value)


def _keep_until(log: Path, step: int) -> None:
    """Drops what a resumed run writes again: the steps after its checkpoint (all, without one), and its end."""
    if not log.exists():
        return
    if step == 0:
        log.unlink()
        return
    whole = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    facts = zip(whole, map(json.loads, whole), strict=True)
    kept = [line for line, fact in facts if fact["step"] <= step and fact["event"] not in ("end", "stop")]
    with atomic_write(log) as file:
        file.write("".join(kept).encode())
