"""The signals by which a cluster ends a job: noted, to be acted on where a step is done.

SLURM sends them to every process of a job step at once, a launcher to its own: a process may get none or several.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

ENDING = (signal.SIGTERM, signal.SIGUSR1)


class Received:
    """The signals that this process has received, in their order; a context, within which none ends it."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self._note) for number in ENDING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.numbers.append(number)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Lets signals wait; processes that are begun inside never get them, unless they take them up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(_: int = 0) -> None:
    """In a DataLoader's worker begun while signals are `held`: ends it when its parent says so, by SIGTERM.

    A signal to all processes of a job would end the workers, and with them the step that their parent has to
    finish. Where the parent is killed, torch's workers notice that within seconds.
    """
    parent = os.getppid()

    def listen() -> None:
        while True:
            came = signal.sigwaitinfo(ENDING)
            if came.si_signo == signal.SIGTERM and came.si_pid == parent:
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
