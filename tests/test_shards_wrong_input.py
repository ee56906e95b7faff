"""Wrong usage and wrong input: exit status 2, and one line that says what, where and what to do."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from shards import cli, synthetic
from tests import commands
from xcon.records import Card


def main(argv):
    return commands.run(cli.main, argv)


META = "nabirds_with_loc_2019.json"


def draw(root: Path, seed: int) -> Path:
    numbers = {"classes": 4, "look_alikes": 2, "per_class": 12, "val_per_class": 1, "missing": 0.1}
    synthetic.draw(root, Console(file=io.StringIO()), seed=seed, **numbers)
    return root


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two drawn releases, `a` and `b`, and the shard set of `a`: never changed."""
    folder = tmp_path_factory.mktemp("originals")
    draw(folder / "a", 0)
    draw(folder / "b", 1)
    arguments = ["--root", str(folder / "a"), "--meta", str(folder / "a" / META)]
    assert main(["build", "nabirds", *arguments, "--out", str(folder / "set")]) == 0
    return folder


@dataclasses.dataclass(frozen=True)
class Case:
    """`spoil` changes a copy (folder with `a`, `b`, `set`) and gives the arguments."""

    name: str
    spoil: Callable[[Path], list[str]]
    message: str


def build(folder: Path, *more: str, root: str = "a", out: str = "out") -> list[str]:
    return ["build", "nabirds", "--root", str(folder / root), "--out", str(folder / out), *more]


def with_meta(folder: Path, meta: str = f"a/{META}") -> list[str]:
    return build(folder, "--meta", str(folder / meta))


def edit_meta(folder: Path, change: Callable[[dict], None]) -> list[str]:
    values = json.loads((folder / "a" / META).read_bytes())
    change(values)
    (folder / "a" / META).write_text(json.dumps(values))
    return with_meta(folder)


def edit_text(folder: Path, name: str, change: Callable[[list[str]], list[str]], *more: str) -> list[str]:
    path = folder / "a" / name
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    return build(folder, *more)


def without(folder: Path, name: str) -> list[str]:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return build(folder)


def first_image(folder: Path) -> Path:
    line = (folder / "a" / "images.txt").read_text().splitlines()[0]
    return folder / "a" / "images" / line.split()[1]


def no_photograph(folder: Path) -> list[str]:
    first_image(folder).unlink()
    return build(folder)


def cut_photograph(folder: Path) -> list[str]:
    path = first_image(folder)
    path.write_bytes(path.read_bytes()[:1500])
    return build(folder)


def archive(folder: Path) -> Path:
    path = folder / "a.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / "a", "nabirds")
    return path


def cut_archive(folder: Path) -> list[str]:
    path = archive(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return build(folder, root="a.tgz")


def no_archive(folder: Path) -> list[str]:
    (folder / "a.tgz").write_text("<html>not found</html>")
    return build(folder, root="a.tgz")


def cut_photograph_in_archive(folder: Path) -> list[str]:
    cut_photograph(folder)
    archive(folder)
    return build(folder, root="a.tgz")


def set_lat(values: dict) -> None:
    values["train"][3]["ebird_meta"].update(lon=-80.0, lat=95.0)


def exchange(values: dict) -> None:
    for split in ("train", "val", "test"):
        for entry in values[split]:
            meta = entry["ebird_meta"]
            meta["lon"], meta["lat"] = meta["lat"], meta["lon"]


def exchange_eastern(values: dict) -> None:
    """All places east of 90 degrees west: every exchanged lat lies within [-90, 90]."""
    for split in ("train", "val", "test"):
        for entry in values[split]:
            entry["ebird_meta"].update(lon=44.0, lat=-72.0)


def other_split(values: dict) -> None:
    values["train"].append(values["test"].pop())


def first_class_wrong(values: dict) -> None:
    values["train"][0]["class_id"] += 1


def infinite(values: dict) -> None:
    values["train"][0]["ebird_meta"]["lon"] = float("inf")


def twice(values: dict) -> None:
    values["val"].append(values["train"][0])


def occupied(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")
    return build(folder)


def write_text(folder: Path, name: str, text: str, arguments: list[str]) -> list[str]:
    (folder / name).write_text(text)
    return arguments


CASES = [
    Case("no command", lambda f: [], "{build, index, verify, audit, info, export}"),
    Case("unknown command", lambda f: ["pack"], "Unrecognized options: pack. Available subcommands: build"),
    Case(
        "unknown source",
        lambda f: ["build", "cub", "--out", str(f / "out")],
        "cub (applied to xcon-shards build)",
    ),
    Case(
        "unknown source alone",
        lambda f: ["build", "cub"],
        "cub. Available subcommands: nabirds, imagefolder, inaturalist, hub, synthetic",
    ),
    Case("unknown flag", lambda f: build(f, "--bogus", "1"), "Unrecognized options: --bogus, 1 (see"),
    Case("not a number", lambda f: build(f, "--size", "large"), "Error parsing --size"),
    Case("out of range", lambda f: build(f, "--quality", "300"), "--quality 300: a number from 1 to 95"),
    Case("no --root", lambda f: ["build", "nabirds", "--out", str(f / "out")], "--root"),
    Case("no such folder", lambda f: build(f, root="nowhere"), "nowhere: no such folder; --root is"),
    Case("no such archive", lambda f: build(f, root="no.tar.gz"), "no.tar.gz: no such file; --root is"),
    Case("no release", lambda f: build(f, root="a/images"), "no images.txt here or below"),
    Case("a file for --root", lambda f: build(f, root="a/images.txt"), "no folder, and no .tar.gz by its name"),
    Case("a table missing", lambda f: without(f, "a/sizes.txt"), "a: sizes.txt is missing"),
    Case("no images folder", lambda f: without(f, "a/images"), "48 of 48 photographs of images.txt are not"),
    Case("a photograph missing", no_photograph, "1 of 48 photographs of images.txt are not there, the first is"),
    Case(
        "a table cut",
        lambda f: edit_text(f, "train_test_split.txt", lambda lines: lines[:-1]),
        "train_test_split.txt has no line for image ",
    ),
    Case(
        "a line cut",
        lambda f: edit_text(f, "images.txt", lambda lines: [*lines[:-1], lines[-1][:20]]),
        "images.txt line 48: ",
    ),
    Case(
        "a line twice",
        lambda f: edit_text(f, "images.txt", lambda lines: [*lines, lines[0]]),
        "images.txt line 49: ",
    ),
    Case(
        "a table of another release",
        lambda f: edit_text(f, "sizes.txt", lambda lines: [*lines, "123 5 5"]),
        "sizes.txt has a line for image 123, which images.txt has not",
    ),
    Case(
        "a word for a number",
        lambda f: edit_text(f, "sizes.txt", lambda lines: [f"{lines[0].split()[0]} wide high", *lines[1:]]),
        "'wide high', 2 whole numbers are needed",
    ),
    Case(
        "a class unknown",
        lambda f: edit_text(f, "classes.txt", lambda lines: lines[:-1]),
        "which classes.txt has not",
    ),
    Case("no meta", lambda f: with_meta(f, "nowhere.json"), "nowhere.json: cannot be read (No such file"),
    Case(
        "meta not JSON",
        lambda f: write_text(f, f"a/{META}", "<html>not found</html>", with_meta(f)),
        "not JSON (Expecting value",
    ),
    Case(
        "meta of another form",
        lambda f: write_text(f, f"a/{META}", "[1, 2]", with_meta(f)),
        "not the form of nabirds_with_loc_2019.json",
    ),
    Case(
        "meta of another release",
        lambda f: with_meta(f, f"b/{META}"),
        "the location file of another release than ",
    ),
    Case("meta lacks one", lambda f: edit_meta(f, lambda v: v["test"].pop()), "1 of the release's 48 images"),
    Case("meta of other classes", lambda f: edit_meta(f, first_class_wrong), "the sorted class ids of the"),
    Case(
        "meta of fewer classes",
        lambda f: edit_meta(f, lambda v: v["classes"].pop()),
        "it has 3 classes and 4 scientific names, the release has 4 classes",
    ),
    Case(
        "meta of another split",
        lambda f: edit_meta(f, other_split),
        "the location file of another split: 1 images are train in one and test in the other, the first is ",
    ),
    Case("meta names one twice", lambda f: edit_meta(f, twice), "stands there twice"),
    Case("latitude 95", lambda f: edit_meta(f, set_lat), "lat 95.0 is outside [-90, 90] degrees"),
    Case("exchanged columns", lambda f: edit_meta(f, exchange), "are lon and lat exchanged?"),
    Case("exchanged in the east", lambda f: edit_meta(f, exchange_eastern), "are lon and lat exchanged?"),
    Case("infinite", lambda f: edit_meta(f, infinite), "the number Infinity is no place"),
    Case(
        "place a word",
        lambda f: edit_meta(f, lambda v: v["val"][0]["ebird_meta"].update(lon="west")),
        "is 'west', a number is needed",
    ),
    Case(
        "half a place",
        lambda f: edit_meta(f, lambda v: v["val"][0]["ebird_meta"].update(lon=-90.0, lat=None)),
        "both or neither",
    ),
    Case("meta and val", lambda f: [*with_meta(f), "--val-per-class", "1"], "--val-per-class 1: --meta says"),
    Case("too much val", lambda f: build(f, "--val-per-class", "9"), "has only 9 train photographs"),
    Case("cut photograph", cut_photograph, "does not decode (image file is truncated"),
    Case("cut photograph, archive", cut_photograph_in_archive, "; --drop broken leaves it out"),
    Case("cut archive", cut_archive, "a.tgz: not a whole archive ("),
    Case("no archive", no_archive, "a.tgz: not a whole archive ("),
    Case(
        "bad caption field",
        lambda f: build(f, "--caption", "a {colour} bird"),
        "has no 'colour', only name, species, plumage, scientific_name, family",
    ),
    Case("caption without a field", lambda f: build(f, "--caption", "a bird"), "names no field"),
    Case("caption cut", lambda f: build(f, "--caption", "a {name"), "caption template 'a {name'"),
    Case(
        "no scientific names",
        lambda f: build(f, "--caption", "{scientific_name}"),
        "has no 'scientific_name', only name, species, plumage, family",
    ),
    Case("out holds a set", lambda f: build(f, out="set"), "set: already holds a shard set; name a new folder"),
    Case("out is occupied", occupied, "out: holds other files (thesis.txt)"),
    Case("out is a file", lambda f: build(f, out="a/images.txt"), "images.txt: is a file; name a new folder"),
    Case(
        "too many look-alikes",
        lambda f: ["build", "synthetic", "--out", str(f / "out"), "--look-alikes", "99"],
        "--look-alikes 99: a number from 1 to 8 is needed",
    ),
    Case(
        "no train left",
        lambda f: ["build", "synthetic", "--out", str(f / "out"), "--per-class", "4"],
        "--per-class 4: leaves no train beside 4 val",
    ),
    Case("drop what", lambda f: build(f, "--drop", "ugly"), "--drop"),
    Case("no workers", lambda f: build(f, "--workers", "0"), "--workers 0: a number from 1 to "),
    Case("task too far", lambda f: build(f, "--tasks", "3", "--task", "3"), "--task 3: a number from 0 to 2 is"),
    Case("repair nothing", lambda f: build(f, "--repair", out="none"), "none: no such folder"),
    Case("repair a task", lambda f: build(f, "--repair", "--tasks", "2"), "--repair: not together with --tasks"),
    Case(
        "repair with others",
        lambda f: [*with_meta(f), "--out", str(f / "set"), "--repair", "--size", "99"],
        "set: was made with other settings (--size was 384, now 99)",
    ),
    Case("audit nowhere", lambda f: ["audit", str(f / "nowhere")], "nowhere: no such folder"),
    Case(
        "audit over a file",
        lambda f: ["audit", str(f / "set"), "--out", str(f / "a/images.txt")],
        "images.txt: is there already",
    ),
    Case("verify nowhere", lambda f: ["verify", str(f / "nowhere")], "nowhere: no such folder"),
    Case("info nowhere", lambda f: ["info", str(f / "a")], "a: no dataset.json here"),
    Case(
        "card cut",
        lambda f: write_text(f, "set/dataset.json", '{"format": ', ["verify", str(f / "set")]),
        "dataset.json: not a card of xcon (",
    ),
]


@pytest.fixture
def folder(originals, tmp_path):
    shutil.copytree(originals, tmp_path / "x")
    return tmp_path / "x"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line_and_exit_status_2(case, folder, capsys):
    arguments = case.spoil(folder)
    before = sorted(p.name for p in folder.iterdir())
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xcon-shards: ")
    assert case.message in line
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_real_process_says_one_line(encoding, tmp_path):
    """tyro draws its box in lines or in dashes, by the encoding of stdout."""
    result = subprocess.run(
        [sys.executable, "-c", "from shards.cli import main; main()", "bild"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 2
    assert result.stderr == (
        "xcon-shards: Unrecognized options: bild. "
        "Available subcommands: build, index, verify, audit, info, export (see xcon-shards --help)\n"
    )


def edit_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def edit_caption(shards: Path) -> None:
    edit_bytes(shards / "train-000000.tar", b"This is a photograph", b"That is a photograph")


def forge_card(shards: Path, path: Path) -> None:
    """As somebody who edits a tar and its hash: the records still have to agree."""
    card = Card.load(shards)
    sha256 = next(s.sha256 for s in card.splits["train"] if s.file == path.name)
    new = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_bytes(shards / "dataset.json", sha256.encode(), new.encode())


def forge_label(shards: Path) -> None:
    path = shards / "train-000000.tar"
    edit_bytes(path, b'"class_id": 2', b'"class_id": 1')
    forge_card(shards, path)


def forge_split(shards: Path) -> None:
    path = shards / "train-000000.tar"
    edit_bytes(path, b'"split": "train"', b'"split": "other"')
    forge_card(shards, path)


def forge_photograph(shards: Path) -> None:
    path = shards / "train-000000.tar"
    row = pq.read_table(path.with_name("train-000000.index.parquet")).to_pylist()[4]
    data = bytearray(path.read_bytes())
    data[row["offset"] : row["offset"] + 100] = bytes(100)
    path.write_bytes(data)
    forge_card(shards, path)


def forge_index(column: str, value: object) -> Callable[[Path], None]:
    def change(shards: Path) -> None:
        path = shards / "train-000000.index.parquet"
        table = pq.read_table(path)
        values = table.to_pylist()
        values[7][column] = value
        pq.write_table(type(table).from_pylist(values, schema=table.schema), path)

    return change


def cut_tar(shards: Path) -> None:
    path = shards / "test-000000.tar"
    path.write_bytes(path.read_bytes()[:-20_000])


def leak(shards: Path) -> None:
    """The val shard becomes a copy of a train shard, by name, hash and index."""
    card = Card.load(shards)
    shutil.copy(shards / "train-000000.tar", shards / "val-000000.tar")
    shutil.copy(shards / "train-000000.index.parquet", shards / "val-000000.index.parquet")
    copied = dataclasses.replace(card.splits["train"][0], file="val-000000.tar")
    dataclasses.replace(card, splits={**card.splits, "val": (copied,)}).save(shards)


BROKEN_SETS = [
    ("edited tar", edit_caption, "train-000000.tar: its bytes are not those of the card"),
    ("cut tar", cut_tar, "test-000000.tar: has "),
    ("tar missing", lambda s: (s / "test-000000.tar").unlink(), "test-000000.tar: is missing"),
    (
        "index missing",
        lambda s: (s / "val-000000.index.parquet").unlink(),
        "parquet: is missing; --repair rebuilds it",
    ),
    ("index damaged", lambda s: (s / "val-000000.index.parquet").write_text("x"), "not a parquet file ("),
    ("index label", forge_index("class_id", 9), "index has class_id 9, the tar "),
    ("index offset", forge_index("offset", 9), "index has offset 9, the tar "),
    ("index place", forge_index("lon", -1.5), "index has lon -1.5, the tar "),
    ("index caption", forge_index("caption", "a bird"), "index has caption 'a bird', the tar 'This is"),
    ("label", forge_label, "class 1 is "),
    ("split", forge_split, "split is 'other'"),
    ("photograph", forge_photograph, ".jpg: does not decode ("),
    ("leak", leak, "stands in train already"),
    ("stray shard", lambda s: shutil.copy(s / "val-000000.tar", s / "val-000009.tar"), "not in the card"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BROKEN_SETS, ids=[name for name, *_ in BROKEN_SETS])
def test_verify_finds_it(name, spoil, message, folder, capsys):
    spoil(folder / "set")
    capsys.readouterr()
    assert main(["verify", str(folder / "set")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(message in line for line in lines)
    assert all(line.startswith("xcon-shards: ") for line in lines)


def test_verify_prints_one_line_per_broken_thing(folder, capsys):
    cut_tar(folder / "set")
    (folder / "set" / "val-000000.index.parquet").unlink()
    capsys.readouterr()
    assert main(["verify", str(folder / "set")]) == 2
    *_, last = lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert last.endswith("2 problems")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("source", ["folder", "archive", "synthetic"])
def test_no_space_left(source, folder, small_disk, capsys):
    out = str(small_disk / "set")
    arguments = {
        "folder": ["build", "nabirds", "--root", str(folder / "a")],
        "archive": ["build", "nabirds", "--root", str(archive(folder))],
        "synthetic": ["build", "synthetic"],
    }[source]
    assert main([*arguments, "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"xcon-shards: --out {out}: no space left on device; free some, or name a folder on another disk"
    )
    assert list(small_disk.iterdir()) == []
