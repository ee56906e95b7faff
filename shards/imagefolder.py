"""Photographs in folders, with or without a table: the convention of Hugging Face's ImageFolder.

    CLASS/x.jpg                     the class is the folder; folders above it are its hierarchy
    train/CLASS/x.jpg               the first folder is the split, where all photographs lie in such folders
    metadata.csv, .jsonl, .parquet  at the top or in any folder, with `file_name` relative to where it lies;
                                    its columns say class, place and date, see `shards.columns`

`datasets` itself passes over photographs that no table names, drops labels of folders of unequal depth and turns
label `007` into 7; here each of these is an error or kept as it stands, so the files are read here. Where both
agree, a test compares them.
"""

import dataclasses
import itertools
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from shards import exif
from shards.columns import Columns, Row, column_facts, no_label
from shards.observations import SPLIT_NAMES, Files, Observation, image_id
from shards.photographs import SUFFIXES
from shards.plan import Plan
from shards.progress import progress
from shards.source import Room
from shards.tables import Table, read_table

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFolder(Columns):
    """Shards of photographs in folders, classes, places and dates by folder or by a table."""

    NAME = "imagefolder"

    root: Path
    """Folder of the photographs."""
    meta: Path | None = None
    """Table with file names relative to --root, instead of the metadata files in the folder."""
    file_column: str = "file_name"
    """File name of the photograph."""
    drop_unlisted: bool = False
    """Leave out photographs that the table does not name, instead of failing."""
    exif: bool = False
    """Take place and date from the camera's EXIF where the table has none."""

    def plan(self, room: Room) -> Plan:
        """Reads the folder, its tables and, if asked to, the cameras' notes."""
        files = find_files(self.root, self.meta)
        if self.meta is None:
            tables = {posixpath.dirname(name): read_table(self.root / name) for name in files.tables}
        else:
            tables = {"": read_table(self.meta)}
        columns = _same_columns(tables, files.tables)
        where = str(self.meta or self.root.joinpath(*files.tables[:1]))
        roles = self.roles(columns, where)
        if not tables and (self.drop_unlisted or self.file_column != "file_name"):
            flag = "--drop-unlisted" if self.drop_unlisted else "--file-column"
            raise ValueError(f"{flag}: {where} has no table; put a metadata.csv there, or name one with --meta")
        rows = list(self._rows(files.photographs, tables, roles, columns, where))
        unlisted = self._unlisted(rows, files.photographs, where)
        with self.reading() as reader:
            found, taxa = self.read(rows, roles, reader)
        paths = {o.image_id: row.path for o, row in zip(found, rows, strict=True)}
        facts = {
            **column_facts(
                [c for c in columns if c != self.file_column], roles, self.hierarchy_columns, "the folder's name"
            ),
            "files passed over": files.others or "none",
            "photographs that no table names, left out": unlisted,
            **reader.facts,
        }
        if self.exif:
            found, filled = _with_exif(found, self.root, paths, room.console)
            facts["taken from EXIF"] = filled
        return self.assemble(found, taxa, Files(self.root, paths, self.fit), facts)

    def _rows(
        self,
        photographs: Sequence[str],
        tables: Mapping[str, Table],
        roles: Mapping[str, str],
        columns: Sequence[str],
        where: str,
    ) -> Iterator[Row]:
        """A row for every photograph that a table names, or without tables for every photograph."""
        listed = (
            list(self._listed(photographs, tables))
            if tables
            else [(str(self.root / p), p, {}) for p in photographs]
        )
        paths = [path for _, path, _ in listed]
        splits = {} if self.split_column else _splits_by_folder(paths)
        if splits and "split" in roles:
            raise ValueError(
                f"{where}: column {roles['split']!r} says the split, and so do the folders; "
                f"--split-column {roles['split']} takes the column, --split-column '' the folders"
            )
        labels = {} if "label" in roles else _labels_by_folder(paths, bool(splits), columns, where)
        for row_where, path, values in listed:
            *groups, label = labels.get(path, (None,))
            yield Row(row_where, path, image_id(path), values, label, tuple(groups), splits.get(path))

    def _listed(
        self, photographs: Sequence[str], tables: Mapping[str, Table]
    ) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """Where a row stands, the photograph it names, and its values."""
        there = {_normal(path): path for path in photographs}
        first: dict[str, str] = {}
        for folder, table in tables.items():
            for where, values in table.rows.items():
                if self.file_column not in values:
                    listed = ", ".join(table.columns)
                    raise ValueError(
                        f"{where}: no column {self.file_column!r}; --file-column names one of {listed}"
                    )
                name = str(values[self.file_column] or "").strip()
                path = there.get(_normal(posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))))
                if path is None:
                    raise ValueError(f"{where}: {_not_there(name, photographs)}")
                if path in first:
                    raise ValueError(f"{where}: {path} stands in {first[path]} already; one row for a photograph")
                first[path] = where
                yield where, path, values

    def _unlisted(self, rows: Sequence[Row], photographs: Sequence[str], where: str) -> int:
        listed = {row.path for row in rows}
        unlisted = [path for path in photographs if path not in listed]
        if unlisted and not self.drop_unlisted:
            raise ValueError(
                f"{where}: {len(unlisted):,} of {len(photographs):,} photographs have no row, the first is "
                f"{unlisted[0]}; --drop-unlisted leaves them out"
            )
        return len(unlisted)


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies in a folder: paths below it, sorted, and what was passed over, by suffix."""

    photographs: tuple[str, ...]
    tables: tuple[str, ...]
    others: dict[str, int]


def find_files(root: Path, meta: Path | None) -> Found:
    """All photographs and metadata files of a folder; hidden ones are none. Links are followed.

    Raises:
        ValueError: no such folder, or no photograph in it.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "no such folder"
        raise ValueError(f"{root}: {what}; --root is the folder of the photographs")
    paths = []
    for folder, below, names in os.walk(root, onerror=_unlisted, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    names = sorted(p.relative_to(root).as_posix() for p in paths if meta is None or p != meta)
    photographs = tuple(name for name in names if name.lower().endswith(SUFFIXES))
    if not photographs:
        raise ValueError(f"{root}: no photograph here or below ({', '.join(SUFFIXES)})")
    tables = () if meta else tuple(name for name in names if posixpath.basename(name) in METADATA_NAMES)
    suffixes = Counter(posixpath.splitext(name)[1] or "no suffix" for name in {*names} - {*photographs, *tables})
    return Found(photographs, tables, dict(suffixes.most_common()))


def _unlisted(error: OSError) -> None:
    raise OSError(f"{error.filename}: cannot be listed ({error.strerror})")


def _same_columns(tables: Mapping[str, Table], names: Sequence[str]) -> tuple[str, ...]:
    """The columns of all tables, which must be alike."""
    if len(tables) < len(names):
        raise ValueError(f"{names[0]}: another metadata file stands in the same folder; keep one")
    columns = {table.columns for table in tables.values()}
    if len(columns) > 1:
        one, other = (", ".join(some) for some in sorted(columns)[:2])
        raise ValueError(f"{names[0]}: metadata files with unlike columns: {one}; and {other}")
    return columns.pop() if columns else ()


def _normal(path: str) -> str:
    # One computer writes e-acute as one character, the other as two.
    return unicodedata.normalize("NFC", path)


def _not_there(name: str, photographs: Sequence[str]) -> str:
    """The message for a file that a table names and the folder has not."""
    if not name:
        return "names no file"
    shared = [_shared_end(name, path) for path in photographs]
    best = max(shared, default=0)
    if not best:
        return f"file {name!r} is not there, nor a photograph of that name elsewhere in the folder"
    alike = [path for path, parts in zip(photographs, shared, strict=True) if parts == best]
    hint = (
        f"is it {alike[0]}?" if len(alike) == 1 else f"{len(alike):,} photographs in other folders have its name"
    )
    return f"file {name!r} is not there; {hint}"


def _shared_end(one: str, other: str) -> int:
    """How many parts two paths have in common at their ends; case and suffix do not count."""
    ends = [posixpath.splitext(path.replace("\\", "/"))[0].lower().split("/")[::-1] for path in (one, other)]
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))


def _splits_by_folder(paths: Sequence[str]) -> dict[str, str]:
    """Path -> split, where the first folder says it; nothing where no first folder is called as a split is.

    Raises:
        ValueError: only some photographs lie in such folders.
    """
    splits = {path: SPLIT_NAMES[top] for path in paths if (top := path.split("/")[0].lower()) in SPLIT_NAMES}
    outside = [path for path in paths if path not in splits]
    if splits and outside:
        raise ValueError(
            f"{next(iter(splits))} lies in a folder of a split and {outside[0]} in none: "
            "lay all of them in train, val and test, or rename the folder"
        )
    return splits


def _labels_by_folder(
    paths: Sequence[str], below_split: bool, columns: Sequence[str], where: str
) -> dict[str, tuple[str, ...]]:
    """Path -> the folders down to that of its class.

    Raises:
        ValueError: a photograph lies in no folder of a class, or they lie at unequal depths.
    """
    labels = {path: tuple(path.split("/")[int(below_split) : -1]) for path in paths}
    shallow, deep = (f(paths, key=lambda path: len(labels[path])) for f in (min, max))
    if not labels[shallow]:
        if columns:
            raise no_label(columns, where)
        raise ValueError(
            f"{where}: {shallow} lies in no folder of a class: lay photographs as CLASS/x.jpg, or put a "
            "metadata.csv with columns file_name and label beside them"
        )
    if len(labels[shallow]) < len(labels[deep]):
        raise ValueError(f"{where}: the classes are no folders of one depth: {shallow}, {deep}")
    return labels


def _with_exif(
    found: Sequence[Observation], root: Path, paths: Mapping[str, str], console: Console
) -> tuple[list[Observation], dict[str, int]]:
    """The observations with what the cameras noted, where nothing else is known; and how often."""
    filled = {"places": 0, "dates": 0}
    complete = []
    with progress(console, "read EXIF", len(found), "photographs") as advance:
        for o in found:
            note = exif.read(root / paths[o.image_id]) if o.lon is None or o.date is None else exif.NOTHING
            new: dict[str, Any] = {}
            if o.lon is None and note.lon is not None:
                new.update(lon=note.lon, lat=note.lat)
                filled["places"] += 1
            if o.date is None and note.date is not None:
                new.update(date=note.date)
                filled["dates"] += 1
            complete.append(dataclasses.replace(o, **new))
            advance(1)
    return complete, filled
