"""What every source goes through: a plan in, a shard set out.

train-000000.tar            KEY.jpg, KEY.txt, KEY.json per record, shuffled once, plain WebDataset
train-000000.index.parquet  see `xcon.records.INDEX_COLUMNS`
report.csv                  photographs with trouble, see `shards.trouble`; none where there is none
dataset.json                the card, written last

Which records make which shard is fixed by the plan and the seed before any photograph is read: so shards can be
made in any order, by any number of processes and machines, and gone on with after a kill, and have the same bytes.
A photograph that is left out makes its own shard smaller and moves no other.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import statistics
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from shards import trouble
from shards.plan import BrokenPhotographError, Photograph, Plan, count
from shards.pool import Pool
from shards.progress import progress
from shards.trouble import Trouble
from shards.workspace import Workspace, full_disk, note_name
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

WORTH_A_WORKER = 500  # photographs; a process takes as long to start as some hundreds of small ones take
_ANOTHER = "another task makes the card; if none runs any more, the same command without --task does"
_BLOCK = 512  # bytes; a USTAR member is one block of header, then its data


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to make.

    Attributes:
        file: name of its tar.
        records: in order.
        without: ids of those that are left out because another record has their file.
    """

    file: str
    records: tuple[Record, ...]
    without: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Made:
    """What came of a job; kept beside the shard until the set is whole.

    Attributes:
        shard: as in the card; None where every photograph was left out, and no file was written.
        index_size: bytes.
        digests: of all photographs of the job, those left out too, see `trouble.same_files`.
        troubles: of single photographs.
        without: as in the job.
    """

    shard: Shard | None
    index_size: int
    digests: bytes
    troubles: tuple[Trouble, ...]
    without: frozenset[str]

    def save(self, path: Path) -> None:
        """Writes the note, whole or not at all."""
        values = dataclasses.asdict(self)
        with atomic_write(path) as file:
            text = json.dumps({**values, "digests": self.digests.hex(), "without": sorted(self.without)})
            file.write(text.encode())

    @classmethod
    def load(cls, path: Path) -> "Made":
        """Reads a note."""
        values = json.loads(path.read_bytes())
        return cls(
            shard=None if values["shard"] is None else Shard(**values["shard"]),
            index_size=values["index_size"],
            digests=bytes.fromhex(values["digests"]),
            troubles=tuple(Trouble(**t) for t in values["troubles"]),
            without=frozenset(values["without"]),
        )


def made_before(folder: Path, jobs: Iterable[Job]) -> dict[str, Made]:
    """Tar name -> what another run made of it, for the shards that are whole."""
    found = {job.file: _made(folder, job.file) for job in jobs}
    return {file: made for file, made in found.items() if made is not None}


def _made(folder: Path, file: str) -> Made | None:
    """Believed if the files are there, and as long as they were."""
    note, tar = folder / note_name(file), folder / file
    try:
        made = Made.load(note)
        sizes = (tar.stat().st_size, tar.with_name(index_name(file)).stat().st_size) if made.shard else None
    except FileNotFoundError:
        return None
    return made if made.shard is None or sizes == (made.shard.size, made.index_size) else None


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes shards: all that a worker is told once.

    Attributes:
        folder: of the tars.
        photograph: as in the plan.
        captions: `[C]`.
        drop: kinds of `trouble` that are left out.
        tiny: pixels.
    """

    folder: Path
    photograph: Callable[[str], Photograph]
    captions: tuple[str, ...]
    drop: frozenset[str]
    tiny: int

    def __call__(self, job: Job) -> Made:
        """Writes one tar, its index and, last, its note.

        Raises:
            BrokenPhotographError: a photograph does not decode, and is not to be dropped.
            OSError: a file cannot be written; its number is kept where the disk is full.
        """
        note = self.folder / note_name(job.file)
        try:
            note.unlink(missing_ok=True)  # first: it must not vouch for what is being overwritten
            digests: list[bytes] = []
            troubles: list[Trouble] = []
            samples = self._samples(job, digests, troubles)
            shard, index_size = write_shard(self.folder / job.file, samples)
            made = Made(shard, index_size, b"".join(digests), tuple(troubles), job.without)
            made.save(note)
        except OSError as error:
            if number := full_disk(error):  # what an error was raised from does not travel between processes
                raise OSError(number, os.strerror(number)) from None
            raise
        return made

    def _samples(self, job: Job, digests: list[bytes], troubles: list[Trouble]) -> Iterator["Sample"]:
        """The photographs that go into the tar; tells of all."""

        def tell(record: Record, kind: str, detail: str, *, dropped: bool) -> None:
            troubles.append(trouble.of_record(record, kind, detail, dropped=dropped))

        for record in job.records:
            try:
                photograph = self.photograph(record.image_id)
            except BrokenPhotographError as error:
                if "broken" not in self.drop:
                    raise BrokenPhotographError(f"{error}; --drop broken leaves it out") from None
                digests.append(bytes(trouble.DIGEST))
                tell(record, "broken", str(error), dropped=True)
                continue
            digests.append(photograph.sha256)
            tiny = photograph.shorter_side < self.tiny
            drop = tiny and "tiny" in self.drop
            if tiny:
                tell(record, "tiny", f"its shorter side has {photograph.shorter_side} pixels", dropped=drop)
            if photograph.remark:
                tell(record, "profile", photograph.remark, dropped=drop)
            if not drop and record.image_id not in job.without:
                yield Sample(record, photograph.jpg, self.captions[record.class_id])


@dataclasses.dataclass(frozen=True)
class Sample:
    """One record with its photograph and its caption: three members of a tar."""

    record: Record
    jpg: bytes
    caption: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a plan is packed.

    Attributes:
        template: of the captions, see `xcon.records.caption`.
        samples_per_shard: the last shard of a split may have fewer.
        seed: of the order within each split.
        drop, tiny: see `Maker`; "duplicates" are left out too where they are named.
        workers: processes.
        made_by: kept in the card.
    """

    template: str
    samples_per_shard: int
    seed: int
    drop: frozenset[str]
    tiny: int
    workers: int
    made_by: Mapping[str, Any]

    def maker(self, plan: Plan, folder: Path) -> Maker:
        """What makes the shards of a plan.

        Raises:
            ValueError: the template does not suit the classes.
        """
        captions = tuple(caption(self.template, info) for info in plan.classes)
        return Maker(folder, plan.photograph, captions, self.drop, self.tiny)

    def jobs(self, plan: Plan) -> list[Job]:
        """Every shard with its records, in order of splits and numbers."""
        jobs = []
        for split in SPLITS:
            ordered = shuffled([r for r in plan.records if r.split == split], self.seed, split)
            starts = range(0, len(ordered), self.samples_per_shard)
            chunks = [tuple(ordered[start : start + self.samples_per_shard]) for start in starts]
            jobs += [Job(f"{split}-{number:06d}.tar", chunk) for number, chunk in enumerate(chunks)]
        return jobs


def pack(plan: Plan, space: Workspace, console: Console, settings: Settings) -> Card | None:
    """Writes the shards of a plan that are this run's and not there yet and, where all are there, the card.

    The same plan, settings and seed give the same bytes.

    Args:
        plan: what is packed.
        space: the folder, from `workspace`.
        console: for the progress.
        settings: how.

    Returns:
        The card; None where other tasks have not made their shards yet.

    Raises:
        BrokenPhotographError: a photograph does not decode, and broken ones are not to be dropped.
        ValueError: the template does not suit the classes, or another build was begun in the folder.
        OSError: a file cannot be written, or a worker was killed.
    """
    maker, jobs = settings.maker(plan, space.out), settings.jobs(plan)
    space.begin(settings.made_by, _hash(plan, jobs), [job.file for job in jobs])
    if (space.out / CARD_NAME).exists():  # a run ended, or was killed while it removed its notes
        space.finish()
        return Card.load(space.out)
    if space.is_finished_by_another:
        console.print(f"{space.out}: {_ANOTHER}")
        return None
    made = made_before(space.out, jobs)
    space.keep_only(set(made))
    if made:
        console.print(f"goes on: {len(made):,} of {len(jobs):,} shards are there")
    mine = [job for number, job in enumerate(jobs) if space.share.has(number) and job.file not in made]
    made |= make(mine, maker, console, settings.workers, "pack")
    made |= made_before(space.out, [job for job in jobs if job.file not in made])  # by other tasks meanwhile
    if (space.out / CARD_NAME).exists():  # another task was quicker
        return Card.load(space.out)
    missing = [job.file for job in jobs if job.file not in made]
    if missing and not space.is_finished_by_another:
        console.print(
            f"{space.out}: the card waits for {len(missing):,} shards of other tasks, {missing[0]} first"
        )
        return None
    if missing or not space.claim():
        console.print(f"{space.out}: {_ANOTHER}")
        return None
    return _finish(plan, jobs, made, space, console, settings)


def _finish(
    plan: Plan,
    jobs: Sequence[Job],
    made: dict[str, Made],
    space: Workspace,
    console: Console,
    settings: Settings,
) -> Card:
    """Looks at all shards together, and writes report and card."""
    copies = _same_files(jobs, made, drop="duplicates" in settings.drop)
    if "duplicates" in settings.drop:
        maker = settings.maker(plan, space.out)
        made |= _make_without(copies, jobs, made, maker, console, settings.workers)
    card = _card(plan, jobs, made, copies, settings)
    trouble.write_report(space.out, [*(t for job in jobs for t in made[job.file].troubles), *copies])
    card.save(space.out)
    space.finish()
    return card


def make(jobs: Sequence[Job], maker: Maker, console: Console, workers: int, title: str) -> dict[str, Made]:
    """Makes shards; tar name -> what came of it."""
    total = sum(len(job.records) for job in jobs)
    worth = min(workers, len(jobs), -(-total // WORTH_A_WORKER))
    made: dict[str, Made] = {}
    if not jobs:
        return made
    with Pool(maker, worth) as pool, progress(console, title, total, "photographs") as advance:
        for job, one in zip(jobs, pool.each(jobs), strict=True):
            made[job.file] = one
            advance(len(job.records))
    return made


def _same_files(jobs: Sequence[Job], made: Mapping[str, Made], *, drop: bool) -> list[Trouble]:
    records = [record for job in jobs for record in job.records]
    digests = b"".join(made[job.file].digests for job in jobs)
    return list(trouble.same_files(records, digests, drop=drop))


def _make_without(
    copies: Iterable[Trouble],
    jobs: Sequence[Job],
    made: Mapping[str, Made],
    maker: Maker,
    console: Console,
    workers: int,
) -> dict[str, Made]:
    """Makes the shards again that hold copies, without them: which these are is known only when all are there."""
    ids = {copy.image_id for copy in copies}
    again = []
    for job in jobs:
        without = frozenset(r.image_id for r in job.records if r.image_id in ids)
        if made[job.file].without != without:
            again.append(dataclasses.replace(job, without=without))
    return make(again, maker, console, workers, "pack again without duplicates")


def _card(
    plan: Plan, jobs: Sequence[Job], made: Mapping[str, Made], copies: Sequence[Trouble], settings: Settings
) -> Card:
    troubles = [*(t for job in jobs for t in made[job.file].troubles), *copies]
    dropped = {t.image_id for t in troubles if t.dropped}
    splits: dict[str, list[Shard]] = {}
    for job in jobs:
        if (shard := made[job.file].shard) is not None:
            splits.setdefault(job.records[0].split, []).append(shard)
    return Card(
        classes=count(plan.classes, (r for r in plan.records if r.image_id not in dropped)),
        splits={split: tuple(shards) for split, shards in splits.items()},
        made_by={
            **settings.made_by,
            **plan.facts,
            "dropped": len(dropped),
            "trouble": trouble.count_kinds(troubles),
        },
    )


def _hash(plan: Plan, jobs: Iterable[Job]) -> str:
    """Of what is packed: classes, and every record in its place. Facts may be of files beside them."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(c) for c in plan.classes]).encode())
    for job in jobs:
        digest.update(job.file.encode())
        for record in job.records:
            digest.update(record.to_json())
    return digest.hexdigest()


def shuffled(records: Sequence[Record], seed: int, split: str) -> list[Record]:
    """The records in an order that depends on their ids, the seed and the split only."""
    ordered = sorted(records, key=lambda record: record.image_id)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    return [ordered[k] for k in rng.permutation(len(ordered))]


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[Shard | None, int]:
    """Writes one tar and its index, each whole or not at all; neither where there are no samples.

    Returns:
        The shard and the bytes of its index.

    Raises:
        OSError: a file cannot be written.
    """
    rows: list[dict[str, Any]] = []
    with atomic_write(path) as file:
        hashed = _HashingWriter(file)
        with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar:
            rows += (_add_sample(tar, sample) for sample in samples)
    index_path = path.with_name(index_name(path.name))
    if not rows:
        path.unlink()
        index_path.unlink(missing_ok=True)
        return None, 0
    index = index_bytes(rows)
    with atomic_write(index_path) as file:
        file.write(index)
    return Shard(path.name, len(rows), hashed.size, hashed.sha256.hexdigest()), len(index)


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
    """The index of a tar, from its rows in order."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=index_schema()), sink)
    return sink.getvalue().to_pybytes()


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
