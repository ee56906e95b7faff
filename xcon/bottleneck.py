"""What holds a training up, and what would help: said once in a while, not with every line.

Clusters cancel jobs whose GPUs idle, NYU Torch below 50 to 60 % of utilisation, and the usual reason is that
photographs do not arrive in time. While that is so, W workers are always at work, so that a photograph costs one
of them W / (images/s) seconds. Without the share w of the time that is spent waiting, images/s / (1 - w) are
needed, hence

    workers = W / (images/s) x images/s / (1 - w) = W / (1 - w)

Without workers the process decodes what it waits for: w / (images/s) seconds a photograph, w / (1 - w) workers.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Mapping

import psutil

WAIT = 0.1  # share of the time, from which on the loader is called the bottleneck
IDLE = 0.6  # utilisation of a GPU, below which clusters cancel jobs
BUSY = 0.5  # share of their time that workers compute, below which it is the disk that they wait for
STEPS, SECONDS = 20, 30.0  # what must have been seen, the first line apart, before anything is said
PAUSE = 900.0  # seconds until something is said again
HEADROOM = 1.1  # photographs are not all alike


def workers_needed(workers: int, wait: float) -> int:
    """Workers per process that would keep up with the training.

    Args:
        workers: that there are, all of them at work; 0: the process decodes itself.
        wait: share of the time that the process waits for data, in [0, 1).
    """
    return math.ceil(HEADROOM * (workers or wait) / (1 - wait))


def cores_per_process() -> int:
    """Cores for this process, where all processes of its node have as many."""
    # Linux alone says which of them this process may use.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else psutil.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def loader_advice(wait: float, workers: int, *, cores: int, busy: float) -> str:
    """What to do about a loader that does not keep up.

    Args:
        wait: share of the time that the process waits for data.
        workers: per process.
        cores: per process.
        busy: share of the time that the workers compute; the rest they wait for the disk, or for a core.
    """
    waiting = f"{wait:.0%} of the time is spent waiting for photographs"
    needed = workers_needed(workers, min(wait, 0.99))
    if needed <= cores:
        return f"{waiting}: --workers {needed} would keep up (now {workers})"
    if workers and busy < BUSY and workers <= cores:
        return (
            f"{waiting}, and the workers themselves wait for the disk, they compute {busy:.0%} of it: copy the "
            f"shards to a disk of the node, or take --workers {needed} (now {workers})"
        )
    helps = f"--workers {cores} helps (now {workers}), but " if workers < cores else ""
    return (
        f"{waiting}: {helps}the cores are the limit, {cores} for this process where {needed} workers would be "
        "needed; ask for more (--cpus-per-task), or build smaller photographs (xcon-shards build --size)"
    )


@dataclasses.dataclass
class _Window:
    """What was seen since a step."""

    step: int
    seconds: float
    computed: float
    last: int
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, step: int, shares: Mapping[str, float]) -> None:
        for name, share in shares.items():
            self.sums[name] = self.sums.get(name, 0.0) + share * (step - self.last)
        self.last = step

    def mean(self, name: str, otherwise: float) -> float:
        return self.sums[name] / (self.last - self.step) if name in self.sums else otherwise


class Watch:
    """Looks at the lines of a log as they come.

    Args:
        workers: of the loader, per process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.cores = cores_per_process()
        self.window: _Window | None = None  # none before the first line, which has the start of the workers in it
        self.quiet_until = 0.0

    def note(self, step: int, timing: Mapping[str, float]) -> str | None:
        """Takes in a line.

        Args:
            step: optimiser steps done.
            timing: `data_wait` and, of a GPU, `gpu_use`: shares of the time since the line before.

        Returns:
            What there is to say, once enough has been seen.
        """
        now = time.monotonic()
        said = None
        if self.window:
            self.window.add(step, timing)
            if step - self.window.step < STEPS or now - self.window.seconds < SECONDS:
                return None
            if now >= self.quiet_until and (said := self._advice(self.window, now)):
                self.quiet_until = now + PAUSE
        self.window = _Window(step, now, _computed_by_workers(), step)
        return said

    def _advice(self, window: _Window, now: float) -> str | None:
        wait, use = window.mean("data_wait", 0.0), window.mean("gpu_use", 1.0)
        said = []
        if wait >= WAIT:
            worked = (now - window.seconds) * max(1, self.workers)
            busy = (_computed_by_workers() - window.computed) / worked
            said.append(loader_advice(wait, self.workers, cores=self.cores, busy=busy))
        if use < IDLE:
            said.append(f"the GPU computes {use:.0%} of the time, and clusters cancel jobs below 50 to 60 %")
            if wait < WAIT:
                said.append("photographs arrive in time: take a larger --batch-size, or fewer GPUs")
        return "; ".join(said) or None


def _computed_by_workers() -> float:
    """Seconds that the child processes have computed."""
    seconds = 0.0
    for child in psutil.Process().children():
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue  # it has just ended, as those of a validation do
        seconds += times.user + times.system
    return seconds
