"""Building by several processes and tasks: the same bytes, whoever makes them, however often they are killed."""

import csv
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from shards import build, cli
from shards.pool import Pool, WorkerLostError
from tests import commands
from tests.releases import noise, write_release
from xcon.records import Card

ROOT = Path(__file__).parents[1]
SHARDS = 15  # 28 train and 14 test photographs, three to a shard: 10 + 5
PROGRAM = "from shards import build, cli; build.WORTH_A_WORKER = 1; cli.main()"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """42 photographs that take a while to be made smaller."""
    rows = [(f"p{n:02d}", 2 + n % 2, "test" if n % 3 == 0 else "train", noise(n, 500)) for n in range(42)]
    return write_release(tmp_path_factory.mktemp("release") / "birds", rows)


def arguments(root: Path, out: Path, *more: str) -> list[str]:
    return ["build", "nabirds", "--root", str(root), "--out", str(out), "--samples-per-shard", "3", *more]


def main(*argv: str) -> int:
    return commands.run(cli.main, argv)


@pytest.fixture(scope="module")
def undisturbed(release, tmp_path_factory):
    """What one process makes: name -> bytes."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    assert main(*arguments(release, out, "--workers", "1")) == 0
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def eager(monkeypatch):
    """A worker is worth its start for a single photograph."""
    monkeypatch.setattr(build, "WORTH_A_WORKER", 1)


@pytest.mark.parametrize("workers", ["2", "3"])
def test_any_number_of_workers_gives_the_same_bytes(workers, release, undisturbed, tmp_path, eager):
    assert main(*arguments(release, tmp_path / "set", "--workers", workers)) == 0
    assert contents(tmp_path / "set") == undisturbed


def test_an_archive_read_by_workers_gives_the_same_bytes(release, undisturbed, tmp_path):
    with tarfile.open(tmp_path / "birds.tgz", "w:gz", compresslevel=1) as tar:
        tar.add(release, "nabirds")
    assert main(*arguments(tmp_path / "birds.tgz", tmp_path / "set", "--workers", "2")) == 0
    made = contents(tmp_path / "set")
    card, other = (made.pop("dataset.json"), undisturbed["dataset.json"])
    assert card.replace(b'"birds.tgz"', b'"birds"') == other
    assert made == {name: data for name, data in undisturbed.items() if name != "dataset.json"}


def test_tasks_of_an_array_give_the_same_bytes_in_any_order(release, undisturbed, tmp_path, capsys):
    out = tmp_path / "set"
    for task, shards in (("2", 5), ("0", 10)):  # 15 in three parts
        assert main(*arguments(release, out, "--tasks", "3", "--task", task)) == 0
        assert "the card waits for " in capsys.readouterr().out
        assert not (out / "dataset.json").exists()
        assert len(list(out.glob("*.tar"))) == shards
    assert main(*arguments(release, out, "--tasks", "3", "--task", "1")) == 0
    assert contents(out) == undisturbed
    assert main(*arguments(release, out, "--tasks", "3", "--task", "2")) == 0  # requeued
    assert capsys.readouterr().out.endswith(f"{out}: whole already\n")
    assert contents(out) == undisturbed


def test_whoever_writes_the_card_leaves_the_work_of_others(release, undisturbed, tmp_path):
    out = tmp_path / "set"
    assert main(*arguments(release, out, "--tasks", "2", "--task", "0")) == 0
    (out / ".work-0").mkdir()  # of a requeued task, which reads its source
    assert main(*arguments(release, out, "--tasks", "2", "--task", "1")) == 0
    (out / ".work-0").rmdir()
    assert contents(out) == undisturbed


def test_one_task_alone_makes_the_card(release, undisturbed, tmp_path, capsys):
    """While one looks at all shards, and may make some again, another leaves everything as it is."""
    out = tmp_path / "set"
    assert main(*arguments(release, out, "--tasks", "2", "--task", "0")) == 0
    (out / ".finish").mkdir()  # the other's claim
    being_written = out / ".train-000001.tar.k3j2"  # of task 1's share
    being_written.touch()
    (out / ".train-000001.made.json").unlink(missing_ok=True)
    before = contents_of_files(out)
    capsys.readouterr()
    assert main(*arguments(release, out, "--tasks", "2", "--task", "1")) == 0
    assert capsys.readouterr().out.endswith("if none runs any more, the same command without --task does\n")
    assert contents_of_files(out) == before
    assert main(*arguments(release, out)) == 0  # none runs any more
    assert contents(out) == undisturbed


def test_tasks_that_end_together_make_one_whole_set(tmp_path):
    """With copies to drop, so that whoever ends last makes shards of the others again."""
    same = noise(99, 40)
    photographs = [(f"p{n:02d}", 2, "train", same if n % 4 == 0 else noise(n, 40)) for n in range(24)]
    root = write_release(tmp_path / "birds", photographs)
    more = ("--drop", "duplicates", "--workers", "1")
    assert main(*arguments(root, tmp_path / "alone", *more)) == 0
    out = tmp_path / "set"
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments(root, out, *more, "--tasks", "3", "--task", str(task))],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        for task in range(3)
    ]
    assert [task.wait(timeout=300) for task in tasks] == [0, 0, 0]
    if not (out / "dataset.json").exists():  # each looked before the last shard was there
        assert main(*arguments(root, out, *more)) == 0
    assert contents(out) == contents(tmp_path / "alone")


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_photograph_that_cannot_be_read_costs_no_shard(release, undisturbed, tmp_path, capsys, monkeypatch):
    """A network's disk that does not answer for once is no wrong input."""
    out, read = tmp_path / "set", Path.read_bytes

    def stale(path: Path) -> bytes:
        if path.name == "p33.jpg":  # of a test shard, the last ones to be made
            raise OSError(116, "Stale file handle")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        assert main(*arguments(release, out, "--workers", "1")) == 2
    assert capsys.readouterr().err.endswith("p33.jpg: cannot be read (Stale file handle)\n")
    assert len(list(out.glob("train-*.tar"))) == 10
    assert main(*arguments(release, out, "--workers", "1")) == 0
    assert contents(out) == undisturbed


def start(release: Path, out: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, *arguments(release, out, "--workers", str(workers))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait_for(out: Path, pattern: str, number: int, process: subprocess.Popen) -> None:
    """Until so many files are there, or the process has ended."""
    while process.poll() is None and len(list(out.glob(pattern)) if out.is_dir() else []) < number:
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_twenty_moments_and_gone_on_with(release, undisturbed, tmp_path):
    """A chain: each command finds what the one before left; the bytes of each that ends are those undisturbed."""
    rng, out, killed = np.random.default_rng(0), tmp_path / "set", 0
    while killed < 20:
        process = start(release, out, workers=2 if killed % 5 == 4 else 1)
        if killed % 2:
            wait_for(out, ".work-0", 1, process)
            time.sleep(rng.uniform(0, 0.3))
        else:
            there = len(list(out.glob("*.tar"))) if out.is_dir() else 0
            wait_for(out, "*.tar", min(there + int(rng.integers(1, 4)), SHARDS), process)
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        _, errors = process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        if process.returncode != -signal.SIGKILL:
            assert (process.returncode, errors) == (0, b"")
            assert contents(out) == undisturbed
            for path in out.iterdir():
                path.unlink()
    assert main(*arguments(release, out)) == 0
    assert contents(out) == undisturbed


@pytest.mark.slow
def test_workers_end_with_their_parent(release, tmp_path):
    """`kill -9` of the parent alone, while its workers are busy."""
    process = start(release, tmp_path / "set", workers=2)
    wait_for(tmp_path / "set", "*.tar", 1, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=60)
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_a_broken_photograph_stops_all_workers_with_one_line(release, tmp_path, capsys, eager):
    rows = [(f"p{n:02d}", 2, "train", noise(n)[: 300 if n in (5, 11) else None]) for n in range(12)]
    root = write_release(tmp_path / "broken", rows)
    assert main(*arguments(root, tmp_path / "set", "--workers", "2")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not decode" in line
    assert not (tmp_path / "set").exists()


def test_a_disk_that_fills_up_under_workers(release, tmp_path, capsys, eager):
    """A file system of 400 kB, for a set of about 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        assert main(*arguments(release, disk / "set", "--workers", "2")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"xcon-shards: --out {disk / 'set'}: no space left on device; free some, or name ")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_repair_makes_missing_and_damaged_files_and_no_others(release, undisturbed, tmp_path, capsys):
    out = tmp_path / "set"
    assert main(*arguments(release, out)) == 0
    (out / "train-000002.tar").unlink()
    (out / "train-000004.index.parquet").write_bytes(b"x")
    data = bytearray((out / "test-000001.tar").read_bytes())
    data[700] ^= 1
    (out / "test-000001.tar").write_bytes(data)
    untouched = (out / "train-000000.tar").stat().st_ino
    capsys.readouterr()
    assert main(*arguments(release, out, "--repair")) == 0
    assert f"{out}: 2 shards and 1 indices made again" in capsys.readouterr().out
    assert contents(out) == undisturbed
    assert (out / "train-000000.tar").stat().st_ino == untouched


def test_repair_from_other_photographs_changes_nothing(release, tmp_path, capsys):
    rows = [(f"p{n:02d}", 2, "train", noise(n)) for n in range(6)]
    root, out = write_release(tmp_path / "birds", rows), tmp_path / "set"
    assert main(*arguments(root, out)) == 0
    (out / "train-000001.tar").unlink()
    for path in root.glob("images/2/*"):
        path.write_bytes(noise(77))
    before = contents(out)
    capsys.readouterr()
    assert main(*arguments(root, out, "--repair")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-000001.tar: would have other bytes than the card says" in line
    assert contents(out) == before


def troubled(folder: Path) -> Path:
    """a, b, c are one file: train, train of another class, test; d and e are one, f is tiny, g is broken."""
    same, twin = noise(1), noise(2)
    return write_release(
        folder / "troubled",
        [
            *(("a", 2, "train", same), ("b", 3, "train", same), ("c", 2, "test", same)),
            *(("d", 2, "train", twin), ("e", 2, "train", twin)),
            *(("f", 3, "train", noise(3, 31)), ("g", 3, "train", noise(4)[:400]), ("h", 3, "test", noise(5))),
        ],
    )


@pytest.mark.parametrize("tasks", [1, 2])
def test_trouble_is_reported_and_dropped_where_told(tmp_path, tasks):
    """Of a, b, c the test copy c stays, of d, e the first; f and g go: left are train d and test c, h."""
    root, out = troubled(tmp_path), tmp_path / "set"
    drop = ("--drop", "broken", "tiny", "duplicates")
    for task in range(tasks):
        assert main(*arguments(root, out, *drop, "--tasks", str(tasks), "--task", str(task))) == 0
    with (out / "report.csv").open(newline="") as file:
        rows = sorted((r["image_id"], r["kind"], r["dropped"]) for r in csv.DictReader(file))
    assert rows == [
        *(("a", "leakage", "yes"), ("b", "conflict", "yes"), ("b", "leakage", "yes")),
        *(("e", "duplicate", "yes"), ("f", "tiny", "yes"), ("g", "broken", "yes")),
    ]
    assert keys(out) == {"train": {"d"}, "test": {"c", "h"}}
    card = Card.load(out)
    assert card.made_by["dropped"] == 5
    assert card.made_by["trouble"] == {"broken": 1, "tiny": 1, "duplicate": 1, "leakage": 2, "conflict": 1}
    assert [dict(info.counts) for info in card.classes] == [
        {"train": 1, "val": 0, "test": 1},
        {"train": 0, "val": 0, "test": 1},
    ]
    assert main("verify", str(out)) == 0
    before = contents(out)
    for path in out.glob("*.tar"):
        path.unlink()
    assert main(*arguments(root, out, *drop, "--repair")) == 0
    assert contents(out) == before


def test_trouble_that_is_not_dropped_is_packed_and_reported(tmp_path, capsys):
    root, out = troubled(tmp_path), tmp_path / "set"
    assert main(*arguments(root, out, "--drop", "broken", "--tiny", "32")) == 0
    assert "trouble: 1 broken, 1 tiny, 1 duplicate, 2 leakage, 1 conflict; dropped: 1; see " in (
        capsys.readouterr().out
    )
    assert keys(out) == {"train": set("abdef"), "test": set("ch")}


def keys(out: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            found.setdefault(path.name[:-11], set()).update(n[:-4] for n in tar.getnames() if n.endswith(".jpg"))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_jobs_are_taken_as_they_are_needed(workers):
    """No more than two jobs for each worker wait, so memory does not grow with their number."""
    taken = []

    def jobs():
        for number in range(30):
            taken.append(number)
            yield str(number)

    with Pool(int, workers) as pool:
        for number, result in enumerate(pool.each(jobs())):
            assert result == number
            assert len(taken) - number <= 2 * workers


def test_the_first_error_in_order_is_raised():
    with Pool(int, 2) as pool, pytest.raises(ValueError, match="'third'"):
        list(pool.each(["1", "2", "third", "fourth"]))


def test_a_worker_that_is_killed_is_one_error():
    with pytest.raises(WorkerLostError, match="a worker was killed"), Pool(exec, 2) as pool:
        list(pool.each(["", "import os; os._exit(3)", ""]))
