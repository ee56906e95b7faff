"""Compares evaluated runs on the same test images: xcon report RUN... [--out FILE.md|FILE.json]."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xcon import commandline, comparison, metrics, records

PROGRAM = "xcon report"
HEADINGS = (
    "row (%)",
    "images",
    "seeds",
    "top-1",
    "top-5",
    "mean per class",
    "ECE",
    "no meta",
    "shuffled meta",
)
DIFFERENCE_HEADINGS = ("row", "against", "top-1, points", "95 % interval", "p")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compares evaluated runs on the same test images; the first one is the baseline."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Run folders that xcon predict has evaluated; those that differ only in their seed make one row."""
    out: Path | None = None
    """Also write the tables here: a .md or .json file."""
    resamples: int = 10_000
    """Resamples of the paired bootstrap."""

    def __post_init__(self) -> None:
        """Refuses settings that could only fail later.

        Raises:
            ValueError: names the setting.
        """
        if not self.runs:
            raise ValueError("RUN...: name at least one run folder")
        if self.resamples < 1:
            raise ValueError(f"--resamples {self.resamples}: at least 1 is needed")
        if self.out is not None and not self.out.parent.is_dir():
            raise ValueError(f"--out {self.out}: no such folder as {self.out.parent}")
        if self.out is not None and self.out.suffix not in {".md", ".json"}:
            raise ValueError(f"--out {self.out}: a name ending in .md or .json is needed")


def row_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table of results, in per cent; controls are top-1."""
    controls = [_percent(row[c]["top1"]) if row["with_meta"] else "" for c in metrics.CONTROLS]
    seeds = ", ".join(map(str, row["seeds"]))
    measured = [_percent(row[name]) for name in comparison.MEASURES]
    return (row["label"], f"{row['n']:,}", seeds, *measured, *controls)


def difference_cells(found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table of differences, in points."""
    points = f"{100 * found['difference']:+.2f}"
    interval = f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}"
    p = "< 0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"
    return (found["row"], found["against"], points, interval, p)


def _percent(value: dict[str, float | None]) -> str:
    mean, spread = value["mean"], value["spread"]
    assert mean is not None
    return f"{100 * mean:.2f}" + ("" if spread is None else f" +-{100 * spread:.2f}")


def tables(report: dict[str, Any]) -> list[tuple[Sequence[str], list[tuple[str, ...]]]]:
    """Headings and lines of each table; a single row of images alone has no differences."""
    found: list[tuple[Sequence[str], list[tuple[str, ...]]]]
    found = [(HEADINGS, [row_cells(row) for row in report["rows"]])]
    if report["differences"]:
        found.append((DIFFERENCE_HEADINGS, [difference_cells(d) for d in report["differences"]]))
    return found


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the report on a terminal."""
    for headings, lines in tables(report):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for n, heading in enumerate(headings):
            # A narrow terminal may break a column between words; only labels give way further.
            words = " ".join([heading, *(line[n] for line in lines)]).split()
            width = max(map(len, words)) if n else None
            side: Literal["left", "right"] = "left" if n == 0 or heading == "against" else "right"
            table.add_column(heading, justify=side, overflow="fold", min_width=width)
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
    for note in report["notes"]:
        console.print(note, markup=False, highlight=False)


def markdown(report: dict[str, Any]) -> str:
    """The report as markdown."""
    blocks = []
    for headings, lines in tables(report):
        rule = ["---" if n == 0 or h == "against" else "---:" for n, h in enumerate(headings)]
        cells = [headings, rule, *([cell.replace("|", "\\|") for cell in line] for line in lines)]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in cells))
    return "\n\n".join([*blocks, *report["notes"]]) + "\n"


def run() -> None:
    """Reads the command line, compares, prints, writes."""
    settings = commandline.parse(Settings, PROGRAM)
    report = comparison.compare(settings.runs, resamples=settings.resamples)
    show(report, Console())
    if settings.out is not None:
        text = markdown(report) if settings.out.suffix == ".md" else json.dumps(report, indent=1) + "\n"
        with records.atomic_write(settings.out) as file:
            file.write(text.encode())


def main() -> None:
    """Entry point."""
    commandline.guarded(run, PROGRAM)


if __name__ == "__main__":
    main()
