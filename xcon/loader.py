"""Batches: the records of one process, step by step, as tensors.

A batch is a dictionary: `image` `[b, 3, S, S]` uint8 with channels last in memory (of V views `[b, V, 3, S, S]`),
`text` `[b, L]` token ids, `meta` `[b, 3]` lon and lat in degrees and the fraction of the year (NaN where unknown),
and beside the modalities `label` `[b]` class ids, `index` `[b]` the records' numbers in their split, `weight`
`[b]`, 0 for rows that only fill up the last batch.
Where captions are shared by class, `text` has this process's part of the captions instead, and `text_class` their
class ids. For a frozen text encoder `text` are vectors `[b, F]` instead of token ids.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from xcon import images, launch, signals
from xcon.config import MODALITIES
from xcon.geotime import known, moved
from xcon.images import Transform
from xcon.sampler import Item, Order
from xcon.shardset import Split

Batch = dict[str, Tensor]


@dataclasses.dataclass
class Records(Dataset[Batch]):
    """Turns one item of an order into the tensors of a record.

    Attributes:
        split: the records.
        modalities: which of image, text and meta to deliver.
        transform: of the photograph; needed where images are delivered.
        tokens: `[K, L]` token ids of the distinct captions; needed where text is delivered.
        meta_dropout: share of records whose metadata is hidden.
        views: times that each photograph is transformed; more than one are stacked, `[V, 3, S, S]`.
        meta_jitter_km, meta_jitter_days: by how much places and dates are moved at random, `geotime.moved`.
        late: an epoch, and the transform from it on.
        seed: of crops, flips, colours, hidden and moved metadata; every record and epoch has draws of its own,
            whatever process and worker it falls to.
    """

    split: Split
    modalities: tuple[str, ...]
    transform: Transform | None = None
    tokens: Tensor | None = None
    meta_dropout: float = 0.0
    views: int = 1
    seed: int = 0
    meta_jitter_km: float = 0.0
    meta_jitter_days: float = 0.0
    late: tuple[int, Transform] | None = None

    def __getitem__(self, item: Item) -> Batch:
        """One record.

        Raises:
            ValueError: its photograph does not decode; the message names it.
        """
        epoch, index, weight = item
        record: Batch = {
            "label": torch.tensor(self.split.class_id[index]),
            "index": torch.tensor(index),
            "weight": torch.tensor(weight, dtype=torch.float32),
        }
        with _draws_of(self.seed, epoch, index):
            if "image" in self.modalities:
                record["image"] = self._photo(index, epoch)
            if "text" in self.modalities:
                assert self.tokens is not None
                record["text"] = self.tokens[self.split.caption[index]]
            if "meta" in self.modalities:
                record["meta"] = self._place(index)
        return record

    def _place(self, index: int) -> Tensor:
        """`[3]`, hidden or moved by draws of its own."""
        if self.meta_dropout > 0 and torch.rand(()).item() < self.meta_dropout:
            return torch.full((3,), math.nan)
        place = torch.tensor(self.split.place[index])
        if self.meta_jitter_km > 0 or self.meta_jitter_days > 0:
            place = moved(place[None], km=self.meta_jitter_km, days=self.meta_jitter_days)[0]
        return place.float()

    def _photo(self, index: int, epoch: int) -> Tensor:
        try:
            pixels = images.decode(self.split.photo(index))
        except ValueError as error:
            raise ValueError(f"{self.split.describe(index)}: {error}; xcon-shards verify lists all") from None
        transform = self.late[1] if self.late and epoch >= self.late[0] else self.transform
        assert transform is not None
        if self.views == 1:
            return transform(pixels)
        return _stacked([transform(pixels) for _ in range(self.views)])  # [V, 3, S, S]


def collated(rows: list[Batch]) -> Batch:
    """Records to a batch, each photograph copied once: channels stay last in memory, as networks want them."""
    photos = [row["image"] for row in rows if "image" in row]
    batch: Batch = default_collate([{n: x for n, x in row.items() if n != "image"} for row in rows])
    return {**batch, "image": _stacked(photos)} if photos else batch


def _stacked(photos: list[Tensor]) -> Tensor:
    """`[..., 3, S, S]` each, with channels last in memory, to `[b, ..., 3, S, S]` likewise."""
    return default_collate([photo.movedim(-3, -1) for photo in photos]).movedim(-1, -3)


@contextlib.contextmanager
def _draws_of(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seeds torch's default generator for one record, and puts it back."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0]))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of every batch falls to this process, and how many workers decode it.

    Attributes:
        rank: of the process.
        world_size: number of processes.
        workers: processes that decode, for each of them; 0 decodes in the process itself.
    """

    rank: int = 0
    world_size: int = 1
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class ClassCaptions:
    """The captions of a batch, each once for its class and shared out among the processes.

    Attributes:
        texts: `[C, ...]` what the text tower is given for each class.
        class_id: `[N]` of the records.
    """

    texts: Tensor
    class_id: np.ndarray

    def of(self, indices: np.ndarray, share: Share) -> Batch:
        """This process's part, for the records of a global batch: as many captions on every process.

        The last parts are filled up with a caption for class -1, which no record has.
        """
        distinct = np.unique(self.class_id[indices])
        each = math.ceil(len(distinct) / share.world_size)
        filled = np.pad(distinct, (0, each * share.world_size - len(distinct)), constant_values=-1)
        mine = torch.from_numpy(filled[share.rank * each : (share.rank + 1) * each])  # [k]
        return {
            "text": self.texts[mine],  # of -1 the last caption, as good as any
            "text_class": mine,
        }


def make_loader(
    records: Records, order: Order, share: Share, *, steps: range, captions: ClassCaptions | None = None
) -> DataLoader[Batch]:
    """The batches of one process for a range of steps, epochs running into one another without a pause.

    Args:
        records: what an item becomes.
        order: the global order.
        share: of this process; the number of processes divides the order's batch size.
        steps: counted from the start of training, so that a resumed run gives those that remain.
        captions: where they are shared by class; the records then have no text of their own.
    """
    return _Loader(
        records,
        captions,
        batch_sampler=_Batches(order, share, steps),
        collate_fn=collated,
        num_workers=share.workers,
        pin_memory=launch.uses_cuda(),
        prefetch_factor=4 if share.workers else None,
        worker_init_fn=signals.end_with_parent,
        generator=torch.Generator(),  # its own, so that starting a loader does not move the global one
    )


class _Loader(DataLoader[Batch]):
    """A DataLoader that adds the captions, and passes on what a worker says of a record without its traceback."""

    def __init__(self, records: Records, captions: ClassCaptions | None, **options: Any) -> None:
        super().__init__(records, **options)
        self.captions = captions

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = self.batch_sampler
        assert isinstance(batches, _Batches)
        with signals.held():
            iterator = super().__iter__()
        with without_traceback():
            for step, batch in zip(batches.steps, iterator, strict=True):
                if self.captions is None:
                    yield batch
                else:
                    yield {**batch, **self.captions.of(batches.order.indices(step), batches.share)}


@contextlib.contextmanager
def without_traceback() -> Iterator[None]:
    """Raises what a worker said of a record as it said it.

    torch raises it again as "Caught ValueError in DataLoader worker ...", the message last.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        wrapper, _, message = str(error).rpartition(f"\n{type(error).__name__}: ")
        if not wrapper:
            raise
        raise type(error)(message.strip()) from None


def evaluation_loader(records: Records, share: Share, *, batch_size: int) -> DataLoader[Batch]:
    """Every record once, in the order of its split.

    Args:
        records: with a transform that draws nothing, or what it draws in the first epoch.
        share: of this process.
        batch_size: over all processes, rounded up until they divide it.
    """
    order = Order(len(records.split), -(-batch_size // share.world_size) * share.world_size, seed=None)
    return make_loader(records, order, share, steps=range(order.steps_per_epoch))


@dataclasses.dataclass(frozen=True)
class _Batches:
    order: Order
    share: Share
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Item]]:
        rank, world_size = self.share.rank, self.share.world_size
        return self.order.local_batches(steps=self.steps, rank=rank, world_size=world_size)


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """All tensors of a batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def in_parts(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts, row by row."""
    pieces = {name: rows.chunk(parts) for name, rows in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(parts)]


def present(rows: Batch) -> dict[str, Tensor]:
    """Modality -> `[b]` bool: real rows, not those that fill up a batch, and for metadata those that have some."""
    real = rows["weight"] > 0
    return {m: real & known(rows["meta"]) if m == "meta" else real for m in MODALITIES if m in rows}
