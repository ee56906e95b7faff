"""A comparison as a figure: top-1 of every row, its seeds, and what its metadata is worth."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, PALE = "#33404d", "#d5dbe1"
# Okabe-Ito, told apart by their markers too. Metadata alone lies far below and is left to the table.
SERIES = {
    "": ("as it is", "#0072b2", "o"),
    "without_meta_": ("without metadata", "#e69f00", "s"),
    "shuffled_meta_": ("with another record's metadata", "#cc79a7", "D"),
}
STEP = 0.24  # between two series of a row, whose own height is 1


def figure(report: dict[str, Any]) -> Figure:
    """The figure of a comparison.

    Args:
        report: as `comparison.compare` gives it.

    Returns:
        A figure with a canvas of its own, unknown to pyplot, with one pair of axes: top-1 in per cent, a line for
        each row, from top to bottom.
    """
    rows = report["rows"]
    drawn = Figure(figsize=(8.6, 1.5 + 0.66 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    for number, row in enumerate(rows):
        series = [part for part in SERIES if f"{part}top1" in row["each"][0]]
        for place, part in enumerate(series):
            height = number + STEP * (place - (len(series) - 1) / 2)
            _draw_series(axes, part, [100 * values[f"{part}top1"] for values in row["each"]], height)
    _draw_frame(axes, rows)
    title = f"Top-1 on the same {report['n']:,} {report['split']} images"
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=10)
    _draw_legend(drawn, axes)
    return drawn


def _draw_series(axes: Axes, part: str, values: Sequence[float], height: float) -> None:
    """Each seed a small point, their mean a large one with its value, one deviation a line."""
    label, colour, marker = SERIES[part]
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    if len(values) > 1:
        axes.plot([mean - spread, mean + spread], [height, height], color=colour, lw=1.8, solid_capstyle="round")
        below = [height + 0.11] * len(values)  # beside the mean, which would hide them
        axes.plot(values, below, marker, ms=3.2, mfc=colour, mew=0, alpha=0.6)
    axes.plot([mean], [height], marker, ms=7.5, mfc=colour, mec="white", mew=0.8, zorder=3, label=label)
    axes.annotate(
        f"{mean:.1f}",
        (max(mean + spread, *values), height),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
        fontweight="normal" if part else "bold",
    )


def _draw_frame(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Names of the rows, a light grid, room for the figures at the right."""
    names = ["\n".join(textwrap.wrap(row["label"], 34)) for row in rows]
    axes.set_yticks(range(len(rows)), names, color=INK, fontsize=9.5)
    axes.set_ylim(len(rows) - 0.45, -0.55)  # the first row on top
    for between in range(1, len(rows)):
        axes.axhline(between - 0.5, color=PALE, lw=0.6)
    seeds = "; small points: seeds, lines: one standard deviation" if any(len(r["each"]) > 1 for r in rows) else ""
    axes.set_xlabel(f"top-1 (%){seeds}", color=INK, fontsize=9)
    axes.tick_params(axis="x", colors=INK, labelsize=8.5, length=0)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.grid(axis="x", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=PALE)


def _draw_legend(drawn: Figure, axes: Axes) -> None:
    """Each series once, below the axes; nothing to explain where there is only one."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if len(once) > 1:
        order = [label for label, _, _ in SERIES.values() if label in once]
        drawn.legend(
            [once[label] for label in order],
            order,
            loc="outside lower center",
            ncols=len(order),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
