"""Shard sets with the same photographs at other places and dates: how well does what was learned travel?

    python benchmarks/shifted_places.py --root BIRDS --out DIR [--years-from 2022]

BIRDS is a folder in the layout of NABirds, with `nabirds_with_loc_2019.json` and `occurrences.csv` in it: records
of its species (`species_common, species_sci, lat, lon, date`). Test photographs are paired again, each with a
record of its species drawn from

- years: the last years;
- points: places that no training record has, though some lie near one;
- sites: whole sites (records within 40 km of one another) that no training record has. Training records there lose
  their place and date, so models are trained again on this set; on the other two they are only tested:

    xcon reproduce --size laptop --shards SHARDS --out OUT ... --test years DIR/years points DIR/points
    xcon reproduce --size laptop --shards DIR/sites --out OUT-sites ...

A photograph whose species has no such record has no metadata; how many is printed.
"""

import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from sklearn.cluster import DBSCAN
from sklearn.neighbors import BallTree

from xcon import records

EARTH_KM = 6371.0
SITE_KM = 40.0
LOCATIONS = "nabirds_with_loc_2019.json"
UNKNOWN: dict[str, Any] = {"lon": math.nan, "lat": math.nan, "date": math.nan, "user_id": None}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to make."""

    root: Path
    """Folder in the layout of NABirds, with its location file and occurrences.csv."""
    out: Path
    """Folder for the shard sets years, points and sites."""
    years_from: int = 2022
    """First of the last years."""
    held_out: float = 0.3
    """Share of the sites that training does without."""
    seed: int = 0
    """Of the draws."""


@dataclasses.dataclass(frozen=True)
class Occurrences:
    """Records of species, M of them.

    Attributes:
        species: `[M]` names.
        place: `[M, 2]` lat and lon in radians, as scikit-learn's haversine has them.
        day: `[M]` ISO dates.
    """

    species: np.ndarray
    place: np.ndarray
    day: np.ndarray

    def draw(self, name: str, chosen: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """The metadata of a record of a species among those chosen, `[M]`; unknown where there is none."""
        found = np.flatnonzero(chosen & (self.species == name))
        if not len(found):
            return UNKNOWN
        one = rng.choice(found)
        lat, lon = (round(float(x), 5) for x in np.rad2deg(self.place[one]))
        return {
            "lon": lon,
            "lat": lat,
            "date": round(records.year_fraction(str(self.day[one])), 5),
            "user_id": None,
        }


def main() -> None:
    """Makes the three sets."""
    settings = tyro.cli(Settings)
    release = json.loads((settings.root / LOCATIONS).read_text())
    with (settings.root / "occurrences.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seen = Occurrences(
        species=np.array([row["species_common"] for row in rows]),
        place=np.deg2rad([[float(row["lat"]), float(row["lon"])] for row in rows]),
        day=np.array([row["date"] for row in rows]),
    )
    trained = np.deg2rad([[m["lat"], m["lon"]] for m in metadata(release, "train", "val") if m["lat"] == m["lat"]])
    apart = BallTree(trained, metric="haversine").query(seen.place)[0][:, 0] * EARTH_KM  # [M]
    settings.out.mkdir(parents=True, exist_ok=True)
    build(settings, "years", paired_again(release, seen, seen.day >= str(settings.years_from), settings.seed))
    build(settings, "points", paired_again(release, seen, apart > 0.05, settings.seed))
    away, kept = without_sites(release, seen, settings)
    build(settings, "sites", paired_again(kept, seen, away, settings.seed))


def metadata(release: dict[str, Any], *splits: str) -> list[dict[str, Any]]:
    """The metadata of some splits of a location file."""
    return [record["ebird_meta"] for split in splits for record in release[split]]


def paired_again(
    release: dict[str, Any], seen: Occurrences, chosen: np.ndarray, seed: int
) -> dict[str, Any]:  # fmt: skip
    """A location file whose test photographs have records of their species among those that are chosen."""
    rng = np.random.default_rng(seed)
    test = [
        {**record, "ebird_meta": seen.draw(release["classes"][record["class_id"]], chosen, rng)}
        for record in release["test"]
    ]
    return {**release, "test": test}


def without_sites(
    release: dict[str, Any], seen: Occurrences, settings: Settings
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which records lie at the sites held out, `[M]`, and a location file that does not train there."""
    known = [m for m in metadata(release, "train", "val") if m["lat"] == m["lat"]]
    trained = np.deg2rad([[m["lat"], m["lon"]] for m in known])
    every = np.concatenate([seen.place, trained])
    points, of_point = np.unique(every, axis=0, return_inverse=True)
    clusters = DBSCAN(eps=SITE_KM / EARTH_KM, min_samples=1, metric="haversine").fit_predict(points)
    number = clusters[of_point.ravel()]  # [M + trained]
    sites = np.unique(number)
    held = np.random.default_rng(settings.seed).choice(sites, round(settings.held_out * len(sites)), replace=False)
    away = np.isin(number, held)
    lost = {id(m) for m, gone in zip(known, away[len(seen.species) :], strict=True) if gone}
    kept = {
        split: [
            {**r, "ebird_meta": UNKNOWN if id(r["ebird_meta"]) in lost else r["ebird_meta"]}
            for r in release[split]
        ]
        for split in ("train", "val")
    }
    sys.stdout.write(f"{len(held)} of {len(sites)} sites held out, with {len(lost)} training records\n")
    return away[: len(seen.species)], {**release, **kept}


def build(settings: Settings, name: str, release: dict[str, Any]) -> None:
    """Writes a location file and builds its shard set, unless it is there."""
    bare = sum(m["lat"] != m["lat"] for m in metadata(release, "test"))
    sys.stdout.write(f"{name}: {bare} of {len(release['test'])} test photographs without metadata\n")
    sys.stdout.flush()
    out, locations = settings.out / name, settings.out / f"{name}.json"
    if (out / records.CARD_NAME).is_file():
        return
    locations.write_text(json.dumps(release))
    command = ["build", "nabirds", "--root", settings.root, "--meta", locations, "--out", out]
    subprocess.run([Path(sys.executable).with_name("xcon-shards"), *command], check=True)


if __name__ == "__main__":
    main()
