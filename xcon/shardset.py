"""Shard sets, read: the card, the columns of a split in memory, photographs by offset.

A split's metadata (places, dates, classes, captions) is read once from the indices, a few bytes per record;
photographs are read from memory-mapped tars when asked for, in any order.
"""

import dataclasses
import functools
import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xcon import records
from xcon.records import INDEX_COLUMNS, LATER_COLUMNS, Card, index_schema


class ShardSet:
    """A folder that `xcon-shards build` made.

    Args:
        folder: with its card.
        caption: template of captions by class (`records.caption`), in place of those that were built.

    Raises:
        FileNotFoundError, ValueError: no shard set here, one whose indices do not fit its card, or a template
            that names what a class has not.
    """

    def __init__(self, folder: Path, caption: str | None = None) -> None:
        self.folder = folder
        self.card = Card.load(folder)
        tables = {split: _read_indices(folder, self.card, split) for split in self.card.splits}
        if caption is not None:
            texts = pa.array([records.caption(caption, info) for info in self.card.classes])  # [C]
            tables = {split: _with_captions(table, texts) for split, table in tables.items()}
        distinct = {text for table in tables.values() for text in table["caption"].unique().to_pylist()}
        # Sorted, so that all processes and all runs number the captions alike.
        self.captions: tuple[str, ...] = tuple(sorted(distinct))
        number = {text: i for i, text in enumerate(self.captions)}
        self._splits = {
            name: Split(
                name=name,
                tars=tuple(folder / shard.file for shard in self.card.splits[name]),
                shard=np.repeat(
                    np.arange(len(self.card.splits[name])), [s.samples for s in self.card.splits[name]]
                ),
                image_id=table["image_id"].to_numpy(),
                offset=table["offset"].to_numpy(),
                size=table["size"].to_numpy(),
                class_id=table["class_id"].to_numpy().astype(np.int64),
                place=np.stack([table[c].to_numpy() for c in ("lon", "lat", "date")], axis=1),
                caption=np.array([number[t] for t in table["caption"].to_pylist()], dtype=np.int64),
                user_id=table["user_id"].to_numpy(),
            )
            for name, table in tables.items()
        }

    def split(self, name: str) -> "Split":
        """One split.

        Raises:
            ValueError: the set has no such split, or it is empty.
        """
        if name not in self._splits or len(self._splits[name]) == 0:
            have = ", ".join(f"{n} ({len(s)})" for n, s in self._splits.items())
            raise ValueError(f"{self.folder}: no records in split {name!r}; it has {have}")
        return self._splits[name]

    def has(self, name: str) -> bool:
        """Whether there are records in a split."""
        return name in self._splits and len(self._splits[name]) > 0

    @functools.cached_property
    def class_captions(self) -> np.ndarray:
        """`[C]` the caption that each class has most often, by its number in `captions`."""
        pairs, counts = self._captions_of_classes
        found = np.zeros(len(self.card.classes), dtype=np.int64)
        rarest_first = np.lexsort((-pairs[:, 1], counts))
        found[pairs[rarest_first, 0]] = pairs[rarest_first, 1]  # the last one written stays
        return found

    @property
    def one_caption_per_class(self) -> bool:
        """Whether the caption is a function of the class."""
        pairs, _ = self._captions_of_classes
        return len(pairs) == len(np.unique(pairs[:, 0]))

    @functools.cached_property
    def _captions_of_classes(self) -> tuple[np.ndarray, np.ndarray]:
        """`[P, 2]` the pairs of class and caption that there are, and `[P]` how many records have each."""
        columns = [np.stack([split.class_id, split.caption], axis=1) for split in self._splits.values()]
        return np.unique(np.concatenate(columns), axis=0, return_counts=True)


@dataclasses.dataclass
class Split:
    """The records of one split as columns.

    Attributes:
        name: train, val or test.
        tars: the files that hold its photographs.
        shard: `[N]` index into `tars`.
        image_id: `[N]` strings.
        offset, size: `[N]` bytes of the photograph within its tar.
        class_id: `[N]`.
        place: `[N, 3]` lon, lat in degrees, fraction of the year; NaN where unknown.
        caption: `[N]` index into `ShardSet.captions`.
        user_id: `[N]` strings, who made the observation; None where unknown.
    """

    name: str
    tars: tuple[Path, ...]
    shard: np.ndarray
    image_id: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    class_id: np.ndarray
    place: np.ndarray
    caption: np.ndarray
    user_id: np.ndarray
    _maps: dict[int, mmap.mmap] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.class_id)

    def photo(self, index: int) -> bytes:
        """The JPEG file of a record."""
        shard, start = int(self.shard[index]), int(self.offset[index])
        if shard not in self._maps:  # opened on first use, in the process that uses it
            with self.tars[shard].open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard][start : start + int(self.size[index])]

    def describe(self, index: int) -> str:
        """Where a record lies, for messages."""
        return f"{self.tars[int(self.shard[index])]}: {self.image_id[index]}.jpg"

    def __getstate__(self) -> dict[str, object]:
        """Open maps do not travel to workers that are spawned."""
        return {**self.__dict__, "_maps": {}}


def _read_indices(folder: Path, card: Card, split: str) -> pa.Table:
    tables = []
    for shard in card.splits[split]:
        tar, index = folder / shard.file, folder / shard.index_file
        for path in (tar, index):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: named by the card but missing; build the shard set again")
        if tar.stat().st_size != shard.size:
            raise ValueError(
                f"{tar}: {tar.stat().st_size} bytes, the card says {shard.size}: truncated or edited; "
                "build the shard set again"
            )
        try:
            earlier = set(LATER_COLUMNS) - set(pq.read_schema(index).names)
            table = pq.read_table(index, columns=[c for c in INDEX_COLUMNS if c not in earlier])
            table.validate(full=True)  # texts are UTF-8
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise ValueError(f"{index}: not an index ({error}); build the shard set again") from None
        if table.num_rows != shard.samples:
            raise ValueError(f"{index}: {table.num_rows} records, the card says {shard.samples}")
        tables.append(table)
    # What is missing in some is null there.
    return pa.concat_tables([index_schema().empty_table(), *tables], promote_options="default")


def _with_captions(table: pa.Table, texts: pa.Array) -> pa.Table:
    """An index with the captions of its classes, `[C]`."""
    column = table.schema.get_field_index("caption")
    return table.set_column(column, "caption", texts.take(table["class_id"].combine_chunks()))
