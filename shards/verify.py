"""Reading a finished shard set back: every broken thing is found, and an index is rebuilt from a whole tar.

Shards are checked apart from each other, by several processes where there is enough to do; what only shows
between them (a record that stands in two, counts) is checked as their reports come in, in the order of the card.
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from shards.build import index_bytes
from shards.members import Stored, row_of, stored
from shards.photographs import decodes, is_stored
from shards.pool import Pool
from shards.progress import progress
from shards.trouble import REPORT_NAME
from shards.workspace import is_ours, remove
from xcon.records import (
    CARD_NAME,
    INDEX_COLUMNS,
    LATER_COLUMNS,
    SPLITS,
    Card,
    ClassInfo,
    Record,
    Shard,
    atomic_write,
    index_schema,
    sha256,
)
from xcon.shardset import from_tar

_PER_PROCESS = 2000  # photographs that are checked in about the time that a process takes to start


@dataclasses.dataclass
class Outcome:
    """What became of a check.

    Attributes:
        problems: a line for each broken thing that is left.
        repaired: a line for each thing that was put right.
        lost: a tar is missing or not what the card says, so that only its source can bring it back.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    repaired: list[str] = dataclasses.field(default_factory=list)
    lost: bool = False


@dataclasses.dataclass
class _Report(Outcome):
    """A shard by itself, with the image id and the class id of its records."""

    records: list[tuple[str, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Check:
    """Checks one shard of a split, in whatever process."""

    card: Card
    folder: Path
    repair: bool

    def __call__(self, place: tuple[str, Shard]) -> _Report:
        split, shard = place
        report = _Report()
        path = self.folder / shard.file
        if problem := _tar_problem(path, shard):
            report.problems.append(problem)
            report.lost = True
        if not path.is_file() or path.stat().st_size != shard.size:
            return report  # what stands in it would be one complaint after another
        try:
            self._records(split, shard, report)
        except ValueError as error:
            report.problems.append(str(error))
        return report

    def _records(self, split: str, shard: Shard, report: _Report) -> None:
        """Checks records and index against each other, and rebuilds the index where asked and possible."""
        path, index = self.folder / shard.file, self.folder / shard.index_file
        wrong: list[str] = []  # with the index
        rows: list[dict[str, Any]] | None = None
        try:
            rows = _read_index(index)
        except ValueError as error:
            wrong.append(str(error))
        expected: list[dict[str, Any]] = []
        readable, number = True, 0
        for number, (row, problems) in enumerate(self._read(path, split, shard), start=1):
            report.problems += [f"{path}: {problem}" for problem in problems]
            if row is None:
                readable = False
                continue
            report.records.append((row["image_id"], row["class_id"]))
            expected.append(row)
            if rows and number <= len(rows):
                wrong += [f"{path}: {problem}" for problem in _row_problems(expected[-1], rows[number - 1])]
        if number != shard.samples:
            report.problems.append(f"{path}: holds {number} records, the card says {shard.samples}")
        if rows is not None and len(rows) != number:
            wrong.append(f"{index}: has {len(rows)} rows, the tar {number} records")
        if wrong and self.repair and readable and not report.lost:
            with atomic_write(index) as file:
                file.write(index_bytes(expected))
            report.repaired.append(f"{index}: rebuilt from its tar")
        else:
            report.problems += wrong

    def _read(self, path: Path, split: str, shard: Shard) -> Iterator[tuple[dict[str, Any] | None, list[str]]]:
        """The row of the index that each record of a tar has, None where it is no record, and what is wrong."""
        if self.card.made_by.get("source") == "index":
            yield from _of_anybody(path, self.card, shard)
            return
        for record in stored(path):
            found, problems = _read_record(self.card, split, record)
            yield (None if found is None else row_of(found, record)), problems


def check(
    card: Card, folder: Path, console: Console, *, repair: bool = False, workers: int | None = None
) -> Outcome:
    """Compares a shard set with its card, every index with its tar, every record with its class.

    Args:
        card: of the set.
        folder: of the set.
        console: for the progress.
        repair: rebuild the indices that are not those of their whole tars, remove what killed builds left hidden.
        workers: processes; None for as many as there are cores, fewer for a small set. The outcome is the same.

    Raises:
        OSError: a file cannot be read or written, or a process was killed.
    """
    outcome, seen = Outcome(), _Seen()
    shards = [(split, shard) for split, listed in card.splits.items() for shard in listed]
    total = sum(shard.samples for _, shard in shards)
    processes = min(len(shards), workers or min(len(os.sched_getaffinity(0)), 1 + total // _PER_PROCESS))
    with (
        progress(console, "verify", total, "photographs") as advance,
        Pool(_Check(card, folder, repair), max(1, processes)) as pool,
    ):
        for (split, shard), report in zip(shards, pool.each(shards), strict=True):
            outcome.problems += report.problems
            outcome.problems += (f"{folder / shard.file}: {line}" for line in seen.add(split, report.records))
            outcome.repaired += report.repaired
            outcome.lost |= report.lost
            advance(shard.samples)
    whole = not outcome.problems  # a broken shard makes every count wrong, and has been named
    _find_strays(card, folder, outcome, repair=repair)
    if whole:
        outcome.problems += _count_problems(card, folder, seen)
    return outcome


@dataclasses.dataclass
class _Seen:
    """What was met so far, over all shards."""

    splits: dict[str, str] = dataclasses.field(default_factory=dict)
    counts: Counter[tuple[int, str]] = dataclasses.field(default_factory=Counter)

    def add(self, split: str, records: Sequence[tuple[str, int]]) -> Iterator[str]:
        """Yields a line for each record that was there before."""
        for image_id, class_id in records:
            if image_id in self.splits:
                yield f"{image_id}: stands in {self.splits[image_id]} already"
            self.splits[image_id] = split
            self.counts[class_id, split] += 1


def _count_problems(card: Card, folder: Path, seen: _Seen) -> Iterator[str]:
    for info, split in itertools.product(card.classes, SPLITS):
        found = seen.counts[info.class_id, split]
        if found != info.counts.get(split, 0):
            counted = info.counts.get(split, 0)
            yield f"{folder}: class {info.name!r} has {found} records in {split}, the card says {counted}"


def _find_strays(card: Card, folder: Path, outcome: Outcome, *, repair: bool) -> None:
    """Files with names of ours that no card names; the hidden ones a killed build or repair left."""
    shards = [shard for listed in card.splits.values() for shard in listed]
    named = {CARD_NAME, REPORT_NAME, *(s.file for s in shards), *(s.index_file for s in shards)}
    for path in sorted(folder.iterdir()):
        if path.name in named or not is_ours(path.name):
            continue
        if not path.name.startswith("."):
            if card.made_by.get("source") == "index":
                continue  # somebody's tars, of which the card may name a part
            outcome.problems.append(f"{path}: not in the card; a reader of all files would take it along")
        elif repair:
            remove(path)
            outcome.repaired.append(f"{path}: removed, left by a killed build")
        else:
            outcome.problems.append(f"{path}: left by a killed build; --repair removes such files")


def _tar_problem(path: Path, shard: Shard) -> str | None:
    """How a tar is not the one that the card names."""
    if not path.is_file():
        return f"{path}: is missing"
    if (size := path.stat().st_size) != shard.size:
        return f"{path}: has {size:,} bytes, the card says {shard.size:,}: cut or edited"
    if sha256(path) != shard.sha256:
        return f"{path}: its bytes are not those of the card (sha256 differs): edited or damaged"
    return None


def _read_index(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; --repair rebuilds it from its tar")
    try:
        table = pq.read_table(path)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    whole = index_schema()
    earlier = pa.schema([field for field in whole if field.name not in LATER_COLUMNS])
    if table.schema not in (whole, earlier):
        raise ValueError(f"{path}: its columns are not {', '.join(INDEX_COLUMNS)}")
    return table.to_pylist()


def _read_record(card: Card, split: str, record: Stored) -> tuple[Record | None, list[str]]:
    """A record, None where it is no record, and what is wrong with it."""
    problems = []
    if not is_stored(record.members["jpg"]):
        problems.append(f"{record.key}.jpg: does not decode (no upright RGB JPEG, or a damaged one)")
    try:
        found = Record.from_json(record.members["json"])
        record.members["txt"].decode()
    except ValueError as error:
        return None, [*problems, f"{record.key}: {error}"]
    if found.image_id != record.key:
        problems.append(f"{record.key}.json: image_id is {found.image_id}")
    if found.split != split:
        problems.append(f"{record.key}.json: split is {found.split}, the shard is of {split}")
    return found, [*problems, *_label_problems(card.classes, record.key, found)]


def _of_anybody(path: Path, card: Card, shard: Shard) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The records of a tar that `xcon-shards index` read, as it reads them."""
    try:
        rows = from_tar(path, card, shard).to_pylist()
    except KeyError as error:
        raise ValueError(f"{path}: has the label {error}, which the card has not") from None
    with path.open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            whole = decodes(file.read(row["size"]))
            yield row, [] if whole else [f"{row['image_id']}: its image does not decode"]


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


def _row_problems(expected: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    for column in row:  # one of an earlier version has fewer
        value = expected[column]
        both_unknown = value != value and row[column] != row[column]  # noqa: PLR0124 (NaN)
        if row[column] != value and not both_unknown:
            yield f"{expected['image_id']}: index has {column} {row[column]!r}, the tar {value!r}"
