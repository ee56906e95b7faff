"""Every command of the README runs, as it stands there, on a small made-up release in place of NABirds."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent

# Twenty minutes' worth of recipe `paper` made small; nothing else of a command is changed.
SMALL = ["--epochs", "1", "--image-backbone", "test_resnet", "--image-size", "64", "--workers", "0"]
SMALL_START = [*SMALL, "--image-weights", "none", "--text-model", "small-distilbert"]
CHANGED = {
    "xcon pretrain laptop": ["--epochs", "1", "--image-backbone", "test_resnet", "--image-size", "64"],
    "xcon finetune laptop": ["--epochs", "1", "--image-size", "64"],
    "xcon finetune laptop-image": ["--epochs", "1", "--image-size", "64"],
    "xcon reproduce --size laptop": [
        *("--seeds", "1", "--budget", "4", "--backbone", "test_resnet", "--image-size", "64", "--workers", "0"),
    ],
    "accelerate launch xcon/pretrain.py paper": SMALL_START,
    "accelerate launch xcon/finetune.py paper": SMALL,
    "accelerate launch --config_file accelerate_configs/ddp.yaml xcon/pretrain.py demo": ["--epochs", "1"],
}
ELSEWHERE = {
    "make": "CI and people run it",
    "sbatch": "tests/test_slurm.py",
    "source": "the environment is this one",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The commands that run here, in the README's order."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    return [words for words in map(shlex.split, lines) if words[0] not in ELSEWHERE]


def with_small_settings(words: list[str]) -> list[str]:
    for start, more in CHANGED.items():
        if words[: len(start.split())] == start.split():
            return words + more
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's folder with NABirds' two files in it, and the demo made."""
    here = tmp_path_factory.mktemp("readme")
    for name in ("xcon", "accelerate_configs"):
        (here / name).symlink_to(ROOT / name)
    release = here / "release" / "nabirds"
    run(
        here,
        shlex.split(
            "xcon-shards build synthetic --out release/shards --per-class 12 --keep-source release/nabirds"
        ),
    )
    (release / "nabirds_with_loc_2019.json").rename(here / "nabirds_with_loc_2019.json")
    run(here, shlex.split("tar czf nabirds.tar.gz -C release nabirds"))
    return here


def run(here: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(words, cwd=here, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_the_demo_and_then_every_command(folder):
    demo = run(folder, ["xcon", "demo", "--out", "demo"])  # what `make demo` runs after the install

    image, both = (
        float(x) for x in re.search(r"Image alone ([\d.]+) %, image \+ meta ([\d.]+) %", demo.stdout).groups()
    )
    assert image < 45, "a photograph gives the group of three at best"
    assert both > image + 30
    assert (folder / "demo" / "map.png").stat().st_size > 10_000

    for words in commands():
        run(folder, with_small_settings(words))
    assert (folder / "ranking.csv").read_text().count("\n") == 6
    assert "image + meta" in (folder / "results.md").read_text()


def test_python_of_the_readme():
    (code,) = blocks("python")

    done = subprocess.run([sys.executable, "-W", "error", "-c", code], text=True, capture_output=True, check=True)

    assert len(re.findall(r"tensor\([\d.]+\)", done.stdout)) == 2


def test_commands_that_are_run_elsewhere_are_in_the_readme():
    lines = [line.split()[0] for block in blocks("bash") for line in block.splitlines() if line]
    assert set(ELSEWHERE) - {"source"} <= set(lines)
    assert len(commands()) >= 10
