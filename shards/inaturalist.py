"""iNaturalist's competition sets of 2017, 2018 and 2021: photographs and annotations in COCO's form.

An annotation file has `images` (`id`, `file_name` below --root, `width`, `height`), `annotations` (`image_id`,
`category_id`) and `categories` (`id`, `name`, `supercategory`; in 2018 and 2021 also `kingdom` .. `genus`; in 2021
also `common_name`). Places and dates stand in the images of 2021 (`longitude`, `latitude`, `date`,
`location_uncertainty`); of 2017 and 2018 they came later, in `train2018_locations.json` and the like: a list of
objects with `id`, `lon`, `lat`, `date`, `loc_uncert`, `user_id`. Unknown is null or the bare token NaN.

The test sets have no annotations: take the validation file for test (`--annotations train.json test=val.json`).
"""

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from shards.observations import Files, Observation, Observations, Reader, Taxon, is_unknown
from shards.plan import Plan
from shards.source import Room
from xcon.records import SPLITS

_RANKS = ("kingdom", "phylum", "class", "order", "family", "genus")
_KEPT: tuple[str, ...] = ("width", "height", "rights_holder", "file_name")  # beside the record, where known
_UNCERTAINTY = ("location_uncertainty", "loc_uncert")  # 2021; 2017 and 2018


@dataclasses.dataclass(frozen=True, kw_only=True)
class INaturalist(Observations):
    """Shards of iNaturalist 2017, 2018 or 2021."""

    NAME = "inaturalist"

    root: Path
    """Folder that the annotations' file names start from, such as the one that holds train_val2018."""
    annotations: tuple[Path, ...]
    """Annotation files: train2018.json val2018.json; or with their split: train=FILE test=FILE."""
    locations: tuple[Path, ...] = ()
    """Location files of 2017 and 2018."""
    categories: Path | None = None
    """The un-obfuscated categories.json of 2018, instead of the categories in the annotation files."""
    supercategories: tuple[str, ...] = ()
    """Only these, such as Birds (2021) or Aves (2017, 2018)."""
    names: Literal["common", "scientific"] = "common"
    """What a class is called; scientific where there is no common name, or where two share it."""

    def plan(self, room: Room) -> Plan:
        """Reads all files and joins them by image id."""
        files = [(split, path, _object(path)) for split, path in map(split_and_file, self.annotations)]
        categories = self._categories(files)
        kept = self._asked(categories)
        notes = read_locations(self.locations)
        found: list[Observation] = []
        paths: dict[str, str] = {}
        with self.reading() as reader:
            for split, path, values in files:
                labels = _labels(path, values, categories)
                for image in values["images"]:
                    if labels[image["id"]] in kept:
                        found.append(_observation(path, split, image, labels[image["id"]], notes, reader))
                        paths[str(image["id"])] = image["file_name"]
        _check_locations(self.locations, notes, found, paths)
        missing = self._missing(paths)
        taxa, without = taxa_of(kept, {o.label for o in found}, self.names)
        listed = sum(len(values["images"]) for *_, values in files)
        facts = {
            "split files": ", ".join(f"{split} from {path.name}" for split, path, _ in files),
            "photographs of other supercategories, left out": listed - len(found),
            "photographs that are not there": missing,
            "classes called by their scientific name": without,
            "categories without photographs": len(kept) - len(taxa),
            **reader.facts,
        }
        return self.assemble(found, taxa, Files(self.root, paths, self.fit), facts)

    def _categories(self, files: Iterable[tuple[str, Path, Mapping[str, Any]]]) -> dict[int, Mapping[str, Any]]:
        """Raw id -> category.

        Raises:
            ValueError: two files have unlike categories for one id.
        """
        lists = [(path, values["categories"]) for _, path, values in files]
        if self.categories is not None:
            loaded = _load(self.categories)
            lists = [(self.categories, loaded["categories"] if isinstance(loaded, dict) else loaded)]
        known: dict[int, Mapping[str, Any]] = {}
        for path, categories in lists:
            for category in categories:
                other = known.setdefault(category["id"], category)
                if other["name"] != category["name"]:
                    raise ValueError(
                        f"{path}: category {category['id']} is {category['name']!r} here and {other['name']!r} in "
                        "another file: they are of different years"
                    )
        return known

    def _asked(self, categories: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
        """The categories of the supercategories asked for, all where none is.

        Raises:
            ValueError: no such supercategory.
        """
        groups = {category.get("supercategory") for category in categories.values()}
        if unknown := [name for name in self.supercategories if name not in groups]:
            raise ValueError(
                f"--supercategories {unknown[0]}: there are only {', '.join(sorted(map(str, groups)))}"
            )
        asked = self.supercategories or groups
        return {
            number: category for number, category in categories.items() if category.get("supercategory") in asked
        }

    def _missing(self, paths: Mapping[str, str]) -> int:
        """How many photographs are not there: an error but for a dry run."""
        by_folder = defaultdict(list)
        for path in paths.values():
            by_folder[str(Path(path).parent)].append(path)
        missing = []
        for folder, names in by_folder.items():
            place = self.root / folder
            there = {file.name for file in place.iterdir()} if place.is_dir() else set()
            missing += [name for name in names if Path(name).name not in there]
        if missing and not self.dry_run:
            raise ValueError(
                f"{self.root}: {len(missing):,} of {len(paths):,} photographs are not there, the first is "
                f"{missing[0]}; --root is the folder that this name starts from"
            )
        return len(missing)


def split_and_file(given: Path) -> tuple[str, Path]:
    """`val=FILE` or a file whose name begins with its split -> split and file.

    Raises:
        ValueError: neither.
    """
    split, equals, file = str(given).partition("=")
    if equals and split in SPLITS:
        return split, Path(file)
    name = re.match("|".join(SPLITS), given.name)
    if name is None:
        raise ValueError(
            f"--annotations {given}: which split? Its name begins with none of {', '.join(SPLITS)}; "
            f"write train={given}, or another split"
        )
    return name[0], given


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); is it still packed, or not whole?") from None


def _object(path: Path) -> Mapping[str, Any]:
    """An annotation file, the lists in it checked for what is read from them."""
    values = _load(path)
    needed = {
        "images": ("id", "file_name"),
        "annotations": ("image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for name, fields in needed.items():
        if not isinstance(values, dict) or name not in values:
            hint = "; the public test files have none: take val for test" if name == "annotations" else ""
            raise ValueError(f"{path}: has no {name!r}, so it is no annotation file of iNaturalist{hint}")
        _check_fields(path, name, values[name], fields)
    return values


def _check_fields(path: Path, name: str, entries: Any, fields: tuple[str, ...]) -> None:
    for number, entry in enumerate(entries):
        for field in fields:
            if not isinstance(entry, dict) or field not in entry:
                raise ValueError(f"{path}: entry {number} of {name!r} has no {field!r}")


def read_locations(files: Iterable[Path]) -> dict[str, Mapping[str, Any]]:
    """Image id -> its entry in the location files of 2017 and 2018.

    Raises:
        ValueError: not such a file, or an image twice.
    """
    notes: dict[str, Mapping[str, Any]] = {}
    for path in files:
        entries = _load(path)
        if not isinstance(entries, list):
            raise ValueError(f"{path}: not a list, so it is no location file of iNaturalist 2017 or 2018")
        _check_fields(path, "the list", entries, ("id", "lon", "lat", "date"))
        for entry in entries:
            if str(entry["id"]) in notes:
                raise ValueError(f"{path}: image {entry['id']} stands in the location files twice")
            notes[str(entry["id"])] = entry
    return notes


def _labels(path: Path, values: Mapping[str, Any], categories: Mapping[int, Any]) -> dict[int, int]:
    """Image id -> category id, for every image; several boxes of one image agree."""
    labels: dict[int, int] = {}
    for entry in values["annotations"]:
        image, label = entry["image_id"], entry["category_id"]
        if labels.setdefault(image, label) != label:
            raise ValueError(f"{path}: image {image} has categories {labels[image]} and {label}")
        if label not in categories:
            raise ValueError(f"{path}: image {image} has category {label}, which the categories lack")
    for entry in values["images"]:
        if entry["id"] not in labels:
            raise ValueError(f"{path}: image {entry['id']} has no annotation, so no class")
    return labels


def _observation(
    path: Path,
    split: str,
    image: Mapping[str, Any],
    label: int,
    notes: Mapping[str, Mapping[str, Any]],
    reader: Reader,
) -> Observation:
    number = str(image["id"])
    where = f"{path}: image {number}"
    known = {**image, **notes.get(number, {})}
    lon, lat = (known.get(short, known.get(long)) for short, long in (("lon", "longitude"), ("lat", "latitude")))
    lon, lat = reader.place(lon, lat, where)
    uncertainty = next((known[name] for name in _UNCERTAINTY if not is_unknown(known.get(name))), None)
    extra: dict[str, Any] = {"user_id": known.get("user_id"), "location_uncertainty": uncertainty}
    more = {name: known[name] for name in _KEPT if name in known}
    return Observation(
        where=where,
        image_id=number,
        label=label,
        lon=lon,
        lat=lat,
        date=reader.date(known.get("date"), where),
        split=split,
        extra={**extra, **more},
    )


def _check_locations(
    files: tuple[Path, ...], notes: Mapping[str, Any], found: Iterable[Observation], paths: Mapping[str, str]
) -> None:
    """Raises ValueError where location files were given and lack an image."""
    if files and (lacking := [o for o in found if o.image_id not in notes]):
        raise ValueError(
            f"{files[0]}: {len(lacking):,} of {len(paths):,} photographs are not in the location files, the first "
            f"is that of {lacking[0].where}; give the one of every annotation file"
        )


def taxa_of(
    categories: Mapping[int, Mapping[str, Any]], labels: Iterable[int | str], names: str
) -> tuple[dict[int | str, Taxon], int]:
    """The classes that have photographs, and how many lack a common name of their own though it was asked for.

    The hierarchy begins with the supercategory, the group that people name; then come the ranks from kingdom to
    genus, where they are known, each name once.
    """
    present = {label: categories[label] for label in labels}  # type: ignore[index]
    common = Counter(c.get("common_name") for c in present.values())
    taxa: dict[int | str, Taxon] = {}
    for label, category in present.items():
        own = category.get("common_name") if names == "common" else None
        name = own if own and common[own] == 1 else category["name"]
        above = [category.get("supercategory"), *(category.get(rank) for rank in _RANKS)]
        hierarchy = tuple(dict.fromkeys(str(group) for group in above if group))
        taxa[label] = Taxon(str(name), str(category["name"]), hierarchy)
    without = sum(taxon.name == taxon.scientific_name for taxon in taxa.values())
    return taxa, without if names == "common" else 0
