"""NABirds: the release of Cornell, joined with the location file of `shards.locations`.

The release is a folder, or the archive it comes in. Every table has one line per record, fields parted by
one space, no header:

    images.txt               <id> <path below images/>          photographers.txt  <id> <name>   (optional)
    image_class_labels.txt   <id> <raw class id>                classes.txt        <raw class id> <name>
    train_test_split.txt     <id> <1 train | 0 test>            hierarchy.txt      <child id> <parent id>
    bounding_boxes.txt       <id> <x> <y> <w> <h>               sizes.txt          <id> <width> <height>
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shards import archive
from shards.locations import (
    Location,
    Locations,
    check_same_classes,
    check_same_images,
    check_same_split,
    read_locations,
)
from shards.photographs import Fit, of_file
from shards.plan import Photograph, Plan, count
from shards.source import SPOOL_NAME, Room, Source
from xcon.records import ClassInfo, Record, number_classes

_TABLES = (
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
    "classes.txt",
    "hierarchy.txt",
    "bounding_boxes.txt",
    "sizes.txt",
)
_PHOTOGRAPHERS = "photographers.txt"

_NOWHERE = Location("", 0, None, None, None, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NABirds(Source):
    """Shards of the NABirds release."""

    NAME = "nabirds"

    root: Path
    """The release: its folder, or its .tar.gz as downloaded."""
    meta: Path | None = None
    """nabirds_with_loc_2019.json of geo_prior: places, dates, val. Without it there are none."""
    val_per_class: int = 0
    """Without --meta: photographs of each class drawn from train for val."""

    def check(self) -> None:
        """Raises ValueError for a setting that could only fail later."""
        super().check()
        self._check_numbers(val_per_class=(0, 1_000_000))
        if self.meta is not None and self.val_per_class:
            raise ValueError(f"--val-per-class {self.val_per_class}: --meta says what is val; give one of them")

    def plan(self, room: Room) -> Plan:
        """Reads the release, an archive in one pass, and the location file."""
        locations = None if self.meta is None else read_locations(self.meta)
        if archive.is_archive(self.root):
            release = read_archive(self.root, room, None if self.dry_run else self.fit)
        else:
            release = read_folder(self.root, self.fit)
        if not self.dry_run:
            check_photographs(release)
        return plan(release, locations, val_per_class=self.val_per_class, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Release:
    """The text files of a release, and a way to its photographs.

    Attributes:
        name: the folder or archive, for messages.
        texts: file name -> text.
        files: paths below `images/` that are there.
        photograph: path below `images/` -> the photograph as it goes into the tar; picklable.
    """

    name: str
    texts: Mapping[str, str]
    files: frozenset[str]
    photograph: Callable[[str], Photograph]


@dataclasses.dataclass(frozen=True)
class _InFolder:
    """Photographs by their paths below a folder."""

    images: Path
    fit: Fit

    def __call__(self, path: str) -> Photograph:
        return of_file(self.images / path, f"images/{path}", self.fit)


@dataclasses.dataclass(frozen=True)
class _Below:
    """Photographs of a spool by their paths below a folder of the archive."""

    spooled: archive.Spooled
    images: str

    def __call__(self, path: str) -> Photograph:
        return self.spooled(self.images + path)


@dataclasses.dataclass(frozen=True)
class _ById:
    """Photographs by image id."""

    photograph: Callable[[str], Photograph]
    paths: Mapping[str, str]

    def __call__(self, image_id: str) -> Photograph:
        return self.photograph(self.paths[image_id])


def read_folder(root: Path, fit: Fit) -> Release:
    """A release that lies unpacked in `root`, or in the one folder below it.

    Raises:
        ValueError: no such folder, no release in it, or a table is missing.
    """
    if not root.is_dir():
        what = "no folder, and no .tar.gz by its name" if root.exists() else "no such folder"
        raise ValueError(f"{root}: {what}; --root is the NABirds release, a folder or a .tar.gz")
    found = [*root.glob("images.txt"), *root.glob("*/images.txt")]
    top = _top([p.relative_to(root).as_posix() for p in found], str(root))
    folder = root / top
    names = [n for n in (*_TABLES, _PHOTOGRAPHERS) if (folder / n).is_file()]
    images = folder / "images"

    return _release(
        name=str(folder),
        tables={n: (folder / n).read_bytes() for n in names},
        files=frozenset(p.relative_to(images).as_posix() for p in images.rglob("*") if p.is_file()),
        photograph=_InFolder(images, fit),
    )


def read_archive(path: Path, room: Room, fit: Fit | None) -> Release:
    """A release in its archive, read in one pass; `fit` None leaves the photographs out.

    Raises:
        ValueError: no such file, not a whole archive, no release in it, or a table is missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --root is the NABirds release, a folder or a .tar.gz")
    if fit is None:
        texts, names = archive.scan(path, room.console, None)
        spooled = archive.Spooled(path, {}, {})
    else:
        with archive.Spool(room.folder / SPOOL_NAME, fit, room.workers) as spool:

            def keep(name: str, data: bytes) -> None:
                spool.add(name, data, f"images/{name.rpartition('images/')[2]}")

            texts, names = archive.scan(path, room.console, keep)
            spooled = spool.spooled()
    top = _top(texts, str(path))
    images = str(top / "images") + "/"
    return _release(
        name=str(path),
        tables={n: texts[str(top / n)] for n in (*_TABLES, _PHOTOGRAPHERS) if str(top / n) in texts},
        files=frozenset(n.removeprefix(images) for n in names if n.startswith(images)),
        photograph=_Below(spooled, images),
    )


def _top(names: Iterable[str], where: str) -> PurePosixPath:
    """The folder of the one `images.txt`."""
    found = sorted(n for n in names if PurePosixPath(n).name == "images.txt")
    if not found:
        raise ValueError(f"{where}: no images.txt here or below, so no NABirds release")
    if len(found) > 1:
        raise ValueError(f"{where}: more than one release below ({', '.join(found[:3])}); name one of them")
    return PurePosixPath(found[0]).parent


def _release(
    name: str, tables: dict[str, bytes], files: frozenset[str], photograph: Callable[[str], Photograph]
) -> Release:
    if missing := [table for table in _TABLES if table not in tables]:
        raise ValueError(f"{name}: {missing[0]} is missing, so this is not a whole NABirds release")
    texts = {table: _decode(data, f"{name}: {table}") for table, data in tables.items()}
    return Release(name=name, texts=texts, files=files, photograph=photograph)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from None


def check_photographs(release: Release) -> None:
    """Raises ValueError where `images.txt` names photographs that are not there."""
    named = list(_table(release, "images.txt").values())
    if missing := [path for path in named if path not in release.files]:
        raise ValueError(
            f"{release.name}: {len(missing):,} of {len(named):,} photographs of images.txt are not there, "
            f"the first is images/{missing[0]}; unpack or download the whole release"
        )


def plan(release: Release, locations: Locations | None, *, val_per_class: int, seed: int) -> Plan:
    """Joins the tables of a release, and the location file where there is one.

    `bbox` ([x, y, w, h], clipped to the image), `width` and `height` are pixels of the ORIGINAL photograph,
    not of the smaller one in the tar. Without a location file there are no places, no dates and no
    scientific names, and `val` is `val_per_class` photographs of each class drawn from train.

    Raises:
        ValueError: a table is damaged, tables do not fit together, or the location file is of another
            release or split.
    """
    paths = _table(release, "images.txt")
    raw = _labels(release, paths)
    numbers = number_classes(raw.values())
    splits = _splits(release, paths)
    known = {} if locations is None else locations.records
    if locations is not None:
        check_same_images(locations, release.name, paths)
        check_same_classes(locations, release.name, {paths[i]: numbers[raw[i]] for i in paths}, len(numbers))
        check_same_split(locations, {paths[i]: splits[i] for i in paths})
        splits = {i: known[path].split for i, path in paths.items()}
    elif val_per_class:
        splits = _draw_val(splits, raw, val_per_class, seed)
    names = _by_number(release, "classes.txt")
    extras, clipped = _extras(release, paths)
    records = []
    for image_id, path in paths.items():
        location = known.get(path, _NOWHERE)
        try:
            record = Record(
                image_id=image_id,
                class_id=numbers[raw[image_id]],
                raw_class_id=raw[image_id],
                class_name=names[raw[image_id]],
                lon=location.lon,
                lat=location.lat,
                date=location.date,
                split=splits[image_id],
                extra={"user_id": location.user_id, **extras[image_id]},
            )
        except ValueError as error:
            raise ValueError(f"{locations.name if locations else release.name}: {path}: {error}") from None
        records.append(record)
    scientific = (None,) * len(numbers) if locations is None else locations.scientific_names
    classes = _classes(release, numbers, names, scientific)
    facts = {**_facts(release, paths), "boxes that leave the image, clipped": clipped}
    return Plan(count(classes, records), tuple(records), _ById(release.photograph, paths), facts)


def _facts(release: Release, paths: Mapping[str, str]) -> dict[str, Any]:
    suffixes = Counter(PurePosixPath(path).suffix for path in paths.values())
    return {
        "files by suffix": dict(sorted(suffixes.items(), key=lambda item: -item[1])),
        "photographs that are not there": sum(path not in release.files for path in paths.values()),
    }


def _table(release: Release, name: str) -> dict[str, str]:
    """First field -> rest of the line, its spelling kept.

    Raises:
        ValueError: a line without a second field, or a first field twice.
    """
    rows: dict[str, str] = {}
    for number, line in enumerate(release.texts[name].split("\n"), start=1):
        key, space, rest = line.removesuffix("\r").partition(" ")
        if not key and not rest:
            continue
        if not space or not rest.strip():
            raise ValueError(f"{release.name}: {name} line {number}: {line.strip()!r} has no second field")
        if key in rows:
            raise ValueError(f"{release.name}: {name} line {number}: {key} stands there twice")
        rows[key] = rest
    if not rows:
        raise ValueError(f"{release.name}: {name} is empty")
    return rows


def _integers(release: Release, name: str, fields: int, images: Mapping[str, str]) -> dict[str, list[int]]:
    """A table of whole numbers, one line for every image and no other."""
    rows = _table(release, name)
    if missing := [i for i in images if i not in rows]:
        raise ValueError(f"{release.name}: {name} has no line for image {missing[0]} of images.txt")
    if extra := [i for i in rows if i not in images]:
        raise ValueError(f"{release.name}: {name} has a line for image {extra[0]}, which images.txt has not")
    numbers: dict[str, list[int]] = {}
    for image_id, rest in rows.items():
        try:
            numbers[image_id] = [int(field) for field in rest.split()]
        except ValueError:
            numbers[image_id] = []
        if len(numbers[image_id]) != fields:
            raise ValueError(
                f"{release.name}: {name}: image {image_id} has {rest!r}, {fields} whole numbers are needed"
            )
    return numbers


def _by_number(release: Release, name: str) -> dict[int, str]:
    """A table whose first field is a raw class id."""
    rows = _table(release, name)
    if wrong := [key for key in rows if not key.isdecimal()]:
        raise ValueError(f"{release.name}: {name}: {wrong[0]!r} is no class id")
    return {int(key): rest for key, rest in rows.items()}


def _labels(release: Release, images: Mapping[str, str]) -> dict[str, int]:
    labels = {i: row[0] for i, row in _integers(release, "image_class_labels.txt", 1, images).items()}
    named = _by_number(release, "classes.txt")
    if unknown := [i for i, raw in labels.items() if raw not in named]:
        raise ValueError(
            f"{release.name}: image {unknown[0]} has class {labels[unknown[0]]}, which classes.txt has not"
        )
    return labels


def _splits(release: Release, images: Mapping[str, str]) -> dict[str, str]:
    rows = _integers(release, "train_test_split.txt", 1, images)
    if wrong := [i for i, row in rows.items() if row[0] not in (0, 1)]:
        raise ValueError(
            f"{release.name}: train_test_split.txt: image {wrong[0]} has {rows[wrong[0]][0]}; 1 train, 0 test"
        )
    return {i: "train" if rows[i][0] else "test" for i in images}


def _extras(release: Release, images: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], int]:
    """What is kept beside the record (see `plan`), and how many boxes were clipped."""
    boxes = _integers(release, "bounding_boxes.txt", 4, images)
    sizes = _integers(release, "sizes.txt", 2, images)
    people = _table(release, _PHOTOGRAPHERS) if _PHOTOGRAPHERS in release.texts else {}
    extras: dict[str, dict[str, Any]] = {}
    for image_id in images:
        width, height = sizes[image_id]
        extras[image_id] = {
            "bbox": clip_box(boxes[image_id], width=width, height=height),
            "width": width,
            "height": height,
        }
        if image_id in people:
            extras[image_id]["photographer"] = people[image_id]
    return extras, sum(extras[i]["bbox"] != boxes[i] for i in images)


def clip_box(box: list[int], *, width: int, height: int) -> list[int]:
    """[x, y, w, h] in pixels, without what lies outside the image."""
    x, y, w, h = box
    left, top = min(max(x, 0), width), min(max(y, 0), height)
    right, bottom = min(max(x + w, left), width), min(max(y + h, top), height)
    return [left, top, right - left, bottom - top]


def _classes(
    release: Release, numbers: Mapping[int, int], names: Mapping[int, str], scientific: tuple[str | None, ...]
) -> tuple[ClassInfo, ...]:
    parents: dict[int, int] = {}
    for child, parent in _by_number(release, "hierarchy.txt").items():
        if not parent.strip().isdecimal() or int(parent) not in names:
            raise ValueError(f"{release.name}: hierarchy.txt: parent {parent!r} of {child} is no class")
        parents[child] = int(parent)
    return tuple(
        ClassInfo(
            class_id=number,
            raw_class_id=raw,
            name=names[raw],
            scientific_name=scientific[number],
            hierarchy=tuple(names[node] for node in ancestors(raw, parents)),
            counts={},
        )
        for raw, number in numbers.items()
    )


def ancestors(node: int, parents: Mapping[int, int]) -> list[int]:
    """The nodes above, from the top group down to the parent; the root, which has no parent, is left out.

    Raises:
        ValueError: the hierarchy runs in a circle.
    """
    above: list[int] = []
    while (parent := parents.get(node)) is not None and parent in parents:
        if parent in above:
            raise ValueError(f"hierarchy.txt: class {parent} is its own ancestor")
        above.append(parent)
        node = parent
    return above[::-1]


def _draw_val(splits: Mapping[str, str], raw: Mapping[str, int], number: int, seed: int) -> dict[str, str]:
    """Moves `number` photographs of each class from train to val."""
    train = defaultdict(list)
    for image_id in sorted(splits):
        if splits[image_id] == "train":
            train[raw[image_id]].append(image_id)
    rng = np.random.default_rng(seed)
    drawn: set[str] = set()
    for raw_id in sorted(set(raw.values())):
        if len(train[raw_id]) <= number:
            raise ValueError(
                f"--val-per-class {number}: class {raw_id} has only {len(train[raw_id])} train photographs"
            )
        drawn.update(train[raw_id][k] for k in rng.choice(len(train[raw_id]), number, replace=False))
    return {i: "val" if i in drawn else split for i, split in splits.items()}
