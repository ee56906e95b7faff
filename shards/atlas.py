"""Where and when the photographs of a shard set were taken, class by class, as one picture."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shards.info import read_columns
from xcon.cartography import INK, Region, draw_graticule, draw_ocean, latitude_stretch
from xcon.records import Card, atomic_write, classes_called

# Okabe-Ito without its yellow, which is lost on white: as many species as can be told apart on one map.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
COMMONEST = 12
_OTHERS, _LAND = "#c3cad1", "#fbfaf7"
_WORLD: Region = (-180.0, -90.0, 180.0, 90.0)
_MONTH_STARTS = np.cumsum([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30])  # days of a year without a leap day


@dataclasses.dataclass(frozen=True)
class Kind:
    """One species, or class, as it is drawn.

    Attributes:
        name: for people.
        records: in all splits.
        lon, lat: `[P]` degrees, of the records that have a place.
        months: `[12]` records that have a date, by month.
    """

    name: str
    records: int
    lon: np.ndarray
    lat: np.ndarray
    months: np.ndarray


def draw(card: Card, folder: Path, species: Sequence[str], out: Path) -> None:
    """Writes the picture: the species asked for on one map or, without any, the commonest classes on one each.

    Args:
        card: of the set.
        folder: of the set.
        species: class names, or names without plumage, which add up all plumages; at most `COLOURS` has.
        out: a PNG file, written whole or not at all.

    Raises:
        ValueError: no class is called so, there are too many, no record has a place, or an index is damaged.
        OSError: `out` cannot be written.
    """
    if len(species) > len(COLOURS):
        raise ValueError(f"--species: {len(species)} of them, {len(COLOURS)} colours can be told apart on one map")
    known = read_columns(card, folder, ["class_id", "lon", "lat", "date"])
    kinds = _chosen(card, known, species) if species else _commonest(card, known)
    everywhere = _kind("", known, range(len(card.classes)))
    if not len(everywhere.lon):
        raise ValueError(f"{folder}: no record has a place, so there is nothing to draw")
    figure = one_map(kinds, everywhere) if species else small_maps(kinds, everywhere)
    with atomic_write(out) as file:
        figure.savefig(file, format="png")


def _chosen(card: Card, known: pa.Table, species: Sequence[str]) -> list[Kind]:
    names = [info.name for info in card.classes]
    return [_kind(name, known, classes_called(names, name)) for name in species]


def _commonest(card: Card, known: pa.Table) -> list[Kind]:
    """The classes with most records, ties in the order of their ids."""
    ordered = sorted(card.classes, key=lambda info: -sum(info.counts.values()))
    return [_kind(info.name, known, [info.class_id]) for info in ordered[:COMMONEST]]


def _kind(name: str, known: pa.Table, class_ids: Sequence[int]) -> Kind:
    chosen = np.isin(known["class_id"].to_numpy(), class_ids)
    lon, lat, date = (known[column].to_numpy()[chosen] for column in ("lon", "lat", "date"))
    placed = ~np.isnan(lon)
    return Kind(
        name=" ".join(name.split()),
        records=int(chosen.sum()),
        lon=lon[placed],
        lat=lat[placed],
        months=np.bincount(month(date[~np.isnan(date)]), minlength=12),
    )


def month(fraction: np.ndarray) -> np.ndarray:
    """Fractions of the year, `[N]` in [0, 1], to months 0 .. 11, as of a year without a leap day."""
    return np.searchsorted(_MONTH_STARTS, np.round(fraction * 364), side="right") - 1


def region_of(lon: np.ndarray, lat: np.ndarray) -> Region:
    """A region around places with some room, at least 8 degrees each way; the world where they span half of it."""
    west, east, south, north = lon.min(), lon.max(), lat.min(), lat.max()
    if east - west > 180:
        return _WORLD
    margin = max(4.0, 0.05 * (east - west), 0.05 * (north - south))
    return (
        max(-180.0, math.floor(west - margin)),
        max(-90.0, math.floor(south - margin)),
        min(180.0, math.ceil(east + margin)),
        min(90.0, math.ceil(north + margin)),
    )


def small_maps(kinds: Sequence[Kind], everywhere: Kind) -> Figure:
    """A map and the months of each class, among the places of all records."""
    region = region_of(everywhere.lon, everywhere.lat)
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    width = 3.3
    figure = _figure(columns * width, rows * (width * _shape(region) + 1.2))
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[width * _shape(region), 0.55] * rows)
    for number, kind in enumerate(kinds):
        row, column = divmod(number, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        _draw_map(axes, region, everywhere, [kind], COLOURS[:1], size=2.2, coast=500)
        _draw_title(axes, kind)
        _draw_months(figure.add_subplot(grid[2 * row + 1, column]), kind, COLOURS[0])
    return figure


def one_map(kinds: Sequence[Kind], everywhere: Kind) -> Figure:
    """All species on one map, each in its colour, their months beside it."""
    region = region_of(everywhere.lon, everywhere.lat)
    width = min(8.0, 6.0 / _shape(region))
    figure = _figure(width + 2.8, max(width * _shape(region) + 0.4, 1.15 * len(kinds)))
    grid = figure.add_gridspec(len(kinds), 2, width_ratios=[width, 2.6])
    axes = figure.add_subplot(grid[:, 0])
    _draw_map(axes, region, everywhere, kinds, COLOURS, size=3.2, coast=2000)
    for row, (kind, colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        months = figure.add_subplot(grid[row, 1])
        _draw_months(months, kind, colour)
        _draw_title(months, kind)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _shape(region: Region) -> float:
    """Height of a map in widths."""
    west, south, east, north = region
    return latitude_stretch(south, north) * (north - south) / (east - west)


def _draw_map(
    axes: Axes,
    region: Region,
    everywhere: Kind,
    kinds: Sequence[Kind],
    colours: Sequence[str],
    *,
    size: float,
    coast: int,
) -> None:
    west, south, east, north = region
    axes.set_facecolor(_LAND)
    axes.set_aspect(latitude_stretch(south, north))
    draw_ocean(axes, region, coast)
    axes.plot(everywhere.lon, everywhere.lat, "o", ms=size, mfc=_OTHERS, mew=0, zorder=3)
    for kind, colour in zip(kinds, colours, strict=False):
        lon, lat, number = spots(kind.lon, kind.lat, cell=(east - west) / 200)
        areas = (1.5 * size) ** 2 * np.sqrt(number)  # square points, as matplotlib has them
        axes.scatter(lon, lat, areas, color=colour, edgecolors="white", linewidths=0.4, alpha=0.85, zorder=4)
    axes.set(xlim=(west, east), ylim=(south, north))
    draw_graticule(axes, 4)


def spots(lon: np.ndarray, lat: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places that one dot would cover, put together.

    Args:
        lon: `[P]` degrees.
        lat: `[P]` degrees.
        cell: degrees within which places are one.

    Returns:
        lon and lat of the middles of the cells that have any, and how many they have, `[K]` each.
    """
    cells, number = np.unique(np.floor(np.stack([lon, lat]) / cell), axis=1, return_counts=True)
    middle = (cells + 0.5) * cell  # [2, K]
    return middle[0], middle[1], number


def _draw_title(axes: Axes, kind: Kind) -> None:
    without = kind.records - len(kind.lon)
    count = f"{kind.records:,}" + (f", {without:,} without a place" if without else "")
    axes.set_title(count, loc="left", fontsize=7.5, color=INK, pad=4)
    axes.annotate(
        kind.name, (0, 1), (0, 15), "axes fraction", "offset points", fontsize=9, fontweight="bold", color=INK
    )  # above the count


def _draw_months(axes: Axes, kind: Kind, colour: str) -> None:
    axes.bar(range(12), kind.months, width=0.8, color=colour)
    axes.set_xticks(range(12), list("JFMAMJJASOND"))
    axes.set(xlim=(-0.6, 11.6), ylim=(0, max(1, 1.1 * kind.months.max())))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
    axes.tick_params(colors=INK, labelsize=7, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=INK, linewidth=0.5)
