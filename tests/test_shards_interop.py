"""Shards and exports read by others: GNU tar, webdataset, datasets, the workers of a torch DataLoader."""

import collections
import dataclasses
import gc
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

from shards import cli, synthetic
from shards.build import Sample, write_shard
from shards.export import label_names
from tests import commands
from xcon.records import Card, ClassInfo, Record, year_fraction

closes_no_tar = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset


def main(*words: object) -> int:
    return commands.run(cli.main, [str(word) for word in words])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A set of 4 classes with 12 photographs each in 7 shards, some without place and date."""
    folder = tmp_path_factory.mktemp("built")
    numbers = {"classes": 4, "look_alikes": 2, "per_class": 12, "val_per_class": 1, "missing": 0.2}
    synthetic.draw(folder / "release", Console(file=io.StringIO()), seed=0, **numbers)
    meta = folder / "release" / "nabirds_with_loc_2019.json"
    arguments = ["--root", folder / "release", "--meta", meta, "--samples-per-shard", 9]
    assert main("build", "nabirds", *arguments, "--out", folder / "set") == 0
    return folder / "set"


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A set of two records with values of every kind: an ISO date and a fraction, text ids, two classes of one
    name, no place, characters beyond ASCII, values that nest."""
    folder = tmp_path_factory.mktemp("by_hand")
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "teal").save(buffer, "JPEG")
    classes = [
        ("lark-a", "Lerche \N{LATIN SMALL LETTER U WITH DIAERESIS}"),
        ("lark-b", "Lark"),
        ("lark-c", "Lark"),
    ]
    extra = [{"user_id": 7, "bbox": [1, 2, 3, 4]}, {"note": {"a": None, "b": ["\N{SNOWMAN}"]}}]
    records = [
        Record("k1", 0, *classes[0], lon=-98.5, lat=39.8, date="2024-02-29", split="train", extra=extra[0]),
        Record("k2", 2, *classes[2], lon=None, lat=None, date=0.25, split="train", extra=extra[1]),
    ]
    samples = [Sample(record, buffer.getvalue(), f"Ein Foto: {record.class_name}") for record in records]
    shard, _ = write_shard(folder / "train-000000.tar", samples)
    counts = [{"train": 1}, {}, {"train": 1}]
    infos = (ClassInfo(i, *classes[i], None, (), counts[i]) for i in range(3))
    Card(tuple(infos), {"train": (shard,)}, {"source": "by hand"}).save(folder)
    return folder


def contents(folder: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """Split -> key -> kind -> bytes, read with tarfile alone."""
    found: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                assert kind not in found[path.name.partition("-")[0]][key]
                found[path.name.partition("-")[0]][key][kind] = tar.extractfile(member).read()
    return found


def urls(folder: Path, split: str) -> list[str]:
    return [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_gnu_tar_lists_the_members(built):
    if shutil.which("tar") is None:
        pytest.skip("no tar here")
    for split, records in contents(built).items():
        listed = [
            line
            for url in urls(built, split)
            for line in subprocess.run(
                ["tar", "tf", url], capture_output=True, text=True, check=True
            ).stdout.split()
        ]
        assert listed == [f"{key}.{kind}" for key in records for kind in ("jpg", "txt", "json")]


@closes_no_tar
def test_webdataset_reads_the_bytes_and_the_records(built):
    for split, records in contents(built).items():
        samples = list(webdataset.WebDataset(urls(built, split), shardshuffle=False))
        assert [s["__key__"] for s in samples] == list(records)
        for sample in samples:
            assert {kind: sample[kind] for kind in ("jpg", "txt", "json")} == records[sample["__key__"]]
            record = Record.from_json(sample["json"])
            assert (record.image_id, record.split) == (sample["__key__"], split)
            assert record.to_json() == sample["json"]
    gc.collect()


@pytest.mark.slow
@closes_no_tar
def test_workers_of_a_loader_see_each_record_once(built):
    """4 shards among 2 workers."""
    found = contents(built)["train"]
    assert len(urls(built, "train")) == 4
    data = webdataset.WebDataset(urls(built, "train"), shardshuffle=False).map(lambda sample: sample["__key__"])
    keys = list(DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert sorted(keys) == sorted(found)
    gc.collect()


def test_datasets_reads_the_tars(built, tmp_path):
    files = {split: urls(built, split) for split in ("train", "val", "test")}
    read = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path))
    for split, records in contents(built).items():
        assert [row["__key__"] for row in read[split]] == list(records)
        for row in read[split]:
            members = records[row["__key__"]]
            assert row["json"] == json.loads(members["json"])
            assert row["txt"] == members["txt"].decode()
            assert np.array_equal(np.asarray(row["jpg"]), pixels(members["jpg"]))


@closes_no_tar
def test_exported_tars_have_the_members_and_a_class_id(built, tmp_path, capsys):
    assert main("export", built, "--to", "webdataset", "--out", tmp_path / "out", "--license", "cc-by-4.0") == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path}/out: 48 photographs (32 train, 4 val, 12 test)\n")
    names = [f"train-{n:06d}.tar" for n in range(4)] + ["test-000000.tar", "test-000001.tar", "val-000000.tar"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*names, "README.md"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    exported = contents(tmp_path / "out")
    for split, records in contents(built).items():
        assert list(exported[split]) == list(records)
        for key, members in records.items():
            class_id = str(Record.from_json(members["json"]).class_id).encode()
            assert exported[split][key] == {**members, "cls": class_id}
        samples = list(webdataset.WebDataset(urls(tmp_path / "out", split), shardshuffle=False).decode())
        assert [s["cls"] for s in samples] == [s["json"]["class_id"] for s in samples]
    gc.collect()


def rebuilt(row: dict, names: list[str], card: Card) -> Record:
    """The record that a row of the Parquet form was made from."""
    assert names[row["label"]] == label_names(card)[row["label"]]
    record = Record(
        image_id=row["image_id"],
        class_id=row["label"],
        raw_class_id=row["raw_class_id"],
        class_name=row["class_name"],
        lon=row["lon"],
        lat=row["lat"],
        date=row["date"] if row["date"] is not None else row["year_fraction"],
        split="train",
        extra=json.loads(row["extra"]),
    )
    assert row["scientific_name"] == card.classes[row["label"]].scientific_name
    assert (row["year_fraction"] is None) == (record.date is None)
    assert record.date is None or row["year_fraction"] == year_fraction(record.date)
    return record


@pytest.mark.parametrize("which", ["built", "by_hand"])
def test_datasets_reads_what_was_exported_for_it(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    out = tmp_path / "out"
    out.mkdir()  # empty: that is as good as new
    assert main("export", folder, "--to", "datasets", "--out", out, "--license", "cc-by-4.0") == 0
    read = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    card = Card.load(folder)
    originals = contents(folder)
    assert {split: len(rows) for split, rows in read.items()} == {s: card.samples(s) for s in card.splits}
    for split, records in originals.items():
        rows = read[split]
        names = rows.features["label"].names
        assert len(set(names)) == len(card.classes)
        for row in rows.cast_column("image", datasets.Image(decode=False)):
            members = records[row["image_id"]]
            original = Record.from_json(members["json"])
            assert dataclasses.replace(rebuilt(row, names, card), split=split) == original
            assert row["image"]["bytes"] == members["jpg"]
            assert row["caption"] == members["txt"].decode()
        first = rows[0]
        assert np.array_equal(np.asarray(first["image"]), pixels(records[first["image_id"]]["jpg"]))


def test_classes_of_one_name_are_told_apart(by_hand):
    names = label_names(Card.load(by_hand))
    assert names[1:] == ["Lark [lark-b]", "Lark [lark-c]"]


def test_the_readme_says_what_there_is(built, tmp_path):
    assert main("export", built, "--to", "datasets", "--out", tmp_path / "larks", "--license", "cc-by-4.0") == 0
    text = (tmp_path / "larks" / "README.md").read_text()
    for line in (
        "license: cc-by-4.0",
        "- image-classification",
        "- n<1K",
        "path: data/train-*",
        "num_examples: 32",
        "# larks",
        "| train | 32 |",
    ):
        assert line in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("to", ["webdataset", "datasets"])
def test_an_export_is_whole_or_not_there(to, built, tmp_path, capsys):
    """A folder that holds something, and a set with a damaged tar in its last split."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert main("export", built, "--to", to, "--out", tmp_path / "full") == 2
    assert "full: holds something already" in capsys.readouterr().err
    shutil.copytree(built, tmp_path / "set")
    tar = tmp_path / "set" / "test-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert main("export", tmp_path / "set", "--to", to, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tar}: not what the card says" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "set"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
