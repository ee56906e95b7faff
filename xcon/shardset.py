"""Shard sets, read: the card, the columns of a split in memory, photographs by offset.

A split's metadata (places, dates, classes, captions) is read once from the indices, about 100 bytes per record,
and kept as Arrow arrays and numpy columns: no Python object per record, whose reference counts would make every
worker copy the pages it looks at. Photographs are read from the tars when asked for, in any order.
"""

import dataclasses
import functools
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xcon import records, tarindex
from xcon.commandline import complain
from xcon.records import INDEX_COLUMNS, LATER_COLUMNS, Card, Shard, index_schema

# Columns of few distinct values are numbers into a list of them.
_OF_FEW_VALUES = ("caption", "user_id")
_READERS = 8  # threads: on a network's disk the time goes into waiting


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
        self._splits = {
            name: _split(name, folder, self.card.splits[name], table, self.captions)
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
        ids: `[N]` strings.
        offset, size: `[N]` bytes of the photograph within its tar.
        class_id: `[N]`.
        place: `[N, 3]` lon, lat in degrees, fraction of the year; NaN where unknown.
        caption: `[N]` index into `ShardSet.captions`.
        users: `[N]` strings, who made the observation; null where unknown.
    """

    name: str
    tars: "Tars"
    shard: np.ndarray
    ids: pa.ChunkedArray
    offset: np.ndarray
    size: np.ndarray
    class_id: np.ndarray
    place: np.ndarray
    caption: np.ndarray
    users: pa.DictionaryArray

    def __len__(self) -> int:
        return len(self.class_id)

    @property
    def image_id(self) -> np.ndarray:
        """`[N]` Python strings, made anew each time."""
        return self.ids.to_numpy()

    @property
    def user_id(self) -> np.ndarray:
        """`[N]` Python strings, None where unknown, made anew each time."""
        return self.users.to_numpy(zero_copy_only=False)

    def photo(self, index: int) -> bytes:
        """The image file of a record.

        Raises:
            OSError: its tar is gone, or shorter than it was.
        """
        return self.tars.read(int(self.shard[index]), int(self.offset[index]), int(self.size[index]))

    def describe(self, index: int) -> str:
        """Where a record lies, for messages."""
        return f"{self.tars.paths[int(self.shard[index])]}: {self.ids[index].as_py()}.jpg"


class Tars:
    """Files that are read from at any offset, only so many of them open at a time.

    Read, not mapped into memory: Python's maps keep a file open too, and a file cut while it is mapped ends the
    process by a signal instead of an error.

    Args:
        paths: any number.
        most: that may be open at once; a quarter of what the system allows this process, unless given.
    """

    def __init__(self, paths: Sequence[Path], most: int | None = None) -> None:
        self.paths = tuple(paths)
        self.most = most or resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self._open: dict[int, int] = {}  # number of the tar -> descriptor, the one used last at the end

    def read(self, number: int, start: int, size: int) -> bytes:
        """Some bytes of one file.

        Raises:
            OSError: it cannot be opened, or ends too early.
        """
        descriptor = self._open.pop(number, None)
        if descriptor is None:
            while len(self._open) >= self.most:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(self.paths[number], os.O_RDONLY)
        self._open[number] = descriptor
        data = os.pread(descriptor, size, start)
        if len(data) != size:
            raise OSError(f"{self.paths[number]}: ends within a photograph: cut or replaced while in use")
        return data

    def __getstate__(self) -> dict[str, object]:
        """Open files do not travel to workers that are spawned."""
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _split(name: str, folder: Path, shards: Sequence[Shard], table: pa.Table, captions: Sequence[str]) -> Split:
    return Split(
        name=name,
        tars=Tars([folder / shard.file for shard in shards]),
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [s.samples for s in shards]),
        ids=table["image_id"],
        offset=table["offset"].to_numpy(),
        size=table["size"].to_numpy(),
        class_id=table["class_id"].to_numpy().astype(np.int64),
        place=np.stack([table[c].to_numpy() for c in ("lon", "lat", "date")], axis=1),
        caption=pc.index_in(table["caption"], pa.array(captions, pa.string())).to_numpy(),
        users=table["user_id"].combine_chunks(),
    )


def _read_indices(folder: Path, card: Card, split: str) -> pa.Table:
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(functools.partial(_read_index, folder, card), card.splits[split]))
    pa.default_memory_pool().release_unused()
    return pa.concat_tables([_columns().empty_table(), *tables]).unify_dictionaries()


def _columns() -> pa.Schema:
    """An index as it is kept in memory."""
    few = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([(f.name, few if f.name in _OF_FEW_VALUES else f.type) for f in index_schema()])


def _read_index(folder: Path, card: Card, shard: Shard) -> pa.Table:
    tar, index = folder / shard.file, folder / shard.index_file
    if not tar.is_file():
        raise FileNotFoundError(f"{tar}: named by the card but missing; build the shard set again")
    if (size := tar.stat().st_size) != shard.size:
        raise ValueError(
            f"{tar}: {size} bytes, the card says {shard.size}: truncated or edited; build the shard set again"
        )
    try:
        if index.is_file():
            footer = pq.read_metadata(index)
            few = [name for name in _OF_FEW_VALUES if name in footer.schema.names]
            with pq.ParquetFile(index, metadata=footer, read_dictionary=few) as file:
                table = file.read(use_threads=False)
            table.validate(full=True)  # texts are UTF-8
        else:
            table = _made_anew(tar, index, card, shard)
        table = _with_later_columns(table).select(list(INDEX_COLUMNS)).cast(_columns())
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise ValueError(f"{index}: not an index ({error}); build the shard set again") from None
    if table.num_rows != shard.samples:
        raise ValueError(f"{index}: {table.num_rows} records, the card says {shard.samples}")
    return table


def from_tar(tar: Path, card: Card, shard: Shard) -> pa.Table:
    """The index of a tar, made from the tar itself as the card says that it was read.

    Raises:
        ValueError, OSError: as `tarindex.samples`.
        KeyError: a label that the card has not.
    """
    keys = tarindex.Keys(**card.made_by.get("keys", {}))
    rows, _ = tarindex.read(
        tar, keys, prefix=tarindex.prefix_of(shard.file) if card.made_by.get("prefixed") else ""
    )
    template = card.made_by.get("caption")
    captions = [records.caption(template or records.PLAIN_CAPTION, info) for info in card.classes]
    class_id = {info.raw_class_id: info.class_id for info in card.classes}
    own_texts = (
        template is None or card.made_by.get("source") != "index"
    )  # a built set has its captions in its tars
    return tarindex.table(rows, class_id, captions, own_texts=own_texts)


def _made_anew(tar: Path, index: Path, card: Card, shard: Shard) -> pa.Table:
    """The index of a tar that has none, written beside it where that can be."""
    table = from_tar(tar, card, shard)
    try:
        with records.atomic_write(index) as file:
            file.write(tarindex.to_bytes(table))
    except OSError:
        complain("xcon", f"{index}: is missing, made anew from the tar for this run; its folder cannot be written")
    else:
        complain("xcon", f"{index}: was missing, made anew from the tar")
    return table


def _with_later_columns(table: pa.Table) -> pa.Table:
    """An index with the columns that one of an earlier version lacks: unknown there."""
    for name in set(LATER_COLUMNS) - set(table.column_names):
        table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
    return table


def _with_captions(table: pa.Table, texts: pa.Array) -> pa.Table:
    """An index with the captions of its classes, `[C]`."""
    column = table.schema.get_field_index("caption")
    return table.set_column(column, "caption", texts.take(table["class_id"].combine_chunks()))
