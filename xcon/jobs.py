"""Steps of a larger job: commands that are run as programs, in their order, several at once where they may be.

A batch job's steps make way as a trainer does. Its script (slurm/launch.sh) notes in the file that the environment
variable `XCON_ASKED` names that a signal came, since one to all processes of a job may find none that handles it.
"""

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from xcon import commandline
from xcon.config import flag, read_json
from xcon.records import atomic_write


@dataclasses.dataclass(frozen=True)
class Step:
    """A command that leaves a file behind when it is done.

    Attributes:
        name: of the step, and of its log.
        command: words; the first is a program beside this Python.
        done: the file.
        after: names of the steps that must be done before.
        saves: whether a signal makes it save and end; what does not is ended when one came, and done anew.
    """

    name: str
    command: tuple[str, ...]
    done: Path
    after: tuple[str, ...] = ()
    saves: bool = False

    @property
    def is_done(self) -> bool:
        """Whether it was done, by this run or an earlier one."""
        return self.done.is_file()


def keep(file: Path, settings: Mapping[str, Any], *, may_change: Collection[str]) -> None:
    """Keeps the settings that a job was begun with, since what is done of it was done with them.

    Args:
        file: JSON beside the results; written where it is not there yet.
        settings: name -> value.
        may_change: names of those that another time may be others.

    Raises:
        ValueError: the job was begun with others.
    """
    fixed = {name: value for name, value in settings.items() if name not in may_change}
    if not file.is_file():
        with atomic_write(file) as out:
            out.write((json.dumps(fixed, indent=1) + "\n").encode())
    begun = read_json(file)
    if changes := [f"{flag(n)} was {begun.get(n)}, now {v}" for n, v in fixed.items() if begun.get(n) != v]:
        raise ValueError(f"{file.parent}: begun with other settings ({'; '.join(changes)}): choose another --out")


def run(steps: Sequence[Step], *, logs: Path, at_once: int, console: Console) -> None:
    """Runs the steps that are not done.

    Args:
        steps: each after those that it waits for.
        logs: a folder for what each prints.
        at_once: how many at the same time; with several, each computes on its share of the cores.
        console: gets a line when a step begins and when it ends.

    Raises:
        ValueError: one failed; those that were running have ended, no other was begun.
        SystemExit: a signal asked for the end (status 75); the file that XCON_STOPPED names says what is done.
    """
    runner = _Runner(logs, at_once, console, total=sum(not step.is_done for step in steps))
    names = {step.name for step in steps}
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        waiting, running = list(steps), dict[concurrent.futures.Future[bool], Step]()
        ended: set[str] = set()
        stopped = False
        while running or (waiting and not stopped):
            ready = [s for s in waiting if ended.issuperset(names.intersection(s.after))]
            for step in ready[: at_once - len(running)] if not stopped else ():
                waiting.remove(step)
                running[pool.submit(runner.run, step)] = step
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                ended.add(running.pop(future).name)
                stopped |= not future.result()
    if stopped:
        _stop(steps, logs.parent)


def _asked() -> bool:
    """Whether a signal that asks for the end has come to the job."""
    noted = os.environ.get("XCON_ASKED")
    return Path(noted).exists() if noted else False


def _stopped_at() -> str:
    """What a step, as it stopped, has told the job's script; empty where none did."""
    told = os.environ.get("XCON_STOPPED")
    return Path(told).read_text(encoding="utf-8").strip() if told and Path(told).exists() else ""


def _stop(steps: Sequence[Step], folder: Path) -> NoReturn:
    at = _stopped_at()
    done = f"{sum(step.is_done for step in steps)} of {len(steps)} done{at and f', {at} of the next'}"
    if told := os.environ.get("XCON_STOPPED"):
        with atomic_write(Path(told)) as file:
            file.write(f"{done}\n".encode())
    commandline.complain(str(folder), f"stopped by a signal, {done}; give the same command again")
    raise SystemExit(os.EX_TEMPFAIL)


class _Runner:
    """Runs a step and tells of it."""

    def __init__(self, logs: Path, at_once: int, console: Console, *, total: int) -> None:
        self.logs, self.console, self.total = logs, console, total
        self.begun = self.ended = 0
        self.start = time.monotonic()
        self.lock = threading.Lock()
        threads = max(1, len(os.sched_getaffinity(0)) // at_once)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if at_once > 1 else dict(os.environ)

    def run(self, step: Step) -> bool:
        """Returns whether the step is done; if not, a signal came."""
        if step.is_done:
            return True
        if _asked():
            return False
        with self.lock:
            self.begun += 1
            self.console.print(f"[dim]{self.begun}/{self.total}[/dim] {step.name}")
        log, begun = self.logs / f"{step.name}.log", time.monotonic()
        status = self._status(step, log)
        if status == os.EX_TEMPFAIL or (status and (_stopped_at() or (_asked() and not step.saves))):
            return False  # a launcher has a status of its own
        if status or not step.is_done:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise ValueError(
                f"{step.name} failed with exit status {status}: {' '.join(last)} (all of it in {log}); "
                "what is done stays, the same command goes on"
            )
        with self.lock:
            self.ended += 1
            left = (time.monotonic() - self.start) / self.ended * (self.total - self.ended)
            self.console.print(
                f"[dim]{self.ended}/{self.total} done, {left / 60:.0f} min left[/dim] {step.name} in "
                f"{time.monotonic() - begun:.0f} s"
            )
        return True

    def _status(self, step: Step, log: Path) -> int:
        """Runs the step's command; returns its exit status."""
        program = Path(sys.executable).with_name(step.command[0])
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [program, *step.command[1:]], env=self.environment, stdout=file, stderr=file
            )
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if _asked() and not step.saves:
                    process.kill()
