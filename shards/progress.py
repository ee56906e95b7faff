"""How far a build is: a bar on a terminal, a plain line now and then in a batch log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(
    console: Console, title: str, total: float, unit: str, every: float = _SECONDS_BETWEEN_LINES
) -> Iterator[Callable[[float], None]]:
    """Shows the way to `total`.

    Args:
        console: where to.
        title: what is being done.
        total: units in all.
        unit: what is counted, in the plural.
        every: seconds between two lines where the console is no terminal.

    Yields:
        A function that is told how many units more are done.
    """
    if console.is_terminal:
        with _bar(console, unit) as bar:
            task = bar.add_task(title, total=total)
            yield lambda step: bar.advance(task, step)
        return
    log = _Lines(console, title, total, unit, every)
    yield log.advance
    log.show()


def _bar(console: Console, unit: str) -> Progress:
    count = TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit)
    columns = (TextColumn("{task.description}"), BarColumn(), count, _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f}/s")


class _Lines:
    def __init__(self, console: Console, title: str, total: float, unit: str, every: float) -> None:
        self.console, self.title, self.total, self.unit, self.every = console, title, total, unit, every
        self.done = 0.0
        self.start = self.shown = time.monotonic()

    def advance(self, step: float) -> None:
        self.done += step
        if time.monotonic() - self.shown >= self.every:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        rate = self.done / max(self.shown - self.start, 1e-9)
        left = max(self.total - self.done, 0) / max(rate, 1e-9)
        self.console.print(
            f"{self.title}: {self.done:,.0f} of {self.total:,.0f} {self.unit} "
            f"({self.done / max(self.total, 1e-9):.0%}), {rate:,.0f}/s, {left:,.0f} s left",
        )
