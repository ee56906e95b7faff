"""The drawn set: its counts, and that photographs tell groups, places and seasons tell species."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from shards import cli, synthetic
from tests import commands
from xcon.records import Card


def main(argv):
    return commands.run(cli.main, argv)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """6 species in 2 groups of 3, 40 photographs each: 10 test, 4 val, 26 train."""
    root = tmp_path_factory.mktemp("synthetic") / "source"
    out = root.parent / "set"
    sizes = ("--classes", "6", "--per-class", "40", "--keep-source", str(root))
    assert main(["build", "synthetic", "--out", str(out), *sizes]) == 0
    return root, out


@pytest.fixture(scope="module")
def records(drawn):
    """(split, class id, colours of the photograph, [lon, lat, cos date, sin date] or None) per record."""
    root, _ = drawn
    source = json.loads((root / "nabirds_with_loc_2019.json").read_bytes())
    return [
        (split, entry["class_id"], _colours(root / "images" / entry["im_path"]), _place(entry["ebird_meta"]))
        for split in ("train", "val", "test")
        for entry in source[split]
    ]


def _colours(path):
    """Shares of 4 x 4 x 4 colours in the middle of a photograph."""
    with Image.open(path) as image:
        width, height = image.size
        pixels = np.asarray(image.crop((width // 4, height // 4, 3 * width // 4, 3 * height // 4))) // 64
    codes = pixels.reshape(-1, 3) @ [16, 4, 1]
    return np.sqrt(np.bincount(codes, minlength=64) / codes.size)


def _place(meta):
    if meta["lon"] != meta["lon"]:
        return None
    angle = 2 * np.pi * meta["date"]
    return np.array([meta["lon"] / 10, meta["lat"] / 10, np.cos(angle), np.sin(angle)])


def _nearest_mean(train, test):
    """Share of `test` ((label, vector) pairs) that lies nearest to its own class's mean in `train`."""
    labels = sorted({label for label, _ in train})
    means = np.stack([np.mean([v for label, v in train if label == wanted], axis=0) for wanted in labels])
    guesses = [labels[np.argmin(np.linalg.norm(means - v, axis=1))] for _, v in test]
    return np.mean([guess == label for guess, (label, _) in zip(guesses, test, strict=True)])


def test_counts(drawn, capsys):
    _, out = drawn
    assert main(["verify", str(out)]) == 0
    card = Card.load(out)
    assert [dict(info.counts) for info in card.classes] == [{"train": 26, "val": 4, "test": 10}] * 6
    assert len({info.name for info in card.classes}) == 6
    assert all(info.scientific_name for info in card.classes)
    assert any("(" in info.name for info in card.classes)


def test_families_are_the_look_alike_groups(drawn):
    families = [info.hierarchy[0] for info in Card.load(drawn[1]).classes]
    assert families[0] == families[1] == families[2] != families[3] == families[4] == families[5]


def test_photographs_tell_the_group(records):
    """A nearest mean over colours, no network at all: chance is 1/2."""
    train = [(label // 3, colours) for split, label, colours, _ in records if split == "train"]
    test = [(label // 3, colours) for split, label, colours, _ in records if split == "test"]
    assert _nearest_mean(train, test) > 0.9


def test_photographs_do_not_tell_the_species(records):
    """Within a group: chance is 1/3, and 30 photographs spread by 0.09; four times that is allowed."""
    for group in (0, 1):
        train = [(y, c) for split, y, c, _ in records if split == "train" and y // 3 == group]
        test = [(y, c) for split, y, c, _ in records if split == "test" and y // 3 == group]
        assert abs(_nearest_mean(train, test) - 1 / 3) < 0.35


def test_place_and_date_tell_the_species_of_a_group(records):
    for group in (0, 1):
        train = [(y, p) for s, y, _, p in records if s == "train" and y // 3 == group and p is not None]
        test = [(y, p) for s, y, _, p in records if s == "test" and y // 3 == group and p is not None]
        assert _nearest_mean(train, test) > 0.85


def test_one_group_needs_the_place_the_other_also_the_season():
    """Group 0: three ranges. Group 1: its last two species share a range and are half a year apart or
    a third."""
    kinds = synthetic.make_species(6, 3, np.random.default_rng(0))
    places = [(kind.lon, kind.lat) for kind in kinds]
    assert len(set(places[:3])) == 3
    assert places[4] == places[5] != places[3]
    assert abs(kinds[4].date - kinds[5].date) % 1 == pytest.approx(1 / 3) or abs(
        kinds[4].date - kinds[5].date
    ) == pytest.approx(2 / 3)


def test_some_records_have_no_place(records):
    """3 % of 240 are 7.2, with a spread of 2.6; lon, lat and date are missing together."""
    assert 1 <= sum(place is None for *_, place in records) <= 18


def test_missing_zero_and_one(tmp_path):
    for share, expected in (("0", 0), ("1", 16)):
        root = tmp_path / f"source{share}"
        sizes = ("--classes", "2", "--look-alikes", "2", "--per-class", "8", "--val-per-class", "1")
        more = ("--missing", share, "--keep-source", str(root))
        assert main(["build", "synthetic", "--out", str(tmp_path / share), *sizes, *more]) == 0
        source = json.loads((root / "nabirds_with_loc_2019.json").read_bytes())
        entries = [e["ebird_meta"] for split in ("train", "val", "test") for e in source[split]]
        assert sum(e["user_id"] is None for e in entries) == expected


def test_places_are_on_the_continent(records):
    """Corners of the drawn continent, by eye on a map."""
    assert synthetic.on_land(lon=-98, lat=39)  # Kansas
    assert synthetic.on_land(lon=-102, lat=23)  # Zacatecas
    assert synthetic.on_land(lon=-82, lat=28.5)  # Florida
    assert not synthetic.on_land(lon=-90, lat=26)  # Gulf of Mexico
    assert not synthetic.on_land(lon=-85, lat=58)  # Hudson Bay
    assert not synthetic.on_land(lon=-130, lat=40)  # Pacific
    for *_, place in records:
        assert place is None or synthetic.on_land(lon=place[0] * 10, lat=place[1] * 10)


def test_the_same_seed_draws_the_same_set(tmp_path):
    sizes = ("--classes", "2", "--look-alikes", "2", "--per-class", "8", "--val-per-class", "1")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["build", "synthetic", "--out", str(tmp_path / name), *sizes, "--seed", seed]) == 0
    cards = {name: Card.load(tmp_path / name) for name in "abc"}
    assert cards["a"] == cards["b"]
    assert cards["a"].sha256 != cards["c"].sha256
    assert [p.name for p in (tmp_path / "a").iterdir() if p.name.startswith(".")] == []


def test_names_are_distinct_for_many_classes():
    kinds = synthetic.make_species(600, 6, np.random.default_rng(0))
    assert max(Counter(kind.name.partition(" (")[0] for kind in kinds).values()) == 1
    assert len({kind.scientific_name for kind in kinds}) == 600


def test_boxes_hold_the_bird(drawn):
    """Within the photograph, and larger than a body of the smallest scale: half heights 0.15 x 1.25 of it."""
    root, _ = drawn
    paths = dict(line.split() for line in (root / "images.txt").read_text().splitlines())
    sizes = dict(line.split(" ", 1) for line in (root / "sizes.txt").read_text().splitlines())
    for line in (root / "bounding_boxes.txt").read_text().splitlines()[:40]:
        image_id, x, y, w, h = line.split()
        with Image.open(root / "images" / paths[image_id]) as image:
            width, height = image.size
        assert f"{width} {height}" == sizes[image_id]
        assert 0 <= int(x) < int(x) + int(w) <= width
        assert 0 <= int(y) < int(y) + int(h) <= height
        assert int(w) * int(h) > 0.08 * width * height


def test_dry_run_writes_nothing(tmp_path, capsys):
    sizes = ("--classes", "2", "--per-class", "8", "--val-per-class", "1")
    assert main(["build", "synthetic", "--out", str(tmp_path / "set"), *sizes, "--dry-run"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_source_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        synthetic.draw(
            tmp_path,
            Console(file=io.StringIO()),
            classes=2,
            look_alikes=2,
            per_class=8,
            val_per_class=1,
            missing=0.0,
            seed=0,
        )
