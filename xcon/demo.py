"""The main job on made-up data, in minutes on a laptop: `xcon demo --out demo`.

Every step is a command that you could have typed; each is shown before it runs.
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from xcon import commandline, records
from xcon.shardset import ShardSet

PROGRAM = "xcon demo"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Draws a set of look-alike birds, trains on it, evaluates, compares and draws a map."""

    out: Path = Path("demo")
    """Folder for everything; a demo that was interrupted there goes on."""
    seed: int = 0
    """Of the drawing and the training."""


def main() -> None:
    """Runs the command line."""
    commandline.guarded(demo, PROGRAM)


def demo() -> None:
    """The main job, from nothing to a map."""
    settings = commandline.parse(Settings, PROGRAM)
    out, seed = settings.out, ["--seed", str(settings.seed)]
    console, begun = Console(highlight=False, soft_wrap=True), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    shards = out / "shards"
    pretrained, both, image = out / "pretrain", out / "image-and-meta", out / "image-only"

    if not (shards / records.CARD_NAME).is_file():
        _say(console, "Look-alike birds: a photograph gives the group, place and season give the species.")
        _run(console, "xcon-shards", "build", "synthetic", "--out", shards, *seed)
    _say(console, "Pre-training: photographs, captions, places and dates of one species are drawn together.")
    _run(console, *_LAUNCH, _script("pretrain"), "demo", "--shards", shards, "--out", pretrained, *seed)
    _say(console, "Fine-tuning: the photograph alone, then the photograph with its place and date.")
    classify = (*_LAUNCH, _script("finetune"), "demo", "--shards", shards, "--init", pretrained)
    _run(console, *classify, "--modalities", "image", "--out", image, *seed)
    _run(console, *classify, "--out", both, *seed)
    _say(console, "Every photograph of the test split, once.")
    for run in (image, both):
        _run(console, "xcon", "predict", run, "--shards", shards)
    _run(console, "xcon", "report", image, both, "--out", out / "results.md")

    species, photo = _example(shards, out)
    _say(console, f"Where would this photograph be a {species}?")
    _run(
        console,
        *("xcon", "map", "species", both, "--species", species, "--image", photo, "--out", out / "map.png"),
        *("--region", "-170", "10", "-50", "75"),
    )
    results = [json.loads((run / "metrics.json").read_text())["top1"] for run in (image, both)]
    _say(
        console,
        f"Image alone {100 * results[0]:.1f} %, image + meta {100 * results[1]:.1f} %, in "
        f"{time.monotonic() - begun:.0f} s. Look at {out / 'results.md'}, {out / 'map.png'}.",
    )


_LAUNCH = (
    *("accelerate", "launch", "--quiet", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def _script(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.py")


def _example(shards: Path, out: Path) -> tuple[str, Path]:
    """The first class and one of its test photographs, written as a file."""
    shard_set = ShardSet(shards)
    split = shard_set.split("test")
    photo = out / "photo.jpg"
    with records.atomic_write(photo) as file:
        file.write(split.photo(int((split.class_id == 0).argmax())))
    return shard_set.card.classes[0].name, photo


def _say(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def _run(console: Console, *command: str | Path) -> None:
    """Shows a command and runs it with the programs beside this Python.

    Raises:
        ValueError: it failed; it has said why.
    """
    words = [str(word) for word in command]
    console.print(f"[dim]$ {shlex.join(words)}[/dim]")
    folder = Path(sys.executable).parent
    # One thread: on a machine with other work, two wait for each other and are up to ten times slower.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([folder / words[0], *words[1:]], check=False, env=environment)
    if done.returncode:
        raise ValueError(f"{words[0]} {words[1]} failed with exit status {done.returncode}, see above")


if __name__ == "__main__":
    main()
