"""Grids of places and maps of them: land, ocean, coast, graticule.

H, W: rows (north to south) and columns (west to east) of a grid of places. Degrees everywhere.
"""

import dataclasses
import functools
import importlib
import math
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from xcon import records

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Region = tuple[float, float, float, float]  # west, south, east, north

COLOURS = "magma_r"  # perceptually uniform, light where nothing is
OCEAN, INK, RECORDS = "#dbe7f0", "#33404d", "#009e73"  # the last: Okabe-Ito bluish green
COAST_COLUMNS = 2000  # of the mask that the coast is drawn from, however coarse the grid


@dataclasses.dataclass(frozen=True)
class Places:
    """Points to mark, [N] each, in degrees."""

    lon: Floats
    lat: Floats


def check_region(region: Region, step: float) -> None:
    """Raises ValueError unless west < east and south < north in degrees, and the step fits inside."""
    west, south, east, north = region
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(
            f"--region {west:g} {south:g} {east:g} {north:g}: WEST SOUTH EAST NORTH in degrees, west < east "
            "within [-180, 180], south < north within [-90, 90]"
        )
    if not 0.01 <= step <= min(east - west, north - south):
        raise ValueError(f"--step {step:g}: degrees, at least 0.01 and no more than the region's sides")


def grid(region: Region, step: float) -> tuple[Floats, Floats]:
    """Centres of the cells that tile a region.

    Args:
        region: west, south, east, north in degrees.
        step: side of a cell in degrees; changed slightly where the region's sides are no multiple of it.

    Returns:
        lon [W], west to east, and lat [H], north to south, in degrees.

    Raises:
        ValueError: as `check_region`.
    """
    check_region(region, step)
    west, south, east, north = region
    return _centres(west, east, round((east - west) / step)), _centres(north, south, round((north - south) / step))


def _centres(start: float, stop: float, cells: int) -> Floats:
    return start + (stop - start) * (np.arange(cells) + 0.5) / cells


def land_mask(lon: Floats, lat: Floats) -> Bools:
    """Where there is land; lakes are land (GLOBE elevation, 30 arc seconds, shipped with global-land-mask).

    Args:
        lon: [W], degrees in [-180, 180].
        lat: [H], degrees in [-90, 90].

    Returns:
        [H, W].
    """
    return np.asarray(_globe().is_land(*np.meshgrid(lat, lon, indexing="ij")))


@functools.cache
def _globe() -> ModuleType:
    # Importing it unpacks 0.9 GB in about 4 s: not for --help, nor for a wrong command line.
    return importlib.import_module("global_land_mask.globe")


def species_figure(
    probability: Floats, lon: Floats, lat: Floats, *, title: str, points: Places | None = None
) -> Figure:
    """The figure that `draw_species` writes; arguments as there.

    Returns:
        A figure with a canvas of its own, unknown to pyplot, with one map among its axes, the first.
    """
    west, east, south, north = _edges(lon, lat)
    stretch = latitude_stretch(south, north)
    shape = stretch * (north - south) / (east - west)
    width = min(8.6, 7.0 / shape)
    figure = Figure(figsize=(max(width, 4.5) + 1.6, width * shape + 1.15), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(
        probability,
        extent=(west, east, south, north),
        cmap=COLOURS,
        vmin=0.0,
        vmax=float(probability.max(initial=0.0, where=land_mask(lon, lat))) or 1.0,
        interpolation="bilinear",
        aspect=stretch,
    )
    draw_ocean(axes, (west, south, east, north))
    if points is not None:
        axes.plot(points.lon, points.lat, "o", ms=4, mfc=RECORDS, mec="white", mew=0.6, zorder=5)
    axes.set(xlim=(west, east), ylim=(south, north))
    draw_graticule(axes)
    headline, *rest = title.split("\n")
    columns = int(width * 13.5)  # of small letters above the map
    small = [part for line in rest for part in textwrap.wrap(line, columns)]
    axes.set_title("\n".join(small), loc="left", fontsize=9.5, color=INK)
    axes.annotate(
        headline,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 10 + 13.5 * len(small)),
        textcoords="offset points",
        fontsize=15,
        fontweight="bold",
        color=INK,
    )
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, aspect=24, pad=0.02)
    bar.set_label("probability", color=INK)
    bar.ax.tick_params(colors=INK, labelsize=8.5, width=0.5)
    bar.outline.set_visible(False)
    return figure


def _edges(lon: Floats, lat: Floats) -> tuple[float, float, float, float]:
    """West, east, south, north of the cells around these centres; a lone centre has 1 degree."""
    half_lon = (lon[-1] - lon[0]) / (len(lon) - 1) / 2 if len(lon) > 1 else 0.5
    half_lat = (lat[0] - lat[-1]) / (len(lat) - 1) / 2 if len(lat) > 1 else 0.5
    return (
        float(lon[0] - half_lon),
        float(lon[-1] + half_lon),
        float(lat[-1] - half_lat),
        float(lat[0] + half_lat),
    )


def latitude_stretch(south: float, north: float) -> float:
    """How much longer a degree of latitude is than one of longitude midway; bounded, for regions at a pole."""
    return 1 / max(0.2, math.cos(math.radians((south + north) / 2)))


def draw_ocean(axes: Axes, region: Region, columns: int = COAST_COLUMNS) -> None:
    """Covers the ocean and draws the coast, finer than a grid of probabilities may be.

    Args:
        axes: of a map, their aspect set.
        region: west, south, east, north in degrees.
        columns: of the mask from which the coast is drawn.
    """
    west, south, east, north = region
    step = max((east - west) / columns, 1 / 120)  # 1 / 120 degree: the mask's own
    lon = _centres(west, east, max(2, round((east - west) / step)))
    lat = _centres(north, south, max(2, round((north - south) / step)))
    land = land_mask(lon, lat)
    axes.imshow(
        np.ma.masked_array(np.zeros(land.shape), mask=land),
        extent=(west, east, south, north),
        cmap=ListedColormap([OCEAN]),
        interpolation="nearest",
        aspect=axes.get_aspect(),
    )
    if land.any() and not land.all():
        axes.contour(lon, lat, land, levels=[0.5], colors=INK, linewidths=0.45)


def draw_graticule(axes: Axes, lines: int = 7) -> None:
    """Draws parallels and meridians, at most about `lines` of each, and names them at the edges."""
    for axis, signs in ((axes.xaxis, "EW"), (axes.yaxis, "NS")):
        axis.set_major_locator(MaxNLocator(nbins=lines, steps=[1, 1.5, 3, 6, 10]))
        axis.set_major_formatter(FuncFormatter(functools.partial(_degrees, signs=signs)))
    axes.grid(color=INK, alpha=0.25, linewidth=0.4)
    axes.tick_params(colors=INK, labelsize=8.5, length=0, pad=5)
    for spine in axes.spines.values():
        spine.set(color=INK, linewidth=0.5)


def _degrees(value: float, _: int, *, signs: str) -> str:
    """-60 with "EW" is 60 degrees W."""
    side = "" if value == 0 else f" {signs[int(value < 0)]}"
    return f"{abs(value):g}\N{DEGREE SIGN}{side}"


def draw_species(
    probability: Floats, lon: Floats, lat: Floats, *, title: str, out: Path, points: Places | None = None
) -> None:
    """Writes a map of a probability over the land of a region; the ocean is masked.

    Equirectangular, true to shape along its middle latitude; colours from 0 to the largest probability.

    Args:
        probability: [H, W], in [0, 1].
        lon: [W], evenly spaced degrees, as `grid` gives them.
        lat: [H], evenly spaced degrees, north to south.
        title: its first line is set large, what follows small.
        out: the PNG file, written whole or not at all.
        points: places to mark, such as known records.

    Raises:
        OSError: `out` cannot be written.
    """
    figure = species_figure(probability, lon, lat, title=title, points=points)
    with records.atomic_write(out) as file:
        figure.savefig(file, format="png")
