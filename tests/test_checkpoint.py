"""Runs begun, interrupted and resumed: positions by hand, what is refused, the log cut where it resumes."""

import concurrent.futures
import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tests import forked
from xcon import checkpoint, config, tracking
from xcon.checkpoint import Checkpoints, Position
from xcon.config import FinetuneConfig, PretrainConfig

FACTS = {"command": "pretrain", "recipe": "demo", "method": "clip", "shards_sha256": "ab"}


def settings(run: Path, **changes: object) -> PretrainConfig:
    return PretrainConfig(**{"shards": Path("shards"), "out": run, **changes})


# ---- positions


def test_training_ends_after_its_steps_or_its_patience() -> None:
    """With patience 2, two validations without a better result; 0 is patience without end."""
    at = Position(step=9, best=(0.5,), best_step=3, since_best=2)
    assert [at.ended(10, patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
    assert at.ended(9, 0)


def test_positions_by_hand() -> None:
    """Top-1 first, then the loss, whose sign is turned; a tie is no improvement."""
    first = Position(step=10).after((0.5, -1.0))
    assert first == Position(10, (0.5, -1.0), 10, 0)
    later = dataclasses.replace(first, step=20)
    assert later.after((0.5, -1.1)) == Position(20, (0.5, -1.0), 10, 1)
    assert later.after((0.5, -1.0)) == Position(20, (0.5, -1.0), 10, 1)
    assert later.after((0.4, -0.1)).after((0.4, -0.1)) == Position(20, (0.5, -1.0), 10, 2)
    assert later.after((0.4, -0.1)).after((0.5, -0.9)) == Position(20, (0.5, -0.9), 20, 0)


# ---- run folders


def test_a_run_is_begun_resumed_and_complete(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert checkpoint.open_run(settings(run), **FACTS) is False
    saved = json.loads((run / "config.json").read_text())
    assert {name: saved[name] for name in FACTS} == FACTS
    assert saved["batch_size"] == 32
    partial = run / "checkpoints" / ".step-7.partial"
    partial.mkdir()
    moved = settings(run, workers=0, checkpoint_every=5, shards=Path("moved"))
    assert checkpoint.open_run(moved, **{**FACTS, "recipe": "run/config.json"}) is False
    assert not partial.exists()
    assert json.loads((run / "config.json").read_text()) == saved
    (run / "model.json").write_text("{}")
    assert checkpoint.open_run(settings(run), **FACTS) is True


def test_a_process_that_was_killed_as_it_began_leaves_a_folder_that_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    (tmp_path / ".config.json.x1").write_text("{")
    assert checkpoint.open_run(settings(tmp_path), **FACTS) is False
    assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_a_complete_run_is_not_locked(tmp_path: Path) -> None:
    checkpoint.open_run(settings(tmp_path), **FACTS)
    (tmp_path / "lock").unlink()
    (tmp_path / "model.json").write_text("{}")
    assert checkpoint.open_run(settings(tmp_path), **FACTS) is True
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    ("changes", "facts", "message"),
    [
        ({"epochs": 3}, {}, "other settings .--epochs was 200, now 3.: choose another --out"),
        ({"image_options": {"a": "b"}}, {}, "--image-options was {}, now {'a': 'b'}"),
        ({}, {"shards_sha256": "cd"}, "shards_sha256 was ab, now cd"),
        ({}, {"command": "finetune"}, "command was pretrain, now finetune"),
    ],
)
def test_a_run_with_other_settings_is_refused(tmp_path: Path, changes: dict, facts: dict, message: str) -> None:
    checkpoint.open_run(settings(tmp_path), **FACTS)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        checkpoint.open_run(settings(tmp_path, **changes), **{**FACTS, **facts})
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_run_of_another_command_is_refused(tmp_path: Path) -> None:
    checkpoint.open_run(settings(tmp_path), **FACTS)
    with pytest.raises(ValueError, match="command was pretrain, now finetune"):
        checkpoint.open_run(
            FinetuneConfig(shards=Path("shards"), out=tmp_path), **{**FACTS, "command": "finetune"}
        )


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "file"
    folder.mkdir()
    (folder / "bird.jpg").write_bytes(b"")
    file.write_text("")
    for path in (folder, file):
        with pytest.raises(ValueError, match=f"{path}: neither empty nor a run folder: choose another --out"):
            checkpoint.open_run(settings(path), **FACTS)
    assert [path.name for path in folder.iterdir()] == ["bird.jpg"]


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert checkpoint.open_run(settings(tmp_path), **FACTS) is False


# ---- checkpoints


class Training:
    """A small model with dropout, trained on noise: its weights depend on every random number drawn."""

    def __init__(self, run: Path) -> None:
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(run, self.accelerator)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.accelerator.backward(self.model(torch.randn(5, 4)).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def test_a_resumed_training_ends_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    """Weights, moments of AdamW and the random state: six steps, or three, and three more after a resume."""
    undisturbed = Training(tmp_path)
    undisturbed.steps(3)
    undisturbed.checkpoints.save(Position(3, (0.5, -1.0), 1, 2))
    undisturbed.steps(3)
    resumed = Training(tmp_path)
    resumed.steps(1)
    assert resumed.checkpoints.restore() == Position(3, (0.5, -1.0), 1, 2)
    resumed.steps(3)
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights(), undisturbed.weights(), strict=True))


def test_without_a_checkpoint_a_run_is_at_its_beginning(tmp_path: Path) -> None:
    assert Training(tmp_path).checkpoints.restore() == Position(0, None, None, 0)


def test_the_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    """By number, not by name: 10 comes after 9."""
    training = Training(tmp_path)
    for step in (2, 9, 10):
        training.checkpoints.save(Position(step))
    (tmp_path / "checkpoints" / ".step-11.partial").mkdir()
    assert [path.name for path in training.checkpoints.whole()] == ["step-9", "step-10"]
    assert training.checkpoints.restore().step == 10


def test_the_best_weights_are_those_of_their_step(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.steps(1)
    expected = training.weights()
    training.checkpoints.keep_weights(training.model, 1)
    training.steps(2)
    training.checkpoints.keep_weights(training.model, 3)
    found = load_file(training.checkpoints.weights(1))
    assert all(
        torch.equal(found[n], e) for (n, _), e in zip(training.model.named_parameters(), expected, strict=True)
    )


def test_weights_are_kept_as_long_as_a_checkpoint_names_them_its_best(tmp_path: Path) -> None:
    """Two checkpoints are kept: that of step 2 names 1, those of steps 4 and 6 name 3."""
    training = Training(tmp_path)
    kept = []
    for step, best in ((2, 1), (4, 3), (6, 3)):
        training.checkpoints.keep_weights(training.model, best)
        training.checkpoints.save(Position(step, (0.5,), best))
        kept.append(sorted(path.name for path in (tmp_path / "checkpoints").glob("weights-*")))
    one, three = "weights-1.safetensors", "weights-3.safetensors"
    assert kept == [[one], [one, three], [three]]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "state.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, share: float) -> None:
    training = Training(tmp_path)
    training.steps(1)
    training.checkpoints.save(Position(1))
    path = tmp_path / "checkpoints" / "step-1" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"step-1.*(damaged|not JSON)"):
        training.checkpoints.restore()


@pytest.mark.parametrize("name", ["step-1/optimizer.bin", "step-1/model.safetensors", "weights-1.safetensors"])
def test_a_changed_bit_is_found(tmp_path: Path, name: str) -> None:
    """In the last byte of a tensor, where only its value is wrong; the best weights, too."""
    training = Training(tmp_path)
    training.checkpoints.keep_weights(training.model, 1)
    training.checkpoints.save(Position(1, (0.5,), 1))
    path = tmp_path / "checkpoints" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"step-1: .*{path.name} is damaged; remove the folder"):
        training.checkpoints.restore()


def test_best_weights_that_are_gone_are_missed_before_training(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.checkpoints.keep_weights(training.model, 1)
    training.checkpoints.save(Position(1, (0.5,), 1))
    training.checkpoints.weights(1).unlink()
    with pytest.raises(ValueError, match=r"step-1: damaged .*weights-1"):
        training.checkpoints.restore()


def test_an_old_checkpoint_goes_after_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every file flushed, and every name given or taken away: what is on disk before which is."""
    training = Training(tmp_path)
    training.checkpoints.save(Position(1))
    training.checkpoints.save(Position(2))
    done: list[tuple[str, str]] = []
    flush, rename, remove = os.fsync, Path.replace, shutil.rmtree

    def flushing(handle: int) -> None:
        flush(handle)
        done.append(("flush", Path(f"/proc/self/fd/{handle}").readlink().name))

    def renaming(path: Path, target: Path) -> Path:
        done.append(("name", target.name))
        return rename(path, target)

    def removing(path: Path, **options: bool) -> None:
        done.append(("remove", path.name))
        remove(path, **options)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "replace", renaming)
    monkeypatch.setattr(shutil, "rmtree", removing)
    training.checkpoints.save(Position(3))
    named, goes = done.index(("name", "step-3")), done.index(("name", ".step-1.partial"))
    files = {path.name for path in (tmp_path / "checkpoints" / "step-3").iterdir()} - {"state.json"}
    flushed = {name for what, name in done[:named] if what == "flush"}
    assert files | {".step-3.partial"} <= flushed
    assert any(name.startswith(".state.json") for name in flushed)
    assert ("flush", "checkpoints") in done[named:goes]
    assert done[goes:] == [("name", ".step-1.partial"), ("remove", ".step-1.partial")]


def test_a_save_that_was_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """Half a checkpoint, half a removal and half of the best weights go when the run is taken up again."""
    checkpoint.open_run(settings(tmp_path), **FACTS)
    training = Training(tmp_path)
    training.checkpoints.save(Position(2))
    folder = tmp_path / "checkpoints"
    for name in (".step-4.partial", ".step-1.partial"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    (folder / ".weights-4.safetensors.x1").write_bytes(b"half")
    assert training.checkpoints.restore() == Position(2)
    checkpoint.open_run(settings(tmp_path), **FACTS)
    assert [path.name for path in folder.iterdir()] == ["step-2"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "[Errno 28] No space left on device); is there space left?",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "[Errno 122] Disk quota exceeded); is there space left?"),
        (RuntimeError("PytorchStreamWriter failed"), "PytorchStreamWriter failed); is there space left?"),
        (PermissionError(errno.EACCES, "Permission denied"), "[Errno 13] Permission denied); the same command"),
        (OSError(), "OSError()); the same command"),
    ],
)
def test_a_failed_save_says_why(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path)

    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(training.accelerator, "save_state", fail)
    with pytest.raises(OSError, match=re.escape(f"the checkpoint of step 1 could not be written ({words}")):
        training.checkpoints.save(Position(1))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_cannot_be_removed_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on NFS, where a file that is read elsewhere cannot go, nor be a part of a later checkpoint."""
    checkpoint.open_run(settings(tmp_path), **FACTS)
    training, folder = Training(tmp_path), tmp_path / "checkpoints"
    for step in (1, 2):
        training.checkpoints.save(Position(step))
    (folder / ".step-3.partial").mkdir()
    (folder / ".step-3.partial" / ".nfs1").write_bytes(b"read elsewhere")
    unlink = os.unlink

    def busy(path: str, **options: int) -> None:
        if Path(path).name in ("optimizer.bin", ".nfs1"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", busy)
    assert checkpoint.open_run(settings(tmp_path), **FACTS) is False
    training.checkpoints.save(Position(3))
    counts = "cannot be removed; it takes space and counts nowhere"
    told = [f"{folder}/.step-{step}.partial: {counts}" for step in (3, 1)]
    assert capsys.readouterr().err.splitlines() == told
    assert {path.name for path in folder.iterdir()} == {".step-1.partial", "step-2", "step-3"}
    assert training.checkpoints.restore() == Position(3)
    assert not any(".nfs" in name for name in config.read_json(folder / "step-3" / "state.json")["sha256"])


def test_a_checkpoint_that_cannot_be_understood_keeps_the_older_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path)
    for step in (1, 2, 3):
        if step == 3:
            (tmp_path / "checkpoints" / "step-2" / "state.json").write_text("{")
        training.checkpoints.keep_weights(training.model, step)
        training.checkpoints.save(Position(step, (0.5,), step))
    assert "checkpoints: older checkpoints stay (" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "weights-2.safetensors").exists()
    assert training.checkpoints.restore().step == 3


@pytest.mark.parametrize("in_pieces", [False, True])
def test_another_number_of_processes_is_refused_where_each_has_a_piece(tmp_path: Path, in_pieces: bool) -> None:
    training = Training(tmp_path)
    training.steps(1)
    training.checkpoints.save(Position(1))
    path = tmp_path / "checkpoints" / "step-1" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 4, "in_pieces": in_pieces}))
    if in_pieces:
        with pytest.raises(ValueError, match="saved by 4 processes, resumed by 1, and each has a piece"):
            training.checkpoints.restore()
    else:
        assert training.checkpoints.restore() == Position(1)


# ---- what two processes agree on


@pytest.fixture(scope="module")
def host() -> Iterator[concurrent.futures.Executor]:
    with forked.host() as executor:
        yield executor


def two(host: concurrent.futures.Executor, folder: Path, work: Callable[..., None], *argv: object) -> list[dict]:
    """What `work` finds on each of two processes, which it leaves in `RANK.json`."""
    folder.mkdir()
    host.submit(forked.run, "ddp", folder, work, folder, *argv).result()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(forked.PROCESSES)]


def tell(folder: Path, rank: int, found: dict) -> None:
    (folder / f"{rank}.json").write_text(json.dumps(found))


def see_another_folder(rank: int, folder: Path, run: Path) -> None:
    """The second process sees neither that the run has begun nor its newest checkpoint, then not that it ended."""
    found: dict[str, object] = {"complete": [checkpoint.open_run(settings(run), **FACTS)]}
    training = Training(run)
    for step in (1, 2):
        training.checkpoints.save(Position(step))
    if rank:
        Checkpoints.whole = lambda self: [run / "checkpoints" / "step-1"]
        PretrainConfig.begun = lambda *_: False
    found["restored"] = training.checkpoints.restore().step
    if not rank:
        (run / "model.json").write_text("{}")
    for changes in ({}, {"epochs": 3}):
        try:
            found["complete"].append(checkpoint.open_run(settings(run, **changes), **FACTS))
        except ValueError as error:
            found["refused"] = str(error)
    tell(folder, rank, found)


@pytest.mark.slow
def test_the_first_process_alone_looks_into_the_folder(host: concurrent.futures.Executor, tmp_path: Path) -> None:
    found = two(host, tmp_path / "meeting", see_another_folder, tmp_path / "run")
    refused = f"{tmp_path}/run: holds a run with other settings (--epochs was 200, now 3): choose another --out"
    assert found == [{"complete": [False, True], "restored": 2, "refused": refused}] * forked.PROCESSES


# ---- the log


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_steps(run: Path, *, start: int, steps: range) -> None:
    tracker = tracking.Tracker(run, step=start, total=10)
    for step in steps:
        tracker.write("train", step, {"loss": step / 2}, {"images_per_s": 1.0})
        tracker.advance(step)
    tracker.close()


def test_a_line_by_hand(tmp_path: Path) -> None:
    write_steps(tmp_path, start=0, steps=range(4, 5))
    assert lines(tmp_path) == [{"event": "train", "step": 4, "loss": 2.0, "timing": {"images_per_s": 1.0}}]


def test_a_resumed_log_is_cut_at_its_checkpoint(tmp_path: Path) -> None:
    """Steps 1 to 6 and half a line were written, the checkpoint is of step 4."""
    write_steps(tmp_path, start=0, steps=range(1, 7))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    write_steps(tmp_path, start=4, steps=range(5, 9))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
    assert [line["loss"] for line in lines(tmp_path)] == [step / 2 for step in range(1, 9)]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("event", ["end", "stop"])
def test_a_resumed_log_does_not_say_that_it_ended(tmp_path: Path, event: str) -> None:
    """It is that of a run that never stopped."""
    tracker = tracking.Tracker(tmp_path, step=0, total=10)
    tracker.write("train", 4, {"loss": 2.0})
    tracker.write(event, 4, {})
    tracker.close()
    write_steps(tmp_path, start=4, steps=range(5, 6))
    assert [(line["event"], line["step"]) for line in lines(tmp_path)] == [("train", 4), ("train", 5)]


def test_a_run_that_begins_again_has_a_new_log(tmp_path: Path) -> None:
    write_steps(tmp_path, start=0, steps=range(1, 7))
    write_steps(tmp_path, start=0, steps=range(1, 3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_progress_is_a_line_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    write_steps(tmp_path, start=0, steps=range(5, 6))
    assert "train 5/10" in capfd.readouterr().err


def test_every_setting_is_saved(tmp_path: Path) -> None:
    checkpoint.open_run(settings(tmp_path), **FACTS)
    names = {field.name for field in dataclasses.fields(PretrainConfig)}
    assert set(json.loads((tmp_path / "config.json").read_text())) == names | set(FACTS)
