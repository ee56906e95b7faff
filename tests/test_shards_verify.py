"""verify by several processes and with --repair, info by class and as a picture; what verify finds is in
test_shards_wrong_input and test_shards_fuzz."""

import hashlib
import io
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

from shards import atlas, cli, synthetic, verify
from tests import commands
from xcon.records import Card

META = "nabirds_with_loc_2019.json"


def main(*words: object) -> int:
    return commands.run(cli.main, [str(word) for word in words])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """4 classes with 12 photographs each, 8 train, 1 val, 3 test, in shards of 9: 4, 1 and 2."""
    folder = tmp_path_factory.mktemp("built")
    numbers = {"classes": 4, "look_alikes": 2, "per_class": 12, "val_per_class": 1, "missing": 0.2}
    synthetic.draw(folder / "release", Console(file=io.StringIO()), seed=0, **numbers)
    settings = ["--meta", folder / "release" / META, "--samples-per-shard", 9, "--seed", 3]
    assert main("build", "nabirds", "--root", folder / "release", "--out", folder / "set", *settings) == 0
    return folder / "set"


@pytest.fixture
def folder(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "set"))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def edit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"This is a photograph", b"That is a photograph"))


def spoil(folder: Path) -> None:
    """Something wrong in five of seven shards, and a record that stands in two."""
    edit(folder / "train-000000.tar")
    (folder / "train-000001.index.parquet").unlink()
    (folder / "train-000002.index.parquet").write_bytes(b"x")
    (folder / "val-000000.tar").unlink()
    shutil.copy(folder / "test-000001.index.parquet", folder / "test-000000.index.parquet")


def test_processes_find_the_same_in_the_same_order(folder):
    spoil(folder)
    card, console = Card.load(folder), Console(file=io.StringIO())
    alone, together = (verify.check(card, folder, console, workers=n) for n in (1, 3))
    assert alone == together
    files = [line.partition(": ")[0].rpartition("/")[2] for line in alone.problems]
    assert list(dict.fromkeys(files)) == [
        "train-000000.tar",
        "train-000001.index.parquet",
        "train-000002.index.parquet",
        "val-000000.tar",
        "test-000000.tar",
        "test-000000.index.parquet",
    ]


def test_indexes_are_rebuilt_byte_for_byte_and_nothing_else_is_touched(folder, built, capsys):
    """Missing, damaged, and that of another shard; what a killed build left hidden goes."""
    before = hashes(built)
    (folder / "train-000001.index.parquet").unlink()
    (folder / "train-000002.index.parquet").write_bytes(b"x")
    shutil.copy(folder / "test-000001.index.parquet", folder / "test-000000.index.parquet")
    (folder / ".train-000000.tar.a1b2").write_bytes(b"left")
    (folder / "notes.txt").write_text("mine")
    assert main("verify", folder) == 2
    capsys.readouterr()
    assert main("verify", folder, "--repair") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("rebuilt from its tar") == 3
    assert ".train-000000.tar.a1b2: removed" in out
    (folder / "notes.txt").unlink()  # nobody's but its owner's
    assert hashes(folder) == before
    assert main("verify", folder) == 0


def test_an_index_of_a_tar_that_is_not_the_cards_stays(folder, capsys):
    """Its records are somebody else's: the command that builds them again is named, with what is no default."""
    edit(folder / "train-000000.tar")
    (folder / "train-000000.index.parquet").unlink()
    (folder / "test-000001.tar").unlink()
    before = hashes(folder)
    capsys.readouterr()
    assert main("verify", folder, "--repair") == 2
    lines = capsys.readouterr().err.splitlines()
    assert hashes(folder) == before
    command = "xcon-shards build nabirds --samples-per-shard 9 --seed 3 --root release --meta " + META
    assert sum(line.endswith(f"{command} --out {folder} --repair") for line in lines) == 1
    assert any("test-000001.tar: is missing" in line for line in lines)


def test_a_killed_process_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(verify, "_Check", _Killed)
    assert main("verify", folder, "--workers", 2) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a worker was killed" in line


class _Killed(verify._Check):
    def __call__(self, place: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ["train-000009.tar", "val-000003.index.parquet"])
def test_strays_that_are_seen_are_named_and_kept(name, folder, capsys):
    (folder / name).write_bytes(b"x")
    assert main("verify", folder, "--repair") == 2
    assert f"{name}: not in the card" in capsys.readouterr().err
    assert (folder / name).exists()


def test_zero_workers_are_refused(folder, capsys):
    assert main("verify", folder, "--workers", 0) == 2
    assert "--workers 0: at least 1 is needed" in capsys.readouterr().err


def test_info_counts_the_classes(built, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main("info", built, "--classes") == 0
    lines = [line.split("\u2502") for line in capsys.readouterr().out.splitlines() if line.startswith("\u2502")]
    rows = [[cell.strip() for cell in line[1:-1]] for line in lines if len(line) == 11]
    names = [info.name for info in Card.load(built).classes]
    assert [row[2] for row in rows] == names
    assert [row[3:7] for row in rows] == [["8", "1", "3", "12"]] * 4
    assert all(row[7].endswith("%") for row in rows)


def test_months_by_hand():
    """Of 365 days: day 0 is 1 January, 31 is 1 February, 58 is 28 February, 59 is 1 March, 364 is 31 December."""
    days = np.array([0, 30, 31, 58, 59, 333, 334, 364])
    assert atlas.month(days / 364).tolist() == [0, 0, 1, 1, 2, 10, 11, 11]


def test_regions_by_hand():
    """At least 4 degrees around; the world where places span more than half of it, and never beyond it."""
    lon, lat = np.array([-100.0, -90.0]), np.array([40.0, 45.5])
    assert atlas.region_of(lon, lat) == (-104, 36, -86, 50)
    assert atlas.region_of(np.array([-170.0, 170.0]), lat) == (-180, -90, 180, 90)
    assert atlas.region_of(np.array([178.0]), np.array([-89.0])) == (174, -90, 180, -85)


def test_spots_by_hand():
    lon, lat, number = atlas.spots(np.array([10.1, 10.4, 12.2]), np.array([5.0, 5.3, 5.1]), cell=0.5)
    assert (lon.tolist(), lat.tolist(), number.tolist()) == ([10.25, 12.25], [5.25, 5.25], [2, 1])


def kind(name: str, lon: list[float], lat: list[float]) -> atlas.Kind:
    return atlas.Kind(name, len(lon), np.array(lon), np.array(lat), np.bincount([3], minlength=12))


def test_each_species_has_its_colour_at_its_place():
    """Denver in the first colour, Chicago in the second, Dallas, of another, in neither; their month in April."""
    kinds = [kind("one", [-105.0], [39.7]), kind("two", [-87.6], [41.9])]
    everywhere = kind("", [-105.0, -87.6, -96.8], [39.7, 41.9, 32.8])
    figure = atlas.one_map(kinds, everywhere)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[:, :, :3] / 255

    def has(colour: str, axes: int, x: float, y: float) -> bool:
        column, row = figure.axes[axes].transData.transform((x, y))
        at = len(picture) - 1 - int(row), int(column)
        near = picture[at[0] - 4 : at[0] + 5, at[1] - 4 : at[1] + 5]
        return bool((np.abs(near - to_rgb(colour)).max(axis=2) < 0.2).any())

    first, second = atlas.COLOURS[:2]
    assert has(first, 0, -105.0, 39.7)
    assert has(second, 0, -87.6, 41.9)
    assert not has(second, 0, -105.0, 39.7)
    assert not has(first, 0, -96.8, 32.8)
    assert has(first, 1, 3, 0.5)
    assert not has(first, 1, 8, 0.5)


def test_the_picture_is_written_whole_or_refused(built, tmp_path, capsys):
    name = Card.load(built).classes[0].name
    assert main("info", built, "--map", tmp_path / "a.png", "--species", name) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    refused = {
        "--species: is drawn, so --map": ["--species", name],
        "a name ending in .png is needed": ["--map", tmp_path / "a.jpg"],
        "'Dodo': no such class here": ["--map", tmp_path / "b.png", "--species", "Dodo"],
        "--species: 8 of them, 7 colours": ["--map", tmp_path / "b.png", "--species", *[name] * 8],
        "cannot be written": ["--map", tmp_path / "none" / "b.png"],
    }
    for message, words in refused.items():
        capsys.readouterr()
        assert main("info", built, *words) == 2
        assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_set_without_places_has_no_picture(built, tmp_path, capsys):
    release = built.parent / "release"
    assert main("build", "nabirds", "--root", release, "--out", tmp_path / "set") == 0
    assert main("info", tmp_path / "set", "--map", tmp_path / "a.png") == 2
    assert "no record has a place" in capsys.readouterr().err
