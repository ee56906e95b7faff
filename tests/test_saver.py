"""What a run is told of its end, and what it tells: the files by which a trainer and a batch script speak."""

import signal
from pathlib import Path

import pytest

from tests import training
from xcon.checkpoint import Checkpoints, Position
from xcon.clock import Clock
from xcon.launch import make_accelerator
from xcon.preemption import Saver
from xcon.signals import Received
from xcon.tracking import Silent


@pytest.fixture
def saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saver:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    training.fresh_accelerator()
    accelerator = make_accelerator("fp32", batch_size=1, clip_norm=0.0)
    return Saver(Checkpoints(tmp_path, accelerator), Received(), Clock(), every=1)


def test_a_signal_that_came_before_there_was_a_trainer(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts as SIGUSR1, and no more where this process has received one itself."""
    assert saver.asked_before() is None
    monkeypatch.setenv("XCON_ASKED", str(tmp_path / "asked"))
    assert saver.asked_before() is None
    (tmp_path / "asked").touch()
    assert (saver.asked_before(), saver.asked_before()) == ("SIGUSR1", "SIGUSR1")
    assert saver.received.numbers == [signal.SIGUSR1]
    saver.received.numbers = [signal.SIGTERM]
    assert saver.asked_before() == "SIGTERM"


def test_a_run_that_cannot_tell_of_its_stop_stops_all_the_same(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "missing" / "stopped"
    monkeypatch.setenv("XCON_STOPPED", str(file))
    with pytest.raises(SystemExit) as ended:
        saver.stop(Silent(), Position(3), "SIGTERM")
    assert ended.value.code == 75
    assert capsys.readouterr().err.splitlines() == [
        f"XCON_STOPPED: {file}: cannot be written (No such file or directory): no job comes back by itself",
        f"{tmp_path}: stopped at step 3 by SIGTERM; give the same command again",
    ]
