"""A comparison as people and programs read it: tables, markdown, JSON, parquet, a figure."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xcon import comparison, metrics, records

HEADINGS = ("row (%)", "images", "seeds", "top-1", "top-5", "mean per class", "ECE")
CONTROLS = {"without_meta": "no meta", "shuffled_meta": "shuffled meta", metrics.META_ONLY: "meta only"}
DIFFERENCE_HEADINGS = ("row", "against", "top-1, points", "95 % interval", "p")
FORMATS = (".md", ".json", ".parquet", ".png")


def row_cells(row: dict[str, Any], controls: Iterable[str]) -> tuple[str, ...]:
    """One line of the table of results, in per cent; controls are top-1."""
    found = [_percent(row[c]["top1"]) if c in row else "" for c in controls]
    seeds = ", ".join(map(str, row["seeds"]))
    measured = [_percent(row[name]) for name in comparison.MEASURES]
    return (row["label"], f"{row['n']:,}", seeds, *measured, *found)


def space_cells(row: dict[str, Any], spaces: Sequence[str]) -> tuple[str, ...]:
    """One line of the table of label spaces, top-1 in per cent."""
    measured = [row, *(row["label_spaces"][space] for space in spaces)]
    return (row["label"], *(_percent(values["top1"]) for values in measured))


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


def tables(report: dict[str, Any]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Headings and lines of each table; a single row of images alone has no differences."""
    rows, found = report["rows"], []
    controls = [c for c in CONTROLS if c in metrics.CONTROLS or any(c in row for row in rows)]
    headings = (*HEADINGS, *(CONTROLS[c] for c in controls))
    found.append((headings, [row_cells(row, controls) for row in rows]))
    if spaces := _coarser(rows):
        sizes = {"classes": rows[0]["n_labels"], **{s: rows[0]["label_spaces"][s]["n_labels"] for s in spaces}}
        headings = ("top-1 (%)", *(f"{size:,} {name}" for name, size in sizes.items()))
        found.append((headings, [space_cells(row, spaces) for row in rows]))
    if report["differences"]:
        found.append((DIFFERENCE_HEADINGS, [difference_cells(d) for d in report["differences"]]))
    return found


def _coarser(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The label spaces that every row has and that are coarser than the classes and than one another."""
    if not all("label_spaces" in row for row in rows):
        return []
    found, size = [], rows[0]["n_labels"]
    for space, measured in rows[0]["label_spaces"].items():
        if measured["n_labels"] < size:
            found.append(space)
            size = measured["n_labels"]
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


def runs_table(report: dict[str, Any]) -> pa.Table:
    """One row per run: label, run, seed, n and every measure, null where a run has it not."""
    rows = [values for row in report["rows"] for values in row["each"]]
    names = dict.fromkeys(name for values in rows for name in values)
    return pa.table({name: [values.get(name) for values in rows] for name in names})


def write(report: dict[str, Any], out: Path) -> None:
    """Writes a comparison by the ending of the file's name, whole or not at all.

    Args:
        report: as `comparison.compare` gives it.
        out: .md the tables, .json all of it, .parquet one row per run, .png the figure.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.BytesIO()
    if out.suffix == ".md":
        buffer.write(markdown(report).encode())
    elif out.suffix == ".parquet":
        pq.write_table(runs_table(report), buffer, compression="zstd")
    elif out.suffix == ".png":
        from xcon import chart  # noqa: PLC0415 - matplotlib alone takes a second to import

        chart.figure(report).savefig(buffer, format="png")
    else:
        buffer.write((json.dumps(report, indent=1) + "\n").encode())
    with records.atomic_write(out) as file:
        file.write(buffer.getvalue())
