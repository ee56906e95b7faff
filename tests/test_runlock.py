"""The lock on a run folder: who has it, who is refused, and that nothing of it outlives its holder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xcon import runlock

# Takes the lock and forks a helper, as a DataLoader does, which outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from xcon import runlock
runlock.take(Path(sys.argv[1]))
if helper := os.fork():
    print(helper, flush=True)
time.sleep(60)
"""


@contextmanager
def held(run: Path, **environment: str) -> Iterator[int]:
    """A process that has the lock; its id. At the end it is killed, and its helper afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        helper = int(process.stdout.readline())
        try:
            yield process.pid
            process.kill()
            process.wait()
            runlock.take(run)
        finally:
            process.kill()
            os.kill(helper, signal.SIGKILL)


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """The holder is named; once it is killed, the next one has the lock, though a helper of the holder lives."""
    with held(tmp_path) as pid:
        who = f"process {pid} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=f"{tmp_path}: {who} is training there: wait for its end, or choose"):
            runlock.take(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    runlock.take(tmp_path)  # what is one's own may be taken again


def test_a_job_that_came_back_follows_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second start of the job takes over; the same start, or another job, does not."""
    with held(tmp_path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1") as pid:
        for job, restarts in (("17", "1"), ("18", "2")):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
            with pytest.raises(ValueError, match=f"process {pid} on .* of SLURM job 17 is training there"):
                runlock.take(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        runlock.take(tmp_path)
        assert f"process {pid} on {socket.gethostname()} of SLURM job 17, which ended" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_is_said(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)
    runlock.take(tmp_path)
    assert capsys.readouterr().err.startswith(
        f"{tmp_path}: no lock is to be had here ({os.strerror(number)}); see"
    )
