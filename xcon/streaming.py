"""Batches from shards that no disk holds: over HTTP, from S3, or out of a command.

The batches of `loader`, with weaker promises, since a tar that flows by can only be read in its order:
- each reader (a worker of a process) takes whole shards, in an order drawn for the epoch, and mixes what it has
  read in a buffer; there are at least as many shards as readers;
- an epoch has the steps of an exact one on every process, so that a reader whose shards hold less begins them
  again and one whose shards hold more leaves the rest to later epochs: a record comes once, twice or not at all;
- the order depends on the number of processes and workers, and a run that resumes begins the epoch's order anew.
What is drawn for a record (crop, flip, hidden metadata) is what `loader` draws for it in that epoch.
"""

import contextlib
import dataclasses
import http.client
import io
import itertools
import os
import random
import select
import shlex
import signal
import subprocess
import tarfile
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.tariterators import group_by_keys, tar_file_iterator

from xcon import loader, records, tarindex
from xcon.loader import Batch, Records, Share
from xcon.records import CARD_NAME, Card, Shard
from xcon.sampler import Order
from xcon.shardset import Split, Tars

TIMEOUT = 60.0  # seconds without a byte after which a source is given up
_ENDED_WELL = (0, -signal.SIGPIPE, 128 + signal.SIGPIPE)  # the padding at the end of a tar may stay unread
SCHEMES = ("http://", "https://", "s3://", "pipe:")


@dataclasses.dataclass
class Passing(Split):
    """A split whose records become known as they flow by; a photograph can be taken once, after `hold`."""

    held: dict[int, bytes] = dataclasses.field(default_factory=dict)

    def photo(self, index: int) -> bytes:
        """The image file of a record that is held."""
        return self.held.pop(index)

    def hold(self, index: int, row: tarindex.Row, label: int, image: bytes) -> None:
        """Fills in a record."""
        self.class_id[index] = self.caption[index] = label
        self.place[index] = (row.lon, row.lat, row.date)
        self.held[index] = image


@dataclasses.dataclass(frozen=True)
class Stream:
    """A split of a shard set somewhere else.

    Attributes:
        url: of its folder.
        card: of the set.
        shards: of the split.
        captions: `[C]` of the classes; a record's caption is that of its class.
    """

    url: str
    card: Card
    shards: tuple[Shard, ...]
    captions: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Records of the split."""
        return sum(shard.samples for shard in self.shards)

    def split(self, name: str) -> Passing:
        """The split, nothing of it known yet."""
        n = self.samples
        return Passing(
            name=name,
            tars=Tars([Path(f"{self.url}/{shard.file}") for shard in self.shards]),
            shard=np.repeat(np.arange(len(self.shards)), [shard.samples for shard in self.shards]),
            ids=pa.chunked_array([np.arange(n).astype(str)]),
            offset=np.zeros(n, np.int64),
            size=np.zeros(n, np.int64),
            class_id=np.zeros(n, np.int64),
            place=np.full((n, 3), np.nan),
            caption=np.zeros(n, np.int64),
            users=pa.nulls(n, pa.string()).dictionary_encode(),
        )


def open_stream(url: str, split: str, caption: str | None = None) -> Stream:
    """Reads the card of a shard set somewhere else.

    Args:
        url: of the folder: `http://host/set`, `s3://bucket/set`, or a command that writes a file whose name it is
            given, `pipe:ssh host cat /data/set`.
        split: train, val or test.
        caption: template of captions by class; by default that of the card.

    Raises:
        ValueError: no such scheme, card or split.
        OSError: the source does not answer; the message names the URL.
    """
    url = url.rstrip("/")
    if not url.startswith(SCHEMES):
        raise ValueError(f"{url}: a URL begins with {', '.join(SCHEMES)}")
    with tempfile.TemporaryDirectory() as folder:
        with opened(f"{url}/{CARD_NAME}") as file:
            (Path(folder) / CARD_NAME).write_bytes(file.read())
        try:
            card = Card.load(Path(folder))
        except ValueError:
            raise ValueError(
                f"{url}/{CARD_NAME}: not a card of xcon; xcon-shards build or index makes one"
            ) from None
    if not card.splits.get(split):
        raise ValueError(f"{url}: no records in split {split!r}; it has {', '.join(card.splits)}")
    template = caption or card.made_by.get("caption") or records.PLAIN_CAPTION
    captions = tuple(records.caption(template, info) for info in card.classes)
    return Stream(url, card, card.splits[split], captions)


def make_loader(
    stream: Stream, rows: Records, order: Order, share: Share, *, steps: range, buffer: int = 1000
) -> DataLoader[Batch]:
    """The batches of one process for a range of steps, as `loader.make_loader`; see above for what differs.

    Args:
        stream: where they come from.
        rows: what a record becomes; its split is `stream.split`.
        order: its number of records, batch size and seed; plain, not by class.
        share: of this process.
        steps: counted from the start of training.
        buffer: records that each reader mixes.

    Raises:
        ValueError: more readers than shards, or batches by class.
    """
    readers = share.world_size * max(share.workers, 1)
    if readers > len(stream.shards):
        raise ValueError(
            f"{stream.url}: {len(stream.shards)} shards for {readers} readers, each needs one; fewer --workers do"
        )
    if order.per_class:
        raise ValueError(f"--per-class {order.per_class}: a stream cannot be read by class; download {stream.url}")
    return _Loader(
        _Batches(stream, rows, order, share, steps, buffer),
        batch_size=None,
        num_workers=share.workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if share.workers else None,
        generator=torch.Generator(),
    )


class _Loader(DataLoader[Batch]):
    """A DataLoader that passes on what a worker says of a source without its traceback."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with loader.without_traceback():
            yield from super().__iter__()


@dataclasses.dataclass
class _Batches(IterableDataset[Batch]):
    stream: Stream
    rows: Records
    order: Order
    share: Share
    steps: range
    buffer: int

    def __iter__(self) -> Iterator[Batch]:
        """This worker's batches: the DataLoader takes one of each worker in turn."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = self.share.rank * workers + worker
        for epoch, steps in itertools.groupby(self.steps[worker::workers], self._epoch):
            flow = self._flow(epoch, reader, self.share.world_size * workers)
            for step in steps:
                yield self._batch(epoch, step, flow)

    def _epoch(self, step: int) -> int:
        return step // self.order.steps_per_epoch

    def _batch(self, epoch: int, step: int, flow: Iterator[tuple[int, tarindex.Row, bytes]]) -> Batch:
        each, real = self.order.batch_size // self.share.world_size, self.order.rows(step)
        numbers = {info.raw_class_id: info.class_id for info in self.stream.card.classes}
        split, found = self.rows.split, []
        assert isinstance(split, Passing)
        for place in range(self.share.rank * each, (self.share.rank + 1) * each):
            index, row, image = next(flow)
            if row.label not in numbers:
                raise ValueError(
                    f"{self.stream.url}: {row.image_id} has the label {row.label!r}, the card has not"
                )
            split.hold(index, row, numbers[row.label], image)
            found.append(self.rows[epoch, index, float(place < real)])
        split.held.clear()  # of records whose photographs nobody asked for
        return loader.collated(found)

    def _flow(self, epoch: int, reader: int, readers: int) -> Iterator[tuple[int, tarindex.Row, bytes]]:
        """Records without end: this reader's shards of the epoch, mixed, and again when all have come."""
        seed = 0 if self.order.seed is None else self.order.seed
        mine = np.random.default_rng([seed, epoch]).permutation(len(self.stream.shards))[reader::readers]
        rng = random.Random(f"{seed} {epoch} {reader}")
        while True:
            passing = (record for shard in mine.tolist() for record in read(self.stream, shard))
            yield from shuffle(self.buffer, initial=self.buffer, rng=rng)(passing)


def read(stream: Stream, number: int) -> Iterator[tuple[int, tarindex.Row, bytes]]:
    """The records of one shard: number in the split, what is said of it, image file.

    Raises:
        OSError: it cannot be read, or breaks off; the message names the URL.
    """
    shard = stream.shards[number]
    url, first = f"{stream.url}/{shard.file}", sum(before.samples for before in stream.shards[:number])
    keys = tarindex.Keys(**stream.card.made_by.get("keys", {}))
    found = 0
    try:
        with opened(url) as file:
            members = ({**member, "__url__": url} for member in tar_file_iterator(file))
            for sample in group_by_keys(members):
                if record := _record(sample, keys):
                    yield first + found, *record
                    found += 1
    except tarfile.TarError as error:
        raise OSError(f"{url}: breaks off after {found} of {shard.samples} records ({error})") from None
    if found != shard.samples:
        raise OSError(f"{url}: breaks off after {found} of {shard.samples} records")


def _record(sample: dict[str, bytes], keys: tarindex.Keys) -> tuple[tarindex.Row, bytes] | None:
    """A sample as the index would have it; None for one that is not in it."""
    members = {ending: data for ending, data in sample.items() if not ending.startswith("__")}
    places = {ending: (0, len(data)) for ending, data in members.items()}
    texts = {ending: members[ending] for ending in tarindex.TEXT_ENDINGS if ending in members}
    try:
        row = tarindex.row_of(tarindex.Sample(str(sample["__key__"]), places, texts), keys, "", Counter())
    except tarindex.SkippedError:
        return None
    return row, next(members[ending] for ending in tarindex.IMAGE_ENDINGS if ending in members)


@contextlib.contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """A file somewhere else, read from its beginning.

    Raises:
        OSError: it is not there, or gives no byte for `TIMEOUT` seconds; the message names the URL.
    """
    try:
        if url.startswith(("http://", "https://")):
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                yield answer
        else:
            command = f"aws s3 cp --quiet {shlex.quote(url)} -" if url.startswith("s3://") else url[len("pipe:") :]
            with _piped(command) as stream:
                yield stream
    except (OSError, http.client.HTTPException) as error:
        if url in str(error):
            raise
        raise OSError(f"{url}: {error}") from None


@contextlib.contextmanager
def _piped(command: str) -> Iterator[BinaryIO]:
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        yield io.BufferedReader(_Pipe(process.stdout.fileno()), 1 << 20)
        process.stdout.close()  # a command that writes on is told so
        if (status := process.wait(TIMEOUT)) not in _ENDED_WELL:
            raise OSError(f"the command ended with status {status}")
    finally:
        process.stdout.close()
        if process.poll() is None:
            process.kill()
            process.wait()


class _Pipe(io.RawIOBase):
    """The output of a command, read as long as some comes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills some of a buffer.

        Raises:
            TimeoutError: nothing came.
        """
        if not select.select([self.descriptor], [], [], TIMEOUT)[0]:
            raise TimeoutError(f"no byte came for {TIMEOUT:g} s")
        return os.readv(self.descriptor, [buffer])
