"""What sources of placed and dated photographs share: reading a place, a date and a split, ids made from paths.

Such a source finds `Observation`s, each with the raw id of its class, and the `Taxon` of every raw id;
`Observations.assemble` makes a plan of them.
"""

import dataclasses
import datetime
import hashlib
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shards.photographs import Fit, of_file
from shards.plan import Photograph, Plan, count
from shards.source import Source
from xcon.records import PLAIN_CAPTION, ClassInfo, Record, check_place, number_classes, year_fraction

# What people and libraries call a split -> what it is called here.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_UNKNOWN = ("", "na", "n/a", "nan", "nat", "none", "null")  # spreadsheets' and R's words for an empty cell
_LONGEST_READABLE = 80  # characters of a path within an image id


@dataclasses.dataclass(frozen=True)
class Observation:
    """One photograph as a source found it.

    Attributes:
        where: file and row, for messages.
        image_id: see `xcon.records.Record`, as are `lon`, `lat`, `date`, `split` and `extra`.
        label: raw id of its class.
    """

    where: str
    image_id: str
    label: int | str
    lon: float | None
    lat: float | None
    date: str | float | None
    split: str
    extra: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Taxon:
    """What is known of a class, see `xcon.records.ClassInfo`."""

    name: str
    scientific_name: str | None = None
    hierarchy: tuple[str, ...] = ()


class Reader:
    """Reads places and dates as they stand in tables; what is none is unknown, and remembered."""

    def __init__(self) -> None:
        self.unreadable = {"places": 0, "dates": 0}
        self._first = ""

    def place(self, lon: Any, lat: Any, where: str) -> tuple[float | None, float | None]:
        """Degrees; None and None where unknown."""
        try:
            numbers = _number(lon, "lon"), _number(lat, "lat")
            check_place(lon=numbers[0], lat=numbers[1])
        except ValueError as error:
            self._remember("places", where, error)
            return None, None
        return numbers

    def date(self, value: Any, where: str) -> str | float | None:
        """An ISO date, or a fraction of the year; None where unknown."""
        try:
            return _date(value)
        except ValueError as error:
            self._remember("dates", where, error)
            return None

    def check(self) -> None:
        """Raises ValueError with the first that could not be read, and the number of the others."""
        if self._first:
            others = sum(self.unreadable.values()) - 1
            more = f" (and {others:,} more that are no place or no date)" if others else ""
            raise ValueError(f"{self._first}{more}; --unreadable-as-unknown takes such as unknown and counts them")

    @property
    def facts(self) -> dict[str, Any]:
        """What could not be read, for the facts of a plan; nothing where all could."""
        return {"unreadable, taken as unknown": self.unreadable} if self._first else {}

    def _remember(self, what: str, where: str, error: ValueError) -> None:
        self.unreadable[what] += 1
        self._first = self._first or f"{where}: {error}"


def is_unknown(value: Any) -> bool:
    """Whether a cell says nothing: empty, NaN, or a word such as NA."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in _UNKNOWN)


def _number(value: Any, name: str) -> float | None:
    if is_unknown(value):
        return None
    try:
        return float(str(value))
    except ValueError:
        raise ValueError(f"{name} {value!r} is no number of degrees such as -73.985") from None


def _date(value: Any) -> str | float | None:
    if is_unknown(value):
        return None
    if isinstance(value, datetime.date):
        return value.isoformat()[:10]
    text = str(value).strip()
    try:
        return datetime.datetime.fromisoformat(text).date().isoformat()
    except ValueError:
        pass  # then it is a number, or nothing
    try:
        fraction = float(text)
        year_fraction(fraction)
    except ValueError:
        raise ValueError(
            f"date {text!r} is neither an ISO date such as 2026-07-01 nor a fraction of the year in [0, 1]"
        ) from None
    return fraction


def split_of(name: str, where: str, flag: str) -> str:
    """`train`, `val` or `test`, from any of the names in use.

    Raises:
        ValueError: none of them; the message begins with `where` and names the flag that helps.
    """
    if name.strip().lower() not in SPLIT_NAMES:
        raise ValueError(f"{where}: split {name!r} is none of {', '.join(SPLIT_NAMES)}; see {flag}")
    return SPLIT_NAMES[name.strip().lower()]


def image_id(path: str) -> str:
    """An id made from a path: what is readable of it, and ten digits of its hash.

    It depends on the path alone, so that it stays when others come and go. Paths that differ only in what
    cannot stand in an id (`a/b_c.jpg`, `a/b c.jpg`, `a/b_c.png`) differ in the hash.
    """
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", str(PurePosixPath(path).with_suffix(""))).strip("-")
    return f"{readable[-_LONGEST_READABLE:]}-{hashlib.sha256(path.encode()).hexdigest()[:10]}"


@dataclasses.dataclass(frozen=True)
class Files:
    """Photographs that lie in a folder, read one by one: a `photograph` of `shards.plan.Plan`.

    Attributes:
        root: the folder.
        paths: image id -> path below `root`.
        fit: makes a photograph small.
    """

    root: Path
    paths: Mapping[str, str]
    fit: Fit

    def __call__(self, name: str) -> Photograph:
        """The photograph of one image id.

        Raises:
            BrokenPhotographError: it does not decode.
            OSError: it cannot be read.
        """
        return of_file(self.root / self.paths[name], self.paths[name], self.fit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observations(Source):
    """Settings of every source of placed and dated photographs."""

    caption: str = PLAIN_CAPTION
    """Pseudo-caption; may name {name}, {species}, {plumage}, {scientific_name}, {family} (the top group)."""
    val_per_class: int = 0
    """Photographs of each class drawn from train for val, by the seed."""
    test_per_class: int = 0
    """Photographs of each class drawn from train for test, by the seed."""
    val_share: float = 0.0
    """Share of the train photographs of each class drawn for val, instead of a number."""
    test_share: float = 0.0
    """Share of the train photographs of each class drawn for test, instead of a number."""
    unreadable_as_unknown: bool = False
    """Take what is no place or no date as unknown, and count it, instead of failing."""

    def check(self) -> None:
        """Raises ValueError for a setting that could only fail later."""
        super().check()
        self._check_numbers(val_per_class=(0, 1_000_000), test_per_class=(0, 1_000_000))
        for split in ("val", "test"):
            number, share = self._wanted(split)
            if not 0 <= share < 1:
                raise ValueError(f"--{split}-share {share}: a number from 0 to below 1 is needed")
            if number and share:
                raise ValueError(f"--{split}-share {share}: --{split}-per-class {number} is given; one of them")

    @contextmanager
    def reading(self) -> Iterator[Reader]:
        """Gives a reader of places and dates.

        Raises:
            ValueError: at the end, where something was no place or no date, unless that is to be unknown.
        """
        reader = Reader()
        yield reader
        if not self.unreadable_as_unknown:
            reader.check()

    def assemble(
        self,
        found: Sequence[Observation],
        taxa: Mapping[int | str, Taxon],
        photograph: Callable[[str], Photograph],
        facts: Mapping[str, Any],
    ) -> Plan:
        """A plan: classes numbered in order of their raw ids, val and test drawn where asked for.

        Args:
            found: every photograph once.
            taxa: raw id -> class, for every label of `found` at least.
            photograph: see `shards.plan.Plan`.
            facts: what the source noticed.

        Raises:
            ValueError: no photograph, an id twice, a value out of its range, or a class too small to draw from.
        """
        if not found:
            raise ValueError("no photograph is left: nothing to build")
        _check_unique(found)
        splits = self.draw(found)
        numbers = number_classes(o.label for o in found)
        records = tuple(_record(o, numbers[o.label], taxa[o.label].name, splits[o.image_id]) for o in found)
        classes = (
            ClassInfo(number, raw, taxa[raw].name, taxa[raw].scientific_name, taxa[raw].hierarchy, {})
            for raw, number in numbers.items()
        )
        counted = count(classes, records)
        return Plan(counted, records, photograph, {**facts, **_noticed(counted)})

    def draw(self, found: Sequence[Observation]) -> dict[str, str]:
        """Image id -> split, after val and test of each class are drawn from its train photographs.

        What is drawn of a class depends on the seed and on that class alone.

        Raises:
            ValueError: a split that is to be drawn is there already, or a class is too small.
        """
        splits = {o.image_id: o.split for o in found}
        wanted = {split: self._wanted(split) for split in ("test", "val") if any(self._wanted(split))}
        for split, (number, _) in wanted.items():
            if split in splits.values():
                flag = f"--{split}-per-class" if number else f"--{split}-share"
                raise ValueError(f"{flag}: {split} is not drawn, the source says what it is; leave the flag out")
        train = defaultdict(list)
        for o in sorted(found, key=lambda o: o.image_id):
            if o.split == "train":
                train[o.label].append(o.image_id)
        for label, ids in train.items():
            rng = np.random.default_rng([self.seed, zlib.crc32(str(label).encode())])
            order = [ids[k] for k in rng.permutation(len(ids))]
            for split, (number, share) in wanted.items():
                size = number or math.floor(share * len(ids) + 0.5)
                if size >= len(order):
                    raise ValueError(self._too_small(label, len(ids)))
                splits.update(dict.fromkeys(order[:size], split))
                order = order[size:]
        return splits

    def _wanted(self, split: str) -> tuple[int, float]:
        """Number and share to be drawn of each class."""
        if split == "val":
            return self.val_per_class, self.val_share
        return self.test_per_class, self.test_share

    def _too_small(self, label: int | str, size: int) -> str:
        flags = [
            f"--{split}-{kind} {value:g}"
            for split in ("val", "test")
            for kind, value in zip(("per-class", "share"), self._wanted(split), strict=True)
            if value
        ]
        return (
            f"{' '.join(flags)}: class {label!r} has only {size} train photographs, and one must be left to train"
        )


def _check_unique(found: Sequence[Observation]) -> None:
    first: dict[str, str] = {}
    for o in found:
        if o.image_id in first:
            raise ValueError(f"{o.where}: image id {o.image_id} stands in {first[o.image_id]} already")
        first[o.image_id] = o.where


def _record(o: Observation, number: int, name: str, split: str) -> Record:
    try:
        return Record(o.image_id, number, o.label, name, o.lon, o.lat, o.date, split, o.extra)
    except ValueError as error:
        raise ValueError(f"{o.where}: {error}") from None


def _noticed(classes: Sequence[ClassInfo]) -> dict[str, Any]:
    """What should make a user look twice, where there is any."""
    empty = {split: sum(not info.counts[split] for info in classes) for split in classes[0].counts}
    used = [split for split in empty if any(info.counts[split] for info in classes)]
    alike = Counter(" ".join(info.name.lower().split()) for info in classes)
    noticed = {
        "classes without photographs in": {split: empty[split] for split in used if empty[split]},
        "class names that differ only in case or spaces": sum(n for n in alike.values() if n > 1),
    }
    return {what: value for what, value in noticed.items() if value}
