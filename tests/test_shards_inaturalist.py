"""`xcon-shards build inaturalist`: files written by hand as the releases of 2017, 2018 and 2021 are."""

import json
import pickle
from pathlib import Path

import pytest

from shards import cli
from shards.inaturalist import INaturalist, split_and_file
from tests import commands
from tests.pictures import photograph, plan
from xcon.records import Card, caption

INFO = {"year": 2021, "version": "1.0", "description": "", "contributor": "", "url": "", "date_created": ""}


def coco(images: list[dict], annotations: list[tuple[int, int]], categories: list[dict]) -> dict:
    """The form of all years."""
    return {
        "info": INFO,
        "images": images,
        "categories": categories,
        "annotations": [{"id": i, "image_id": i, "category_id": c} for i, c in annotations],
        "licenses": [{"id": 1, "name": "CC BY-NC", "url": ""}],
    }


def taxon(number: int, name: str, common: str, supercategory: str, *ranks: str) -> dict:
    kingdom, phylum, klass, order, family = ranks
    genus, epithet = name.split()
    return {
        "id": number,
        "name": name,
        "common_name": common,
        "supercategory": supercategory,
        "kingdom": kingdom,
        "phylum": phylum,
        "class": klass,
        "order": order,
        "family": family,
        "genus": genus,
        "specific_epithet": epithet,
        "image_dir_name": "_".join([f"{number:05d}", *ranks, genus, epithet]),
    }


WORM = taxon(
    0, "Lumbricus terrestris", "Common Earthworm", "Animalia", "Animalia", "Annelida", "Clitellata", "Haplotaxida",
    "Lumbricidae",
)  # fmt: skip
BIRDS = ("Animalia", "Chordata", "Aves", "Passeriformes")
WREN = taxon(4010, "Troglodytes troglodytes", "Wren", "Birds", *BIRDS, "Troglodytidae")
ROCK_WREN = taxon(4020, "Salpinctes obsoletus", "Wren", "Birds", *BIRDS, "Troglodytidae")
JAY = taxon(3500, "Garrulus glandarius", "Eurasian Jay", "Birds", *BIRDS, "Corvidae")


def image_2021(number: int, category: dict, split: str, lon: float | None, lat: float | None, date: str) -> dict:
    return {
        "id": number,
        "width": 500,
        "height": 375,
        "file_name": f"{split}/{category['image_dir_name']}/{number}-ab.jpg",
        "license": 1,
        "rights_holder": "Zo\u00eb \u00c5lund",
        "date": date,
        "latitude": lat,
        "longitude": lon,
        "location_uncertainty": None if lon is None else 122,
    }


@pytest.fixture
def inat2021(tmp_path):
    """Six photographs; one without a place as the bare token NaN."""
    categories = [WREN, WORM, JAY, ROCK_WREN]
    train = [
        image_2021(12, WREN, "train_mini", -0.5, 51.25, "2019-06-17 15:19:38+00:00"),
        image_2021(7, WORM, "train_mini", 147.0, -42.0, "2018-12-31 23:59:59+00:00"),
        image_2021(9, JAY, "train_mini", float("nan"), float("nan"), "1979-08-11 00:00:00+00:00"),
        image_2021(3, ROCK_WREN, "train_mini", -110.0, 35.0, "2016-01-01 00:00:00+00:00"),
    ]
    val = [
        image_2021(20, JAY, "val", 8.0, 47.0, "2019-06-17 15:19:38+00:00"),
        image_2021(21, WORM, "val", None, None, "2019-06-17 15:19:38+00:00"),
    ]
    labels = [(12, 4010), (7, 0), (9, 3500), (3, 4020)]
    (tmp_path / "train_mini.json").write_text(json.dumps(coco(train, labels, categories)))
    (tmp_path / "val.json").write_text(json.dumps(coco(val, [(20, 3500), (21, 0)], categories[::-1])))
    for shade, image in enumerate([*train, *val]):
        photograph(tmp_path / "images" / image["file_name"], shade)
    return tmp_path


def source(folder: Path, *annotations: str, **more) -> INaturalist:
    parts = [annotation.rpartition("=") for annotation in annotations]
    files = tuple(Path(f"{split}{equals}{folder / name}") for split, equals, name in parts)
    return INaturalist(root=folder / "images", annotations=files, **more)


def test_2021(inat2021):
    """Classes by sorted category id; two species called Wren go by their scientific names."""
    made = plan(source(inat2021, "train_mini.json", "val.json"))
    assert [(info.class_id, info.raw_class_id, info.name, info.scientific_name) for info in made.classes] == [
        (0, 0, "Common Earthworm", "Lumbricus terrestris"),
        (1, 3500, "Eurasian Jay", "Garrulus glandarius"),
        (2, 4010, "Troglodytes troglodytes", "Troglodytes troglodytes"),
        (3, 4020, "Salpinctes obsoletus", "Salpinctes obsoletus"),
    ]
    jay = ("Birds", "Animalia", "Chordata", "Aves", "Passeriformes", "Corvidae", "Garrulus")
    assert made.classes[1].hierarchy == jay
    worm = ("Animalia", "Annelida", "Clitellata", "Haplotaxida", "Lumbricidae", "Lumbricus")
    assert made.classes[0].hierarchy == worm
    assert {r.image_id: (r.class_id, r.lon, r.lat, r.date, r.split) for r in made.records} == {
        "12": (2, -0.5, 51.25, "2019-06-17", "train"),
        "7": (0, 147.0, -42.0, "2018-12-31", "train"),
        "9": (1, None, None, "1979-08-11", "train"),
        "3": (3, -110.0, 35.0, "2016-01-01", "train"),
        "20": (1, 8.0, 47.0, "2019-06-17", "val"),
        "21": (0, None, None, "2019-06-17", "val"),
    }
    first = made.records[0].extra
    assert (first["location_uncertainty"], first["rights_holder"]) == (122, "Zo\u00eb \u00c5lund")
    assert (first["width"], first["height"], first["user_id"]) == (500, 375, None)
    assert made.facts["classes called by their scientific name"] == 2
    assert made.facts["split files"] == "train from train_mini.json, val from val.json"
    assert caption("{scientific_name}, one of {family}", made.classes[1]) == "Garrulus glandarius, one of Birds"


def test_photographs_by_id_in_any_process(inat2021):
    made = plan(source(inat2021, "train_mini.json"))
    (file,) = inat2021.glob("images/train_mini/*Troglodytes_troglodytes/12-ab.jpg")
    assert pickle.loads(pickle.dumps(made.photograph))("12").jpg == file.read_bytes()


def test_one_supercategory_with_val_as_test_and_val_drawn(inat2021):
    """Of three birds each class has one photograph to train on: none to draw. With names as in the literature."""
    made = plan(
        source(inat2021, "train_mini.json", "test=val.json", supercategories=("Birds",), names="scientific")
    )
    assert [(r.image_id, r.split) for r in made.records] == [
        *(("12", "train"), ("9", "train"), ("3", "train"), ("20", "test"))
    ]
    assert [info.name for info in made.classes] == [
        "Garrulus glandarius",
        "Troglodytes troglodytes",
        "Salpinctes obsoletus",
    ]
    assert made.facts["photographs of other supercategories, left out"] == 2
    with pytest.raises(ValueError, match=r"^--val-per-class 1: class 4010 has only 1 train photographs"):
        plan(source(inat2021, "train_mini.json", supercategories=("Birds",), val_per_class=1))


@pytest.fixture
def inat2018(tmp_path):
    """Obfuscated categories, places in files of their own, `date` absent for one."""
    hidden = [{**WREN, "name": "4010", "genus": "17"}, {**JAY, "name": "3500", "genus": "18"}]
    for category in hidden:
        del category["common_name"]
    (tmp_path / "categories.json").write_text(json.dumps([WREN, JAY]))
    for split, numbers in {"train": [(1, 4010), (2, 3500)], "val": [(5, 3500)]}.items():
        images = [
            {
                "id": number,
                "width": 800,
                "height": 600,
                "file_name": f"train_val2018/Aves/{category}/{number}.jpg",
                "license": 3,
                "rights_holder": "Ada",
            }
            for number, category in numbers
        ]
        (tmp_path / f"{split}2018.json").write_text(json.dumps(coco(images, numbers, hidden)))
        for image in images:
            photograph(tmp_path / "images" / image["file_name"], image["id"])
    train = [
        {
            "id": 1,
            "lat": 51.25,
            "lon": -0.5,
            "loc_uncert": 31,
            "date": "2016-05-01 10:00:00+00:00",
            "date_c": 0.33,
            "user_id": 77,
        },
        {"id": 2, "lat": None, "lon": None, "loc_uncert": None, "date": None, "date_c": None, "user_id": None},
    ]
    val = [{**train[0], "id": 5, "user_id": 78}]
    (tmp_path / "train2018_locations.json").write_text(json.dumps(train))
    (tmp_path / "val2018_locations.json").write_text(json.dumps(val))
    return tmp_path


def test_2018(inat2018):
    made = plan(
        source(
            inat2018,
            "train2018.json",
            "val2018.json",
            locations=(inat2018 / "train2018_locations.json", inat2018 / "val2018_locations.json"),
            categories=inat2018 / "categories.json",
        )
    )
    assert [(r.image_id, r.class_name, r.lon, r.lat, r.date, r.split) for r in made.records] == [
        ("1", "Wren", -0.5, 51.25, "2016-05-01", "train"),
        ("2", "Eurasian Jay", None, None, None, "train"),
        ("5", "Eurasian Jay", -0.5, 51.25, "2016-05-01", "val"),
    ]
    assert [(r.extra["user_id"], r.extra["location_uncertainty"]) for r in made.records] == [
        *((77, 31), (None, None), (78, 31))
    ]


def test_without_location_files_there_are_no_places(inat2018):
    made = plan(source(inat2018, "train2018.json"))
    assert [(r.class_name, r.lon, r.lat, r.date) for r in made.records] == [
        ("4010", None, None, None),
        ("3500", None, None, None),
    ]


def test_2017_has_a_supercategory_and_boxes(tmp_path):
    """Two boxes of one photograph are two annotations of one category."""
    categories = [{"id": 1, "name": "Zonotrichia leucophrys", "supercategory": "Aves"}]
    images = [{"id": 4, "width": 9, "height": 9, "file_name": "train_val_images/Aves/4.jpg", "license": 1}]
    values = coco(images, [(4, 1), (4, 1)], categories)
    (tmp_path / "train_2017_bboxes.json").write_text(json.dumps(values))
    photograph(tmp_path / "images" / "train_val_images" / "Aves" / "4.jpg")
    made = plan(source(tmp_path, "train_2017_bboxes.json"))
    assert [(r.class_name, r.split) for r in made.records] == [("Zonotrichia leucophrys", "train")]
    assert made.classes[0].hierarchy == ("Aves",)


@pytest.mark.parametrize(
    ("given", "split", "file"),
    [
        ("data/train2018.json", "train", "data/train2018.json"),
        ("val.json", "val", "val.json"),
        ("test=data/val.json", "test", "data/val.json"),
        ("train=mine.json", "train", "mine.json"),
    ],
)
def test_split_of_a_file(given, split, file):
    assert split_and_file(Path(given)) == (split, Path(file))


def test_from_json_to_verified_shards(inat2021, capsys):
    out = inat2021 / "set"
    files = [inat2021 / "train_mini.json", f"test={inat2021 / 'val.json'}"]
    arguments = ["build", "inaturalist", "--root", inat2021 / "images", "--annotations", *files, "--out", out]
    assert commands.run(cli.main, arguments) == 0
    assert "train from train_mini.json, test from val.json" in capsys.readouterr().out
    assert commands.run(cli.main, ["verify", out]) == 0
    card = Card.load(out)
    assert (card.samples("train"), card.samples("test")) == (4, 2)
    assert str(inat2021) not in (out / "dataset.json").read_text()


def test_a_dry_run_counts_what_is_not_there(inat2021, capsys):
    arguments = ["build", "inaturalist", "--root", inat2021, "--annotations", inat2021 / "val.json", "--dry-run"]
    assert commands.run(cli.main, arguments) == 0
    assert "photographs that are not there                  2\n" in capsys.readouterr().out
