"""What a run tells while it goes: progress for people, `metrics.jsonl` for programs, TensorBoard.

On a terminal a bar moves; in a batch log the same facts come as a line at every log step.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from xcon.records import atomic_write

LOG = "metrics.jsonl"


class Clock:
    """Time per step, and how much of it went into waiting for data."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside: validation, saving."""
        begun = time.perf_counter()
        yield
        self.start += time.perf_counter() - begun

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Passes batches through and counts the time until each arrives."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.steps += 1
            yield batch

    def lap(self, rows: int) -> dict[str, float]:
        """Images per second and the share of time spent waiting for data since the last lap.

        Args:
            rows: of one global batch.
        """
        seconds = time.perf_counter() - self.start
        facts = {
            "images_per_s": round(self.steps * rows / seconds, 1),
            "data_wait": round(self.waited / seconds, 3),
        }
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0
        return facts


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
    """

    def __init__(self, run: Path, *, step: int, total: int) -> None:
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
        self.progress.start()

    def write(
        self, event: str, step: int, facts: Mapping[str, Any], timing: Mapping[str, Any] | None = None
    ) -> None:
        """Adds a line to `metrics.jsonl` and shows it.

        Args:
            event: start, train, val, and end or stop.
            step: optimiser steps done.
            facts: the same in every run of the same command.
            timing: what is not.
        """
        facts = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in facts.items()}
        line = {"event": event, "step": step, **facts, **({"timing": timing} if timing else {})}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for name, value in {**facts, **(timing or {})}.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{event}/{name}", value, step)
        self._show(event, step, {**facts, **(timing or {})})

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self.progress.update(self.task, completed=step)

    def close(self) -> None:
        """Ends the bar and the TensorBoard file."""
        self.progress.stop()
        self.board.close()

    def _show(self, event: str, step: int, facts: Mapping[str, Any]) -> None:
        text = " ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in facts.items())
        if event == "train" and self.console.is_terminal:
            self.progress.update(self.task, facts=text)
            return
        done = step - self.first
        left = (self.total - step) * (time.perf_counter() - self.begun) / done if done else 0.0
        self.console.print(
            f"{event} {step}/{self.total}{f' {left:.0f} s left' if left else ''} {text}",
            highlight=False,
            soft_wrap=True,
        )


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
