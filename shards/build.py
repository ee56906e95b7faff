"""What every source goes through: a plan in, a shard set out, whole or not at all.

.xcon-build                 stands while a build writes; a folder that has it was left by a killed build
train-000000.tar            KEY.jpg, KEY.txt, KEY.json per record, shuffled once, plain WebDataset
train-000000.index.parquet  see `xcon.records.INDEX_COLUMNS`
dropped.csv                 photographs left out by --drop-broken, where there are any
dataset.json                the card, written last
"""

import csv
import dataclasses
import errno
import hashlib
import io
import itertools
import os
import re
import shutil
import statistics
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from shards.plan import BrokenPhotographError, Plan, count
from shards.progress import progress
from shards.source import DRAWN_NAME, SPOOL_NAME
from xcon.records import (
    CARD_NAME,
    SPLITS,
    Card,
    ClassInfo,
    Record,
    Shard,
    atomic_write,
    caption,
    index_name,
    index_schema,
    year_fraction,
)

DROPPED_NAME = "dropped.csv"
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar")
_MARKER = ".xcon-build"
OURS = re.compile(
    rf"\.?({'|'.join(SPLITS)})-\d{{6}}\.(tar|index\.parquet)(\..+)?|\.?{DROPPED_NAME}(\..+)?"
    rf"|\.{CARD_NAME}\..+|{SPOOL_NAME}|{DRAWN_NAME}|{_MARKER}"
)
_BLOCK = 512  # bytes; a USTAR member is one block of header, then its data


@dataclasses.dataclass(frozen=True)
class Sample:
    """One record with its photograph and its caption: three members of a tar."""

    record: Record
    jpg: bytes
    caption: str


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """The folder of a new shard set; what the block wrote is removed unless it wrote the card.

    Raises:
        ValueError: `out` holds a shard set, or files that no build of ours left.
        OSError: no space left; the message says where.
    """
    _check_free(out)
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    _remove_ours(out)
    try:
        (out / _MARKER).touch()
        yield out
        _remove_hidden(out)
    except BaseException as error:
        _remove_ours(out)
        (out / CARD_NAME).unlink(missing_ok=True)
        if created:
            out.rmdir()
        if full := _numbers(error) & {errno.ENOSPC, errno.EDQUOT}:
            reason = os.strerror(min(full)).lower()
            raise OSError(f"--out {out}: {reason}; free some, or name a folder on another disk") from error
        raise


def _numbers(error: BaseException) -> set[int]:
    """The error numbers of an error and of what it was raised from."""
    return {e.errno for e in (error, error.__cause__) if isinstance(e, OSError) and e.errno is not None}


def _check_free(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a new folder")
    if (out / CARD_NAME).exists():
        raise ValueError(f"--out {out}: already holds a shard set; name a new folder, or remove it first")
    names = sorted(p.name for p in out.iterdir())
    killed = _MARKER in names
    if foreign := [n for n in names if not (killed and OURS.fullmatch(n))]:
        raise ValueError(f"--out {out}: holds other files ({foreign[0]}); name a new or empty folder")


def _remove_ours(out: Path) -> None:
    for path in out.iterdir():
        if OURS.fullmatch(path.name):
            remove(path)


def _remove_hidden(out: Path) -> None:
    for path in out.glob(".*"):
        if OURS.fullmatch(path.name):
            remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def pack(
    plan: Plan,
    out: Path,
    console: Console,
    *,
    template: str,
    samples_per_shard: int,
    seed: int,
    drop_broken: bool,
    made_by: Mapping[str, Any],
) -> Card:
    """Writes the shards of a plan and, last, the card.

    The same plan, settings and seed give the same bytes.

    Args:
        plan: what is packed.
        out: a folder from `workspace`.
        console: for the progress.
        template: of the captions, see `xcon.records.caption`.
        samples_per_shard: the last shard of a split may have fewer.
        seed: of the order within each split.
        drop_broken: leave out what does not decode and list it in `dropped.csv`, instead of failing.
        made_by: kept in the card.

    Raises:
        BrokenPhotographError: a photograph does not decode, and `drop_broken` is false.
        ValueError: the template does not suit the classes.
        OSError: a file cannot be written.
    """
    captions = [caption(template, info) for info in plan.classes]
    dropped: list[tuple[Record, str]] = []
    packed: list[Record] = []
    splits: dict[str, tuple[Shard, ...]] = {}
    with progress(console, "pack", len(plan.records), "photographs") as advance:

        def samples(records: Iterable[Record]) -> Iterator[Sample]:
            for record in records:
                advance(1)
                try:
                    jpg = plan.photograph(record.image_id)
                except BrokenPhotographError as error:
                    if not drop_broken:
                        raise BrokenPhotographError(f"{error}; --drop-broken leaves it out") from None
                    dropped.append((record, str(error)))
                    continue
                packed.append(record)
                yield Sample(record, jpg, captions[record.class_id])

        for split in SPLITS:
            ordered = shuffled([r for r in plan.records if r.split == split], seed, split)
            splits[split] = tuple(_write_split(out, split, samples(ordered), samples_per_shard))
    if dropped:
        _write_dropped(out / DROPPED_NAME, dropped)
    card = Card(
        classes=count(plan.classes, packed),
        splits={split: shards for split, shards in splits.items() if shards},
        made_by={**made_by, **plan.facts, "dropped": len(dropped)},
    )
    card.save(out)
    return card


def shuffled(records: Sequence[Record], seed: int, split: str) -> list[Record]:
    """The records in an order that depends on their ids, the seed and the split only."""
    ordered = sorted(records, key=lambda record: record.image_id)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    return [ordered[k] for k in rng.permutation(len(ordered))]


def _write_split(out: Path, split: str, samples: Iterator[Sample], per_shard: int) -> Iterator[Shard]:
    for number, chunk in enumerate(_chunks(samples, per_shard)):
        yield write_shard(out / f"{split}-{number:06d}.tar", chunk)


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    # A whole shard is held in memory, so that reading a photograph never fails inside an open tar.
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def write_shard(path: Path, samples: Sequence[Sample]) -> Shard:
    """Writes one tar and its index, each whole or not at all.

    Raises:
        OSError: a file cannot be written.
    """
    with atomic_write(path) as file:
        hashed = _HashingWriter(file)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar:
            rows = [_add_sample(tar, sample) for sample in samples]
    with atomic_write(path.with_name(index_name(path.name))) as file:
        file.write(index_bytes(rows))
    return Shard(file=path.name, samples=len(rows), size=hashed.size, sha256=hashed.sha256.hexdigest())


class _HashingWriter(io.RawIOBase):
    """Hashes what it passes on: a tar is read by nobody while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def _add_sample(tar: tarfile.TarFile, sample: Sample) -> dict[str, Any]:
    """Adds the three members; returns the row of the index."""
    offset = tar.offset + _BLOCK
    key = sample.record.image_id
    add_member(tar, f"{key}.jpg", sample.jpg)
    add_member(tar, f"{key}.txt", sample.caption.encode())
    add_member(tar, f"{key}.json", sample.record.to_json())
    return index_row(sample.record, sample.caption, offset=offset, size=len(sample.jpg))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file with nothing about it that another machine or day would change."""
    member = tarfile.TarInfo(name)  # mtime, uid, gid are 0, mode is 0644: the same bytes everywhere
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def index_row(record: Record, text: str, *, offset: int, size: int) -> dict[str, Any]:
    """One row of an index, see `xcon.records.INDEX_COLUMNS`; `offset` is that of the JPEG's first byte."""
    nan, user = float("nan"), record.extra.get("user_id")
    return {
        "image_id": record.image_id,
        "offset": offset,
        "size": size,
        "class_id": record.class_id,
        "lon": nan if record.lon is None else record.lon,
        "lat": nan if record.lat is None else record.lat,
        "date": year_fraction(record.date),
        "caption": text,
        "user_id": None if user is None else str(user),
    }


def index_bytes(rows: list[dict[str, Any]]) -> bytes:
    """An index as a file, from rows of `index_row`."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=index_schema()), sink)
    return sink.getvalue().to_pybytes()


def _write_dropped(path: Path, dropped: Iterable[tuple[Record, str]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image_id", "split", "class_id", "reason"])
    table.writerows([r.image_id, r.split, r.class_id, reason] for r, reason in dropped)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def describe(plan: Plan) -> dict[str, str]:
    """The counts of a plan, as lines for people: what a dry run shows."""
    counts = {s: [info.counts[s] for info in plan.classes] for s in SPLITS}
    return {
        "images": f"{len(plan.records):,}",
        **{split: f"{sum(numbers):,}{_spread(numbers)}" for split, numbers in counts.items()},
        "classes": f"{len(plan.classes):,}",
        "raw ids": raw_id_range(plan.classes),
        "without place or date": _without_meta(plan.records),
        **{name: _show(value) for name, value in plan.facts.items()},
    }


def _spread(numbers: Sequence[int]) -> str:
    if not any(numbers):
        return ""
    low, middle, high = min(numbers), statistics.median(numbers), max(numbers)
    return f" ({low} to {high} per class, median {middle:g})"


def _without_meta(records: Sequence[Record]) -> str:
    without = sum(record.lon is None or record.date is None for record in records)
    return f"{without:,} ({without / max(len(records), 1):.1%})"


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{number:,} {name}" for name, number in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def raw_id_range(classes: Sequence[ClassInfo]) -> str:
    """`295 -> 0 ... 1010 -> 554, 161 ids between unused in 6 gaps`."""
    first, last = classes[0], classes[-1]
    ends = f"{first.raw_class_id} -> {first.class_id} ... {last.raw_class_id} -> {last.class_id}"
    raw = [info.raw_class_id for info in classes]
    numbers = [r for r in raw if isinstance(r, int)]
    if len(numbers) < len(raw):
        return ends
    steps = [b - a - 1 for a, b in itertools.pairwise(numbers)]
    return f"{ends}, {sum(steps)} ids between unused in {sum(s > 0 for s in steps)} gaps"
