"""Reading a finished shard set back: `verify` finds every broken thing, `show` tells what is there."""

import dataclasses
import hashlib
import itertools
import statistics
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from shards.build import index_row
from shards.photographs import fit
from shards.plan import BrokenPhotographError
from shards.progress import progress
from shards.workspace import SHARD_NAME
from xcon.records import INDEX_COLUMNS, LATER_COLUMNS, SPLITS, Card, ClassInfo, Record, Shard, index_schema

_MEMBERS = ("jpg", "txt", "json")
_ANY_SIZE = 1 << 30  # pixels: nothing is made smaller here


@dataclasses.dataclass
class _Seen:
    """What was met so far, over all shards."""

    splits: dict[str, str] = dataclasses.field(default_factory=dict)
    counts: Counter[tuple[int, str]] = dataclasses.field(default_factory=Counter)


def problems(card: Card, folder: Path, console: Console) -> Iterator[str]:
    """Compares a shard set with its card, every index with its tar, every record with its class.

    Yields:
        One line per broken thing, none for a whole set.
    """
    seen = _Seen()
    shards = [(split, shard) for split, listed in card.splits.items() for shard in listed]
    total = sum(shard.samples for _, shard in shards)
    broken = False
    with progress(console, "verify", total, "photographs") as advance:
        for split, shard in shards:
            for problem in _shard_problems(card, folder, split, shard, seen):
                broken = True
                yield problem
            advance(shard.samples)
    listed = {shard.file for _, shard in shards}
    for path in sorted(folder.glob("*.tar")):
        if SHARD_NAME.fullmatch(path.name) and path.name not in listed:
            yield f"{path}: not in the card; a reader of *.tar would take it along"
    if not broken:  # a broken shard makes every count wrong, and has been named
        yield from _count_problems(card, folder, seen)


def _count_problems(card: Card, folder: Path, seen: _Seen) -> Iterator[str]:
    for info, split in itertools.product(card.classes, SPLITS):
        found = seen.counts[info.class_id, split]
        if found != info.counts.get(split, 0):
            counted = info.counts.get(split, 0)
            yield f"{folder}: class {info.name!r} has {found} records in {split}, the card says {counted}"


def _shard_problems(card: Card, folder: Path, split: str, shard: Shard, seen: _Seen) -> Iterator[str]:
    path = folder / shard.file
    if not path.is_file():
        yield f"{path}: is missing"
        return
    if (size := path.stat().st_size) != shard.size:
        yield f"{path}: has {size:,} bytes, the card says {shard.size:,}: cut or edited; build the set again"
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            yield f"{path}: its bytes are not those of the card (sha256 differs): edited or damaged"
    try:
        rows = _read_index(folder / shard.index_file)
    except ValueError as error:
        yield str(error)
        rows = None
    try:
        samples = list(_samples(path))
    except (tarfile.TarError, ValueError) as error:
        yield f"{path}: not a tar of three members per record ({error})"
        return
    if len(samples) != shard.samples:
        yield f"{path}: holds {len(samples)} records, the card says {shard.samples}"
    if rows is not None and len(rows) != len(samples):
        yield f"{folder / shard.index_file}: has {len(rows)} rows, the tar {len(samples)} records"
        rows = None
    for number, sample in enumerate(samples):
        row = None if rows is None else rows[number]
        yield from (f"{path}: {problem}" for problem in _sample_problems(card, split, sample, row, seen))


def _read_index(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; build the set again")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    whole = index_schema()
    earlier = pa.schema([field for field in whole if field.name not in LATER_COLUMNS])
    if table.schema not in (whole, earlier):
        raise ValueError(f"{path}: its columns are not {', '.join(INDEX_COLUMNS)}")
    return table.to_pylist()


@dataclasses.dataclass(frozen=True)
class _Raw:
    """The bytes of a record's three members, and where its photograph lies in the tar."""

    key: str
    offset: int
    members: Mapping[str, bytes]


def _samples(path: Path) -> Iterator[_Raw]:
    with tarfile.open(path, mode="r:") as tar:
        members = iter(tar)
        while group := list(itertools.islice(members, len(_MEMBERS))):
            key = group[0].name.partition(".")[0]
            if [m.name for m in group] != [f"{key}.{kind}" for kind in _MEMBERS]:
                raise ValueError(f"at {group[0].name}")
            contents = [file.read() for m in group if (file := tar.extractfile(m)) is not None]
            yield _Raw(key, group[0].offset_data, dict(zip(_MEMBERS, contents, strict=True)))


def _sample_problems(
    card: Card, split: str, sample: _Raw, row: Mapping[str, Any] | None, seen: _Seen
) -> Iterator[str]:
    try:
        fit(sample.members["jpg"], f"{sample.key}.jpg", size=_ANY_SIZE, quality=95)
    except BrokenPhotographError as error:
        yield str(error)
    try:
        record = Record.from_json(sample.members["json"])
        text = sample.members["txt"].decode()
    except ValueError as error:
        yield f"{sample.key}: {error}"
        return
    if record.image_id != sample.key:
        yield f"{sample.key}.json: image_id is {record.image_id}"
    if record.split != split:
        yield f"{sample.key}.json: split is {record.split}, the shard is of {split}"
    if record.image_id in seen.splits:
        yield f"{sample.key}: stands in {seen.splits[record.image_id]} already"
    seen.splits[record.image_id] = split
    seen.counts[record.class_id, split] += 1
    yield from _label_problems(card.classes, sample.key, record)
    if row is not None:
        expected = index_row(record, text, offset=sample.offset, size=len(sample.members["jpg"]))
        yield from _row_problems(sample.key, expected, row)


def _label_problems(classes: tuple[ClassInfo, ...], key: str, record: Record) -> Iterator[str]:
    if not 0 <= record.class_id < len(classes):
        yield f"{key}.json: class_id {record.class_id}, the card has {len(classes)} classes"
        return
    info = classes[record.class_id]
    if (record.raw_class_id, record.class_name) != (info.raw_class_id, info.name):
        yield (
            f"{key}.json: class {record.class_id} is {record.raw_class_id} {record.class_name!r}, "
            f"the card says {info.raw_class_id} {info.name!r}"
        )


def _row_problems(key: str, expected: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    for column in row:  # one of an earlier version has fewer
        value = expected[column]
        both_unknown = value != value and row[column] != row[column]  # noqa: PLR0124 (NaN)
        if row[column] != value and not both_unknown:
            yield f"{key}: index has {column} {row[column]!r}, the tar {value!r}"


def show(card: Card, folder: Path, console: Console) -> None:
    """Prints what a shard set holds."""
    table = Table(title=str(folder), title_justify="left")
    table.add_column("split")
    names = ("shards", "samples", "MB", "classes", "per class min / median / max", "with place and date")
    for name in names:
        table.add_column(name, justify="right")
    for split, shards in card.splits.items():
        table.add_row(split, *_split_row(card, folder, split, shards))
    console.print(table)
    named = sum(info.scientific_name is not None for info in card.classes)
    console.print(f"classes: {len(card.classes):,}, {named:,} with a scientific name")
    console.print(f"caption, for example: {_example_caption(card, folder)}", markup=False)
    console.print(f"sha256: {card.sha256}", markup=False)
    for name, value in card.made_by.items():
        console.print(f"  {name}: {value}", markup=False)


def _split_row(card: Card, folder: Path, split: str, shards: tuple[Shard, ...]) -> list[str]:
    counts = [info.counts.get(split, 0) for info in card.classes]
    columns = [pq.read_table(folder / s.index_file, columns=["lon", "date"]).to_pydict() for s in shards]
    known = sum(
        lon == lon and date == date  # noqa: PLR0124 (NaN)
        for c in columns
        for lon, date in zip(c["lon"], c["date"], strict=True)
    )
    return [
        f"{len(shards):,}",
        f"{card.samples(split):,}",
        f"{sum(s.size for s in shards) / 1e6:,.1f}",
        f"{sum(c > 0 for c in counts):,}",
        f"{min(counts)} / {statistics.median(counts):g} / {max(counts)}",
        f"{known / max(card.samples(split), 1):.1%}",
    ]


def _example_caption(card: Card, folder: Path) -> str:
    first = next(iter(card.splits.values()))[0]
    return pq.read_table(folder / first.index_file, columns=["caption"])["caption"][0].as_py()
