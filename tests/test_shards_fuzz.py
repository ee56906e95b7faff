"""Damaged and malicious input by the hundred, from a seeded generator, on three ways in: a photograph that is
built from, an archive that is built from, a finished shard that is verified and read.

Each is refused in one line that names it, or left out and listed by name, or read as Pillow and tarfile read it;
within a bound on memory and on processor time, and with nothing written anywhere else.
"""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import os
import resource
import shutil
import signal
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps

from shards import cli
from shards.build import Sample, write_shard
from tests import commands
from xcon.loader import Records
from xcon.records import UNREADABLE, Card, ClassInfo, Record
from xcon.shardset import ShardSet, Split

# As `xcon-shards build` calls them.
DROP, REPORT = ("--drop", "broken"), "report.csv"

MEMORY = 1_500_000_000  # bytes that a case may take beside what the process has
SECONDS = 20  # of processor time for a case

Mutation = Callable[[np.random.Generator, bytes], bytes]


class TooLongError(BaseException):
    """No ValueError nor OSError, which a command line would answer."""


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """Ends what takes too much memory or too long."""

    def stop(*_: object) -> None:
        raise TooLongError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def run(arguments: list[object], capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    """Status and lines on stderr of `xcon-shards`."""
    capsys.readouterr()
    with bounds():
        status = commands.run(cli.main, [str(word) for word in arguments])
    return status, capsys.readouterr().err.splitlines()


def contents(folder: Path, *, but: Path) -> dict[str, str]:
    """What stands below a folder, by name; `but` one folder."""
    files = (p for p in folder.rglob("*") if but != p and but not in p.parents)
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for p in files}


# --- photographs


def photograph(kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    y, x = np.mgrid[:60, :80]
    waves = [127 + 120 * np.sin(x / a + y / b) for a, b in ((9.0, 30.0), (25.0, 12.0), (14.0, 50.0))]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(waves, axis=2).astype(np.uint8)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def on_its_side() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


BASES = (
    photograph(quality=85),
    photograph(quality=85, progressive=True),
    photograph(mode="L"),
    photograph(mode="CMYK"),
    photograph(exif=on_its_side()),
    photograph("PNG"),
)


def flip(rng: np.random.Generator, data: bytes, start: int, stop: int) -> bytes:
    """One to four bytes within a range take other values."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        changed[rng.integers(start, min(stop, len(data)))] ^= int(rng.integers(1, 256))
    return bytes(changed)


def cut(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: rng.integers(0, len(data))]


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of one bit per pixel, whatever its rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def huge_jpeg(_: np.random.Generator, __: bytes) -> bytes:
    """65,500 by 65,500 pixels, it says: 4.3 gigapixels, 12.9 GB."""
    data = photograph()
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", 65_500, 65_500) + data[at + 9 :]


PHOTOGRAPHS: dict[str, Mutation] = {
    "cut": cut,
    "header": lambda rng, data: flip(rng, data, 0, 300),
    "body": lambda rng, data: flip(rng, data, len(data) // 3, len(data)),
    "anywhere": lambda rng, data: flip(rng, data, 0, len(data)),
    "garbage behind": lambda rng, data: data + rng.bytes(500),
    "garbage before": lambda rng, data: rng.bytes(5) + data,
    "twice": lambda _, data: data + data,
}
SINGLE_PHOTOGRAPHS: dict[str, Mutation] = {
    "empty": lambda *_: b"",
    "noise": lambda rng, _: rng.bytes(3000),
    "4 gigapixel jpeg": huge_jpeg,
    "4 gigapixel png": lambda *_: png(65_000, 65_000, b""),
    "100 megapixel png, cut": lambda *_: png(10_000, 10_000, b""),
    "png bomb": lambda *_: png(13_500, 13_500, bytes(13_500 * 1_689)),  # 182 megapixels in 22 kB
}


def mutated_photographs(rounds: int) -> dict[str, bytes]:
    """Name -> bytes; every mutation of every base so many times, with other draws each."""
    rng = np.random.default_rng(0)
    found = {
        f"{name} {base} {again}": mutate(rng, data)
        for again in range(rounds)
        for base, data in enumerate(BASES)
        for name, mutate in PHOTOGRAPHS.items()
    }
    return found | {name: mutate(rng, BASES[0]) for name, mutate in SINGLE_PHOTOGRAPHS.items()}


def reference(data: bytes) -> np.ndarray | None:
    """`[H, W, 3]` as Pillow decodes it, upright; None where it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except (*UNREADABLE, Image.DecompressionBombError):
            return None


# --- releases


def write_release(root: Path, photographs: dict[str, bytes]) -> dict[str, str]:
    """A release of two classes in the layout of NABirds; image id -> path below images/."""
    paths = {f"{n:04d}": f"a/{name.replace(' ', '_')}.jpg" for n, name in enumerate(photographs)}
    (root / "images" / "a").mkdir(parents=True)
    for path, data in zip(paths.values(), photographs.values(), strict=True):
        (root / "images" / path).write_bytes(data)
    tables = {
        "images": [f"{i} {path}" for i, path in paths.items()],
        "image_class_labels": [f"{i} {2 + n % 2}" for n, i in enumerate(paths)],
        "train_test_split": [f"{i} {n // 2 % 2}" for n, i in enumerate(paths)],
        "classes": ["0 Birds", "1 Larks", "2 Sky Lark", "3 Wood Lark"],
        "hierarchy": ["1 0", "2 1", "3 1"],
        "bounding_boxes": [f"{i} 1 1 20 20" for i in paths],
        "sizes": [f"{i} 80 60" for i in paths],
    }
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return paths


def pack(root: Path) -> bytes:
    """The release as a tar, its tables behind its photographs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(root.rglob("*"), key=lambda p: (p.suffix == ".txt", p.name)):
            if path.is_file():
                tar.add(path, path.relative_to(root).as_posix())
    return buffer.getvalue()


def build(root: Path, out: Path, *more: str) -> list[object]:
    return ["build", "nabirds", "--root", root, "--out", out, *more]


def packed(folder: Path) -> dict[str, bytes]:
    """Photographs of a finished set by key, read with tarfile alone."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {m.name.removesuffix(".jpg"): tar.extractfile(m).read() for m in tar if ".jpg" in m.name}
    return found


def reported(folder: Path) -> dict[str, str]:
    """Image id -> why it was left out."""
    if not (folder / REPORT).exists():
        return {}
    with (folder / REPORT).open(newline="") as table:
        return {row["image_id"]: row["detail"] for row in csv.DictReader(table) if row["dropped"] == "yes"}


def read(folder: Path) -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Key, file and pixels `[H, W, 3]` of every record, as a training reads them."""
    shards = ShardSet(folder)
    for name in shards.card.splits:
        split = shards.split(name)
        for index in range(len(split)):
            yield split.image_id[index], split.photo(index), pixels_of(split, index)


def pixels_of(split: Split, index: int) -> np.ndarray:
    records = Records(split, ("image",), transform=lambda pixels: pixels)
    return records[(0, index, 1.0)]["image"].permute(1, 2, 0).numpy()


def check_set(folder: Path, sources: dict[str, bytes]) -> list[str]:
    """What is wrong with a set that was built from these photographs, by image id."""
    kept, dropped = packed(folder), reported(folder)
    if sorted([*kept, *dropped]) != sorted(sources):
        return [f"{len(kept)} kept and {len(dropped)} left out of {len(sources)}"]
    wrong = [
        f"{key}: {'kept' if key in kept else 'left out'}"
        for key, data in sources.items()
        if (key in dropped) != (reference(data) is None)
    ]
    for key, file, pixels in read(folder):
        expected = reference(sources[key])
        if not np.array_equal(pixels, reference(file)):
            wrong.append(f"{key}: not as Pillow reads it")
        # What was encoded again is near; damaged data has edges that a JPEG of quality 90 does not keep.
        elif file != sources[key] and np.abs(pixels.astype(float) - expected).mean() > 12:
            wrong.append(f"{key}: far from its source")
    return wrong


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A release with 300 damaged photographs: its folder, image id -> path, image id -> bytes."""
    damaged = mutated_photographs(rounds=7)
    assert len(damaged) == 7 * 6 * 7 + 6
    root = tmp_path_factory.mktemp("photographs") / "release"
    paths = write_release(root, damaged)
    return root, paths, dict(zip(paths, damaged.values(), strict=True))


@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
def test_damaged_photographs_are_left_out_by_name_or_read_as_pillow_reads_them(
    kind, photographs, tmp_path, capsys
):
    root, paths, sources = photographs
    if kind == "tar.gz":
        root = tmp_path / "release.tar.gz"
        root.write_bytes(gzip.compress(pack(photographs[0]), compresslevel=1))
    before = contents(root.parent, but=tmp_path / "set")
    status, lines = run(build(root, tmp_path / "set", *DROP), capsys)
    assert (status, lines) == (0, [])
    dropped = reported(tmp_path / "set")
    assert 50 < len(dropped) < 200  # of 300: neither all nor none, so both ways are seen
    assert [key for key, reason in dropped.items() if paths[key] not in reason] == []
    assert check_set(tmp_path / "set", sources) == []
    assert run(["verify", tmp_path / "set"], capsys) == (0, [])
    assert contents(root.parent, but=tmp_path / "set") == before


@pytest.mark.parametrize("name", SINGLE_PHOTOGRAPHS)
def test_one_damaged_photograph_is_refused_by_name(name, tmp_path, capsys):
    root = tmp_path / "release"
    write_release(root, {"fine": BASES[0], "damaged": SINGLE_PHOTOGRAPHS[name](np.random.default_rng(1), b"")})
    status, lines = run(build(root, tmp_path / "set"), capsys)
    assert (status, len(lines)) == (2, 1)
    assert "images/a/damaged.jpg: does not decode" in lines[0]
    assert not (tmp_path / "set").exists()


# --- tars


def patch(raw: bytes, at: int, fields: dict[int, bytes]) -> bytes:
    """Writes fields of the header at `at`, offset -> value, and makes its checksum right."""
    header = bytearray(raw[at : at + 512])
    for offset, value in fields.items():
        header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return raw[:at] + bytes(header) + raw[at + 512 :]


def members(raw: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return tar.getmembers()


def jpegs(raw: bytes) -> list[tarfile.TarInfo]:
    return [m for m in members(raw) if m.name.endswith(".jpg")]


def end(member: tarfile.TarInfo) -> int:
    return member.offset_data + -(-member.size // 512) * 512


def base_256(number: int) -> bytes:
    """A size as GNU tar writes what 11 octal digits cannot hold, negative ones too."""
    return (
        b"\x80" + number.to_bytes(11, "big") if number >= 0 else b"\xff" + number.to_bytes(11, "big", signed=True)
    )


def header(fields: dict[int, bytes]) -> Mutation:
    """Changes the header of one of the photographs."""
    return lambda rng, raw: patch(raw, jpegs(raw)[rng.integers(len(jpegs(raw)))].offset, fields)


def extra_header(kind: bytes, body: bytes, claims: bytes = b"", times: int = 1) -> Mutation:
    """Puts a PAX or GNU header before one of the photographs, which may claim another size than it has."""
    info = tarfile.TarInfo("././@Extra")
    info.type, info.size = kind, len(body)
    block = info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)
    if claims:
        block = patch(block, 0, {124: claims})

    def mutate(rng: np.random.Generator, raw: bytes) -> bytes:
        at = jpegs(raw)[rng.integers(len(jpegs(raw)))].offset
        return raw[:at] + times * block + raw[at:]

    return mutate


def pax(name: str, value: str, kind: bytes = tarfile.XHDTYPE, times: int = 1) -> Mutation:
    body = f"{name}={value}\n"
    length = len(body) + 1
    while length != len(f"{length} {body}"):
        length = len(f"{length} {body}")
    return extra_header(kind, f"{length} {body}".encode(), times=times)


def again(rng: np.random.Generator, raw: bytes) -> bytes:
    """A photograph stands there once more, with the content of another."""
    first, second = rng.choice(len(jpegs(raw)), 2, replace=False)
    one, other = jpegs(raw)[first], jpegs(raw)[second]
    name = raw[one.offset : one.offset + 100]
    return patch(raw[other.offset : end(other)], 0, {0: name}) + raw


def swap(rng: np.random.Generator, raw: bytes) -> bytes:
    """Two neighbouring members change places."""
    found = members(raw)
    number = rng.integers(len(found) - 1)
    one, other = found[number], found[number + 1]
    return raw[: one.offset] + raw[other.offset : end(other)] + raw[one.offset : end(one)] + raw[end(other) :]


def flip_photograph(rng: np.random.Generator, raw: bytes) -> bytes:
    member = jpegs(raw)[rng.integers(len(jpegs(raw)))]
    return flip(rng, raw, member.offset_data, member.offset_data + member.size)


def flip_header(rng: np.random.Generator, raw: bytes) -> bytes:
    member = members(raw)[rng.integers(len(members(raw)))]
    return flip(rng, raw, member.offset, member.offset + 512)


SPARSE = {156: b"S", 257: b"ustar  \0", 386: b"%011o\0%011o\0" % (0, 512), 483: base_256(10 << 30)}
GB10 = base_256(10 << 30)

RANDOM_TARS: dict[str, Mutation] = {
    "cut": cut,
    "flip in a header": flip_header,
    "flip in a photograph": flip_photograph,
    "flip anywhere": lambda rng, raw: flip(rng, raw, 0, len(raw)),
    "twice": again,
    "swapped": swap,
}
TARS: dict[str, Mutation] = {
    "empty": lambda *_: b"",
    "zeros": lambda *_: bytes(10_240),
    "noise": lambda rng, _: rng.bytes(10_240),
    "garbage behind": lambda rng, raw: raw + rng.bytes(3000),
    "size 0": header({124: b"00000000000\0"}),
    "size 1 more": lambda rng, raw: patch(raw, jpegs(raw)[1].offset, {124: b"%011o\0" % (1 + jpegs(raw)[1].size)}),
    "size 8 GB": header({124: b"77777777777\0"}),
    "size 10 GB": header({124: GB10}),
    "size negative": header({124: base_256(-512)}),
    "size very negative": header({124: base_256(-(10 << 30))}),
    "size no number": header({124: b"elephant\0\0\0\0"}),
    "parent": header({0: b"../x.jpg\0".ljust(100, b"\0")}),
    "parents": header({0: b"images/../../../x.jpg\0".ljust(100, b"\0")}),
    "dot": header({0: b".\0".ljust(100, b"\0")}),
    "no name": header({0: bytes(100)}),
    "not UTF-8": header({0: b"\xff\xfe.jpg\0".ljust(100, b"\0")}),
    "symlink": header({156: b"2", 157: b"/etc/passwd\0"}),
    "symlink to itself": lambda rng, raw: patch(
        raw, jpegs(raw)[0].offset, {156: b"2", 157: jpegs(raw)[0].name.rpartition("/")[2].encode() + b"\0"}
    ),
    "hard link": header({156: b"1", 157: b"/etc/passwd\0"}),
    "character device": header({156: b"3", 329: b"0000001\0" * 2}),
    "block device": header({156: b"4", 329: b"0000001\0" * 2}),
    "folder": header({156: b"5"}),
    "fifo": header({156: b"6"}),
    "contiguous": header({156: b"7"}),
    "unknown kind": header({156: b"Z"}),
    "sparse": header(SPARSE),
    "pax size": pax("size", str(10 << 30)),
    "pax size negative": pax("size", "-512"),
    "pax path": pax("path", "../x.jpg"),
    "pax sparse": pax("GNU.sparse.realsize", str(10 << 30)),
    "pax for all": pax("path", "../x.jpg", kind=tarfile.XGLTYPE),
    "pax claims 10 GB": extra_header(tarfile.XHDTYPE, b"x", claims=GB10),
    "pax garbage": extra_header(tarfile.XHDTYPE, b"999999999999999999 x=1\n"),
    "pax upon pax": pax("comment", "x", times=3000),
    "long name": extra_header(tarfile.GNUTYPE_LONGNAME, b"../../x.jpg\0"),
    "long name claims 10 GB": extra_header(tarfile.GNUTYPE_LONGNAME, b"x", claims=GB10),
    "long link": extra_header(tarfile.GNUTYPE_LONGLINK, b"/etc/passwd\0"),
}


def mutated_tars(raw: bytes, elsewhere: Path, rounds: int) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(2)
    absolute = header({0: f"{elsewhere}/x.jpg".encode()[:100].ljust(100, b"\0")})
    for name, mutate in (TARS | {"absolute": absolute}).items():
        yield name, mutate(rng, raw)
    for number in range(rounds):
        for name, mutate in RANDOM_TARS.items():
            yield f"{name} {number}", mutate(rng, raw)


# --- archives


def last_of_each_name(path: Path, paths: dict[str, str]) -> dict[str, bytes]:
    """Image id -> bytes as unpacking gives them, read with random access."""
    with tarfile.open(path) as tar:
        return {i: tar.extractfile(tar.getmember(f"images/{name}")).read() for i, name in paths.items()}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A release of six photographs as a tar, and image id -> path."""
    root = tmp_path_factory.mktemp("archive") / "release"
    paths = write_release(root, {f"photo {n}": data for n, data in enumerate([*BASES[:2], *BASES[:4]])})
    return pack(root), paths


def check_archive(path: Path, folder: Path, paths: dict[str, str], capsys: pytest.CaptureFixture) -> list[str]:
    """Builds from an archive: what is wrong with how that ended."""
    status, lines = run(build(path, folder / "set", *DROP), capsys)
    if status == 2:
        named = len(lines) == 1 and (path.name in lines[0] or "images/" in lines[0])
        gone = not (folder / "set").exists()
        return [*([] if named else [f"says {lines}"]), *([] if gone else ["left something"])]
    found = [f"status {status}, {lines}"] if status or lines else []
    return found + check_set(folder / "set", last_of_each_name(path, paths))


def test_damaged_archives_are_refused_or_read_as_tarfile_reads_them(archive, tmp_path, capsys):
    raw, paths = archive
    target = tmp_path / "work" / "target"
    target.mkdir(parents=True)
    path = tmp_path / "release.tar"
    wrong = {}
    for name, data in mutated_tars(raw, tmp_path / "elsewhere", rounds=5):
        path.write_bytes(data)
        before = contents(tmp_path, but=target)
        if found := check_archive(path, target, paths, capsys):
            wrong[name] = found
        shutil.rmtree(target / "set", ignore_errors=True)
        if contents(tmp_path, but=target) != before or list(target.iterdir()):
            wrong[name] = ["wrote elsewhere"]
    assert wrong == {}


def test_damaged_compressed_archives_are_refused_or_whole(archive, tmp_path, capsys):
    """gzip has a checksum: what is not refused has the photographs that were packed."""
    raw, paths = archive
    whole = gzip.compress(raw, mtime=0)
    rng = np.random.default_rng(3)
    damaged = {
        "garbage behind": whole + rng.bytes(600),
        "zeros behind": whole + bytes(600),
        "empty": b"",
        "magic": b"\x1f\x8b" + rng.bytes(3000),
        "checksum": whole[:-8] + b"\0\0\0\0" + whole[-4:],
        **{f"cut {n}": cut(rng, whole) for n in range(6)},
        **{f"flip {n}": flip(rng, whole, 10, len(whole)) for n in range(12)},
    }
    path = tmp_path / "release.tar.gz"
    (tmp_path / "plain.tar").write_bytes(raw)
    sources = last_of_each_name(tmp_path / "plain.tar", paths)
    wrong = {}
    for name, data in damaged.items():
        path.write_bytes(data)
        status, lines = run(build(path, tmp_path / "set", *DROP), capsys)
        if status == 2 and len(lines) == 1 and path.name in lines[0]:
            continue
        if found := [str(status), *lines] if status else check_set(tmp_path / "set", sources):
            wrong[name] = found
        shutil.rmtree(tmp_path / "set")
    assert wrong == {}


# --- finished shards


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A set of twelve photographs in two shards."""
    folder = tmp_path_factory.mktemp("finished")
    write_release(folder / "release", {f"photo {n}": BASES[n % 2] for n in range(12)})
    assert commands.run(cli.main, [str(word) for word in build(folder / "release", folder / "set")]) == 0
    return folder / "set"


def forge(folder: Path, path: Path) -> None:
    """The card says what the tar is now, so that what comes behind the hash is reached."""
    card = Card.load(folder)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    splits = {
        split: tuple(
            dataclasses.replace(s, size=path.stat().st_size, sha256=sha256) if s.file == path.name else s
            for s in shards
        )
        for split, shards in card.splits.items()
    }
    dataclasses.replace(card, splits=splits).save(folder)


def check_reader(folder: Path) -> list[str]:
    """What a training would read wrongly; that it refuses is fine, if it says where."""
    try:
        with bounds(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF data
            return [f"{key} read wrongly" for key, file, pixels in read(folder) if not equal(file, pixels)]
    except (ValueError, OSError) as error:
        return [] if "train-000000" in str(error) or "dataset.json" in str(error) else [f"reader: {error}"]


def equal(file: bytes, pixels: np.ndarray) -> bool:
    return np.array_equal(reference(file), pixels)


@pytest.mark.parametrize("forged", [False, True])
def test_damaged_shards_are_named_and_never_read_wrongly(forged, finished, tmp_path, capsys):
    """A changed tar whose card says its old hash is always named; with its new hash it is named, or in order."""
    raw = (finished / "train-000000.tar").read_bytes()
    folder = tmp_path / "work" / "set"
    wrong = {}
    for name, data in mutated_tars(raw, tmp_path / "elsewhere", rounds=8 if forged else 2):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        tar = folder / "train-000000.tar"
        tar.write_bytes(data)
        if forged:
            forge(folder, tar)
        before = contents(tmp_path, but=tmp_path / "nothing")
        status, lines = run(["verify", folder, "--workers", "1"], capsys)
        refused = status == 2 and any(tar.name in line for line in lines)
        in_order = status == 0 and forged and not lines
        problems = [] if refused or in_order else [str(status), *lines]
        problems += check_reader(folder)
        if contents(tmp_path, but=tmp_path / "nothing") != before:
            problems.append("wrote something")
        if problems:
            wrong[name] = problems
    assert wrong == {}


def test_what_verify_passes_is_read_as_pillow_reads_it(photographs, tmp_path, capsys):
    """300 damaged photographs put into a tar as they are, by somebody else's tool: the reader names what it does
    not read, and reads all that verify does not name."""
    _, _, sources = photographs
    infos = (ClassInfo(0, 2, "Sky Lark", None, (), {"train": len(sources)}),)
    records = [Record(key, 0, 2, "Sky Lark", None, None, None, "train") for key in sources]
    shard, _ = write_shard(
        tmp_path / "train-000000.tar", [Sample(r, sources[r.image_id], "a lark") for r in records]
    )
    Card(infos, {"train": (shard,)}, {}).save(tmp_path)
    status, lines = run(["verify", tmp_path, "--workers", "1"], capsys)
    assert status == 2
    named = {key for key in sources if any(f"{key}.jpg: does not decode" in line for line in lines)}
    assert len(lines) == len(named) + 1
    assert 100 < len(named) < 290
    split = ShardSet(tmp_path).split("train")
    wrong = []
    with bounds(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF data
        for index, key in enumerate(sources):
            try:
                pixels = pixels_of(split, index)
                # What verify names may be read too, a CMYK file one level off Pillow.
                right = key in named or equal(sources[key], pixels)
            except ValueError as error:
                right = key in named and f"{key}.jpg: " in str(error)
            if not right:
                wrong.append(key)
    assert wrong == []


def test_damaged_indexes_are_named_and_repaired(finished, tmp_path, capsys):
    """Whatever became of an index, --repair makes it what it was, and touches nothing else."""
    folder = tmp_path / "set"
    shutil.copytree(finished, folder)
    index = folder / "train-000000.index.parquet"
    whole, before = index.read_bytes(), contents(tmp_path, but=tmp_path / "nothing")
    rng = np.random.default_rng(4)
    damaged = [b"", rng.bytes(500), *(cut(rng, whole) for _ in range(6))]
    damaged += [flip(rng, whole, 0, len(whole)) for _ in range(16)]
    named = 0
    for data in damaged:
        index.write_bytes(data)
        status, lines = run(["verify", folder], capsys)
        assert (status, bool(lines)) in ((0, False), (2, True))
        named += status == 2
        assert check_reader(folder) == []
        assert [line for line in lines if "train-000000" not in line and "problems" not in line] == []
        assert run(["verify", folder, "--repair"], capsys) == (0, [])
        if status == 2:
            assert contents(tmp_path, but=tmp_path / "nothing") == before
    assert named > 16  # a flipped byte may lie in what nobody reads


def test_a_card_that_leads_elsewhere_is_refused(finished, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(finished, folder)
    card = (folder / "dataset.json").read_text()
    for name in ("../set/train-000000.tar", f"{os.sep}etc{os.sep}passwd", "..", ""):
        (folder / "dataset.json").write_text(card.replace("train-000000.tar", name))
        status, (line,) = run(["verify", folder, "--repair"], capsys)
        assert status == 2
        assert "dataset.json: not a card of xcon" in line
