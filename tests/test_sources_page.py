"""Every command of docs/sources.md runs, as it stands there, on small made-up inputs; so does its new source."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from shards import cli
from tests import commands
from tests.pictures import photograph
from xcon.records import Card

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
SPECIES = ("Lynx lynx", "Meles meles")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def page_commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


def lay_own(here: Path) -> None:
    """Class folders with metadata.csv, and the same photographs in another table that names all but one."""
    photographs = [f"{species}/{k}.jpg" for species in SPECIES for k in range(4)]
    for shade, path in enumerate(photographs):
        photograph(here / "photographs" / path, shade)
    rows = [f"{path}\t{path.split('/')[0]}\tMustelidae\t46.5\t7.5\t2020-12-31\tZo\u00eb\n" for path in photographs]
    head = "photo\tspecies\tfamily\tdecimalLatitude\tdecimalLongitude\teventDate\trecordedBy\n"
    (here / "gbif.tsv").write_text(head + "".join(rows[1:]), encoding="utf-8")
    table = (head + "".join(rows)).replace("\t", ",").replace("photo,", "file_name,")
    (here / "photographs" / "metadata.csv").write_text(table, encoding="utf-8")


def write_coco(file: Path, folder: str, numbers: range) -> None:
    """An annotation file, its photographs, and a location file beside it."""
    images = [{"id": k, "file_name": f"Aves/{k % 2}/{k}.jpg", "longitude": 7.5, "latitude": 46.5} for k in numbers]
    categories = [{"id": k, "name": f"Species {k}", "supercategory": "Birds"} for k in range(2)]
    annotations = [{"id": k, "image_id": k, "category_id": k % 2} for k in numbers]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    notes = [{"id": k, "lon": 7.5, "lat": 46.5, "date": "2018-05-01", "user_id": k} for k in numbers]
    file.with_name(f"{file.stem}_locations.json").write_text(json.dumps(notes))
    for image in images:
        photograph(file.parent / folder / image["file_name"], image["id"])


def lay_cub(root: Path) -> None:
    names = ("001.Black_footed_Albatross", "200.Common_Yellowthroat")
    paths = [f"{name}/{k}.jpg" for name in names for k in range(4)]
    tables = {
        "images": [f"{k} {path}" for k, path in enumerate(paths, start=1)],
        "image_class_labels": [f"{k} {1 if k < 5 else 200}" for k in range(1, 9)],
        "train_test_split": [f"{k} {k % 2}" for k in range(1, 9)],
        "classes": [f"{int(name[:3])} {name}" for name in names],
    }
    for shade, path in enumerate(paths):
        photograph(root / "images" / path, shade)
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """All that the page's commands read."""
    folder = tmp_path_factory.mktemp("page")
    lay_own(folder)
    for year, train in (("2018", "train2018"), ("2021", "train_mini")):
        write_coco(folder / f"{train}.json", f"inat{year}", range(6))
        write_coco(folder / ("val2018.json" if year == "2018" else "val.json"), f"inat{year}", range(6, 10))
    (folder / "categories.json").write_text(json.dumps([{"id": k, "name": f"True name {k}"} for k in range(2)]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    image = {"bytes": photograph(folder / "one.jpg"), "path": None}
    rows = datasets.Dataset.from_list([{"image": image, "label": k} for k in (0, 1)], features=features)
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(folder / "saved"))
    more = ["--classes", "3", "--per-class", "8", "--val-per-class", "1", "--keep-source", folder / "nabirds"]
    assert commands.run(cli.main, ["build", "synthetic", "--out", folder / "drawn", *more]) == 0
    lay_cub(folder / "cub")
    return folder


def test_every_command(here, monkeypatch):
    monkeypatch.chdir(here)
    for words in page_commands():
        if words[2] != "cub":
            assert words[0] == "xcon-shards"
            assert commands.run(cli.main, words[1:]) == 0, shlex.join(words)
    mine, gbif, inat = (Card.load(here / "shards" / name) for name in ("mine", "gbif", "inat2018"))
    assert (mine.samples("train"), mine.samples("test")) == (6, 2)
    assert [gbif.samples(split) for split in ("train", "val", "test")] == [3, 2, 2]
    assert [info.name for info in inat.classes] == ["True name 0", "True name 1"]


def test_every_source_has_a_command():
    assert {words[2] for words in page_commands()} == {"cub", *(source.NAME for source in cli.SOURCES)}


def test_the_new_source_of_the_page(here, tmp_path):
    """The module as it stands there, named in SOURCES of a copy of shards/, and the page's command."""
    (code,) = blocks("python")
    shutil.copytree(ROOT / "shards", tmp_path / "shards", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "xcon").symlink_to(ROOT / "xcon")
    (tmp_path / "shards" / "cub.py").write_text(code)
    text = (tmp_path / "shards" / "cli.py").read_text()
    text = text.replace("from shards.hub", "from shards.cub import CUB\nfrom shards.hub")
    (tmp_path / "shards" / "cli.py").write_text(text.replace("Synthetic)\n", "Synthetic, CUB)\n", 1))
    (words,) = [words for words in page_commands() if words[2] == "cub"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-m", "shards.cli", *words[1:]]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    card = Card.load(here / "shards" / "cub")
    assert [(info.raw_class_id, info.name, info.counts) for info in card.classes] == [
        (1, "Black footed Albatross", {"train": 1, "val": 1, "test": 2}),
        (200, "Common Yellowthroat", {"train": 1, "val": 1, "test": 2}),
    ]
