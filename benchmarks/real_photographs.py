"""Four systems on real photographs with real places and dates: the table of the README.

    python benchmarks/real_photographs.py --root BIRDS37 --weights MOBILENETV2.safetensors --out runs/birds37

BIRDS37 is a folder in the layout of NABirds with `nabirds_with_loc_2019.json` in it; the weights are those of
`timm.create_model("mobilenetv2_100", pad_type="same")`. Two runs at a time, one thread each; a run that is there
already is not run again. The systems differ in their method alone: backbone, crops and learning rates are those of
the recipe `laptop`; every system sees each photograph 16 times: 10 in pre-training and 6 in fine-tuning, or all
16 in fine-tuning where there is no pre-training.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro

from xcon import config

BIN = Path(sys.executable).parent
FULL, CLIP = "pretrain", "pretrain-clip"
EPOCHS = config.PRETRAIN["laptop"][1].epochs + config.FINETUNE["laptop"][1].epochs
# name -> (the pre-training it starts from, what the classifier sees)
SYSTEMS = {
    "image": (None, ["image"]),
    "image-meta": (None, ["image", "meta"]),
    "clip-image": (CLIP, ["image"]),
    "full-image-meta": (FULL, ["image", "meta"]),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure on, and where to put it."""

    root: Path
    """Folder in the layout of NABirds, with nabirds_with_loc_2019.json."""
    weights: Path
    """ImageNet weights of mobilenetv2_100."""
    out: Path
    """Folder for the shards and the runs."""
    seeds: int = 3
    """Runs of every system."""
    at_once: int = 2
    """Runs at the same time, one thread each."""


def main() -> None:
    """Builds the shards, trains every system with every seed, evaluates, prints the report."""
    settings = tyro.cli(Settings)
    begun = time.monotonic()
    shards = settings.out / "shards"
    if not (shards / "dataset.json").is_file():
        meta = settings.root / "nabirds_with_loc_2019.json"
        run("xcon-shards", "build", "nabirds", "--root", settings.root, "--meta", meta, "--out", shards)
    seeds = range(settings.seeds)
    with ThreadPoolExecutor(settings.at_once) as pool:
        list(pool.map(lambda job: pretrain(settings, shards, *job), [(n, s) for s in seeds for n in (FULL, CLIP)]))
        list(pool.map(lambda job: classify(settings, shards, *job), [(n, s) for s in seeds for n in SYSTEMS]))
    runs = [settings.out / f"{name}-{seed}" for name in SYSTEMS for seed in seeds]
    run("xcon", "report", *runs, "--out", settings.out / "results.md")
    sys.stdout.write(f"{time.monotonic() - begun:.0f} s in all\n")


def pretrain(settings: Settings, shards: Path, name: str, seed: int) -> None:
    """One pre-training."""
    clip = ["--modalities", "image", "text", "--matching", "diagonal"] if name == CLIP else []
    out = settings.out / f"{name}-{seed}"
    run("xcon", "pretrain", "laptop", *common(shards, out, seed), *imagenet(settings), *clip)


def classify(settings: Settings, shards: Path, name: str, seed: int) -> None:
    """One fine-tuning and its evaluation."""
    init, modalities = SYSTEMS[name]
    out = settings.out / f"{name}-{seed}"
    start = ["--init", settings.out / f"{init}-{seed}"] if init else [*imagenet(settings), "--epochs", str(EPOCHS)]
    run("xcon", "finetune", "laptop", *common(shards, out, seed), "--modalities", *modalities, *start)
    if not (out / "metrics.json").is_file():
        run("xcon", "predict", out, "--shards", shards, "--workers", "0")


def imagenet(settings: Settings) -> list[str | Path]:
    """The weights that every system starts from, and how their network pads."""
    return ["--image-weights", settings.weights, "--image-options", "pad_type", "same"]


def common(shards: Path, out: Path, seed: int) -> list[str | Path]:
    """What every training is told."""
    return ["--shards", shards, "--out", out, "--seed", str(seed), "--workers", "1"]


def run(*command: str | Path) -> None:
    """Runs a command of xcon on one thread; ends the benchmark where it fails."""
    words: Sequence[str] = [str(word) for word in command]
    sys.stdout.write(f"{' '.join(words)}\n")
    sys.stdout.flush()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([BIN / words[0], *words[1:]], check=True, env=environment)


if __name__ == "__main__":
    main()
