"""Wrong usage and wrong input of the sources with tables: exit status 2, and one line that says what, where and
what to do."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from shards import cli
from tests import commands
from tests.pictures import photograph

HEAD = "file_name,species,decimalLatitude,decimalLongitude,eventDate,split\n"
ROWS = [
    "a/1.jpg,wren,51.5,-0.5,2021-05-04,train\n",
    "a/2.jpg,wren,51.5,-0.5,2021-05-04,train\n",
    "b/1.jpg,jay,47.0,8.5,2020-12-31,test\n",
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """`lab`: class folders with a table; `inat`: two annotation files; `saved`: a set of `datasets`."""
    folder = tmp_path_factory.mktemp("originals")
    for path in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        photograph(folder / "lab" / path)
        photograph(folder / "bare" / path)
        photograph(folder / "inat" / "x" / path)
    (folder / "lab" / "metadata.csv").write_text(HEAD + "".join(ROWS))
    images = [
        {"id": k, "file_name": f"x/{path}", "latitude": 51.5, "longitude": -0.5, "date": "2021-05-04"}
        for k, path in enumerate(("a/1.jpg", "a/2.jpg", "b/1.jpg"))
    ]
    annotations = [{"id": k, "image_id": k, "category_id": k // 2} for k in range(3)]
    categories = [{"id": k, "name": name, "supercategory": "Birds"} for k, name in enumerate(("wren", "jay"))]
    values = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "inat" / "train.json").write_text(json.dumps(values))
    notes = [{"id": k, "lat": 51.5, "lon": -0.5, "date": "2021-05-04", "user_id": 1} for k in range(3)]
    (folder / "inat" / "train_locations.json").write_text(json.dumps(notes))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["wren", "jay"]),
            "lon": datasets.Value("float32"),
        }
    )
    image = {"bytes": (folder / "lab" / "a" / "1.jpg").read_bytes(), "path": None}
    rows = [{"image": image, "label": k, "lon": 1.0} for k in (0, 1)]
    saved = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": saved, "extra": saved}).save_to_disk(str(folder / "saved"))
    unlabelled = datasets.Dataset.from_list([{**rows[0], "label": -1}], features=features)
    unlabelled.remove_columns("lon").save_to_disk(str(folder / "unlabelled"))
    empty = datasets.Dataset.from_list([{**rows[0], "image": None}], features=features).remove_columns("lon")
    empty.save_to_disk(str(folder / "empty"))
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "x")
    return tmp_path / "x"


@dataclasses.dataclass(frozen=True)
class Case:
    """`spoil` changes a copy and gives the arguments."""

    name: str
    spoil: Callable[[Path], list[str]]
    message: str


def lab(folder: Path, *more: str, root: str = "lab") -> list[str]:
    return ["build", "imagefolder", "--root", str(folder / root), "--out", str(folder / "out"), *more]


def species(folder: Path, *more: str) -> list[str]:
    return lab(folder, "--label-column", "species", *more)


def table(folder: Path, *rows: str, head: str = HEAD) -> list[str]:
    """A table with these rows, line 2 and on."""
    (folder / "lab" / "metadata.csv").write_text(head + "".join(rows), encoding="utf-8")
    return species(folder)


def one(old: str, new: str) -> Callable[[Path], list[str]]:
    """The first row, line 2, changed."""
    assert old in ROWS[0]
    return lambda folder: table(folder, ROWS[0].replace(old, new), *ROWS[1:])


def put(folder: Path, path: str, content: str | bytes | None, arguments: list[str]) -> list[str]:
    """Another file; a photograph where the content is None."""
    if content is None:
        photograph(folder / path)
    else:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return arguments


def inat(folder: Path, *more: str, annotations: str = "train.json") -> list[str]:
    given = ["--root", str(folder / "inat"), "--annotations", str(folder / "inat" / annotations)]
    return ["build", "inaturalist", *given, "--out", str(folder / "out"), *more]


def edit(change: Callable[[dict], object], name: str = "train.json", *more: str) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        path = folder / "inat" / name
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        return inat(folder, *(str(folder / word) if "/" in word else word for word in more))

    return spoil


LOCATIONS = ("train_locations.json", "--locations", "inat/train_locations.json")


def hub(folder: Path, *more: str, name: str = "saved") -> list[str]:
    return ["build", "hub", "--name", str(folder / name), "--out", str(folder / "out"), *more]


BOTH = ("--splits", "train=train", "test=extra")

CASES = [
    # a folder and its table
    Case("no folder", lambda f: lab(f, root="nowhere"), "nowhere: no such folder; --root is the folder of the"),
    Case("a file", lambda f: lab(f, root="lab/metadata.csv"), "metadata.csv: is a file; --root is the folder"),
    Case(
        "no photographs",
        lambda f: put(f, "docs/a.txt", "x", lab(f, root="docs")),
        "docs: no photograph here or below (.jpg, ",
    ),
    Case(
        "no such column",
        lambda f: lab(f, "--label-column", "taxon"),
        "--label-column taxon: {x}/lab/metadata.csv has no such column, only file_name, species, decimalLatitude, "
        "decimalLongitude, eventDate, split",
    ),
    Case(
        "no such hierarchy", lambda f: species(f, "--hierarchy-columns", "family"), "--hierarchy-columns family: "
    ),
    Case(
        "no label",
        lambda f: put(
            f,
            "lab/metadata.csv",
            "file_name,sp\n1.jpg,wren\n",
            put(f, "lab/1.jpg", None, lab(f, "--drop-unlisted")),
        ),
        "metadata.csv: has no column 'label'; --label-column names one of file_name, sp",
    ),
    Case(
        "no file column",
        lambda f: table(f, "1,wren\n", head="photo,species\n"),
        "metadata.csv line 2: no column 'file_name'; --file-column names one of photo, species",
    ),
    Case(
        "lat without lon",
        lambda f: table(f, "a/1.jpg,wren,1,2\n", head="file_name,species,lat,easting\n"),
        "column 'lat' is the lat, which is the lon? --lon-column names one of file_name, species, lat, easting; "
        "or --lat-column '' reads no places",
    ),
    Case(
        "two dates",
        lambda f: table(f, "a/1.jpg,wren,1,2\n", head="file_name,species,date,eventDate\n"),
        "has columns date and eventDate; --date-column says which is meant",
    ),
    Case(
        "lat of 95",
        one("51.5", "95"),
        "lab/metadata.csv line 2: lat 95.0 is outside [-90, 90] degrees: are lon and lat exchanged?; "
        "--unreadable-as-unknown takes such as unknown and counts them",
    ),
    Case(
        "exchanged", one("51.5,-0.5", "-120.5,47"), "line 2: lat -120.5 is outside [-90, 90] degrees: are lon and"
    ),
    Case("lon of 181", one("-0.5", "181"), "line 2: lon 181.0 is outside [-180, 180] degrees"),
    Case("decimal comma", one("51.5", '"51,5"'), "line 2: lat '51,5' is no number of degrees such as -73.985"),
    Case("degrees and minutes", one("51.5", "51 30 N"), "line 2: lat '51 30 N' is no number of degrees"),
    Case("half a place", one("51.5", ""), "line 2: lon is -0.5, lat is None: both or neither"),
    Case(
        "no date",
        one("2021-05-04", "04/05/2021"),
        "line 2: date '04/05/2021' is neither an ISO date such as 2026-07-01 nor a fraction of the year in "
        "[0, 1]; --unreadable-as-unknown takes such as unknown and counts them",
    ),
    Case(
        "several",
        lambda f: table(f, *(row.replace("-0.5", "west").replace("2020", "20") for row in ROWS)),
        "line 2: lon 'west' is no number of degrees such as -73.985 (and 2 more that are no place or no date)",
    ),
    Case("an interval", one("2021-05-04", "2021-05-04/2021-05-06"), "line 2: date '2021-05-04/2021-05-06' is nei"),
    Case("no split", one("train", "holdout"), "line 2: split 'holdout' is none of train, training, val, "),
    Case("empty split", one(",train", ","), "line 2: column 'split' is empty; fill it in, or take the row out"),
    Case("empty label", one("wren", ""), "line 2: column 'species' is empty; fill it in, or take the row out"),
    Case("no such photograph", one("a/1.jpg", "a/9.jpg"), "line 2: file 'a/9.jpg' is not there, nor a photograph"),
    Case("case of a suffix", one("a/1.jpg", "a/1.JPG"), "line 2: file 'a/1.JPG' is not there; is it a/1.jpg?"),
    Case("folder left out", one("a/1.jpg", "2.jpg"), "line 2: file '2.jpg' is not there; is it a/2.jpg?"),
    Case(
        "outside",
        one("a/1.jpg", "../../1.jpg"),
        "line 2: file '../../1.jpg' is not there; 2 photographs in other folders",
    ),
    Case("names no file", one("a/1.jpg", ""), "line 2: names no file"),
    Case(
        "a row twice",
        lambda f: table(f, *ROWS, ROWS[0]),
        "lab/metadata.csv line 5: a/1.jpg stands in {x}/lab/metadata.csv line 2 already; one row for a photograph",
    ),
    Case(
        "a photograph without a row",
        lambda f: table(f, *ROWS[:2]),
        "metadata.csv: 1 of 3 photographs have no row, the first is b/1.jpg; --drop-unlisted leaves them out",
    ),
    Case("a cell too many", one("wren", "wren,x"), "line 2: has 7 cells, the first line has 6"),
    Case("empty table", table, "metadata.csv: has no rows"),
    Case(
        "a column twice",
        lambda f: table(f, *ROWS, head=HEAD.replace("species", "split")),
        "two columns are called",
    ),
    Case(
        "not UTF-8",
        lambda f: put(f, "lab/metadata.csv", "file_name,label\na/1.jpg,ca\u00e7a\n".encode("latin-1"), lab(f)),
        "metadata.csv: not UTF-8 (invalid continuation byte at byte",
    ),
    Case(
        "no JSON",
        lambda f: put(f, "m.jsonl", "{\n", lab(f, "--meta", str(f / "m.jsonl"))),
        "m.jsonl line 1: not JSON",
    ),
    Case(
        "no object",
        lambda f: put(f, "m.jsonl", "[]\n", lab(f, "--meta", str(f / "m.jsonl"))),
        "line 1: not a JSON ob",
    ),
    Case(
        "no parquet",
        lambda f: put(f, "m.parquet", "x", lab(f, "--meta", str(f / "m.parquet"))),
        "m.parquet: not a par",
    ),
    Case(
        "a workbook",
        lambda f: lab(f, "--meta", str(f / "m.xlsx")),
        "m.xlsx: no table by its name; save it as one of .csv, .tsv, .jsonl, .parquet",
    ),
    Case("no such table", lambda f: lab(f, "--meta", str(f / "m.csv")), "m.csv: cannot be read (No such file"),
    Case(
        "two tables",
        lambda f: put(f, "lab/metadata.jsonl", '{"file_name": "a/1.jpg"}\n', lab(f)),
        "metadata.csv: another metadata file stands in the same folder; keep one",
    ),
    Case(
        "unlike tables",
        lambda f: put(f, "lab/a/metadata.csv", "file_name,x\n1.jpg,1\n", lab(f)),
        "metadata files with unlike columns: file_name, ",
    ),
    Case(
        "labels of two kinds",
        lambda f: put(
            f,
            "m.jsonl",
            '{"file_name": "a/1.jpg", "label": 1}\n{"file_name": "a/2.jpg", "label": "x"}\n',
            lab(f, "--meta", str(f / "m.jsonl"), "--drop-unlisted"),
        ),
        "column 'label' holds numbers in some rows and words in others",
    ),
    Case(
        "two families",
        lambda f: [
            *table(
                f, "a/1.jpg,wren,A\n", "a/2.jpg,wren,B\n", "b/1.jpg,jay,C\n", head="file_name,species,family\n"
            ),
            *("--hierarchy-columns", "family"),
        ],
        "metadata.csv line 3 and {x}/lab/metadata.csv line 2: class 'wren' is 'B' in one and 'A' in the other",
    ),
    Case(
        "id twice",
        lambda f: species(f, "--image-id-column", "eventDate"),
        "line 3: image id 2021-05-04 stands in {x}/lab/metadata.csv line 2 already",
    ),
    Case(
        "no id",
        lambda f: species(f, "--image-id-column", "file_name"),
        "line 2: record a/1.jpg: an image id has 1 to",
    ),
    # folders without a table
    Case(
        "no class folder",
        lambda f: put(f, "bare/1.jpg", None, lab(f, root="bare")),
        "1.jpg lies in no folder of a cl",
    ),
    Case(
        "unequal depths",
        lambda f: put(f, "bare/b/c/1.jpg", None, lab(f, root="bare")),
        "bare: the classes are no folders of one depth: a/1.jpg, b/c/1.jpg",
    ),
    Case(
        "some in splits",
        lambda f: put(f, "bare/test/c/1.jpg", None, lab(f, root="bare")),
        "test/c/1.jpg lies in a folder of a split and a/1.jpg in none: lay all of them in train, val and test",
    ),
    Case(
        "split twice",
        lambda f: put(
            f,
            "m.csv",
            "file_name,split\ntrain/a/1.jpg,test\n",
            put(f, "in/train/a/1.jpg", None, lab(f, "--meta", str(f / "m.csv"), root="in")),
        ),
        "m.csv: column 'split' says the split, and so do the folders; --split-column split takes the column, ",
    ),
    Case(
        "columns of no table",
        lambda f: lab(f, "--lon-column", "x", root="bare"),
        "--lon-column x: {x}/bare has no table; put a metadata.csv there, or name one with --meta",
    ),
    Case(
        "unused", lambda f: lab(f, "--drop-unlisted", root="bare"), "--drop-unlisted: {x}/bare has no table; put"
    ),
    # drawn splits
    Case(
        "too small a class",
        lambda f: lab(f, "--val-per-class", "1", "--test-share", "0.5", root="bare"),
        "--val-per-class 1 --test-share 0.5: class 'a' has only 2 train photographs, and one must be left "
        "to train",
    ),
    Case("share", lambda f: lab(f, "--val-share", "1.5"), "--val-share 1.5: a number from 0 to below 1 is needed"),
    Case(
        "share and number",
        lambda f: lab(f, "--val-share", "0.5", "--val-per-class", "1"),
        "--val-share 0.5: --val-per-class 1 is given; one of them",
    ),
    Case(
        "test is there",
        lambda f: species(f, "--test-share", "0.1"),
        "--test-share: test is not drawn, the source says",
    ),
    Case(
        "broken",
        lambda f: put(f, "lab/a/1.jpg", "x", species(f)),
        "a/1.jpg: does not decode (no image format that Pillow knows); --drop",
    ),
    # iNaturalist
    Case(
        "which split",
        lambda f: inat(f, annotations="mini.json"),
        "mini.json: which split? Its name begins with none",
    ),
    Case("no file", lambda f: inat(f, annotations="val.json"), "inat/val.json: cannot be read (No such file"),
    Case(
        "no JSON file",
        lambda f: put(f, "inat/val.json", "x", inat(f, annotations="val.json")),
        "val.json: not JSON (",
    ),
    Case(
        "public test",
        edit(lambda v: v.pop("annotations")),
        "train.json: has no 'annotations', so it is no annotation file of iNaturalist; the public test files have "
        "none: take val for test",
    ),
    Case(
        "another JSON",
        lambda f: inat(f, annotations="train_locations.json"),
        "has no 'images', so it is no annotation",
    ),
    Case("field missing", edit(lambda v: v["images"][1].pop("id")), "train.json: entry 1 of 'images' has no 'id'"),
    Case(
        "not annotated",
        edit(lambda v: v["annotations"].pop()),
        "train.json: image 2 has no annotation, so no class",
    ),
    Case(
        "category unknown",
        edit(lambda v: v["categories"].pop()),
        "train.json: image 2 has category 1, which the cat",
    ),
    Case(
        "two categories", edit(lambda v: v["annotations"][1].update(image_id=2)), "image 2 has categories 0 and 1"
    ),
    Case("image twice", edit(lambda v: v["images"][1].update(id=0)), "image 0: image id 0 stands in"),
    Case(
        "photograph missing",
        edit(lambda v: v["images"][1].update(file_name="x/a/9.jpg")),
        "1 of 3 photographs are not",
    ),
    Case(
        "latitude", edit(lambda v: v["images"][1].update(latitude=95)), "train.json: image 1: lat 95.0 is outside"
    ),
    Case("date", edit(lambda v: v["images"][1].update(date="May")), "train.json: image 1: date 'May' is neither"),
    Case(
        "supercategory",
        lambda f: inat(f, "--supercategories", "Aves"),
        "--supercategories Aves: there are only Birds",
    ),
    Case(
        "no list",
        edit(lambda v: None, "train.json", "--locations", "inat/train.json"),
        "train.json: not a list, so",
    ),
    Case(
        "locations lack one",
        edit(lambda v: v.pop(), *LOCATIONS),
        "1 of 3 photographs are not in the location files",
    ),
    Case(
        "locations twice", edit(lambda v: v.append(v[0]), *LOCATIONS), "image 0 stands in the location files twice"
    ),
    Case("locations field", edit(lambda v: v[0].pop("lat"), *LOCATIONS), "entry 0 of 'the list' has no 'lat'"),
    # sets of `datasets`
    Case("no set", lambda f: hub(f, name="bare/nothing"), "bare/nothing: datasets cannot load it ("),
    Case(
        "split unknown",
        hub,
        "saved: split 'extra' is none of train, training, val, valid, validation, ",
    ),
    Case(
        "splits flag",
        lambda f: hub(f, "--splits", "dev=extra"),
        "--splits dev=extra: OURS=THEIRS is needed, ours one of",
    ),
    Case("a split twice", lambda f: hub(f, *BOTH, "val=extra"), "--splits val=extra: extra is test already"),
    Case("no such split", lambda f: hub(f, "--splits", "test=test"), "theirs one of train, extra"),
    Case(
        "no image column",
        lambda f: hub(f, *BOTH, "--image-column", "photo"),
        "--image-column photo: columns of images",
    ),
    Case(
        "lon alone",
        lambda f: hub(f, *BOTH),
        "column 'lon' is the lon, which is the lat? --lat-column names one of label, lo",
    ),
    Case(
        "label column", lambda f: hub(f, *BOTH, "--label-column", "species"), "has no such column, only label, lon"
    ),
    Case(
        "no label",
        lambda f: hub(f, name="unlabelled"),
        "train row 0: label -1 is no class of the set; --splits leaves",
    ),
    Case("no photograph", lambda f: hub(f, name="empty"), "train row 0: has no photograph in column 'image'"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line_and_exit_status_2(case, folder, capsys):
    arguments = case.spoil(folder)
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert commands.run(cli.main, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xcon-shards: ")
    assert case.message.format(x=folder) in line
    assert sorted(folder.iterdir()) == before
