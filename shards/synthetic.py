"""A small made-up release in the layout of NABirds, drawn from a seed.

Species come in groups that look the same: one procedural bird per group, with pose, light, background and
clutter of its own in every photograph. Groups differ by eye. Within a group a species is told from the
others by where it lives (a range on the North American continent) or by when it is seen (two species of
every second group share a range and differ in season). So a photograph gives the group, and only photograph
with place and date gives the species: 1 / look_alikes is the best that photographs alone can reach.

The top group of the hierarchy (a class's `family`) is the look-alike group.
"""

import colorsys
import dataclasses
import json
import math
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console

from shards import nabirds
from shards.locations import LOCATION_FILE, read_locations
from shards.plan import Plan
from shards.progress import progress
from shards.source import DRAWN_NAME, Room, Source

# Within the coasts, coarse on purpose: degrees (lon, lat), a closed ring.
CONTINENT = (
    *((-123, 48.5), (-123.4, 44), (-122.9, 39.5), (-121, 36.8), (-118.5, 34.7), (-115.5, 32.8)),
    *((-111.5, 30.5), (-108, 26.5), (-104, 21), (-100, 18), (-97.5, 18.5), (-98.5, 23), (-98.5, 27)),
    *((-96.3, 29.8), (-92, 30.6), (-88.5, 31.2), (-84.5, 31), (-82.4, 29.4), (-81.4, 26.8), (-80.8, 27.2)),
    *((-81.9, 31), (-79.6, 34.2), (-77.6, 36), (-77.6, 39.4), (-74.9, 40.6), (-72, 42.4), (-69.8, 45)),
    *((-70.5, 47), (-74, 48), (-72, 51), (-66, 52), (-62, 54), (-67, 57), (-73, 56), (-76, 53), (-80, 50)),
    *((-86, 51), (-91, 54), (-95.5, 57.5), (-98, 62), (-108, 65), (-120, 67), (-135, 66.5), (-150, 67)),
    *((-158, 66), (-156, 61.5), (-150, 62.5), (-142, 61.5), (-133, 59.5), (-127.5, 54.5), (-123.4, 50)),
)
# Where a range may have its centre: degrees (lon, lat).
CENTRES = (
    *((-121, 45), (-118, 37), (-111, 33.5), (-103, 24), (-98, 32), (-90, 33.5), (-82, 33.5), (-78, 38)),
    *((-72, 44), (-84, 42), (-94, 46), (-105, 40), (-110, 50), (-98, 53), (-70, 54), (-122, 57)),
    *((-112, 61), (-145, 64)),
)
_RANGE_SPREAD = (3.0, 2.0)  # degrees of lon and lat, standard deviation
_LONG_SEASON, _SHORT_SEASON = 0.22, 0.06  # of the year, standard deviation
_HABITATS = ("Marsh", "Canyon", "Prairie", "Alder", "Tundra", "Mesa", "Harbor", "Cedar", "Meadow", "Bog")
_BIRDS = {
    "Lark": "Alaudella",
    "Finch": "Fringuilla",
    "Warbler": "Silviola",
    "Jay": "Garrulina",
    "Plover": "Charadriola",
    "Thrush": "Turdilla",
    "Wren": "Troglodella",
    "Dove": "Columbella",
    "Kite": "Elanulus",
    "Bunting": "Passerella",
    "Teal": "Querquella",
}
_MEMBERS = {
    "Western": "occidentalis",
    "Northern": "borealis",
    "Least": "minima",
    "Painted": "picta",
    "Common": "communis",
    "Lesser": "minor",
    "Masked": "personata",
    "Southern": "australis",
}
_PLUMAGES = ("", "", " (Adult male)", "", " (Female/immature)", "", " (Breeding)")
_PHOTOGRAPHERS = ("A. Quill", "B. Reed", "C. Sander", "D. Tarn", "Zo\u00eb \u00c5lund")
_REACH = 3  # of bill and tail from the middle of the body, in half heights of the body
_CANVAS = 2  # drawn so many times larger, then made small: smooth edges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Shards of drawn birds: look-alike species that only place and season tell apart."""

    NAME = "synthetic"

    classes: int = 12
    """Species."""
    look_alikes: int = 3
    """Species in a group that look the same."""
    per_class: int = 80
    """Photographs of each species, a quarter of them test."""
    val_per_class: int = 4
    """Photographs of each species drawn from train for val."""
    missing: float = 0.03
    """Share of photographs without place and date."""
    keep_source: Path | None = None
    """New folder that keeps the drawn release in the layout of NABirds."""

    def check(self) -> None:
        """Raises ValueError for a setting that could only fail later."""
        super().check()
        self._check_numbers(val_per_class=(0, 1_000_000))
        if self.keep_source and self.dry_run:
            raise ValueError("--keep-source: unused in a dry run, which writes nothing")

    def plan(self, room: Room) -> Plan:
        """Draws the release and reads it."""
        root = self.keep_source or room.folder / DRAWN_NAME
        draw(
            root, room.console, classes=self.classes, look_alikes=self.look_alikes, per_class=self.per_class,
            val_per_class=self.val_per_class, missing=self.missing, seed=self.seed,
        )  # fmt: skip
        release = nabirds.read_folder(root, self.fit)
        return nabirds.plan(release, read_locations(root / LOCATION_FILE), val_per_class=0, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Species:
    """A made-up class: `lon`, `lat` the centre of its range in degrees, `date` of its season."""

    name: str
    scientific_name: str
    group: int
    lon: float
    lat: float
    date: float
    season: float


@dataclasses.dataclass(frozen=True)
class Look:
    """What the birds of a group share. Colours are hues, saturations and values in [0, 1]."""

    body: tuple[float, float, float]
    belly: tuple[float, float, float]
    head: tuple[float, float, float]
    wing: tuple[float, float, float]
    bill: float
    tail: float
    length: float
    bars: int
    crest: bool


@dataclasses.dataclass(frozen=True)
class _Photograph:
    """One record of the release."""

    image_id: str
    species: int
    raw_class_id: int
    split: str
    lon: float
    lat: float
    date: float
    user_id: int | None
    photographer: str

    @property
    def path(self) -> str:
        return f"{self.raw_class_id:04d}/{self.image_id.replace('-', '')}.jpg"


def draw(
    root: Path,
    console: Console,
    *,
    classes: int,
    look_alikes: int,
    per_class: int,
    val_per_class: int,
    missing: float,
    seed: int,
) -> None:
    """Draws a release and its location file into a new folder.

    Args:
        root: the folder; must not be there, or be empty.
        console: for the progress.
        classes: species.
        look_alikes: species that look the same; the last group may have fewer.
        per_class: photographs of each species; a quarter of them is test.
        val_per_class: photographs of each species that the location file takes from train for val.
        missing: share of the photographs without place and date, in [0, 1].
        seed: of everything.

    Raises:
        ValueError: a number cannot be met, or `root` is not empty.
    """
    _check(classes, look_alikes, per_class, val_per_class, missing)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root}: is not empty; the drawn release needs a new folder")
    rng = np.random.default_rng(seed)
    kinds = make_species(classes, look_alikes, rng)
    looks = [look(group, rng) for group in range(kinds[-1].group + 1)]
    photographs = _photographs(kinds, per_class, val_per_class, missing, rng)
    root.mkdir(parents=True, exist_ok=True)
    try:
        boxes = {}
        with progress(console, "draw", len(photographs), "photographs") as advance:
            for photograph in photographs:
                image, box = picture(looks[kinds[photograph.species].group], rng)
                file = root / "images" / photograph.path
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file, "JPEG", quality=90)
                boxes[photograph.image_id] = (box, image.size)
                advance(1)
        _write_tables(root, kinds, photographs, boxes)
        (root / LOCATION_FILE).write_text(_location_file(kinds, photographs), encoding="utf-8")
    except BaseException:
        shutil.rmtree(root)
        raise


def _check(classes: int, look_alikes: int, per_class: int, val_per_class: int, missing: float) -> None:
    most = len(_HABITATS) * len(_BIRDS)
    if not 1 <= look_alikes <= len(_MEMBERS):
        raise ValueError(f"--look-alikes {look_alikes}: a number from 1 to {len(_MEMBERS)} is needed")
    if not 1 <= classes <= most * look_alikes:
        raise ValueError(f"--classes {classes}: a number from 1 to {most * look_alikes} is needed")
    if per_class - per_class // 4 <= val_per_class:
        raise ValueError(f"--per-class {per_class}: leaves no train beside {val_per_class} val")
    if not 0 <= missing <= 1:
        raise ValueError(f"--missing {missing}: a share from 0 to 1 is needed")


def make_species(classes: int, look_alikes: int, rng: np.random.Generator) -> list[Species]:
    """The species, group by group."""
    kinds: list[Species] = []
    for group in range(-(-classes // look_alikes)):
        bird = list(_BIRDS)[group % len(_BIRDS)]
        habitat = _HABITATS[group % len(_HABITATS)]  # 10 and 11 have no common factor: 110 pairs
        centres = _far_apart(look_alikes, rng)
        start = rng.random()
        seasonal = group % 2 == 1 and look_alikes > 1
        for member in range(min(look_alikes, classes - len(kinds))):
            twin = seasonal and member >= look_alikes - 2
            first, epithet = list(_MEMBERS.items())[member]
            lon, lat = centres[look_alikes - 2 if twin else member]
            kinds.append(
                Species(
                    name=f"{first} {habitat} {bird}{_PLUMAGES[len(kinds) % len(_PLUMAGES)]}",
                    scientific_name=f"{habitat[:3]}{_BIRDS[bird].lower()} {epithet}",
                    group=group,
                    lon=lon,
                    lat=lat,
                    date=(start + member / look_alikes) % 1,
                    season=_SHORT_SEASON if twin else _LONG_SEASON,
                )
            )
    return kinds


def _far_apart(number: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres, each the farthest from those before it; the first is drawn."""
    chosen: list[tuple[float, float]] = [CENTRES[rng.integers(len(CENTRES))]]
    while len(chosen) < number:
        chosen.append(max(CENTRES, key=lambda c: min(math.dist(c, other) for other in chosen)))
    return chosen


def look(group: int, rng: np.random.Generator) -> Look:
    """The bird of a group: hues one golden angle apart, the rest drawn."""
    hue = (0.02 + group * 0.381966) % 1

    def colour(shift: float, saturation: float, value: float) -> tuple[float, float, float]:
        return ((hue + shift) % 1, saturation, value)

    return Look(
        body=colour(0, 0.7, 0.45 + 0.4 * (group % 2)),
        belly=colour(rng.uniform(-0.08, 0.08), rng.uniform(0.1, 0.4), 0.95),
        head=colour(rng.choice([0, 0.33, 0.5]), 0.6, rng.uniform(0.3, 0.9)),
        wing=colour(0.05, 0.7, rng.uniform(0.15, 0.4)),
        bill=rng.uniform(0.2, 0.75),
        tail=rng.uniform(0.35, 0.9),
        length=rng.uniform(1.25, 1.8),
        bars=int(rng.integers(0, 4)),
        crest=bool(rng.integers(2)),
    )


def _photographs(
    kinds: list[Species], per_class: int, val: int, missing: float, rng: np.random.Generator
) -> list[_Photograph]:
    """All records, in order of their ids as in NABirds."""
    splits = ["test"] * (per_class // 4) + ["val"] * val
    splits += ["train"] * (per_class - len(splits))
    first_leaf = 1 + kinds[-1].group + 1 + len(kinds)
    return sorted(
        (
            _photograph(kind, rng, species=number, raw=first_leaf + number, split=split, missing=missing)
            for number, kind in enumerate(kinds)
            for split in splits
        ),
        key=lambda photograph: photograph.image_id,
    )


def _photograph(
    kind: Species, rng: np.random.Generator, *, species: int, raw: int, split: str, missing: float
) -> _Photograph:
    known = rng.random() >= missing
    lon, lat = sighting(kind, rng)
    date = round(rng.normal(kind.date, kind.season) % 1, 5)
    return _Photograph(
        image_id=str(uuid.UUID(bytes=rng.bytes(16), version=4)),
        species=species,
        raw_class_id=raw,
        split=split,
        lon=lon if known else math.nan,
        lat=lat if known else math.nan,
        date=date if known else math.nan,
        user_id=int(rng.integers(200)) if known else None,
        photographer=_PHOTOGRAPHERS[rng.integers(len(_PHOTOGRAPHERS))],
    )


def sighting(kind: Species, rng: np.random.Generator) -> tuple[float, float]:
    """(lon, lat) in degrees: around the centre of the range, on land."""
    while True:
        lon, lat = rng.normal((kind.lon, kind.lat), _RANGE_SPREAD)
        if on_land(lon=lon, lat=lat):
            return round(float(lon), 5), round(float(lat), 5)


def on_land(*, lon: float, lat: float) -> bool:
    """Whether a place lies within `CONTINENT` (ray casting)."""
    inside = False
    for (x0, y0), (x1, y1) in zip(CONTINENT, (*CONTINENT[1:], CONTINENT[0]), strict=True):
        if (y0 > lat) != (y1 > lat) and lon < x0 + (lat - y0) / (y1 - y0) * (x1 - x0):
            inside = not inside
    return inside


def picture(bird: Look, rng: np.random.Generator) -> tuple[Image.Image, list[int]]:
    """One photograph of a bird of this look, and its box [x, y, w, h] in pixels."""
    width, height = int(rng.integers(96, 129)), int(rng.integers(96, 113))
    image = _background(width, height, rng)
    canvas = ImageDraw.Draw(image)
    _clutter(canvas, image.size, rng, 6)
    box = _bird(image, bird, rng)
    _clutter(canvas, image.size, rng, 2)
    small = image.resize((width, height), Image.Resampling.BILINEAR)
    grain = 6 * rng.standard_normal((height, width, 3), dtype=np.float32)
    cast = rng.normal(0, 5, 3).astype(np.float32)
    pixels = np.asarray(small, dtype=np.float32) * rng.uniform(0.8, 1.15) + grain + cast
    x0, y0, x1, y1 = (round(edge / _CANVAS) for edge in box)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), [x0, y0, x1 - x0, y1 - y0]


def _background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Sky or leaves: a few random colours, smoothly blended."""
    hue = rng.choice([0.58, 0.3, 0.12])
    corners = [_rgb((hue + rng.normal(0, 0.04), rng.uniform(0.1, 0.5), rng.uniform(0.4, 0.9))) for _ in range(6)]
    small = np.array(corners, dtype=np.uint8).reshape(2, 3, 3)
    return Image.fromarray(small).resize((width * _CANVAS, height * _CANVAS), Image.Resampling.BICUBIC)


def _clutter(canvas: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator, most: int) -> None:
    """Twigs and leaves."""
    width, height = size
    for _ in range(rng.integers(1, most + 1)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        colour = _rgb((rng.uniform(0.05, 0.4), rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.6)))
        if rng.random() < 0.5:
            ends = (x, y, x + rng.normal(0, width / 2), y + rng.normal(0, height / 2))
            canvas.line(ends, fill=colour, width=int(rng.integers(2, 6)))
        else:
            r = rng.uniform(3, 14)
            canvas.ellipse((x - r, y - r / 2, x + r, y + r / 2), fill=colour)


def _bird(image: Image.Image, bird: Look, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws the bird with a pose of its own; returns the edges of its box on the canvas."""
    width, height = image.size
    unit = height * rng.uniform(0.15, 0.22)  # half the height of the body
    layer = Image.new("RGBA", (int(unit * 2 * _REACH), int(unit * 2 * _REACH)))
    _draw_bird(ImageDraw.Draw(layer), bird, unit, rng)
    if rng.random() < 0.5:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR)
    x = int(width * rng.uniform(0.4, 0.6) - layer.width / 2)
    y = int(height * rng.uniform(0.4, 0.6) - layer.height / 2)
    image.paste(layer, (x, y), layer)
    drawn = layer.getbbox()
    assert drawn is not None
    left, top, right, bottom = drawn
    return max(x + left, 0), max(y + top, 0), min(x + right, width), min(y + bottom, height)


def _draw_bird(canvas: ImageDraw.ImageDraw, bird: Look, unit: float, rng: np.random.Generator) -> None:
    def colour(hsv: tuple[float, float, float]) -> tuple[int, int, int]:
        h, s, v = hsv
        return _rgb((h + rng.normal(0, 0.012), s + rng.normal(0, 0.06), v + rng.normal(0, 0.06)))

    def ellipse(x: float, y: float, a: float, b: float, fill: tuple[int, int, int]) -> None:
        canvas.ellipse(_around(unit, x, y, a, b), fill=fill)

    dark = colour((0.08, 0.3, 0.15))
    long = bird.length
    canvas.polygon(
        _points(unit, (-long + 0.3, -0.3), (-long - bird.tail, 0.1), (-long + 0.3, 0.3)), colour(bird.wing)
    )
    for foot in (-0.2, 0.25):
        canvas.line(_points(unit, (foot, 0.8), (foot + 0.1, 1.5)), fill=dark, width=3)
    ellipse(0, 0, long, 1, colour(bird.body))
    ellipse(0.15, 0.4, long * 0.7, 0.55, colour(bird.belly))
    ellipse(-0.35, -0.1, long * 0.6, 0.5, colour(bird.wing))
    for bar in range(bird.bars):
        x = -0.7 + 0.35 * bar
        canvas.line(_points(unit, (x, -0.4), (x - 0.2, 0.25)), fill=colour(bird.belly), width=int(unit / 8) + 1)
    head = long * 0.85
    if bird.crest:
        canvas.polygon(_points(unit, (head - 0.5, -1), (head - 0.5, -1.75), (head + 0.2, -1.2)), colour(bird.head))
    canvas.polygon(_points(unit, (head + 0.4, -1), (head + 0.5 + bird.bill, -0.8), (head + 0.4, -0.65)), dark)
    ellipse(head, -0.85, 0.58, 0.55, colour(bird.head))
    ellipse(head + 0.2, -0.95, 0.11, 0.11, dark)


def _points(unit: float, *points: tuple[float, float]) -> list[tuple[float, float]]:
    """Bird's coordinates (centre of the body, half its height) to those of its square layer."""
    return [((_REACH + x) * unit, (_REACH + y) * unit) for x, y in points]


def _around(unit: float, x: float, y: float, a: float, b: float) -> list[tuple[float, float]]:
    return _points(unit, (x - a, y - b), (x + a, y + b))


def _rgb(hsv: tuple[float, float, float]) -> tuple[int, int, int]:
    hue, saturation, value = hsv
    r, g, b = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return round(255 * r), round(255 * g), round(255 * b)


def _write_tables(
    root: Path,
    kinds: list[Species],
    photographs: Iterable[_Photograph],
    boxes: Mapping[str, tuple[list[int], tuple[int, int]]],
) -> None:
    tables: dict[str, list[str]] = {
        "images.txt": [f"{p.image_id} {p.path}" for p in photographs],
        "image_class_labels.txt": [f"{p.image_id} {p.raw_class_id}" for p in photographs],
        "train_test_split.txt": [f"{p.image_id} {int(p.split != 'test')}" for p in photographs],
        "bounding_boxes.txt": [f"{i} {' '.join(map(str, box))}" for i, (box, _) in boxes.items()],
        "sizes.txt": [f"{i} {width} {height}" for i, (_, (width, height)) in boxes.items()],
        "photographers.txt": [f"{p.image_id} {p.photographer}" for p in photographs],
        "classes.txt": [f"{i} {name}" for i, (name, _) in enumerate(_nodes(kinds))],
        "hierarchy.txt": [f"{i} {parent}" for i, (_, parent) in enumerate(_nodes(kinds)) if i],
    }
    for name, lines in tables.items():
        (root / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _nodes(kinds: list[Species]) -> Iterator[tuple[str, int]]:
    """(name, parent) by raw id, as NABirds has them: root, top groups, species, then the leaves."""
    yield "Birds", -1
    first = {kind.group: kind for kind in reversed(kinds)}
    for group in sorted(first):
        bird = _base(first[group].name).partition(" ")[2]
        yield f"{bird}{'es' if bird.endswith(('ch', 'sh')) else 's'} and Allies", 0
    for kind in kinds:
        yield _base(kind.name), 1 + kind.group
    for number, kind in enumerate(kinds):
        yield kind.name, 1 + len(first) + number


def _base(name: str) -> str:
    return name.partition(" (")[0]


def _location_file(kinds: list[Species], photographs: Iterable[_Photograph]) -> str:
    lists: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for p in photographs:
        meta = {"lon": p.lon, "lat": p.lat, "date": p.date, "user_id": p.user_id}
        entry = {"class_id": p.species, "im_path": p.path, "valid_image": True, "ebird_meta": meta}
        lists[p.split].append(entry)
    names = {"classes": [k.name for k in kinds], "classes_sci": [k.scientific_name for k in kinds]}
    return json.dumps({**lists, **names})  # NaN bare, as in the file of geo_prior
