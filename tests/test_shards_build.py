"""What any source goes through: the photograph, the tar, the order, killed and interrupted builds."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from shards import cli, photographs, synthetic
from shards.build import raw_id_range
from shards.photographs import fit, take
from shards.plan import BrokenPhotographError
from shards.workspace import Share, workspace
from tests import commands
from xcon.records import Card, ClassInfo


def main(argv):
    return commands.run(cli.main, argv)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A drawn release of 4 classes with 12 photographs each: 3 test, 1 val, 8 train."""
    root = tmp_path_factory.mktemp("drawn") / "release"
    synthetic.draw(
        root,
        Console(file=io.StringIO()),
        classes=4,
        look_alikes=2,
        per_class=12,
        val_per_class=1,
        missing=0.1,
        seed=0,
    )
    return root


def build(root: Path, out: Path, *more: str) -> int:
    return main(["build", "nabirds", "--root", str(root), "--out", str(out), *more])


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("size", "stored"),
    [((1024, 683), (576, 384)), ((683, 1024), (384, 576)), ((90, 1024), (90, 1024)), ((384, 384), (384, 384))],
)
def test_the_shorter_side_becomes_384_and_nothing_grows(size, stored):
    """683 -> 384 is a factor of 0.5622, so 1024 -> 575.7, 576."""
    data = fit(encoded(Image.new("RGB", size)), "a.jpg", size=384, quality=90)
    assert decoded(data).size == stored


def test_a_small_upright_jpeg_keeps_its_bytes():
    data = encoded(Image.new("RGB", (500, 300), "red"), quality=37)
    assert fit(data, "a.jpg", size=300, quality=90) is data


@pytest.mark.parametrize("kind", ["grey", "palette png", "cmyk", "rgba png"])
def test_other_kinds_become_rgb_jpegs(kind):
    mode = {"grey": "L", "palette png": "P", "cmyk": "CMYK", "rgba png": "RGBA"}[kind]
    data = encoded(Image.new(mode, (40, 30)), "PNG" if "png" in kind else "JPEG")
    image = decoded(fit(data, "a.png", size=100, quality=90))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 30))


def test_a_photograph_on_its_side_is_turned_upright():
    """EXIF orientation 6: the camera was turned, so the stored left column is the top row when shown."""
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, :30] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(pixels), exif=exif, quality=95)
    upright = decoded(fit(data, "a.jpg", size=100, quality=95))
    assert upright.size == (30, 60)
    assert upright.getpixel((15, 5))[0] > 200
    assert upright.getpixel((15, 55))[0] < 50
    assert 0x0112 not in upright.getexif()


@pytest.mark.parametrize("cut", [0, 10, 300, -200])
def test_a_cut_photograph_is_broken_and_named(cut):
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)))
    with pytest.raises(BrokenPhotographError, match=r"images/x\.jpg: does not decode"):
        fit(data[:cut], "images/x.jpg", size=32, quality=90)


def test_tar_members_are_plain_and_in_order(release, tmp_path):
    assert build(release, tmp_path / "set") == 0
    with tarfile.open(tmp_path / "set" / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name.partition(".")[2] for m in members] == ["jpg", "txt", "json"] * (len(members) // 3)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_equal_seeds_equal_bytes_other_seed_other_order(release, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        meta = str(release / "nabirds_with_loc_2019.json")
        assert build(release, tmp_path / name, "--seed", seed, "--meta", meta) == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    keys = []
    for folder in ("a", "c"):
        with tarfile.open(tmp_path / folder / "train-000000.tar") as tar:
            keys.append([name for name in tar.getnames() if name.endswith("jpg")])
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])


def test_samples_per_shard(release, tmp_path):
    """4 classes x 9 train = 36 = 10 + 10 + 10 + 6; 12 test = 10 + 2."""
    assert build(release, tmp_path / "set", "--samples-per-shard", "10") == 0
    card = Card.load(tmp_path / "set")
    assert [s.samples for s in card.splits["train"]] == [10, 10, 10, 6]
    assert [s.samples for s in card.splits["test"]] == [10, 2]
    assert [s.file for s in card.splits["test"]] == ["test-000000.tar", "test-000001.tar"]
    assert list(card.splits) == ["train", "test"]
    assert main(["verify", str(tmp_path / "set")]) == 0


def test_val_drawn_from_train(release, tmp_path):
    assert build(release, tmp_path / "set", "--val-per-class", "2") == 0
    card = Card.load(tmp_path / "set")
    assert [dict(info.counts) for info in card.classes] == [{"train": 7, "val": 2, "test": 3}] * 4


def test_without_meta_nothing_is_known(release, tmp_path):
    assert build(release, tmp_path / "set") == 0
    with tarfile.open(tmp_path / "set" / "test-000000.tar") as tar:
        records = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]
    assert {(r["lon"], r["lat"], r["date"]) for r in records} == {(None, None, None)}
    assert {info.scientific_name for info in Card.load(tmp_path / "set").classes} == {None}


def test_caption_template(release, tmp_path):
    meta = str(release / "nabirds_with_loc_2019.json")
    assert build(release, tmp_path / "set", "--meta", meta, "--caption", "{name}, {scientific_name}") == 0
    card = Card.load(tmp_path / "set")
    expected = {f"{info.name}, {info.scientific_name}" for info in card.classes}
    with tarfile.open(tmp_path / "set" / "train-000000.tar") as tar:
        assert {tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")} == expected


def broken_copy(release: Path, folder: Path) -> tuple[Path, Path]:
    """A copy whose first test photograph is cut; (root, the cut file)."""
    root = folder / "broken"
    shutil.copytree(release, root)
    split = dict(line.split() for line in (root / "train_test_split.txt").read_text().splitlines())
    paths = dict(line.split() for line in (root / "images.txt").read_text().splitlines())
    file = root / "images" / paths[next(i for i in paths if split[i] == "0")]
    file.write_bytes(file.read_bytes()[:1500])
    return root, file


@pytest.mark.parametrize("packed", [False, True])
def test_drop_broken(release, tmp_path, capsys, packed):
    """One of 12 test photographs is cut: 11 are left, and the report names it; from an archive too."""
    root, file = broken_copy(release, tmp_path)
    if packed:
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
            tar.add(root, "nabirds")
        root = tmp_path / "x.tar.gz"
    assert build(root, tmp_path / "set", "--drop", "broken") == 0
    assert "trouble: 1 broken; dropped: 1; " in capsys.readouterr().out
    card = Card.load(tmp_path / "set")
    assert card.samples("test") == 11
    assert (card.made_by["dropped"], card.made_by["trouble"]) == (1, {"broken": 1})
    assert sum(info.counts["test"] for info in card.classes) == 11
    with (tmp_path / "set" / "report.csv").open(newline="") as table:
        (row,) = csv.DictReader(table)
    assert row["image_id"].replace("-", "") == file.stem
    assert (row["split"], row["kind"], row["dropped"]) == ("test", "broken", "yes")
    assert f"images/{file.parent.name}/{file.name}: does not decode" in row["detail"]
    assert main(["verify", str(tmp_path / "set")]) == 0


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C at the 20th photograph; the names of those that were taken."""
    calls = []

    def take_or_stop(data, name, **settings):
        calls.append(name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return take(data, name, **settings)

    monkeypatch.setattr(photographs, "take", take_or_stop)
    return calls


def test_an_interrupted_build_keeps_its_shards_and_is_gone_on_with(release, tmp_path, capsys, interrupted):
    """Ctrl-C at the 20th of 48 photographs, five to a shard: three shards are whole; then 33 are left."""
    arguments = ("--samples-per-shard", "5", "--workers", "1")
    assert build(release, tmp_path / "set", *arguments) == 130
    assert capsys.readouterr().err == "xcon-shards: interrupted; give the same command again\n"
    assert [p.name for p in sorted((tmp_path / "set").glob("*.tar"))] == [f"train-00000{n}.tar" for n in range(3)]
    assert build(release, tmp_path / "set", *arguments) == 0
    assert len(interrupted) == 20 + 33
    assert build(release, tmp_path / "undisturbed", *arguments) == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_an_interrupted_build_without_a_shard_leaves_nothing(release, tmp_path, monkeypatch):
    def interrupted(data, name, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(photographs, "take", interrupted)
    assert build(release, tmp_path / "set", "--workers", "1") == 130
    assert list(tmp_path.iterdir()) == []


def test_what_workers_were_writing_goes_when_they_are_interrupted(tmp_path):
    def interrupted():
        with workspace(tmp_path / "set", Share()) as space:
            space.begin({}, "a plan", ["train-000000.tar"])
            (space.out / ".train-000000.tar.x1y2").touch()
            (space.out / "..train-000000.made.json.x1y2").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("interrupted")
def test_another_command_in_a_begun_folder_is_refused_and_harms_nothing(release, tmp_path, capsys):
    out = tmp_path / "set"
    assert build(release, out, "--samples-per-shard", "5", "--workers", "1") == 130
    before = contents(out)
    capsys.readouterr()
    assert build(release, out, "--samples-per-shard", "5", "--seed", "1", "--quality", "80") == 2
    assert capsys.readouterr().err == (
        f"xcon-shards: --out {out}: holds the beginning of another build (--quality was 90, now 80, --seed was 0, "
        "now 1); give its command again to go on, or remove the folder to start anew\n"
    )
    assert contents(out) == before


def test_what_a_killed_build_left_is_overwritten(release, tmp_path):
    """Shards without a note, notes without a shard, and files that were being written are not believed."""
    out = tmp_path / "set"
    (out / ".work-0").mkdir(parents=True)
    (out / ".xcon-build").touch()
    left = (
        *("train-000007.tar", "val-000000.index.parquet", ".train-000008.tar.x1y2", ".work-0/.spool"),
        *("..test-000000.made.json.abc", ".train-000003.made.json"),
    )
    for name in left:
        (out / name).write_bytes(b"{}")
    assert build(release, out) == 0
    assert build(release, tmp_path / "undisturbed") == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_failed_build_leaves_the_folder_it_found(release, tmp_path):
    """An empty folder that was there before stays, and stays empty."""
    out = tmp_path / "set"
    out.mkdir()
    root, _ = broken_copy(release, tmp_path)
    assert build(root, out) == 2
    assert list(out.iterdir()) == []


def test_info_shows_counts_and_caption(release, tmp_path, capsys):
    meta = str(release / "nabirds_with_loc_2019.json")
    assert build(release, tmp_path / "set", "--meta", meta) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "set")]) == 0
    shown = capsys.readouterr().out
    assert "8 / 8 / 8" in shown
    assert "classes: 4, 4 with a scientific name" in shown
    assert "caption, for example: This is a photograph of a bird called " in shown
    assert Card.load(tmp_path / "set").sha256 in shown


def test_the_card_names_no_folder_of_this_machine(release, tmp_path):
    assert build(release, tmp_path / "set") == 0
    assert str(tmp_path) not in (tmp_path / "set" / "dataset.json").read_text()
    assert str(release.parent) not in (tmp_path / "set" / "dataset.json").read_text()


def test_raw_id_range_by_hand():
    """5, 6, 9, 10, 20: 7 and 8 are unused, and 11 to 19, so 11 ids in 2 gaps."""
    classes = [ClassInfo(i, raw, "x", None, (), {}) for i, raw in enumerate((5, 6, 9, 10, 20))]
    assert raw_id_range(classes) == "5 -> 0 ... 20 -> 4, 11 ids between unused in 2 gaps"
    assert raw_id_range([ClassInfo(i, raw, "x", None, (), {}) for i, raw in enumerate("ab")]) == (
        "a -> 0 ... b -> 1"
    )
