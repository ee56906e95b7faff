"""`xcon-shards build imagefolder`: folders and tables made by hand, and `datasets` as a second reader of them."""

import json
import os
import pickle
import string
import unicodedata
from pathlib import Path, PurePosixPath

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from shards import cli
from shards.imagefolder import ImageFolder
from shards.nabirds import NABirds
from shards.observations import Reader, image_id, split_of
from tests import commands
from tests.pictures import photograph, plan
from xcon.records import Card, caption, check_image_id

SHARED = Path(os.environ.get("XCON_SHARED", Path(__file__).parents[2] / "shared"))
BIRDS37 = SHARED / "data" / "birds37"
needs_birds37 = pytest.mark.skipif(not BIRDS37.is_dir(), reason="no shared/data/birds37 beside the checkout")


def lay(root: Path, *paths: str) -> Path:
    """A folder with these photographs, each of another shade."""
    for shade, path in enumerate(paths):
        photograph(root / path, shade)
    return root


def by_file(source: ImageFolder) -> dict:
    return {record.extra["file_name"]: record for record in plan(source).records}


def test_class_folders(tmp_path):
    """Classes are numbered in order of their names; the record keeps the file's name."""
    root = lay(tmp_path, "Wren/a.jpg", "Wren/b.JPG", "Jay/a.jpg", "Blue  Tit/x y.jpeg")
    (root / "Wren" / "notes.txt").write_text("not a photograph")
    (root / ".thumbnails").mkdir()
    photograph(root / ".thumbnails" / "a.jpg")
    made = plan(ImageFolder(root=root))
    assert [(info.class_id, info.raw_class_id, info.name) for info in made.classes] == [
        (0, "Blue  Tit", "Blue  Tit"),
        (1, "Jay", "Jay"),
        (2, "Wren", "Wren"),
    ]
    assert {r.extra["file_name"]: (r.class_id, r.split, r.lon, r.lat, r.date) for r in made.records} == {
        "Blue  Tit/x y.jpeg": (0, "train", None, None, None),
        "Jay/a.jpg": (1, "train", None, None, None),
        "Wren/a.jpg": (2, "train", None, None, None),
        "Wren/b.JPG": (2, "train", None, None, None),
    }
    assert made.facts["files passed over"] == {".txt": 1}
    assert made.facts["class"] == "the folder's name"
    assert [info.counts["train"] for info in made.classes] == [1, 1, 2]
    assert caption("a {name}", made.classes[0]) == "a Blue Tit"


def test_folders_above_the_class_are_its_hierarchy(tmp_path):
    root = lay(tmp_path, "train/Aves/Corvidae/Jay/a.jpg", "test/Aves/Paridae/Tit/a.jpg")
    made = plan(ImageFolder(root=root))
    assert [info.hierarchy for info in made.classes] == [("Aves", "Corvidae"), ("Aves", "Paridae")]
    assert [(r.class_name, r.split) for r in made.records] == [("Tit", "test"), ("Jay", "train")]


@pytest.mark.parametrize(
    "folders", [("train", "validation", "test"), ("training", "valid", "testing"), ("", "", "")]
)
def test_labels_and_splits_of_folders_are_those_of_datasets(folders, tmp_path):
    """The convention's own reader, on the same folder."""
    names = ("a/1.jpg", "b/2.png", "b/3.JPG", "c/4.jpg")
    paths = [f"{folder}/{name}".strip("/") for folder in dict.fromkeys(folders) for name in names]
    root = lay(tmp_path / "photographs", *paths)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    expected = {}
    for split, rows in theirs.items():
        for row in rows.cast_column("image", datasets.Image(decode=False)):
            expected[os.path.relpath(row["image"]["path"], root)] = (row["label"], split_of(split, "", ""))
    assert len(expected) == len(paths)
    assert {path: (r.class_id, r.split) for path, r in by_file(ImageFolder(root=root)).items()} == expected


def test_metadata_in_the_folders_of_splits_is_read_as_datasets_reads_it(tmp_path):
    root = lay(tmp_path / "photographs", "train/1.jpg", "train/2.jpg", "test/below/1.jpg")
    rows = {
        "train": [("1.jpg", "wren", -1.5, 2.0), ("2.jpg", "jay", 3.25, -4.0)],
        "test": [("below/1.jpg", "jay", 0.5, 0.0)],
    }
    for split, entries in rows.items():
        lines = [
            json.dumps(dict(zip(("file_name", "label", "lon", "lat"), entry, strict=True))) for entry in entries
        ]
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    expected = {
        os.path.relpath(row["image"]["path"], root): (row["label"], row["lon"], row["lat"], split)
        for split, found in theirs.items()
        for row in found.cast_column("image", datasets.Image(decode=False))
    }
    assert len(expected) == 3
    ours = by_file(ImageFolder(root=root))
    assert {path: (r.class_name, r.lon, r.lat, r.split) for path, r in ours.items()} == expected


ROWS = [
    {"file_name": "1.jpg", "label": "007", "lon": -73.5, "lat": 40.25, "date": "2021-05-04"},
    {"file_name": "deep/2.jpg", "label": "Jay (Female)", "lon": None, "lat": None, "date": None},
    {"file_name": "3.jpg", "label": "007", "lon": 180, "lat": -90, "date": 0.25},
]


def write_csv(root: Path, delimiter: str = ",", start: str = "") -> None:
    lines = [delimiter.join(ROWS[0])]
    lines += [delimiter.join("" if value is None else str(value) for value in row.values()) for row in ROWS]
    (root / "metadata.csv").write_text(start + "\n".join(lines) + "\n" + delimiter * 4 + "\n", encoding="utf-8")


def write_jsonl(root: Path) -> None:
    lines = [json.dumps({name: value for name, value in row.items() if value is not None}) for row in ROWS]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_parquet(root: Path) -> None:
    rows = [{**row, "date": None if row["date"] is None else str(row["date"])} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")


KINDS = {
    "commas": write_csv,
    "semicolons": lambda root: write_csv(root, ";", "\ufeff"),
    "tabs": lambda root: write_csv(root, "\t"),
    "lines of JSON": write_jsonl,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_says_the_same(kind, tmp_path):
    """Spelling is kept: label 007 is no 7. An empty cell is unknown; lines of empty cells are nothing."""
    root = lay(tmp_path, "1.jpg", "deep/2.jpg", "3.jpg")
    KINDS[kind](root)
    found = by_file(ImageFolder(root=root))
    assert {path: (r.class_name, r.lon, r.lat, r.date) for path, r in found.items()} == {
        "1.jpg": ("007", -73.5, 40.25, "2021-05-04"),
        "deep/2.jpg": ("Jay (Female)", None, None, None),
        "3.jpg": ("007", 180.0, -90.0, 0.25),
    }


def test_a_spreadsheet_of_gbif_needs_no_flag_but_the_label(tmp_path):
    """Darwin Core's names are known; the table lies elsewhere, has windows' paths, and names fewer photographs."""
    root = lay(tmp_path / "photographs", "cam1/IMG_1.JPG", "cam1/IMG_2.JPG", "cam2/IMG_1.JPG")
    table = tmp_path / "occurrences.tsv"
    head = "photo\tspecies\tfamily\torder\tdecimalLatitude\tdecimalLongitude\teventDate\trecordedBy\tremarks\n"
    table.write_text(
        head
        + "cam1\\IMG_1.JPG\tLynx lynx\tFelidae\tCarnivora\t46.5\t7.75\t2020-12-31T23:59:00Z\tZo\u00eb\tNA\n"
        + "cam2\\IMG_1.JPG\tMeles meles\tMustelidae\tCarnivora\tNA\tNA\tNA\tNA\t\n",
        encoding="utf-8",
    )
    made = plan(
        ImageFolder(
            root=root,
            meta=table,
            file_column="photo",
            label_column="species",
            scientific_name_column="species",
            hierarchy_columns=("order", "family"),
            user_id_column="recordedBy",
            drop_unlisted=True,
        )
    )
    lynx, badger = made.records
    assert (lynx.class_name, lynx.lon, lynx.lat, lynx.date) == ("Lynx lynx", 7.75, 46.5, "2020-12-31")
    assert lynx.extra == {"user_id": "Zo\u00eb", "file_name": "cam1/IMG_1.JPG"}
    assert (badger.lon, badger.lat, badger.date, badger.extra["user_id"]) == (None, None, None, None)
    assert [info.hierarchy for info in made.classes] == [("Carnivora", "Felidae"), ("Carnivora", "Mustelidae")]
    assert made.classes[1].scientific_name == "Meles meles"
    assert made.facts["photographs that no table names, left out"] == 1
    assert made.facts["columns not read"] == "remarks"
    assert made.facts["columns"].startswith(
        "lon from decimalLongitude, lat from decimalLatitude, date from eventD"
    )


def test_a_table_without_labels_adds_places_to_class_folders(tmp_path):
    root = lay(tmp_path, "Wren/1.jpg", "Jay/1.jpg")
    (root / "metadata.csv").write_text("file_name,longitude,latitude\nWren/1.jpg,1,2\nJay/1.jpg,,\n")
    found = by_file(ImageFolder(root=root))
    assert {path: (r.class_name, r.lon, r.lat) for path, r in found.items()} == {
        "Wren/1.jpg": ("Wren", 1.0, 2.0),
        "Jay/1.jpg": ("Jay", None, None),
    }


def test_accents_written_in_two_ways_are_one_file(tmp_path):
    """A Mac writes e and its accent apart, a spreadsheet together."""
    apart = unicodedata.normalize("NFD", "caf\u00e9/1.jpg")
    lay(tmp_path, apart, "x/1.jpg")
    (tmp_path / "metadata.csv").write_text("file_name,label\ncaf\u00e9/1.jpg,a\nx/1.jpg,b\n", encoding="utf-8")
    assert set(by_file(ImageFolder(root=tmp_path))) == {apart, "x/1.jpg"}


@pytest.mark.parametrize(
    ("cell", "date"),
    [
        ("2021-05-04", "2021-05-04"),
        ("2019-06-17 15:19:38+00:00", "2019-06-17"),
        ("2019-06-17T23:59:59Z", "2019-06-17"),
        (" 2021-05-04 ", "2021-05-04"),
        ("0.5", 0.5),
        (1, 1.0),
        ("", None),
        ("NA", None),
        (float("nan"), None),
        (None, None),
    ],
)
def test_dates_by_hand(cell, date):
    reader = Reader()
    assert reader.date(cell, "row 1") == date
    reader.check()
    assert reader.facts == {}


@pytest.mark.parametrize(
    "cell", ["17.06.2019", "6/17/2019", "2019", "2019-06", "2019-06-17/2019-06-18", "1.5", "summer", "2021-02-30"]
)
def test_what_is_no_date_is_unknown_and_an_error(cell):
    reader = Reader()
    assert reader.date(cell, "row 1") is None
    assert reader.facts == {"unreadable, taken as unknown": {"places": 0, "dates": 1}}
    with pytest.raises(ValueError, match=r"^row 1: date .* is neither an ISO date such as 2026-07-01 nor a frac"):
        reader.check()


def test_unreadable_places_are_counted(tmp_path):
    root = lay(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg")
    (root / "metadata.csv").write_text(
        "file_name,lon,lat,date\na/1.jpg,20,95,2021-05-04\na/2.jpg,47,,May\nb/3.jpg,1,2,0.5\n"
    )
    made = plan(ImageFolder(root=root, unreadable_as_unknown=True))
    assert [(r.lon, r.lat, r.date) for r in made.records] == [
        (None, None, "2021-05-04"),
        (None, None, None),
        (1.0, 2.0, 0.5),
    ]
    assert made.facts["unreadable, taken as unknown"] == {"places": 2, "dates": 1}


def test_drawn_splits(tmp_path):
    """Of 10 and 5 train photographs: 2 of each for val; a fifth for test, 2 and 1."""
    paths = [f"a/{k}.jpg" for k in range(10)] + [f"b/{k}.jpg" for k in range(5)]
    root = lay(tmp_path, *paths)
    source = ImageFolder(root=root, val_per_class=2, test_share=0.2)
    made = plan(source)
    assert [info.counts for info in made.classes] == [
        {"train": 6, "val": 2, "test": 2},
        {"train": 2, "val": 2, "test": 1},
    ]
    splits = {r.image_id: r.split for r in made.records}
    assert {r.image_id: r.split for r in plan(source).records} == splits
    other = plan(ImageFolder(root=root, val_per_class=2, test_share=0.2, seed=1)).records
    assert {r.image_id: r.split for r in other} != splits
    lay(root, *(f"c/{k}.jpg" for k in range(5)))  # another class changes nothing
    again = {r.image_id: r.split for r in plan(source).records}
    assert {name: again[name] for name in splits} == splits


def test_val_is_drawn_from_train_alone(tmp_path):
    root = lay(tmp_path, *(f"{split}/a/{k}.jpg" for split in ("train", "test") for k in range(4)))
    records = plan(ImageFolder(root=root, val_per_class=1)).records
    assert sorted(r.split for r in records) == ["test"] * 4 + ["train"] * 3 + ["val"]
    assert {r.split for r in records if r.extra["file_name"].startswith("test/")} == {"test"}


def test_classes_that_a_share_leaves_without_test_are_said(tmp_path):
    root = lay(tmp_path, *(f"a/{k}.jpg" for k in range(9)), "b/1.jpg")
    assert plan(ImageFolder(root=root, test_share=0.3)).facts["classes without photographs in"] == {"test": 1}


def test_names_that_differ_in_case_alone_are_said(tmp_path):
    root = lay(tmp_path, "Parus major/1.jpg", "parus  major/1.jpg", "Jay/1.jpg")
    made = plan(ImageFolder(root=root))
    assert made.facts["class names that differ only in case or spaces"] == 2
    assert len(made.classes) == 3


PATHS = st.text(string.printable + "\u00e9\u4e2d/", min_size=1).filter(lambda path: PurePosixPath(path).name)


@settings(deadline=None)
@given(PATHS, PATHS)
def test_ids_of_paths(one, other):
    """Any path gives an id that a tar can hold; two paths give two."""
    check_image_id(image_id(one))
    assert image_id(one).isascii()
    assert (image_id(one) == image_id(other)) == (one == other)


def test_an_id_by_hand():
    """sha256sum of the path begins with these ten digits."""
    assert image_id("Parus major/IMG 3.JPG") == "Parus-major-IMG-3-ca56ef9d0d"
    assert image_id("a" * 200 + ".jpg") == "a" * 80 + "-" + image_id("a" * 200 + ".jpg")[-10:]


def test_ids_of_a_column(tmp_path):
    root = lay(tmp_path, "a/1.jpg", "a/2.jpg")
    (root / "metadata.csv").write_text("file_name,id\na/1.jpg,1001\na/2.jpg,1002\n")
    assert [r.image_id for r in plan(ImageFolder(root=root, image_id_column="id")).records] == ["1001", "1002"]


def noted(lon: str, lat: str, degrees: tuple, date: str | None) -> Image.Exif:
    exif = Image.Exif()
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLatitude] = lat, degrees
    gps[ExifTags.GPS.GPSLongitudeRef], gps[ExifTags.GPS.GPSLongitude] = lon, degrees
    if date:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = date
    return exif


def test_exif_fills_what_the_table_lacks_and_only_when_asked(tmp_path):
    """40 degrees 30 minutes 36 seconds are 40.51 degrees; south and west are negative."""
    west = noted("W", "S", (40.0, 30.0, 36.0), "2021:05:04 10:11:12")
    photograph(tmp_path / "a" / "1.jpg", exif=west)
    photograph(tmp_path / "a" / "2.jpg", exif=west)
    photograph(tmp_path / "a" / "3.jpg", exif=noted("E", "N", (0.0, 0.0, 0.0), "0000:00:00 00:00:00"))
    (tmp_path / "a" / "4.png").write_bytes(b"broken")
    rows = "file_name,lon,lat,date\na/1.jpg,,,\na/2.jpg,1,2,2001-01-01\na/3.jpg,,,\na/4.png,,,\n"
    (tmp_path / "metadata.csv").write_text(rows)
    made = plan(ImageFolder(root=tmp_path, exif=True))
    assert [(r.lon, r.lat, r.date) for r in made.records] == [
        (pytest.approx(-40.51), pytest.approx(-40.51), "2021-05-04"),
        (1.0, 2.0, "2001-01-01"),
        (None, None, None),
        (None, None, None),
    ]
    assert made.facts["taken from EXIF"] == {"places": 1, "dates": 1}
    silent = plan(ImageFolder(root=tmp_path)).records[0]
    assert (silent.lon, silent.date) == (None, None)


def test_a_photograph_can_be_read_in_another_process(tmp_path):
    data = photograph(tmp_path / "a" / "1.jpg", 7)
    made = plan(ImageFolder(root=tmp_path))
    assert pickle.loads(pickle.dumps(made.photograph))(made.records[0].image_id).jpg == data


def test_from_folder_to_verified_shards(tmp_path, capsys):
    """No place, no date: both null. The dry run counts the same and writes nothing."""
    root = lay(
        tmp_path / "in", *(f"{split}/{c}/{k}.jpg" for split in ("train", "test") for c in "ab" for k in "12")
    )
    arguments = ["build", "imagefolder", "--root", root, "--out", tmp_path / "set"]
    assert commands.run(cli.main, [*arguments, "--dry-run"]) == 0
    dry = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "set").exists()
    assert commands.run(cli.main, arguments) == 0
    assert set(dry) - set(capsys.readouterr().out.splitlines()) == {"dry run: nothing was written"}
    assert "without place or date                      8 (100.0%)" in dry
    assert commands.run(cli.main, ["verify", tmp_path / "set"]) == 0
    card = Card.load(tmp_path / "set")
    assert [info.counts for info in card.classes] == [{"train": 2, "val": 0, "test": 2}] * 2
    assert card.made_by["root"] == "in"


@needs_birds37
def test_birds37_in_class_folders_gives_the_records_of_nabirds(tmp_path):
    """Real photographs and places, laid out anew: same class, place, date, split and bytes by photograph."""
    release = plan(NABirds(root=BIRDS37, meta=BIRDS37 / "nabirds_with_loc_2019.json"))
    files = dict(line.split(" ", 1) for line in (BIRDS37 / "images.txt").read_text().splitlines())
    lines = ["file_name,label,decimalLatitude,decimalLongitude,eventDate,user_id,split,image_id,name,group\n"]
    for record in release.records:
        folder = tmp_path / str(record.raw_class_id)
        folder.mkdir(exist_ok=True)
        name = Path(files[record.image_id]).name
        (folder / name).symlink_to(BIRDS37 / "images" / files[record.image_id])
        info = release.classes[record.class_id]
        cells = [f"{folder.name}/{name}", record.class_id + 100, record.lat, record.lon, record.date]
        cells += [record.extra["user_id"], record.split, record.image_id, info.scientific_name, info.hierarchy[0]]
        lines.append(",".join("" if cell is None else f'"{cell}"' for cell in cells) + "\n")
    (tmp_path / "metadata.csv").write_text("".join(lines))
    made = plan(
        ImageFolder(
            root=tmp_path, image_id_column="image_id", scientific_name_column="name", hierarchy_columns=("group",)
        )
    )

    def facts(records):
        return {r.image_id: (r.class_id, r.lon, r.lat, r.date, r.split) for r in records}

    assert facts(made.records) == facts(release.records)
    assert [i.scientific_name for i in made.classes] == [i.scientific_name for i in release.classes]
    assert [i.hierarchy[0] for i in made.classes] == [i.hierarchy[0] for i in release.classes]
    assert [i.counts for i in made.classes] == [i.counts for i in release.classes]
    for record in made.records[::200]:
        assert made.photograph(record.image_id) == release.photograph(record.image_id)
