"""`xcon-shards build nabirds` on real files: the NABirds index (no photographs) and birds37 (whole)."""

import gc
import io
import json
import os
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from rich.console import Console

from shards import cli, nabirds
from shards.progress import progress
from tests import commands
from xcon.records import Card, caption


def main(argv):
    return commands.run(cli.main, argv)


SHARED = Path(os.environ.get("XCON_SHARED", Path(__file__).parents[2] / "shared"))
INDEX = SHARED / "data" / "nabirds_index"
BIRDS37 = SHARED / "data" / "birds37"
META = "nabirds_with_loc_2019.json"

needs_index = pytest.mark.skipif(not INDEX.is_dir(), reason="no shared/data/nabirds_index beside the checkout")
needs_birds37 = pytest.mark.skipif(not BIRDS37.is_dir(), reason="no shared/data/birds37 beside the checkout")


def rows(path: Path) -> list[list[str]]:
    return [line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines()]


def build(root: Path, out: Path, *more: str) -> None:
    arguments = ["build", "nabirds", "--root", str(root), "--out", str(out), *more]
    assert main(arguments) == 0


@pytest.fixture(scope="module")
def index_plan():
    release = nabirds.read_folder(INDEX, lambda data, name: data)
    return nabirds.plan(release, None, val_per_class=0, seed=0)


@pytest.fixture(scope="module")
def birds37(tmp_path_factory):
    out = tmp_path_factory.mktemp("birds37") / "set"
    build(BIRDS37, out, "--meta", str(BIRDS37 / META))
    return out


@pytest.fixture(scope="module")
def birds37_records(birds37):
    """Every record by its image id: (json, caption, jpg), read with tarfile alone."""
    records = {}
    for path in sorted(birds37.glob("*.tar")):
        with tarfile.open(path) as tar:
            contents = {m.name: tar.extractfile(m).read() for m in tar}
        for name, data in contents.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                records[key] = (json.loads(data), contents[f"{key}.txt"].decode(), contents[f"{key}.jpg"])
    return records


@needs_index
def test_dry_run_counts_the_release(tmp_path, capsys):
    """The published counts: 48,562 = 23,929 train + 24,633 test, 555 classes, 35 files .JPG, 201 boxes
    outside; raw ids 295..1010 with the gaps 299-313, 382-392, 402-446, 561-599, 681-696, 700-746, which hold
    13 + 9 + 43 + 37 + 14 + 45 = 161 unused ids."""
    assert main(["build", "nabirds", "--root", str(INDEX), "--out", str(tmp_path / "set"), "--dry-run"]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    shown = {name: value.strip() for name, value in shown.items()}
    assert shown["images"] == "48,562"
    assert shown["train"].startswith("23,929 (4 to 60 per class")
    assert shown["val"] == "0"
    assert shown["test"].startswith("24,633 (9 to 60 per class")
    assert shown["classes"] == "555"
    assert shown["raw ids"] == "295 -> 0 ... 1010 -> 554, 161 ids between unused in 6 gaps"
    assert shown["files by suffix"] == "48,527 .jpg, 35 .JPG"
    assert shown["boxes that leave the image, clipped"] == "201"
    assert list(tmp_path.iterdir()) == []


@needs_index
def test_class_ids_are_those_of_np_unique(index_plan):
    """Many readers number the classes with np.unique; set order or 1-based ids would differ."""
    labels = rows(INDEX / "image_class_labels.txt")
    raw, inverse = np.unique([int(label) for _, label in labels], return_inverse=True)
    ours = {r.image_id: r.class_id for r in index_plan.records}
    assert [ours[image_id] for image_id, _ in labels] == inverse.tolist()
    assert [info.raw_class_id for info in index_plan.classes] == raw.tolist()


@needs_index
def test_boxes_lie_in_their_images(index_plan):
    """201 boxes of bounding_boxes.txt leave the image of sizes.txt (facts/nabirds.md); none does here."""
    boxes = {i: [int(v) for v in rest.split()] for i, rest in rows(INDEX / "bounding_boxes.txt")}
    changed = 0
    for record in index_plan.records:
        x, y, w, h = record.extra["bbox"]
        assert x >= 0
        assert y >= 0
        assert w > 0
        assert h > 0
        assert x + w <= record.extra["width"]
        assert y + h <= record.extra["height"]
        changed += boxes[record.image_id] != [x, y, w, h]
    assert changed == 201


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([10, 20, 30, 25], [10, 20, 30, 25]),
        ([-5, -6, 30, 40], [0, 0, 25, 34]),
        ([90, 40, 30, 40], [90, 40, 10, 10]),
        ([120, 60, 5, 5], [100, 50, 0, 0]),
    ],
)
def test_clip_box_by_hand(box, clipped):
    assert nabirds.clip_box(box, width=100, height=50) == clipped


@needs_index
def test_names_keep_their_spelling_and_captions_do_not(index_plan):
    """classes.txt has two spaces in class 318; a caption is a sentence and has one."""
    teal = next(info for info in index_plan.classes if info.raw_class_id == 318)
    assert teal.name == "Blue-winged Teal  (Male)"
    template = "This is a photograph of a bird called {name}"
    assert caption(template, teal) == "This is a photograph of a bird called Blue-winged Teal (Male)"
    assert caption("{family}", teal) == "Ducks, Geese, and Swans"


@needs_index
def test_hierarchy_runs_from_a_top_group_to_the_parent(index_plan):
    """The 22 groups below the root are classes 1..22; every leaf's parent is a species of its base name."""
    names = {int(raw): name for raw, name in rows(INDEX / "classes.txt")}
    parents = {int(child): int(parent) for child, parent in rows(INDEX / "hierarchy.txt")}
    for info in index_plan.classes:
        assert info.hierarchy[0] in {names[i] for i in range(1, 23)}
        assert info.hierarchy[-1] == names[parents[info.raw_class_id]]
        assert "Birds" not in info.hierarchy


def test_ancestors_by_hand():
    """0 <- 1 <- 5 <- 9, 0 is the root."""
    parents = {1: 0, 5: 1, 9: 5}
    assert nabirds.ancestors(9, parents) == [1, 5]
    assert nabirds.ancestors(1, parents) == []
    with pytest.raises(ValueError, match="its own ancestor"):
        nabirds.ancestors(9, {9: 8, 8: 7, 7: 8})


@needs_index
def test_a_build_without_photographs_says_so(tmp_path, capsys):
    assert main(["build", "nabirds", "--root", str(INDEX), "--out", str(tmp_path / "set")]) == 2
    assert "48,562 of 48,562 photographs of images.txt are not there" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@needs_birds37
def test_birds37_is_whole(birds37, capsys):
    assert main(["verify", str(birds37)]) == 0
    assert capsys.readouterr().err == ""
    card = Card.load(birds37)
    assert {split: card.samples(split) for split in card.splits} == {"train": 1036, "val": 74, "test": 1101}
    assert not [p for p in birds37.iterdir() if p.name.startswith(".")]


@needs_birds37
def test_birds37_records_are_those_of_the_location_file(birds37_records):
    """Against the file itself, joined by path and not by id."""
    source = json.loads((BIRDS37 / META).read_bytes())
    paths = {path: image_id for image_id, path in rows(BIRDS37 / "images.txt")}
    unknown = 0
    assert len(birds37_records) == len(paths)
    for split in ("train", "val", "test"):
        for entry in source[split]:
            record, text, _ = birds37_records[paths[entry["im_path"]]]
            meta = entry["ebird_meta"]
            for name in ("lon", "lat", "date"):
                unknown += meta[name] != meta[name]
                assert record[name] == (None if meta[name] != meta[name] else meta[name])
            assert record["user_id"] == meta["user_id"]
            assert record["split"] == split
            assert record["class_id"] == entry["class_id"]
            assert record["class_name"] == source["classes"][entry["class_id"]]
            name = " ".join(record["class_name"].split())
            assert text == f"This is a photograph of a bird called {name}"
    assert unknown == 3 * 24  # 24 records of birds37 have no place and no date


@needs_birds37
def test_small_upright_jpegs_keep_their_bytes(birds37_records):
    """All of birds37 is 227 x 227, below --size 384."""
    for image_id, path in rows(BIRDS37 / "images.txt"):
        assert birds37_records[image_id][2] == (BIRDS37 / "images" / path).read_bytes()


@needs_birds37
def test_upper_case_suffixes_are_kept(birds37_records):
    """A glob of *.jpg loses 35 photographs of NABirds; birds37 has 7 such files."""
    upper = [image_id for image_id, path in rows(BIRDS37 / "images.txt") if path.endswith(".JPG")]
    assert len(upper) == 7
    assert set(upper) <= set(birds37_records)


@needs_birds37
def test_index_points_at_the_jpegs(birds37, birds37_records):
    """Offset and size give the photograph without any tar reader; NaN stands for unknown."""
    for path in birds37.glob("*.index.parquet"):
        data = path.with_name(path.name.replace(".index.parquet", ".tar")).read_bytes()
        for row in pq.read_table(path).to_pylist():
            record, text, jpg = birds37_records[row["image_id"]]
            assert data[row["offset"] : row["offset"] + row["size"]] == jpg
            assert row["caption"] == text
            assert row["class_id"] == record["class_id"]
            assert (row["lon"] == record["lon"]) or (row["lon"] != row["lon"] and record["lon"] is None)


@needs_birds37
def test_order_is_shuffled_at_write(birds37):
    """37 classes: 256 records in class order hold about 10 classes, shuffled about 37."""
    labels = pq.read_table(birds37 / "train-000000.index.parquet")["class_id"].to_pylist()
    assert len(set(labels)) > 30
    images = pq.read_table(birds37 / "train-000000.index.parquet")["image_id"].to_pylist()
    assert images != sorted(images)


@needs_birds37
def test_scientific_names_and_families_come_along(birds37):
    first = Card.load(birds37).classes[0]
    assert (first.name, first.scientific_name) == ("Red-winged Blackbird", "Agelaius phoeniceus")
    assert caption("{scientific_name}, {family}", first) == "Agelaius phoeniceus, Blackbirds and Orioles"


@needs_birds37
def test_archive_and_folder_give_the_same_bytes(birds37, tmp_path):
    """The archive has a top folder, and its photographs come before its tables."""
    archive = tmp_path / "nabirds.tgz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for path in sorted(BIRDS37.iterdir(), key=lambda p: p.is_file()):
            tar.add(path, f"nabirds/{path.name}")
    build(archive, tmp_path / "set", "--meta", str(BIRDS37 / META))
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == sorted(p.name for p in birds37.iterdir())
    for path in birds37.glob("*-*"):
        assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes()
    assert Card.load(tmp_path / "set").sha256 == Card.load(birds37).sha256


@needs_birds37
def test_archive_dry_run_counts_without_photographs(tmp_path, capsys):
    archive = tmp_path / "birds.tar"
    with tarfile.open(archive, "w") as tar:
        for path in BIRDS37.glob("*.txt"):
            tar.add(path, path.name)
    arguments = ["build", "nabirds", "--root", str(archive), "--out", str(tmp_path / "x"), "--dry-run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2,211" in shown
    assert not (tmp_path / "x").exists()


@needs_birds37
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset closes no tar
def test_webdataset_reads_it(birds37, birds37_records):
    urls = sorted(str(p) for p in birds37.glob("test-*.tar"))
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        assert sample["txt"] == birds37_records[sample["__key__"]][1]
        assert sample["jpg"].size == (227, 227)
        found[sample["__key__"]] = sample["json"]
    assert found == {key: record for key, (record, _, _) in birds37_records.items() if record["split"] == "test"}
    gc.collect()


@needs_birds37
def test_datasets_reads_it(birds37, birds37_records, tmp_path):
    files = [str(birds37 / "val-000000.tar")]
    rows_read = datasets.load_dataset(
        "webdataset", data_files={"val": files}, split="val", cache_dir=str(tmp_path)
    )
    assert len(rows_read) == 74
    for row in rows_read:
        record, text, jpg = birds37_records[row["__key__"]]
        assert row["json"] == record
        assert row["txt"] == text
        assert np.array_equal(np.asarray(row["jpg"]), np.asarray(Image.open(io.BytesIO(jpg))))


def test_a_console_without_a_terminal_gets_plain_lines():
    """No cursor movement in a batch log."""
    text = io.StringIO()
    with progress(Console(file=text), "pack", 200, "photographs", every=0.0) as advance:
        advance(50)
    first, last = text.getvalue().splitlines()
    assert first.startswith("pack: 50 of 200 photographs (25%), ")
    assert last.startswith("pack: 50 of 200 photographs (25%), ")
    assert "\x1b" not in text.getvalue()
