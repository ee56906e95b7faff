"""Indices made from tars: equal to those that the build wrote, and of anybody's tars as webdataset reads them."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from shards import cli
from tests import commands
from xcon import records
from xcon.records import Card
from xcon.shardset import ShardSet, Tars


def photograph(kind: str, shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def facts(**values: object) -> bytes:
    return json.dumps(values).encode()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Three tars: seven samples that are records, four that are not."""
    folder = tmp_path / "tars"
    write_tar(
        folder / "birds-train-000.tar",
        {
            "a/0001.jpg": photograph("JPEG", 1),
            "a/0001.cls": b"7\n",
            "a/0001.txt": b"a jay",
            "a/0002.png": photograph("PNG", 2),
            "a/0002.json": facts(label=3, lon=10.5, lat=-20, date="2026-01-01", user_id=5),
            "a/0003.seg.png": photograph("PNG", 3),  # another ending: no image
            "a/0003.cls": b"3",
            "a/0004.webp": photograph("WEBP", 4),  # no label
            "a/0005.jpg": photograph("JPEG", 5),
            "a/0005.json": b"{",
            "a/0006.JPG": photograph("JPEG", 6),
            "a/0006.json": facts(label=7, class_name="Steller's Jay", lon=10, lat=95, date="soon"),
        },
    )
    write_tar(folder / "more.tar", {f"b{i}.{e}": d for i in range(3) for e, d in two(i)})
    write_tar(
        folder / "valid/0.tar", {"v.jpeg": photograph("JPEG", 9), "v.json": facts(class_id=3), "w.txt": b"w"}
    )
    return folder


def two(number: int) -> list[tuple[str, bytes]]:
    return [("jpg", photograph("JPEG", 20 + number)), ("cls", b"3")]


def by_webdataset(tars: list[str]) -> Iterator[tuple[str, bytes]]:
    """Key and photograph of each sample."""
    for tar in tars:
        with Path(tar).open("rb") as file:
            members = ({**member, "__url__": tar} for member in tar_file_iterator(file))
            yield from ((s["__key__"], s.get("jpg") or s.get("png")) for s in group_by_keys(members))


def run(*argv: str | Path) -> int:
    return commands.run(cli.main, [str(word) for word in argv])


def test_a_lost_index_is_made_anew(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the one that the build wrote; in memory alone where the folder cannot be written."""
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "set"))
    lost = folder / "train-000000.index.parquet"
    built = pq.read_table(lost)
    lost.unlink()

    def refuse(path: Path) -> None:
        raise OSError(f"{path}: cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(records, "atomic_write", refuse)
        in_memory = ShardSet(folder).split("train")
    assert not lost.exists()
    assert capsys.readouterr().err == (
        f"xcon: {lost}: is missing, made anew from the tar for this run; its folder cannot be written\n"
    )
    ShardSet(folder)
    assert capsys.readouterr().err == f"xcon: {lost}: was missing, made anew from the tar\n"
    anew = pq.read_table(lost)
    assert anew.schema == built.schema
    for name in built.column_names:
        np.testing.assert_array_equal(anew[name].to_numpy(), built[name].to_numpy(), err_msg=name)
    np.testing.assert_array_equal(in_memory.offset, built["offset"].to_numpy())
    ShardSet(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_anybodys_tars(foreign: Path, tmp_path: Path, elsewhere: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand what is left out; photographs as webdataset reads them; the tars keep their bytes."""
    before = {path: path.read_bytes() for path in foreign.rglob("*.tar")}
    out = tmp_path / "indexed" if elsewhere else foreign
    assert run("index", foreign, *(("--out", out) if elsewhere else ())) == 0
    told = capsys.readouterr().out
    for line in (
        "left out: 2 samples without an image (jpg, jpeg, png, webp)",
        "left out: 1 samples without a label (json raw_class_id, label, class_id, class_name; cls)",
        "left out: 1 samples whose json is damaged",
        "left out: 1 places that are no degrees (lon, lat)",
        "left out: 1 dates that are none (date)",
        "train 6, val 1 records of 2 classes; 1 with a place, 1 with a date",
    ):
        assert line in told
    assert {path: path.read_bytes() for path in foreign.rglob("*.tar")} == before
    shards = ShardSet(out)
    train, val = shards.split("train"), shards.split("val")
    assert train.image_id.tolist() == ["a/0001", "a/0002", "a/0006", "b0", "b1", "b2"]
    assert val.image_id.tolist() == ["v"]
    assert [info.raw_class_id for info in shards.card.classes] == [3, 7]
    assert train.class_id.tolist() == [1, 0, 1, 0, 0, 0]
    assert train.place[1].tolist() == [10.5, -20, 0]
    assert np.isnan(np.delete(train.place, 1, axis=0)).all()
    assert train.user_id.tolist() == [None, "5", None, None, None, None]
    assert shards.captions[train.caption[0]] == "a jay"
    assert shards.captions[train.caption[2]] == "This is a photograph of 7"
    tars = [str(out / shard.file) for shard in shards.card.splits["train"]]
    theirs = dict(by_webdataset(tars))
    assert [train.photo(i) for i in range(6)] == [theirs[key] for key in train.image_id]
    for path in out.rglob("*.index.parquet"):  # and these too are made anew, with the settings of the card
        was = path.read_bytes()
        path.unlink()
        ShardSet(out)
        assert path.read_bytes() == was


def test_anybodys_tars_are_verified(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole as indexed; a lost index comes back; a broken image is named though the card knows its bytes."""
    assert run("index", foreign) == 0
    assert run("verify", foreign) == 0
    index = next(foreign.rglob("*train*.index.parquet"))
    was = index.read_bytes()
    index.unlink()
    assert run("verify", foreign, "--repair") == 0
    assert index.read_bytes() == was
    (foreign / records.CARD_NAME).unlink()
    tar = foreign / "birds-train-000.tar"
    data = tar.read_bytes()
    start = data.index(b"\xff\xda")  # of the scan of the first photograph, whose bytes after it are lost
    tar.write_bytes(data[: start + 2] + bytes(40) + data[start + 42 :])
    assert run("index", foreign) == 0
    capsys.readouterr()
    assert run("verify", foreign) == 2
    assert capsys.readouterr().err == f"xcon-shards: {tar}: a/0001: its image does not decode\n"
    tar.unlink()
    assert run("verify", foreign, "--repair") == 2
    assert "bring its tars back" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut between members", "a header"])
def test_a_damaged_tar_is_not_taken_for_a_shorter_one(
    damage: str, foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """tarfile takes what it cannot read for the end of the tar, without a word."""
    tar = foreign / "birds-train-000.tar"
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as whole:
        at = whole.getmembers()[5].offset
    if damage == "a header":
        data[at + 150] ^= 1
    else:
        del data[at:]
    tar.write_bytes(data)
    assert run("index", foreign) == 2
    assert f"{tar}: breaks off or is damaged at byte {at:,}" in capsys.readouterr().err
    assert not list(foreign.rglob("*.parquet"))


def test_links_to_other_tars_are_not_believed(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("index", foreign, "--out", out) == 0
    (out / records.CARD_NAME).unlink()
    again = shutil.copytree(foreign, tmp_path / "others")
    assert run("index", again, "--out", out) == 2
    assert "is another file than" in capsys.readouterr().err


def test_labels_places_and_captions_under_other_names(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "1.jpg": photograph("JPEG", 1),
            "1.json": facts(taxon="Jay", x=1, y=2, day=0.5, by="Ann"),
            "1.txt": b"no",
        },
    )
    names = ("--label-key", "taxon", "--lon-key", "x", "--lat-key", "y", "--date-key", "day", "--user-key", "by")
    assert run("index", tmp_path, *names, "--split", "test", "--caption", "a {name}") == 0
    shards = ShardSet(tmp_path)
    split = shards.split("test")
    assert split.place.tolist() == [[1, 2, 0.5]]
    assert split.user_id.tolist() == ["Ann"]
    assert shards.captions == ("a Jay",)
    (tmp_path / "a.index.parquet").unlink()
    assert ShardSet(tmp_path).captions == ("a Jay",)


def test_keys_that_come_twice_are_told_apart_by_their_tars(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"1.jpg": photograph("JPEG", 1), "1.cls": b"0"})
    assert run("index", tmp_path) == 0
    assert ShardSet(tmp_path).split("train").image_id.tolist() == ["a/1", "b/1"]
    (tmp_path / "b.index.parquet").unlink()
    assert ShardSet(tmp_path).split("train").image_id.tolist() == ["a/1", "b/1"]


def no_tar(folder: Path) -> None:
    (folder / "z.tar").write_bytes(b"no tar at all" * 100)


def compressed(folder: Path) -> None:
    with tarfile.open(folder / "z.tar", "w:gz"):
        pass


def two_kinds(folder: Path) -> None:
    write_tar(folder / "z.tar", {"1.jpg": photograph("JPEG", 1), "1.cls": b"jay", **dict(two_named())})


def two_named() -> list[tuple[str, bytes]]:
    return [(f"2.{ending}", data) for ending, data in two(2)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: None, "no file is called **/*.tar; --pattern names the tars"),
        (no_tar, "z.tar: not a whole tar without compression"),
        (compressed, "z.tar: not a whole tar without compression"),
        (two_kinds, "labels are numbers here, words there"),
        (lambda f: write_tar(f / "z.tar", {"1.txt": b""}), "no record with image and label in 1 tars (1 samples"),
        (lambda f: Card((), {}, {}).save(f), "no file is called"),
    ],
)
def test_what_cannot_be_indexed_is_one_line(
    tmp_path: Path, spoil, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(tmp_path)
    assert run("index", tmp_path) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("*.parquet"))


def test_a_set_is_not_indexed_over(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", foreign) == 0
    assert run("index", foreign) == 2
    assert "already holds a shard set" in capsys.readouterr().err


# ---- many tars


def test_few_of_many_tars_are_open_at_once(tmp_path: Path) -> None:
    """Each read gives the bytes of its own file, whatever was closed in between."""
    paths = [tmp_path / f"{i}.tar" for i in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100)
    tars = Tars(paths, most=3)
    for number in np.random.default_rng(0).integers(0, 20, 200).tolist():
        assert tars.read(number, 90, 5) == bytes([number]) * 5
        assert len([p for p in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(p.resolve())]) <= 3
    with pytest.raises(OSError, match="ends within a photograph"):
        tars.read(0, 96, 5)
    del tars
    assert not [p for p in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(p.resolve())]


def test_a_split_holds_no_object_per_record(tiny_shards: Path) -> None:
    """Reference counts of objects make forked workers copy the pages that these lie on."""
    split = ShardSet(tiny_shards).split("train")
    assert isinstance(split.ids, pa.ChunkedArray)
    assert isinstance(split.users, pa.DictionaryArray)
    for name in ("shard", "offset", "size", "class_id", "place", "caption"):
        assert getattr(split, name).dtype != object
