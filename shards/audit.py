"""What a set's test records share with those that are trained on, and what their places and dates give alone.

Photographs of one photographer's day show the same bird, often from the same branch; a model that is tested on
some and trained on others looks better than it is. And where places give the label away, any model that is given
them looks good. So numbers with metadata are worth what this table leaves of them.
"""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from xcon.records import SPLITS, atomic_write
from xcon.shardset import ShardSet, Split

if TYPE_CHECKING:
    from sklearn.neighbors import KNeighborsClassifier

# Legend: N records of train, M records of test.

EARTH_KM = 6371.0
NEAR_KM = 1.0
NEIGHBOURS = 20
MOST_TESTED = 20_000  # records whose neighbours are looked up; more are drawn from
_DAYS = 364  # from the first to the last of a year, as `records.year_fraction` counts them
_SEASON = 0.2  # radius of the year beside the globe's 1: half a year is as far apart as 2,500 km
DRAWN = (
    "NABirds' places and dates are not where and when the photographs were taken: they were drawn from eBird "
    "given the true species, so accuracy with them is an upper bound."
)
MAY_MEAN = (
    "High accuracy by place and date may be ecology, species that live apart, or a leak, photographers and sites "
    "that test shares with train: the counts above help to tell."
)


def audit(shards: ShardSet, console: Console, *, out: Path | None, seed: int) -> None:
    """Prints the counts and the accuracies, and writes them to `out` where it is given.

    Raises:
        ValueError: `out` is there already.
        OSError: it cannot be written.
    """
    if out is not None and out.exists():
        raise ValueError(f"--out {out}: is there already; name a new file")
    counted, by_metadata = shared(shards), metadata_alone(shards, seed)
    _print_shared(counted, console)
    _print_metadata(by_metadata, console)
    source = shards.card.made_by.get("source")
    remark = DRAWN if source == "nabirds" else MAY_MEAN
    console.print(remark)
    if out is not None:
        values = {
            "shards_sha256": shards.card.sha256,
            "shared": counted,
            "metadata_alone": by_metadata,
            "remark": remark,
        }
        with atomic_write(out) as file:
            file.write((json.dumps(values, indent=1) + "\n").encode())


def in_short(shards: ShardSet) -> str:
    """One line: what test shares with train."""
    if not (shards.has("train") and shards.has("test")):
        return "nothing, there are not both test and train"
    found = _shared_exactly(shards.split("test"), shards.split("train"))
    known = [f"{name} {_percent(count)}" for name, count in found.items() if count["of"]]
    return ", ".join(known) or "nothing is known of photographers and places"


def shared(shards: ShardSet) -> dict[str, dict[str, Any]]:
    """For each pair of splits, how many records of the first share something with a record of the second.

    Returns:
        `"test with train"` -> what is shared -> `{"records": of the first split that share it, "of": records that
        know it}`; what no record knows is left out.
    """
    names = [name for name in reversed(SPLITS) if shards.has(name)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {f"{a} with {b}": _shared(shards.split(a), shards.split(b)) for a, b in pairs}


def _shared(tested: Split, trained: Split) -> dict[str, Any]:
    found = _shared_exactly(tested, trained)
    found |= {"within 1 km": _near(tested, trained), "within 1 km and day": _near_same_day(tested, trained)}
    return {name: count for name, count in found.items() if count["of"]}


def _shared_exactly(tested: Split, trained: Split) -> dict[str, dict[str, int]]:
    return {
        name: _shared_keys(_keys(tested, columns), _keys(trained, columns))
        for name, columns in {
            "photographer": ("user_id",),
            "photographer and day": ("user_id", "day"),
            "place": ("place",),
            "place and day": ("place", "day"),
        }.items()
    }


def _keys(split: Split, columns: Sequence[str]) -> list[Hashable]:
    """`[N]` what the records have in some columns; None where any of it is unknown."""
    lon, lat, date = split.place.T
    every: dict[str, Iterable[Hashable]] = {
        "user_id": split.user_id.tolist(),
        "day": [None if np.isnan(d) else round(d * _DAYS) for d in date],
        "place": [None if np.isnan(x) or np.isnan(y) else (x, y) for x, y in zip(lon, lat, strict=True)],
    }
    rows = zip(*(every[column] for column in columns), strict=True)
    return [None if None in row else row for row in rows]


def _shared_keys(tested: Sequence[Hashable], trained: Sequence[Hashable]) -> dict[str, int]:
    seen = set(trained) - {None}
    known = [key for key in tested if key is not None]
    return {"records": sum(key in seen for key in known), "of": len(known)}


def _near(tested: Split, trained: Split) -> dict[str, int]:
    """Records that lie within `NEAR_KM` of another."""
    here, there = (_radians(split.place[_known(split, 2), :2]) for split in (tested, trained))
    return {"records": _count_near(here, there), "of": len(here)}


def _near_same_day(tested: Split, trained: Split) -> dict[str, int]:
    """Records that lie within `NEAR_KM` of another of the same day of the year."""
    here, there = (split.place[_known(split, 3)] for split in (tested, trained))
    today, that_day = (np.round(place[:, 2] * _DAYS) for place in (here, there))
    near = sum(
        _count_near(_radians(here[today == day, :2]), _radians(there[that_day == day, :2]))
        for day in np.unique(today)
    )
    return {"records": near, "of": len(here)}


def _count_near(here: np.ndarray, there: np.ndarray) -> int:
    """How many of `[M, 2]` lie near one of `[N, 2]`, lat and lon in radians."""
    if not len(here) or not len(there):
        return 0
    from sklearn.neighbors import BallTree  # noqa: PLC0415 - as below

    apart, _ = BallTree(np.unique(there, axis=0), metric="haversine").query(here)
    return int((apart[:, 0] * EARTH_KM <= NEAR_KM).sum())


def _radians(place: np.ndarray) -> np.ndarray:
    """`[N, 2]` lon and lat in degrees -> lat and lon in radians, as scikit-learn's haversine has them."""
    return np.deg2rad(place[:, ::-1])


def _known(split: Split, columns: int) -> np.ndarray:
    """`[N]` whether lon and lat, and the date where three columns are asked for, are known."""
    return ~np.isnan(split.place[:, :columns]).any(axis=1)


def metadata_alone(shards: ShardSet, seed: int) -> dict[str, Any]:
    """Top-1 on test of the nearest neighbours in train by place and date, which see no photograph.

    Returns:
        `tested` and `trained` records, those with place and date; top-1 with the `true` metadata, with that of
        another test record (`shuffled`), and of always saying the `commonest` class of train; or `not_measured`.
    """
    if not (shards.has("train") and shards.has("test")):
        return {"not_measured": "there are not both test and train"}
    trained, tested = shards.split("train"), shards.split("test")
    rows, asked = (np.flatnonzero(_known(split, 3)) for split in (trained, tested))
    if not len(rows) or not len(asked):
        return {"not_measured": "no places and dates"}
    from sklearn.neighbors import KNeighborsClassifier  # noqa: PLC0415 - seconds to import, and no build needs it

    rng = np.random.default_rng(seed)
    asked = np.sort(rng.choice(asked, min(len(asked), MOST_TESTED), replace=False))
    labels = tested.class_id[asked]
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(rows)), weights="distance")
    neighbours.fit(_features(trained.place[rows]), trained.class_id[rows])
    features = _features(tested.place[asked])
    return {
        "tested": len(asked),
        "trained": len(rows),
        "true": _accuracy(neighbours, features, labels),
        "shuffled": _accuracy(neighbours, features[rng.permutation(len(asked))], labels),
        "commonest": float((labels == np.bincount(trained.class_id).argmax()).mean()),
    }


def _features(place: np.ndarray) -> np.ndarray:
    """`[N, 5]`: a point of the unit sphere, and one of a circle for the day of the year."""
    lon, lat, turn = np.deg2rad(place[:, 0]), np.deg2rad(place[:, 1]), 2 * np.pi * place[:, 2]
    sphere = [np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)]
    return np.stack([*sphere, _SEASON * np.cos(turn), _SEASON * np.sin(turn)], axis=1)


def _accuracy(neighbours: "KNeighborsClassifier", features: np.ndarray, labels: np.ndarray) -> float:
    parts = np.array_split(np.arange(len(labels)), -(-len(labels) // 1000))  # thousands of classes take memory
    right = sum((neighbours.predict(features[part]) == labels[part]).sum() for part in parts)
    return float(right / len(labels))


def _print_shared(counted: Mapping[str, Mapping[str, Mapping[str, int]]], console: Console) -> None:
    """One row for what is shared, one column for each pair of splits."""
    if not counted:
        console.print("one split: it can share nothing with another")
        return
    table = Table(title="records of the first split that share it with one of the second", title_justify="left")
    table.add_column("shared")
    for pair in counted:
        table.add_column(pair, justify="right")
    for name in dict.fromkeys(name for found in counted.values() for name in found):
        table.add_row(name, *(_cell(found.get(name)) for found in counted.values()))
    if table.row_count:
        console.print(table)
        console.print("a day is that of the year: shard sets do not keep the year")
    else:
        console.print("photographers, places and dates are unknown: nothing to compare")


def _cell(count: Mapping[str, int] | None) -> str:
    return "unknown" if count is None else f"{count['records']:,} of {count['of']:,} ({_percent(count)})"


def _percent(count: Mapping[str, int]) -> str:
    return f"{count['records'] / count['of']:.1%}"


def _print_metadata(measured: Mapping[str, Any], console: Console) -> None:
    if "not_measured" in measured:
        console.print(f"accuracy by metadata alone: not measured, {measured['not_measured']}")
        return
    console.print(
        f"top-1 by place and date alone, nearest neighbours, {measured['tested']:,} test records: "
        f"{measured['true']:.1%}; with another's {measured['shuffled']:.1%}; "
        f"always the commonest class {measured['commonest']:.1%}"
    )
