"""What a shard set holds: a table of its splits, and one of its classes."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from xcon.records import SPLITS, Card, ClassInfo, Shard


def read_columns(card: Card, folder: Path, names: list[str]) -> pa.Table:
    """Some columns of all indices, and the split of each record as `split`.

    Raises:
        ValueError, OSError: an index is missing or damaged.
    """
    tables = [
        (split, _read_index(folder / shard.index_file, names))
        for split in card.splits
        for shard in card.splits[split]
    ]
    return pa.concat_tables(
        table.append_column("split", pa.repeat(pa.scalar(split), len(table))) for split, table in tables
    )


def _read_index(path: Path, names: list[str]) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is missing; xcon-shards verify --repair makes it anew from its tar")
    try:
        return pq.read_table(path, columns=names)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not an index ({reason}); xcon-shards verify says what else is broken") from None


def show(card: Card, folder: Path, console: Console) -> None:
    """Prints what a shard set holds.

    Raises:
        ValueError: an index is missing or damaged.
    """
    known = read_columns(card, folder, ["lon", "date", "caption"])
    complete = _is_known(known, "lon") & _is_known(known, "date")  # [N]
    split_of = known["split"].to_numpy()
    table = Table(title=str(folder), title_justify="left")
    table.add_column("split")
    for name in ("shards", "samples", "MB", "classes", "per class min / median / max", "with place and date"):
        table.add_column(name, justify="right")
    for split, shards in card.splits.items():
        share = complete[split_of == split].mean() if card.samples(split) else 0.0
        table.add_row(split, *_split_row(card, split, shards), f"{share:.1%}")
    console.print(table)
    named = sum(info.scientific_name is not None for info in card.classes)
    console.print(f"classes: {len(card.classes):,}, {named:,} with a scientific name")
    console.print(f"caption, for example: {known['caption'][0].as_py()}", markup=False)
    console.print(f"sha256: {card.sha256}", markup=False)
    for name, value in card.made_by.items():
        console.print(f"  {name}: {value}", markup=False)


def _is_known(table: pa.Table, column: str) -> np.ndarray:
    return ~np.isnan(table[column].to_numpy())


def _split_row(card: Card, split: str, shards: tuple[Shard, ...]) -> list[str]:
    counts = [info.counts.get(split, 0) for info in card.classes]
    return [
        f"{len(shards):,}",
        f"{card.samples(split):,}",
        f"{sum(s.size for s in shards) / 1e6:,.1f}",
        f"{sum(c > 0 for c in counts):,}",
        f"{min(counts)} / {statistics.median(counts):g} / {max(counts)}",
    ]


def show_classes(card: Card, folder: Path, console: Console) -> None:
    """Prints a line for each class: its records by split, and how many of them have a place, and a date.

    Raises:
        ValueError: an index is missing or damaged.
    """
    known = read_columns(card, folder, ["class_id", "lon", "date"])
    table = Table(title="classes", title_justify="left")
    table.add_column("id", justify="right")
    table.add_column("raw id", justify="right")
    table.add_column("name")
    for name in (*SPLITS, "all", "with place", "with date"):
        table.add_column(name, justify="right")
    number = known["class_id"].to_numpy()  # [N]
    places, dates = (
        np.bincount(number[_is_known(known, column)], minlength=len(card.classes)) for column in ("lon", "date")
    )  # [C]
    for info in card.classes:
        table.add_row(*_class_row(info, int(places[info.class_id]), int(dates[info.class_id])))
    console.print(table)


def _class_row(info: ClassInfo, places: int, dates: int) -> Iterator[str]:
    total = sum(info.counts.values())
    yield from (str(info.class_id), str(info.raw_class_id), info.name)
    yield from (f"{info.counts.get(split, 0):,}" for split in SPLITS)
    yield f"{total:,}"
    yield from (f"{known / max(total, 1):.0%}" for known in (places, dates))
