"""The location file of macaodha/geo_prior: places, dates and a validation split for a release of NABirds.

One JSON object: `train`, `val`, `test` (lists of records with `class_id`, `im_path` and `ebird_meta`: `lon`,
`lat`, `date`, `user_id`), `classes`, `classes_sci`. Unknown numbers are the bare token NaN. The places and
dates are drawn from eBird given the species: they are not where the photograph was taken.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xcon.records import SPLITS

LOCATION_FILE = "nabirds_with_loc_2019.json"


@dataclasses.dataclass(frozen=True)
class Location:
    """One record of the location file. `lon`, `lat` in degrees, `date` the fraction of the year."""

    split: str
    class_id: int
    lon: float | None
    lat: float | None
    date: float | None
    user_id: int | None


@dataclasses.dataclass(frozen=True)
class Locations:
    """The location file: records by path below `images/`, names of the classes in order of class id."""

    name: str
    records: Mapping[str, Location]
    classes: tuple[str, ...]
    scientific_names: tuple[str | None, ...]


def read_locations(path: Path) -> Locations:
    """Reads the location file; NaN becomes None.

    Raises:
        ValueError: no such file, not JSON, or not of this form.
    """
    try:
        values = json.loads(path.read_bytes(), parse_constant=_constant)
        entries = [(split, entry) for split in SPLITS for entry in values[split]]
        records = {
            str(entry["im_path"]): Location(split=split, class_id=entry["class_id"], **_meta(entry))
            for split, entry in entries
        }
        classes = tuple(str(name) for name in values["classes"])
        scientific_names = tuple(values["classes_sci"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); --meta is {LOCATION_FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); --meta is {LOCATION_FILE}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the form of {LOCATION_FILE} ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if len(records) < len(entries):
        twice, _ = Counter(entry["im_path"] for _, entry in entries).most_common(1)[0]
        raise ValueError(f"{path}: {twice} stands there twice")
    _check_exchange(path, records.values())
    return Locations(str(path), records, classes, scientific_names)


def _constant(token: str) -> None:
    if token != "NaN":
        raise ValueError(f"the number {token} is no place and no date")


def _meta(entry: Mapping[str, Any]) -> dict[str, Any]:
    meta = entry["ebird_meta"]
    numbers = {name: _number(meta[name], f"{name} of {entry['im_path']}") for name in ("lon", "lat", "date")}
    return {**numbers, "user_id": meta["user_id"]}


def _number(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, a number is needed")
    return float(value)


def _check_exchange(path: Path, records: Iterable[Location]) -> None:
    """Finds exchanged columns that the range of lat alone would let pass (all lon in [-90, 0])."""
    places = [(r.lon, r.lat) for r in records if r.lon is not None and r.lat is not None]
    if places and max(lat for _, lat in places) < -50 and min(lon for lon, _ in places) > 0:
        raise ValueError(
            f"{path}: every lat is below -50 and every lon above 0, no place of a North American bird: "
            "are lon and lat exchanged?"
        )


def check_same_images(locations: Locations, release: str, paths: Mapping[str, str]) -> None:
    """Raises ValueError unless the file covers the images exactly (image id -> path below images/)."""
    ours = set(paths.values())
    missing = [path for path in paths.values() if path not in locations.records]
    extra = [path for path in locations.records if path not in ours]
    if not missing and not extra:
        return
    what = (
        f"{len(missing):,} of the release's {len(ours):,} images are not in it, the first is {missing[0]}"
        if missing
        else f"{len(extra):,} of its images are not in the release, the first is {extra[0]}"
    )
    raise ValueError(f"{locations.name}: the location file of another release than {release}: {what}")


def check_same_classes(locations: Locations, release: str, ours: Mapping[str, int], classes: int) -> None:
    """Raises ValueError unless every path has the class id that the release gives it."""
    if not len(locations.classes) == len(locations.scientific_names) == classes:
        raise ValueError(
            f"{locations.name}: the location file of another release than {release}: it has "
            f"{len(locations.classes)} classes and {len(locations.scientific_names)} scientific names, "
            f"the release has {classes} classes"
        )
    for path, record in locations.records.items():
        if record.class_id != ours[path]:
            raise ValueError(
                f"{locations.name}: the location file of another release than {release}: {path} has "
                f"class_id {record.class_id}, the sorted class ids of the release give {ours[path]}"
            )


def check_same_split(locations: Locations, ours: Mapping[str, str]) -> None:
    """Raises ValueError unless train and val together are the official train (path -> train or test)."""
    theirs = {path: "test" if r.split == "test" else "train" for path, r in locations.records.items()}
    if wrong := [path for path, split in ours.items() if theirs[path] != split]:
        raise ValueError(
            f"{locations.name}: the location file of another split: {len(wrong):,} images are train in one "
            f"and test in the other, the first is {wrong[0]} ({ours[wrong[0]]} in train_test_split.txt)"
        )
