"""The paper's whole table by one command: every system of section 4, every seed, on the same shards.

    xcon reproduce --shards DIR --out DIR [--size laptop --backbone NAME --image-weights FILE --seeds 3 ...]
    sbatch --array=0-20 slurm/reproduce.sh --shards DIR --out DIR         # each task does a part of it

Each step is a command that you could type; --list shows them all. What is done already is not done again, and what
was interrupted goes on from its last checkpoint. After the last step comes the table: results.md, .json, .parquet
and .png in --out. Tasks make none: the same command without --task does, and whatever they left open.
"""

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

from rich.console import Console

from xcon import commandline, comparison, jobs, results, runfiles
from xcon.jobs import Step
from xcon.records import SPLITS, Card
from xcon.systems import SYSTEMS, System, chains

PROGRAM = "xcon reproduce"
# Settings that leave every run as it is; the others stay as --out was begun with.
MAY_CHANGE = ("shards", "out", "seeds", "rows", "test", "workers", "at_once", "launch", "task", "list")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains and evaluates the six systems of the paper's table, and what they are compared with."""

    shards: Path
    """Shard set with the splits train and test."""
    out: Path
    """Folder for all runs and the table."""
    size: Literal["paper", "laptop"] = "paper"
    """paper: the recipes of the paper, for GPUs. laptop: the same methods at a size for two cores."""
    seeds: int = 3
    """Runs of every system."""
    rows: tuple[str, ...] = ()
    """Systems to run; all where none is named."""
    budget: int | None = None
    """Times that a system sees each training photograph, pre-training included; none: as the recipes have it."""
    pretraining: float = 0.25
    """Share of --budget that goes into pre-training, where a system has it."""
    backbone: str | None = None
    """One timm network for all systems; none: those of the recipes."""
    image_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Keyword arguments of timm.create_model."""
    image_weights: str | None = None
    """imagenet, none or a .safetensors file; none given: as the recipes have it."""
    image_size: int | None = None
    """Side of the square that networks see; none: as the recipes have it."""
    text_model: str | None = None
    """As of xcon pretrain; none: as the recipes have it."""
    text_frozen: bool = False
    """As of xcon pretrain."""
    test: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Further shard sets with the same test photographs at other places, as NAME DIR: each gets a table."""
    workers: int = 2
    """Processes that decode photographs, per training process."""
    at_once: int = 1
    """Steps at the same time, where one does not wait for another."""
    launch: str = ""
    """What trainings are started with, as in --launch "accelerate launch --num_processes 4"."""
    task: int | None = None
    """Only this part of the work, from 0 on, as a task of an array job, and no table; --list counts the parts."""
    list: bool = False
    """Show the steps and whether they are done; run nothing."""

    def __post_init__(self) -> None:
        """Refuses settings that could only fail later.

        Raises:
            ValueError: names the setting.
        """
        known = SYSTEMS[self.size]
        if unknown := [row for row in self.rows if row not in known]:
            raise ValueError(f"--rows {unknown[0]}: no such system; there are {', '.join(known)}")
        for name in ("seeds", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")
        if not 0 < self.pretraining < 1:
            raise ValueError(f"--pretraining {self.pretraining}: a share in (0, 1) is needed")
        if self.budget is None and self.pretraining != Settings.pretraining:
            raise ValueError(f"--pretraining {self.pretraining}: unused, give --budget too")
        if self.text_frozen and (self.text_model or self.size) in ("small-distilbert", "laptop"):
            raise ValueError("--text-frozen: the small text model is untrained and stays so; give --text-model")
        for name in self.test:
            runfiles.check_name(name, "--test", taken=(*SPLITS, *known))
        for row in self.systems:
            plan(self, row, seed=0)  # refuses too few passes
        parts = len(parts_of(self))
        if self.task is not None and not 0 <= self.task < parts:
            raise ValueError(f"--task {self.task}: the parts are numbered 0 to {parts - 1}")

    @property
    def systems(self) -> dict[str, System]:
        """The systems to run."""
        return {name: system for name, system in SYSTEMS[self.size].items() if not self.rows or name in self.rows}


def main() -> None:
    """Runs the command line."""
    commandline.guarded(reproduce, PROGRAM)


def reproduce() -> None:
    """Parse, plan, run, compare."""
    settings = commandline.parse(Settings, PROGRAM)
    console = Console(highlight=False, soft_wrap=True)
    parts = parts_of(settings)
    mine = steps_of(settings, parts if settings.task is None else [parts[settings.task]])
    if settings.list:
        console.print(f"{len(mine)} steps in {len(parts)} parts, --task 0 to {len(parts) - 1}")
        for step in mine:
            console.print("done" if step.is_done else "open", shlex.join(step.command), markup=False)
        return
    for folder in (settings.shards, *settings.test.values()):
        if not all(step.is_done for step in mine):
            Card.load(folder)  # what is no shard set is refused now, not after hours
    (settings.out / "logs").mkdir(parents=True, exist_ok=True)
    jobs.keep(settings.out / "settings.json", vars(settings), may_change=MAY_CHANGE)
    jobs.run(mine, logs=settings.out / "logs", at_once=settings.at_once, console=console)
    if settings.task is not None:
        others = sum(not step.is_done for step in steps_of(settings, parts))
        console.print(f"This part is done, {others} steps of others are not; without --task the table is made.")
        return
    for test in ("", *settings.test):
        folders, names, titles = evaluations(settings, test)
        report = comparison.compare(folders, resamples=10_000, names=names, labels=titles, baseline="last")
        report["notes"].append(budget(settings))
        results.show(report, console)
        for ending in results.FORMATS:
            results.write(report, settings.out / f"results{test and '-' + test}{ending}")


def budget(settings: Settings) -> str:
    """What each system was given, for the notes of the table."""
    if settings.budget is None:
        return "Every system was trained as its recipe has it."
    return (
        f"Every system saw each training photograph {settings.budget} times, pre-training included; a row that "
        "takes the weights or scores of another adds nothing, and priors see places alone."
    )


# --------------------------------------------------------------------------------------------------------
# The plan


def parts_of(settings: Settings) -> list[tuple[tuple[str, ...], int]]:
    """Systems that build on one another, with one seed: what a task of an array job does."""
    return [(chain, seed) for seed in range(settings.seeds) for chain in chains(settings.systems)]


def steps_of(settings: Settings, parts: list[tuple[tuple[str, ...], int]]) -> list[Step]:
    """The steps of some parts, each once, in an order in which they can be run."""
    steps = (step for chain, seed in parts for row in chain for step in plan(settings, row, seed))
    return list(dict.fromkeys(steps))


def plan(settings: Settings, row: str, seed: int) -> list[Step]:
    """The steps of one system with one seed, those of the system that it builds on included."""
    system = SYSTEMS[settings.size][row]
    if system.of:
        base = plan(settings, system.of, seed)
        more = _multiply if system.prior else _judge
        return [*base, *more(settings, row, seed, tuple(step.name for step in base))]
    steps: list[Step] = []
    out = settings.out / f"{row}-{seed}"
    before, after = system.epochs(settings.budget, settings.pretraining)
    start = _network(settings)
    if system.pretrain:
        begun = settings.out / f"{system.shares or row}-pretrain-{seed}"
        words = (*_train(settings, "pretrain", begun, seed, system.pretrain), *_network(settings))
        steps = [Step(begun.name, (*words, *_text(settings, system), *before), begun / "model.json", saves=True)]
        start = ("--init", str(begun), *_size(settings))
    words = (*_train(settings, "finetune", out, seed, system.finetune), *start, *after)
    steps.append(Step(out.name, words, out / "model.json", after=tuple(step.name for step in steps), saves=True))
    return [*steps, *_judge(settings, row, seed, (out.name,))]


def _judge(settings: Settings, row: str, seed: int, after: tuple[str, ...]) -> list[Step]:
    """Evaluates the weights of a system on every test."""
    system, steps = SYSTEMS[settings.size][row], []
    out = settings.out / f"{system.of or row}-{seed}"
    for test, shards in {"": settings.shards, **settings.test}.items():
        name = evaluation_name(row, system, test)
        words = ("xcon", "predict", str(out), "--shards", str(shards), "--workers", str(settings.workers))
        words = (*words, *system.predict, *(("--name", name) if name else ()))
        called = "-".join(part for part in ("predict", out.name, name) if part)
        steps.append(Step(called, words, runfiles.measures(out, name), after=after))
    return steps


def _multiply(settings: Settings, row: str, seed: int, after: tuple[str, ...]) -> list[Step]:
    """Multiplies the scores of a system on images alone by a prior, for every test."""
    system, steps = SYSTEMS[settings.size][row], []
    for test, shards in {"": settings.shards, **settings.test}.items():
        out = settings.out / f"{row}-{seed}{test and '-' + test}"
        words = ("xcon", "prior", *system.prior, "--shards", str(settings.shards), "--out", str(out))
        words = (*words, "--image-run", str(settings.out / f"{system.of}-{seed}"), "--test-shards", str(shards))
        steps.append(Step(out.name, words, out / "metrics.json", after=after))
    return steps


def evaluation_name(row: str, system: System, test: str) -> str | None:
    """What `xcon predict --name` is told; None: nothing."""
    return "-".join(part for part in (test, row if system.predict else "") if part) or None


def evaluations(settings: Settings, test: str) -> tuple[list[Path], list[str | None], list[str]]:
    """Folder, name and title of every evaluation on a test, row by row, seed by seed."""
    folders, names, titles = [], [], []
    for row, system in settings.systems.items():
        for seed in range(settings.seeds):
            own = f"{row}-{seed}{test and '-' + test}" if system.prior else f"{system.of or row}-{seed}"
            folders.append(settings.out / own)
            names.append(None if system.prior else evaluation_name(row, system, test))
            titles.append(system.title)
    return folders, names, titles


def _train(settings: Settings, command: str, out: Path, seed: int, recipe: tuple[str, ...]) -> tuple[str, ...]:
    launched = (*shlex.split(settings.launch), "-m", f"xcon.{command}") if settings.launch else ("xcon", command)
    common = ("--shards", str(settings.shards), "--out", str(out), "--seed", str(seed))
    return (*launched, *recipe, *common, "--workers", str(settings.workers))


def _network(settings: Settings) -> tuple[str, ...]:
    given = (("--image-backbone", settings.backbone), ("--image-weights", settings.image_weights))
    words = [word for name, value in given if value for word in (name, value)]
    options = [word for pair in settings.image_options.items() for word in pair]
    return (*words, *(["--image-options", *options] if options else []), *_size(settings))


def _size(settings: Settings) -> tuple[str, ...]:
    return ("--image-size", str(settings.image_size)) if settings.image_size else ()


def _text(settings: Settings, system: System) -> tuple[str, ...]:
    if not system.reads:
        return ()
    words = ("--text-model", settings.text_model) if settings.text_model else ()
    return (*words, "--text-frozen") if settings.text_frozen else words


if __name__ == "__main__":
    main()
