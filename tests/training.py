"""Training runs of a few seconds: their settings, their logs, and how to launch them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from tests import commands

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

COMMON = ("--image-weights", "none", "--image-size", "32", "--precision", "fp32", "--workers", "0")
RESNET = ("--image-backbone", "test_resnet", *COMMON)
VIT = ("--image-backbone", "test_vit", "--image-options", "img_size", "32", *COMMON)  # without BatchNorm
EVERY_STEP = ("--log-every", "1")


def fresh_accelerator() -> None:
    """Forgets what earlier tests told Accelerate, which keeps one state for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(main: Callable[[], None], argv: Sequence[str | Path]) -> int:
    """`commands.run` with a fresh Accelerator, as in a process of its own."""
    fresh_accelerator()
    return commands.run(main, [str(word) for word in argv])


def environment() -> dict[str, str]:
    """For a process that is to compute the same bits as this one: as many threads, no GPU, no launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return kept | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONSAFEPATH": "1",
    }


def torchrun(script: str, *argv: str | Path, processes: int = 2) -> str:
    """Launches an entry script by path in several processes of this machine; what it printed."""
    launch = [BIN / "torchrun", "--nproc_per_node", str(processes), "--standalone", f"xcon/{script}.py"]
    done = subprocess.run(
        [*launch, *argv], cwd=ROOT, env=environment(), text=True, capture_output=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(run_folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's log, or those of one event, without what differs between two equal runs."""
    text = (run_folder / "metrics.jsonl").read_text(encoding="utf-8")
    every = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in every if event in (None, line["event"])]


def largest_deviation(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Name -> the largest absolute difference of a number over all lines; the lines must be alike else."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    deviation: dict[str, float] = {}
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if isinstance(value, float):
                deviation[name] = max(deviation.get(name, 0.0), abs(ours[name] - value))
            else:
                assert ours[name] == value
    return deviation
