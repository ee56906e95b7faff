"""`xcon-shards build hub`: sets made here with `datasets`, saved, and written as a folder of Parquet."""

import pickle

import datasets
import pytest

from shards import cli
from shards.hub import Hub
from tests import commands
from tests.pictures import photograph, plan
from xcon.records import Card

NAMES = ["wren", "Jay  (Female)", "owl"]
ROWS = [
    {"label": 1, "lon": -1.5, "lat": 52.0, "date": "2021-05-04", "id": "a"},
    {"label": 0, "lon": None, "lat": None, "date": None, "id": "b"},
    {"label": 1, "lon": 10.0, "lat": -20.0, "date": "2020-01-01T12:00:00", "id": "c"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the photographs, and a set of two splits that holds their bytes."""
    folder = tmp_path_factory.mktemp("hub")
    bytes_of = [photograph(folder / "photographs" / f"{k}.jpg", 40 * k) for k in range(3)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=NAMES),
            "lon": datasets.Value("float64"),
            "lat": datasets.Value("float64"),
            "date": datasets.Value("string"),
            "id": datasets.Value("string"),
        }
    )
    rows = [{**row, "image": {"bytes": data, "path": None}} for row, data in zip(ROWS, bytes_of, strict=True)]
    train = datasets.Dataset.from_list(rows, features=features)
    test = datasets.Dataset.from_list(rows[::-1], features=features)
    splits = datasets.DatasetDict({"train": train, "validation": test})
    splits.save_to_disk(str(folder / "saved"))
    train.save_to_disk(str(folder / "one"))
    (folder / "parquet").mkdir()
    train.to_parquet(str(folder / "parquet" / "train.parquet"))
    test.to_parquet(str(folder / "parquet" / "validation.parquet"))
    return folder, bytes_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_records_by_hand(kind, made):
    folder, _ = made
    found = plan(Hub(name=str(folder / kind), image_id_column="id", splits=("train=train",)))
    assert [(i.class_id, i.raw_class_id, i.name) for i in found.classes] == [
        (0, 0, "wren"),
        (1, 1, "Jay  (Female)"),
    ]
    assert [(r.image_id, r.class_name, r.lon, r.lat, r.date, r.split) for r in found.records] == [
        ("a", "Jay  (Female)", -1.5, 52.0, "2021-05-04", "train"),
        ("b", "wren", None, None, None, "train"),
        ("c", "Jay  (Female)", 10.0, -20.0, "2020-01-01", "train"),
    ]
    assert found.facts["splits left out"] == "validation"


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_photographs_keep_their_bytes_by_row_and_in_another_process(kind, made):
    """Pickled, the set is the names of its files and not their bytes."""
    folder, bytes_of = made
    found = plan(Hub(name=str(folder / kind)))
    pickled = pickle.dumps(found.photograph)
    photographs = pickle.loads(pickled)
    by_row = {r.extra["file_name"]: photographs(r.image_id).jpg for r in found.records}
    assert [by_row[f"train/{k:08d}"] for k in range(3)] == bytes_of
    assert [by_row[f"validation/{k:08d}"] for k in range(3)] == bytes_of[::-1]
    assert not any(data in pickled for data in bytes_of)
    assert {r.split for r in found.records} == {"train", "val"}


def test_a_folder_of_photographs_is_a_set_too(tmp_path):
    """`datasets` gives the path and no bytes."""
    data = [photograph(tmp_path / "x" / label / "1.jpg", shade) for label, shade in (("a", 3), ("b", 90))]
    found = plan(Hub(name=str(tmp_path / "x")))
    assert [info.name for info in found.classes] == ["a", "b"]
    assert [found.photograph(r.image_id).jpg for r in found.records] == data


def test_names_of_a_text_column_and_drawn_splits(made):
    """A set without splits is all train; classes by a column of words."""
    folder, _ = made
    found = plan(Hub(name=str(folder / "one"), label_column="id", lon_column="", lat_column="", date_column=""))
    assert [info.raw_class_id for info in found.classes] == ["a", "b", "c"]
    assert {(r.lon, r.lat, r.date, r.split) for r in found.records} == {(None, None, None, "train")}
    assert found.facts["columns not read"] == "label, lon, lat, date"


def test_from_a_set_to_verified_shards(made, tmp_path, capsys):
    folder, _ = made
    out = tmp_path / "set"
    arguments = ["build", "hub", "--name", folder / "saved", "--splits", "train=train", "test=validation"]
    assert commands.run(cli.main, [*arguments, "--out", out]) == 0
    assert "train from train, test from validation" in capsys.readouterr().out
    assert commands.run(cli.main, ["verify", out]) == 0
    assert {split: Card.load(out).samples(split) for split in Card.load(out).splits} == {"train": 3, "test": 3}
