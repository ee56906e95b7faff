"""The record: what one photograph carries from its source through shards and loader to its prediction.

`shards/` writes records, `xcon.shardset` reads them, and this module is what they agree on: the fields and
their units, the members of a tar, the columns of an index, the card of a shard set, the file writes that
leave either the whole file or none.
"""

import dataclasses
import datetime
import difflib
import hashlib
import json
import math
import os
import re
import string
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

SPLITS = ("train", "val", "test")
CARD_NAME = "dataset.json"
BUILDING_NAME = ".xcon-build"  # stands in a folder while a set is built there
FORMAT = "xcon-shards/1"

# The paper's sentence, section 3.1, "Text Embedding". Fields: those of `ClassInfo.caption_fields`.
PAPER_CAPTION = "This is a photograph of a bird called {name}"

PLAIN_CAPTION = "This is a photograph of {name}"  # for whatever else there is

# What Pillow raises on a damaged file, by experience; its DecompressionBombError beside them.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)

# One row of an index: where the photograph lies in its tar, and all of the record that training needs.
# `lon`, `lat` are degrees, `date` the fraction of the year; NaN where unknown. `user_id` is null where unknown.
INDEX_COLUMNS = {
    "image_id": "string",
    "offset": "int64",
    "size": "int64",
    "class_id": "int32",
    "lon": "float64",
    "lat": "float64",
    "date": "float64",
    "caption": "string",
    "user_id": "string",
}
# Columns that an index made by an earlier version lacks: unknown there.
LATER_COLUMNS = ("user_id",)


@dataclasses.dataclass(frozen=True)
class Record:
    """One photograph and what is known of it.

    Attributes:
        image_id: the key of its members in the tar; no dot, no slash, at most 95 characters (a name in a
            USTAR archive ends at 100).
        class_id: 0 .. C-1, the position of `raw_class_id` among the sorted raw ids.
        raw_class_id: the class id of the source, as it stands there.
        class_name: the name of the source, its spelling kept.
        lon: degrees east, WGS-84, in [-180, 180], or None.
        lat: degrees north, WGS-84, in [-90, 90], or None.
        date: an ISO date (`2026-07-01`), a fraction of the year in [0, 1], or None.
        split: one of `SPLITS`.
        extra: what else the source knows (`user_id`, `bbox`, `width`, `height`), saved beside the rest.

    Raises:
        ValueError: a value is out of its range; the message names the record.
    """

    image_id: str
    class_id: int
    raw_class_id: int | str
    class_name: str
    lon: float | None
    lat: float | None
    date: str | float | None
    split: str
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check_image_id(self.image_id)
            check_place(lon=self.lon, lat=self.lat)
            year_fraction(self.date)
            if self.split not in SPLITS:
                raise ValueError(f"split is {self.split!r}, one of {', '.join(SPLITS)} is needed")
        except ValueError as error:
            raise ValueError(f"record {self.image_id}: {error}") from None

    def to_json(self) -> bytes:
        """The `json` member of the tar: strict JSON, unknown values null."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return json.dumps({**fields, **self.extra}, ensure_ascii=False, allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Record":
        """Reads a `json` member.

        Raises:
            ValueError: not a JSON object, a field is missing, or a value is out of its range or of the wrong kind.
        """
        try:
            values = json.loads(data)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        names = [f.name for f in dataclasses.fields(cls) if f.name != "extra"]
        if missing := [n for n in names if n not in values]:
            raise ValueError(f"fields missing: {', '.join(missing)}")
        try:
            return cls(**{n: values.pop(n) for n in names}, extra=values)
        except TypeError as error:
            raise ValueError(f"a value of the wrong kind ({error})") from None


def check_image_id(image_id: str) -> None:
    """Raises ValueError where WebDataset would split, cut or misread the key."""
    if not image_id or len(image_id) > 95 or set(image_id) & set("./\\ ") or not image_id.isprintable():
        raise ValueError("an image id has 1 to 95 characters, none of them a dot, slash or space")


def check_place(*, lon: float | None, lat: float | None) -> None:
    """Raises ValueError unless both are None, or both are degrees within range."""
    if (lon is None) != (lat is None):
        raise ValueError(f"lon is {lon}, lat is {lat}: both or neither")
    if lon is None or lat is None:
        return
    if not -90 <= lat <= 90:
        swapped = ": are lon and lat exchanged?" if -180 <= lat <= 180 and -90 <= lon <= 90 else ""
        raise ValueError(f"lat {lat} is outside [-90, 90] degrees{swapped}")
    if not -180 <= lon <= 180:
        raise ValueError(f"lon {lon} is outside [-180, 180] degrees")


def year_fraction(date: str | float | None) -> float:
    """The day as a fraction of its year: 0.0 on 1 January, 1.0 on 31 December; NaN for None.

    (day_of_year - 1) / (days_in_year - 1), the convention of the NABirds location file.

    Raises:
        ValueError: neither an ISO date nor a number in [0, 1].
    """
    if date is None:
        return math.nan
    if isinstance(date, str):
        try:
            day = datetime.datetime.fromisoformat(date).date()
        except ValueError:
            raise ValueError(f"date {date!r} is no ISO date such as 2026-07-01") from None
        first, last = day.replace(month=1, day=1), day.replace(month=12, day=31)
        return (day - first).days / (last - first).days
    if not 0 <= date <= 1:
        raise ValueError(f"date {date} is no fraction of the year in [0, 1]")
    return float(date)


@dataclasses.dataclass(frozen=True)
class ClassInfo:
    """One class of a shard set.

    Attributes:
        class_id: 0 .. C-1.
        raw_class_id: the id of the source; classes are sorted by it.
        name: the name of the source, its spelling kept.
        scientific_name: or None where unknown.
        hierarchy: names from the top group down to the parent of this class, without the root.
        counts: split -> number of records.
    """

    class_id: int
    raw_class_id: int | str
    name: str
    scientific_name: str | None
    hierarchy: tuple[str, ...]
    counts: Mapping[str, int]

    @property
    def caption_fields(self) -> dict[str, str]:
        """What a caption template may name.

        Returns:
            `name`; `species`, the name without a parenthesis at its end; `plumage`, the words of that parenthesis
            (sex, age, morph), empty without one; where they are known `scientific_name` and `family`, the top
            group of the hierarchy.
        """
        name = " ".join(self.name.split())
        species, words = split_plumage(name)
        known = {
            "scientific_name": self.scientific_name,
            "family": self.hierarchy[0] if self.hierarchy else None,
        }
        # NABirds writes the same as "Female/immature" and "Female, immature", "Adult Male" and "Adult male".
        plumage = " or ".join(part.strip() for part in re.split("[/,]", words.lower()))
        named = {"name": name, "species": species, "plumage": plumage}
        return named | {field: value for field, value in known.items() if value}


def index_schema() -> pa.Schema:
    """The columns of an index as Arrow types."""
    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in INDEX_COLUMNS.items()])


def caption(template: str, info: ClassInfo) -> str:
    """The pseudo-caption of a class (paper, section 3.1), its words set apart by single spaces.

    So `a {plumage} {species}` reads well for a class without plumage too.

    Raises:
        ValueError: the template names a field that the class has not, or none at all.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"caption template {template!r}: {error}") from None
    if not fields:
        raise ValueError(f"caption template {template!r} names no field: every class would be called alike")
    if missing := [f for f in fields if f not in info.caption_fields]:
        have = ", ".join(info.caption_fields)
        raise ValueError(f"caption template {template!r}: class {info.name!r} has no {missing[0]!r}, only {have}")
    return " ".join(template.format(**info.caption_fields).split())


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar of a split, and the hash of its bytes.

    Raises:
        ValueError: the file's name leads out of the folder of the set.
    """

    file: str
    samples: int
    size: int
    sha256: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.file)
        if path.suffix != ".tar" or path.is_absolute() or ".." in path.parts or "\\" in self.file:
            raise ValueError(f"shard {self.file!r} is no name of a .tar in the set's folder")

    @property
    def index_file(self) -> str:
        """The index beside the tar."""
        return index_name(self.file)


def index_name(tar_name: str) -> str:
    """`train-000000.tar` -> `train-000000.index.parquet`."""
    return tar_name.removesuffix(".tar") + ".index.parquet"


@dataclasses.dataclass(frozen=True)
class Card:
    """The card of a shard set, `dataset.json`: no card, no shard set.

    Attributes:
        classes: in order of `class_id`.
        splits: split -> its shards, in order.
        made_by: how the set was made (source, settings, versions), for people.
    """

    classes: tuple[ClassInfo, ...]
    splits: Mapping[str, tuple[Shard, ...]]
    made_by: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """One hash for the whole set: over the classes and the hashes of all shards."""
        digest = hashlib.sha256(json.dumps([dataclasses.asdict(c) for c in self.classes]).encode())
        for split in sorted(self.splits):
            digest.update("".join([split, *(shard.sha256 for shard in self.splits[split])]).encode())
        return digest.hexdigest()

    def samples(self, split: str) -> int:
        """Records in a split."""
        return sum(shard.samples for shard in self.splits[split])

    def class_facts(self) -> tuple[dict[str, Any], ...]:
        """The classes as plain values, as a model carries them along."""
        return tuple(dataclasses.asdict(c) for c in self.classes)

    def to_json(self) -> str:
        """The text of `dataset.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: Path) -> None:
        """Writes `dataset.json`, whole or not at all: the last step of a build."""
        with atomic_write(folder / CARD_NAME) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, folder: Path) -> "Card":
        """Reads the card of a shard set.

        Raises:
            FileNotFoundError: no such folder, or no card in it.
            ValueError: the card is of another format, or damaged.
        """
        path = folder / CARD_NAME
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; xcon-shards build makes a shard set")
        if not path.is_file():
            how = "xcon-shards build makes one, xcon-shards index one of tars that are there"
            if (folder / BUILDING_NAME).exists():
                how = "it is being built, or its build was ended: the same command goes on"
            raise FileNotFoundError(f"{folder}: no {CARD_NAME} here, so no whole shard set; {how}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError(f"format is not {FORMAT}")
            return cls(
                classes=tuple(_class_info(c) for c in values["classes"]),
                splits={name: tuple(Shard(**s) for s in shards) for name, shards in values["splits"].items()},
                made_by=values["made_by"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a card of xcon ({error}); build the shard set again") from None


def _class_info(values: Mapping[str, Any]) -> ClassInfo:
    return ClassInfo(**{**values, "hierarchy": tuple(values["hierarchy"])})


def split_plumage(name: str) -> tuple[str, str]:
    """The species, and the words of a parenthesis at the end of the name: sex, age, morph; "" without one.

    "Mallard (Male)" is ("Mallard", "Male"). Repeated spaces do not count.
    """
    whole = " ".join(name.split())
    parts = re.fullmatch(r"(.*\S) ?\(([^()]*)\)", whole)
    return (parts[1], parts[2]) if parts else (whole, "")


def classes_called(names: Sequence[str], species: str) -> list[int]:
    """Classes called `species`, or its plumages: "Mallard" is "Mallard (Male)" and "Mallard (Female)".

    Capital letters and repeated spaces do not count.

    Raises:
        ValueError: no class is called so; the message has the nearest names.
    """
    plain = [" ".join(name.split()).casefold() for name in names]
    wanted = " ".join(species.split()).casefold()
    found = [i for i, name in enumerate(plain) if name == wanted]
    found = found or [i for i, name in enumerate(plain) if split_plumage(name)[0] == wanted]
    if not found:
        near = [names[plain.index(name)] for name in difflib.get_close_matches(wanted, plain, n=3, cutoff=0.5)]
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"classes are {names[0]!r} and so on"
        raise ValueError(f"--species {species!r}: no such class here; {hint}")
    return found


def number_classes(raw_ids: Iterable[Any]) -> dict[Any, int]:
    """Raw id -> class id: the position among the sorted distinct raw ids."""
    return {raw: number for number, raw in enumerate(sorted(set(raw_ids)))}


def sha256(path: Path) -> str:
    """The hash of a file, as the card has that of a shard."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that appears at `path` only when the block ends well; otherwise nothing is left.

    Raises:
        OSError: the file cannot be written; the message names `path`.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, name):
            raise  # another file's trouble inside the block, or one that says itself what it is
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
