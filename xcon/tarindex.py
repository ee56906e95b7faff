"""The index of a tar, made from the tar itself: where each photograph lies, and what is said of it beside it.

For WebDataset tars of anybody, and for our own whose indices are lost. Photographs are passed over, not read.
"""

import dataclasses
import io
import itertools
import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xcon.records import check_place, index_schema, year_fraction

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("raw_class_id", "label", "class_id", "class_name")  # of a json; the first that it has, then `cls`
TEXT_ENDINGS = ("txt", "cls", "json")
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # as WebDataset reads it: key, ending

Label = int | str


@dataclasses.dataclass(frozen=True)
class Keys:
    """What a record's json calls things."""

    label_key: str | None = None
    """The class; by default the first of raw_class_id, label, class_id, class_name, then the member cls."""
    name_key: str = "class_name"
    """The name of the class; its label where there is none."""
    lon_key: str = "lon"
    """Degrees east."""
    lat_key: str = "lat"
    """Degrees north."""
    date_key: str = "date"
    """An ISO date, or a fraction of the year."""
    user_key: str = "user_id"
    """Who made the observation."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The members of one key.

    Attributes:
        key: as WebDataset has it.
        places: ending -> offset and size in the tar, bytes.
        texts: ending -> content, of `txt`, `cls` and `json`.
    """

    key: str
    places: Mapping[str, tuple[int, int]]
    texts: Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class Row:
    """A record of an index before its classes are numbered; `lon`, `lat` degrees, `date` of the year, or NaN."""

    image_id: str
    offset: int
    size: int
    label: Label
    name: str
    text: str | None
    lon: float
    lat: float
    date: float
    user_id: str | None


class SkippedError(ValueError):
    """A sample that is no record; the message says what it lacks."""


def samples(path: Path) -> Iterator[Sample]:
    """The samples of a tar, in its order; members that lie side by side and share a key are one.

    Raises:
        ValueError: no tar, a compressed one, or one that breaks off.
        OSError: it cannot be read.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            named = ((match, member) for member in tar if member.isreg() if (match := NAME.fullmatch(member.name)))
            for key, group in itertools.groupby(named, key=lambda pair: pair[0][1]):
                members: dict[str, tarfile.TarInfo] = {}
                for match, member in group:
                    if members.setdefault(match[2].lower(), member) is not member:
                        raise ValueError(f"{path}: {member.name} stands there twice, so keys are no keys")
                yield Sample(
                    key,
                    {ending: (m.offset_data, m.size) for ending, m in members.items()},
                    {ending: _content(tar, members[ending]) for ending in TEXT_ENDINGS if ending in members},
                )
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar without compression ({error})") from None


def _check_end(path: Path, offset: int) -> None:
    """Raises ValueError unless a tar ends where its reader stopped: tarfile takes any damage there for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path}: breaks off or is damaged at byte {offset:,}; copy or download it again")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def read(path: Path, keys: Keys, *, prefix: str = "") -> tuple[list[Row], Counter[str]]:
    """The records of a tar.

    Args:
        path: of the tar.
        keys: what its json members call things.
        prefix: of the image ids, where keys alone are not unique.

    Returns:
        The records in the order of the tar, and what was left out: why -> how often.

    Raises:
        ValueError, OSError: as `samples`.
    """
    rows, left_out = [], Counter[str]()
    for sample in samples(path):
        try:
            rows.append(row_of(sample, keys, prefix, left_out))
        except SkippedError as skipped:
            left_out[str(skipped)] += 1
    return rows, left_out


def row_of(sample: Sample, keys: Keys, prefix: str, left_out: Counter[str]) -> Row:
    """One record; places and dates that are none are counted in `left_out`, and unknown.

    Raises:
        SkippedError: it has no image, no label, or damaged texts.
    """
    place = next((sample.places[ending] for ending in IMAGE_ENDINGS if ending in sample.places), None)
    if place is None:
        raise SkippedError(f"samples without an image ({', '.join(IMAGE_ENDINGS)})")
    facts = _facts(sample)
    label = _label(sample, facts, keys)
    try:
        text = sample.texts["txt"].decode() if "txt" in sample.texts else None
    except UnicodeDecodeError:
        raise SkippedError("samples whose txt is not UTF-8") from None
    user = facts.get(keys.user_key)
    lon, lat = _position(facts, keys, left_out)
    return Row(
        image_id=prefix + sample.key,
        offset=place[0],
        size=place[1],
        label=label,
        name=str(facts.get(keys.name_key, label)),
        text=text,
        lon=lon,
        lat=lat,
        date=_date(facts, keys, left_out),
        user_id=None if user is None else str(user),
    )


def _facts(sample: Sample) -> Mapping[str, Any]:
    try:
        facts = json.loads(sample.texts.get("json", b"{}"))
    except ValueError:
        raise SkippedError("samples whose json is damaged") from None
    if not isinstance(facts, dict):
        raise SkippedError("samples whose json is no object")
    return facts


def _label(sample: Sample, facts: Mapping[str, Any], keys: Keys) -> Label:
    names = LABEL_KEYS if keys.label_key is None else (keys.label_key,)
    found = next((facts[name] for name in names if facts.get(name) is not None), None)
    if found is None and keys.label_key is None and "cls" in sample.texts:
        found = sample.texts["cls"].decode(errors="replace").strip()
        found = int(found) if found.isdecimal() else found or None
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise SkippedError(f"samples without a label (json {', '.join(names)}{'' if keys.label_key else '; cls'})")
    return found


def _position(facts: Mapping[str, Any], keys: Keys, left_out: Counter[str]) -> tuple[float, float]:
    """Longitude and latitude; one that no place on Earth has is counted and unknown."""
    lon, lat = facts.get(keys.lon_key), facts.get(keys.lat_key)
    if lon is None and lat is None:
        return math.nan, math.nan
    try:
        lon, lat = float(lon), float(lat)  # type: ignore[arg-type]
        check_place(lon=lon, lat=lat)
    except (TypeError, ValueError):
        left_out[f"places that are no degrees ({keys.lon_key}, {keys.lat_key})"] += 1
        return math.nan, math.nan
    return lon, lat


def _date(facts: Mapping[str, Any], keys: Keys, left_out: Counter[str]) -> float:
    try:
        return year_fraction(facts.get(keys.date_key))
    except (TypeError, ValueError):
        left_out[f"dates that are none ({keys.date_key})"] += 1
        return math.nan


def prefix_of(name: str) -> str:
    """What the image ids of a tar begin with where keys come twice: `a/0001.tar` -> `a/0001/`."""
    return name.removesuffix(".tar") + "/"


def table(
    rows: Iterable[Row], class_id: Mapping[Label, int], captions: Sequence[str], *, own_texts: bool
) -> pa.Table:
    """The index of some records, see `records.INDEX_COLUMNS`.

    Args:
        rows: of one tar.
        class_id: label -> 0 .. C-1.
        captions: `[C]` of the classes.
        own_texts: where a record has a text, it is its caption.

    Raises:
        KeyError: a label that has no number.
    """
    columns: dict[str, list[Any]] = {name: [] for name in index_schema().names}
    for row in rows:
        number = class_id[row.label]
        text = row.text if own_texts and row.text is not None else captions[number]
        known = {"class_id": number, "caption": text}
        for name, values in columns.items():
            values.append(known[name] if name in known else getattr(row, name))
    return pa.table(columns, schema=index_schema())


def to_bytes(index: pa.Table) -> bytes:
    """An index as it is written."""
    sink = io.BytesIO()
    pq.write_table(index, sink)
    return sink.getvalue()
