"""A run that was killed goes on as if it had never stopped, to the last bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import training
from xcon import finetune, pretrain
from xcon.checkpoint import KEPT

pytestmark = pytest.mark.slow

STEPS = 40  # 10 epochs of 96 photographs in batches of 24
SETTINGS = (*training.RESNET, *training.EVERY_STEP, "--batch-size", "24", "--epochs", "10")

# A process that kills itself while it writes its 4th checkpoint: the model is there, the optimiser is not.
DIES_WHILE_SAVING = """
import os, signal, sys
import accelerate.checkpointing as saving
from xcon import finetune

write, calls = saving.save, 0
def dying(*arguments, **options):
    global calls
    calls += 1
    if calls == 3 * 3 + 2:  # three files by this function for each checkpoint: model, optimiser, average weights
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments, **options)
saving.save = dying
finetune.main()
"""


# All that is drawn at random in fine-tuning but dropout and hidden metadata, and the average weights.
DRAWN = (
    *("--mixup", "0.4", "--cutmix", "1", "--color-jitter", "0.2", "--ema", "0.9"),
    *("--meta-jitter-km", "200", "--meta-jitter-days", "20"),
)


def command(shards: Path, run: Path, *more: str) -> list[str]:
    return ["demo", "--shards", str(shards), "--out", str(run), *SETTINGS, *more]


def files(run: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a run: when it was written, and its bytes."""
    found = [path for path in run.rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def check_equal(found: Path, expected: Path) -> None:
    assert training.lines(found) == training.lines(expected)
    for name in ("model.safetensors", "model.json", f"checkpoints/step-{STEPS}/model.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    checkpoints = sorted(path.name for path in (found / "checkpoints").iterdir())
    assert checkpoints == sorted(path.name for path in (expected / "checkpoints").iterdir())
    assert len([name for name in checkpoints if name.startswith("step-")]) == KEPT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(tiny_shards: Path, folder: Path) -> Path:
    """Pre-training from start to end, in this process."""
    run = folder / "undisturbed"
    assert training.run(pretrain.main, command(tiny_shards, run, "--checkpoint-every", "4")) == 0
    return run


def killed(script: list[str], run: Path, when: Callable[[], bool]) -> None:
    """Starts a process and ends it by SIGKILL when `when` holds, unless it does so itself."""
    log = run.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *script], cwd=training.ROOT, env=training.environment(), stdout=output, stderr=output
        )
        patience = time.monotonic() + 240
        while process.poll() is None and not when():
            assert time.monotonic() < patience
            time.sleep(0.005)
        process.kill()
    assert process.wait() == -signal.SIGKILL, log.read_text()


def steps(run: Path) -> int:
    """Steps of the log so far."""
    log = run / "metrics.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


def test_pretraining_killed_at_a_random_step(undisturbed: Path, tiny_shards: Path, folder: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    chosen = random.Random(seed).randrange(5, STEPS - 10)
    print(f"killed after step {chosen} (seed {seed})")  # noqa: T201
    run = folder / "killed"
    argv = command(tiny_shards, run, "--checkpoint-every", "4")
    killed(["xcon/pretrain.py", *argv], run, lambda: steps(run) >= chosen)
    assert not (run / "model.json").exists()
    assert chosen <= steps(run) < STEPS

    assert training.run(pretrain.main, argv) == 0
    assert steps(run) == STEPS
    check_equal(run, undisturbed)


def test_finetuning_killed_while_it_writes_a_checkpoint(
    undisturbed: Path, tiny_shards: Path, folder: Path
) -> None:
    """With all that is drawn at random, which must go on where it stopped, and the average weights."""
    drawn = (*DRAWN, "--dropout", "0.3", "--meta-dropout", "0.2", "--init", str(undisturbed))
    drawn = (*drawn, "--checkpoint-every", "3")
    run, reference = folder / "killed-classifier", folder / "classifier"
    argv = command(tiny_shards, run, *drawn)
    killed(["-c", DIES_WHILE_SAVING, *argv], run, lambda: False)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert [name for name in left if "weights" not in name] == [".step-12.partial", "step-6", "step-9"]
    assert steps(run) == 12

    assert training.run(finetune.main, argv) == 0
    assert training.run(finetune.main, command(tiny_shards, reference, *drawn)) == 0
    assert steps(run) == STEPS
    assert training.lines(run) == training.lines(reference)
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert not list((run / "checkpoints").glob(".step*"))


def test_dropout_is_drawn(folder: Path, tiny_shards: Path, undisturbed: Path) -> None:
    """Else the test above would show less than it says."""
    argv = command(
        tiny_shards, folder / "dry", *DRAWN, "--init", str(undisturbed), "--epochs", "1", "--meta-dropout", "0.2"
    )
    assert training.run(finetune.main, argv) == 0
    dry, wet = (training.lines(folder / name, "train")[0] for name in ("dry", "classifier"))
    assert dry["loss"] != wet["loss"]


def test_a_finished_run_is_left_as_it_is(
    undisturbed: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(undisturbed)
    assert training.run(pretrain.main, command(tiny_shards, undisturbed, "--checkpoint-every", "4")) == 0
    assert f"{undisturbed}: this run is complete" in capsys.readouterr().out
    assert files(undisturbed) == before


def test_a_run_killed_just_before_its_end(undisturbed: Path, tiny_shards: Path, folder: Path) -> None:
    """All steps done and the last checkpoint saved, the end logged, the model not yet there."""
    run = shutil.copytree(undisturbed, folder / "almost")
    (run / "model.json").unlink()
    (run / "model.safetensors").unlink()
    assert training.run(pretrain.main, command(tiny_shards, run, "--checkpoint-every", "4")) == 0
    check_equal(run, undisturbed)


def test_a_run_killed_after_it_stopped_early(tiny_shards: Path, folder: Path) -> None:
    """Its last checkpoint says that patience is at an end: it trains no further."""
    run, again = folder / "stopped", folder / "stopped-again"
    stopping = ("--checkpoint-every", "4", "--patience", "1", "--image-lr", "0.3")
    assert training.run(pretrain.main, command(tiny_shards, run, *stopping)) == 0
    assert 0 < steps(run) < STEPS
    shutil.copytree(run, again)
    (again / "model.json").unlink()
    assert training.run(pretrain.main, command(tiny_shards, again, *stopping)) == 0
    assert training.lines(again) == training.lines(run)
    assert (again / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_views_in_groups_resume_exactly_and_fine_tuning_starts_from_them(tiny_shards: Path, folder: Path) -> None:
    """Resumed within an epoch: 10 steps of 5 an epoch, stopped after step 8. The classifier has its groups too."""
    small = (*training.RESNET, *training.EVERY_STEP, "--batch-size", "20", "--per-class", "4", "--epochs", "2")
    argv = ["supcon", "--shards", str(tiny_shards), *small, "--checkpoint-every", "4"]
    run, again = folder / "views", folder / "views-again"
    assert training.run(pretrain.main, [*argv, "--out", str(run)]) == 0
    shutil.copytree(run, again)
    (again / "model.json").unlink()
    assert sorted(path.name for path in (again / "checkpoints").glob("step-*")) == ["step-4", "step-8"]
    assert training.run(pretrain.main, [*argv, "--out", str(again)]) == 0
    assert training.lines(again) == training.lines(run)
    assert (again / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()

    tuned = ["image", "--shards", str(tiny_shards), *small, "--init", str(run), "--out", str(folder / "tuned")]
    assert training.run(finetune.main, tuned) == 0
    saved = json.loads((folder / "tuned" / "config.json").read_text())
    assert (saved["init_method"], saved["per_class"]) == ("supcon", 4)


def test_what_may_not_change(
    undisturbed: Path, tiny_shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(undisturbed, folder / "changed")
    (run / "model.json").unlink()
    before = files(run)
    changes = ("--image-lr", "0.5", "--temperature", "0.1", "--modalities", "image", "text")
    assert training.run(pretrain.main, command(tiny_shards, run, *changes)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for setting in (
        "--image-lr was 0.002, now 0.5",
        "--temperature was 0.07, now 0.1",
        "--modalities was ['image', 'text', 'meta'], now ['image', 'text']",
    ):
        assert setting in told
    assert "choose another --out" in told
    assert files(run) == before


def test_another_number_of_processes(
    undisturbed: Path, tiny_shards: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(undisturbed, folder / "four")
    (run / "model.json").unlink()
    state = run / "checkpoints" / f"step-{STEPS}" / "state.json"
    saved = json.loads(state.read_text())
    again = command(tiny_shards, run, "--checkpoint-every", "4")
    state.write_text(json.dumps(saved | {"processes": 4, "in_pieces": True}))
    assert training.run(pretrain.main, again) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"step-{STEPS}: saved by 4 processes, resumed by 1, and each has a piece of the optimiser" in told
    state.write_text(json.dumps(saved | {"processes": 4}))
    assert training.run(pretrain.main, again) == 0
    assert f"step-{STEPS}: saved by 4 processes, gone on with by 1" in capsys.readouterr().out
    check_equal(run, undisturbed)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json"])
def test_a_damaged_checkpoint(
    name: str, undisturbed: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named; with it removed, the run goes on from the one before."""
    run = shutil.copytree(undisturbed, tmp_path / "damaged")
    (run / "model.json").unlink()
    newest = run / "checkpoints" / f"step-{STEPS}"
    whole = (newest / name).read_bytes()
    (newest / name).write_bytes(whole[: len(whole) // 2])
    argv = command(tiny_shards, run, "--checkpoint-every", "4")
    assert training.run(pretrain.main, argv) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(newest) in told
    shutil.rmtree(newest)
    assert training.run(pretrain.main, argv) == 0
    check_equal(run, undisturbed)
