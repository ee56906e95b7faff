"""`xcon reproduce`: its plan by hand and by the parsers of its commands, how steps are run, the whole table."""

import collections
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests import commands
from xcon import commandline, config, jobs, predict, recipes, reproduce
from xcon.jobs import Step
from xcon.reproduce import Settings
from xcon.systems import SYSTEMS, System, chains

ROOT = Path(__file__).parent.parent
LAPTOP = ("--size", "laptop")
TINY = ("--backbone", "test_resnet", "--image-weights", "none", "--image-size", "32", "--workers", "0")

PLANS = [
    {},
    {"budget": 12, "seeds": 1},
    {"test": {"drawn": Path("drawn"), "years-later": Path("later")}, "seeds": 2},
    {
        "backbone": "test_vit", "image_options": {"img_size": "64", "pad_type": "same"}, "image_weights": "none",
        "image_size": 64, "text_model": "words", "text_frozen": True, "budget": 6, "workers": 0,
    },
    {"launch": "accelerate launch --num_processes 4", "rows": ("clip", "doubting")},
]  # fmt: skip


def plan_of(size: str, **settings: Any) -> list[Step]:
    made = Settings(Path("shards"), Path("out"), size=size, **settings)
    return reproduce.steps_of(made, reproduce.parts_of(made))


def read(step: Step, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    """The command of a step and the settings that its own parser reads from its words."""
    words = list(step.command)
    at = next(n for n, word in enumerate(words) if word == "xcon" or word.startswith("xcon."))
    command, arguments = (words[1], words[2:]) if words[at] == "xcon" else (words[at][5:], words[at + 1 :])
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    if command == "predict":
        return command, commandline.parse(predict.Settings, "xcon predict")
    known = {"pretrain": recipes.PRETRAIN, "finetune": recipes.FINETUNE, "prior": recipes.PRIOR}[command]
    return command, config.parse_recipe(known, f"xcon {command}")[1]


# --------------------------------------------------------------------------------------------------------
# The plan


def test_steps_by_hand() -> None:
    """Of size laptop the paper's classifier starts from the pre-training of `best`, of size paper from its own."""
    baselines = [
        *("inception-0", "predict-inception-0", "geoprior-0", "softmax-0"),
        *("inception-meta-0", "predict-inception-meta-0"),
        *("supcon-pretrain-0", "supcon-0", "predict-supcon-0"),
        *("clip-pretrain-0", "clip-0", "predict-clip-0"),
        *("experts-0", "predict-experts-0"),
    ]
    best = ["best-0", "predict-best-0", "predict-best-0-doubting"]
    paper = ["paper-0", "predict-paper-0"]
    found = {size: [step.name for step in plan_of(size, seeds=1)] for size in SYSTEMS}
    assert found["laptop"] == [*baselines, "best-pretrain-0", *paper, *best]
    assert found["paper"] == [*baselines, "paper-pretrain-0", *paper, "best-pretrain-0", *best]


def test_commands_by_hand() -> None:
    steps = {s.name: s for s in plan_of("paper", seeds=2, budget=12, test={"drawn": Path("b")})}
    prior, judged = steps["geoprior-1-drawn"], steps["predict-best-1-drawn-doubting"]
    assert " ".join(steps["supcon-pretrain-1"].command) == (
        "xcon pretrain supcon --shards shards --out out/supcon-pretrain-1 --seed 1 --workers 2 --epochs 2"
    )
    assert " ".join(steps["supcon-1"].command) == (
        "xcon finetune image --image-size 299 --shards shards --out out/supcon-1 --seed 1 --workers 2 "
        "--init out/supcon-pretrain-1 --epochs 8"
    )
    assert steps["supcon-1"].after == ("supcon-pretrain-1",)
    assert " ".join(prior.command) == (
        "xcon prior geoprior --shards shards --out out/geoprior-1-drawn --image-run out/inception-1 "
        "--test-shards b"
    )
    assert prior.after == ("inception-1", "predict-inception-1", "predict-inception-1-drawn")
    assert " ".join(judged.command) == (
        "xcon predict out/best-1 --shards b --workers 2 --doubt 0.4 --name drawn-doubting"
    )
    assert judged.done == Path("out/best-1/metrics-drawn-doubting.json")


@pytest.mark.parametrize("size", SYSTEMS)
@pytest.mark.parametrize("settings", PLANS, ids=lambda settings: "-".join(settings) or "plain")
def test_every_command_is_read_by_its_parser(
    size: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each name and each result comes once, after what it needs; passes add up; what is started from is made."""
    steps = plan_of(size, **settings)
    made: dict[Path, tuple[Step, Any]] = {}
    for number, step in enumerate(steps):
        before = [other.name for other in steps[:number]]
        assert set(step.after) <= set(before)
        command, found = read(step, monkeypatch)
        named = found.run if command == "predict" else found.out
        assert step.done.parent == named
        assert found.shards in (Path("shards"), *settings.get("test", {}).values())
        for start in (getattr(found, name, None) for name in ("init", "image_run", "run")):
            assert start is None or made[start][0].name in step.after
        if command != "predict":
            assert named not in made
            made[named] = (step, found)
        if command in ("pretrain", "finetune"):
            assert found.image_size == settings.get("image_size", found.image_size)
            assert found.workers == settings.get("workers", 2)
        if command == "finetune":
            begun = made[found.init][1] if found.init else None
            assert begun is None or found.image_size == begun.image_size
            seen = found.epochs + (begun.epochs * begun.views if begun else 0)
            assert seen == settings.get("budget", seen)
    assert len({step.name for step in steps}) == len({step.done for step in steps}) == len(steps)


@pytest.mark.parametrize("size", SYSTEMS)
@pytest.mark.parametrize("settings", PLANS, ids=lambda settings: "-".join(settings) or "plain")
def test_every_part_is_a_task_and_every_evaluation_a_step(size: str, settings: dict[str, Any]) -> None:
    """Each step is one task's, so that tasks never write to one folder; the tables need what some step makes."""
    everything = plan_of(size, **settings)
    whole = Settings(Path("shards"), Path("out"), size=size, **settings)
    parts = reproduce.parts_of(whole)
    tasks = [reproduce.steps_of(whole, [part]) for part in parts]
    assert collections.Counter(step for steps in tasks for step in steps) == collections.Counter(everything)
    makers = {step.done: step.name for step in everything}
    for test in ("", *whole.test):
        folders, names, titles = reproduce.evaluations(whole, test)
        files = [f / (f"metrics-{n}.json" if n else "metrics.json") for f, n in zip(folders, names, strict=True)]
        assert len({makers[file] for file in files}) == len(whole.systems) * whole.seeds
        assert collections.Counter(titles) == {s.title: whole.seeds for s in whole.systems.values()}


def test_chains_by_hand() -> None:
    alone = [("inception-meta",), ("supcon",), ("clip",), ("experts",)]
    inception = ("inception", "geoprior", "softmax")
    assert chains(SYSTEMS["laptop"]) == [inception, *alone, ("paper", "doubting", "best")]
    assert chains(SYSTEMS["paper"]) == [inception, *alone, ("paper",), ("doubting", "best")]
    some = {name: SYSTEMS["laptop"][name] for name in ("geoprior", "clip", "softmax")}
    assert chains(some) == [("geoprior", "softmax"), ("clip",)]


def test_the_script_says_how_many_tasks_there_are() -> None:
    parts = {size: len(reproduce.parts_of(Settings(Path("a"), Path("b"), size=size))) for size in SYSTEMS}
    assert parts == {"paper": 7 * 3, "laptop": 6 * 3}
    script = (ROOT / "slurm/reproduce.sh").read_text()
    assert "21 of size paper with three\n# seeds, 18 of laptop" in script
    assert script.count("--array=0-20") == (reproduce.__doc__ or "").count("--array=0-20") == 1


def test_rows_bring_what_they_build_on() -> None:
    """In the table is what was asked for alone."""
    settings = Settings(Path("shards"), Path("out"), size="laptop", seeds=1, rows=("softmax", "doubting"))
    steps = [step.name for step in reproduce.steps_of(settings, reproduce.parts_of(settings))]
    assert steps == [
        *("inception-0", "predict-inception-0", "softmax-0"),
        *("best-pretrain-0", "best-0", "predict-best-0", "predict-best-0-doubting"),
    ]
    assert reproduce.evaluations(settings, "") == (
        [Path("out/softmax-0"), Path("out/best-0")],
        [None, "doubting"],
        [SYSTEMS["laptop"][row].title for row in settings.rows],
    )


def test_epochs_add_up_to_passes() -> None:
    """0.4 x 12 = 4.8, so 5 and 7; on two views 2.4 epochs, so 2, which are 4 passes, and 8; at least one each."""
    bare = System(title="bare", finetune=("laptop-image",))
    ours = System(title="ours", pretrain=("laptop",), finetune=("laptop",))
    twice = System(title="twice", pretrain=("laptop",), views=2, finetune=("laptop-image",))
    late = System(title="late", pretrain=("best",), finetune=("best",))  # whose last three epochs are larger

    def numbers(system: System, passes: int, share: float = 0.4) -> tuple[int, int]:
        (_, before), (_, after) = system.epochs(passes, share)
        return int(before), int(after)

    assert numbers(bare, 12) == (0, 12)
    assert numbers(ours, 12) == (5, 7)
    assert numbers(ours, 12, 0.75) == (9, 3)
    assert numbers(twice, 12) == (2, 8)
    assert numbers(ours, 2, 0.1) == (1, 1)
    assert numbers(twice, 4) == numbers(twice, 4, 0.1) == (1, 2)
    assert numbers(late, 6) == (2, 4)
    assert ours.epochs(None, 0.4) == ((), ())
    for system, passes, words in (
        (twice, 2, "'twice': pre-training takes 2, and fine-tuning needs 1"),
        (late, 5, "'late': pre-training takes 2, and fine-tuning needs 4"),
        (bare, 0, "'bare': pre-training takes 0, and fine-tuning needs 1"),
    ):
        with pytest.raises(ValueError, match=words):
            system.epochs(passes, 0.4)


# --------------------------------------------------------------------------------------------------------
# The command line


WRONG = {
    "unknown row": (
        [*LAPTOP, "--rows", "clip", "clap"],
        "--rows clap: no such system; there are inception, ",
    ),
    "task too high": ([*LAPTOP, "--task", "18"], "--task 18: the parts are numbered 0 to 17"),
    "task of few rows": (
        [*LAPTOP, "--rows", "clip", "--seeds", "2", "--task", "2"],
        "--task 2: the parts are numbered 0 to 1",
    ),
    "task below zero": (["--task", "-1"], "--task -1: the parts are numbered 0 to 20"),
    "too few passes": ([*LAPTOP, "--budget", "2"], "--budget 2: too few for '+ contrastive learning'"),
    "too few before a late size": (
        ["--size", "paper", "--budget", "4"],
        "--budget 4: too few for 'Ours, two experts'",
    ),
    "too few for what a row needs": (
        ["--size", "paper", "--rows", "doubting", "--budget", "4"],
        "fine-tuning needs 4",
    ),
    "nothing left": ([*LAPTOP, "--budget", "9", "--pretraining", "0.95"], "fine-tuning needs 1"),
    "no share": (
        [*LAPTOP, "--budget", "9", "--pretraining", "1"],
        "--pretraining 1.0: a share in (0, 1)",
    ),
    "share of nothing": (
        [*LAPTOP, "--pretraining", "0.5"],
        "--pretraining 0.5: unused, give --budget too",
    ),
    "no seeds": ([*LAPTOP, "--seeds", "0"], "--seeds 0: at least 1"),
    "none at once": ([*LAPTOP, "--at-once", "0"], "--at-once 0: at least 1"),
    "name of a test": (
        [*LAPTOP, "--test", "a b", "dir"],
        "--test 'a b': letters and digits are needed",
    ),
    "test called as a split": (
        [*LAPTOP, "--test", "val", "dir"],
        "--test val: other results are called so",
    ),
    "test called as a row": ([*LAPTOP, "--test", "doubting", "dir"], "--test doubting: other results"),
    "frozen and untrained": (
        [*LAPTOP, "--text-frozen"],
        "--text-frozen: the small text model is untrained",
    ),
    "unknown size": (["--size", "huge"], "huge"),
    "unknown setting": ([*LAPTOP, "--bugdet", "4"], "--bugdet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words, message = WRONG[name]
    out = tmp_path / "out"
    assert commands.run(reproduce.main, [*words, "--shards", "none", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("xcon reproduce: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_list_is_there_at_once() -> None:
    """Without what takes a second or ten to import."""
    code = (
        "import sys; from xcon import reproduce\n"
        "sys.argv = ['xcon', '--size', 'laptop', '--shards', 'a', '--out', 'b', '--seeds', '1', '--list']\n"
        "reproduce.main(); assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    first, *steps = done.stdout.splitlines()
    assert first == "20 steps in 6 parts, --task 0 to 5"
    assert steps[0] == "open xcon finetune laptop-image --shards a --out b/inception-0 --seed 0 --workers 2"
    assert len(steps) == 20


def test_a_part_makes_no_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """And a folder keeps to the settings it was begun with."""
    out = tmp_path / "out"
    argv = [
        "--size",
        "laptop",
        "--shards",
        "none",
        "--out",
        str(out),
        "--rows",
        "inception",
        "clip",
        "--budget",
        "4",
    ]
    settings = Settings(Path("none"), out, size="laptop", rows=("inception", "clip"))
    for step in reproduce.steps_of(settings, [(("inception",), 2)]):
        step.done.parent.mkdir(parents=True, exist_ok=True)
        step.done.touch()
    assert commands.run(reproduce.main, [*argv, "--task", "4"]) == 0  # seed 0: 0 and 1, seed 1: 2 and 3
    # Of inception those of two seeds, train and predict; of clip those of three, pre-training too: 4 + 9.
    assert capsys.readouterr().out == (
        "This part is done, 13 steps of others are not; without --task the table is made.\n"
    )
    assert commands.run(reproduce.main, [*argv, "--task", "4", "--workers", "1", "--seeds", "4"]) == 0
    capsys.readouterr()
    assert commands.run(reproduce.main, [*argv[:-1], "6", "--task", "4", "--image-size", "64"]) == 2
    changes = "--budget was 4, now 6; --image-size was None, now 64"
    error = f"xcon reproduce: {out}: begun with other settings ({changes}): choose another --out\n"
    assert capsys.readouterr().err == error


# --------------------------------------------------------------------------------------------------------
# Running steps


START = """
import pathlib, sys, time

here = pathlib.Path()
with open("begun", "a") as file:
    file.write(me + " ")

def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    sys.exit("waited for a minute")

def alive(pid):
    return pathlib.Path("/proc", pid).exists()
"""


class Work:
    """Steps that are small programs in a folder; each knows its name as `me` and leaves a file called so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.said = io.StringIO()

    def step(self, name: str, code: str = "", *after: str) -> Step:
        whole = f"import os; os.chdir({str(self.folder)!r}); me = {name!r}\n{START}\n{code}\n(here / me).touch()"
        return Step(name, ("python", "-I", "-c", whole), self.folder / name, after)

    def run(self, *steps: Step, at_once: int = 1) -> None:
        jobs.run(steps, logs=self.logs, at_once=at_once, console=Console(file=self.said, width=200))

    @property
    def begun(self) -> list[str]:
        """Names in the order in which the programs began."""
        return (self.folder / "begun").read_text().split()


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_steps_run_in_order_and_only_once(work: Work) -> None:
    (work.folder / "b").touch()  # done by an earlier call
    steps = [work.step("a", "print('hello')"), work.step("b", "", "a"), work.step("c", "", "a", "b", "elsewhere")]
    work.run(*steps)
    work.run(*steps)
    assert work.begun == ["a", "c"]
    assert (work.logs / "a.log").read_text() == "hello\n"
    told = [line.split(" in ")[0] for line in work.said.getvalue().splitlines()]
    assert told == ["1/2 a", "1/2 done, 0 min left a", "2/2 c", "2/2 done, 0 min left c"]


def test_as_many_at_once_as_asked_for(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """a ends when b runs too; c waits for a, and d for nothing but room. Seven cores for two make three each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    wait = "until(lambda: (here / 'b-runs').exists())"
    count = (
        "mine = here / ('running-' + me); mine.touch(); time.sleep(0.2)\n"
        "with open('together', 'a') as file: file.write(str(len(list(here.glob('running-*')))))\n"
        "mine.unlink(); print(os.environ['OMP_NUM_THREADS'])\n"
    )
    steps = [
        work.step("a", f"{wait}\n{count}"),
        work.step("b", f"(here / 'b-runs').touch()\n{count}"),
        work.step("c", f"assert (here / 'a').exists()\n{count}", "a"),
        work.step("d", count),
    ]
    work.run(*steps, at_once=2)
    assert sorted(work.begun) == ["a", "b", "c", "d"]
    assert set(work.begun[:2]) == {"a", "b"}
    assert max((work.folder / "together").read_text()) <= "2"
    assert {(work.logs / f"{name}.log").read_text() for name in "abcd"} == {"3\n"}


def test_one_at_a_time_has_all_cores(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as the environment says."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    work.run(work.step("a", "print(os.environ['OMP_NUM_THREADS'])"))
    assert (work.logs / "a.log").read_text() == "5\n"


def test_a_failure_ends_it_and_the_same_call_goes_on(work: Work) -> None:
    """What runs beside it comes to its end, nothing else begins, nothing is done twice."""
    fails = (
        "(here / 'pid').write_text(str(os.getpid())); until(lambda: (here / 'beside').exists())\n"
        "print('reading birds', flush=True)\n"
        "if not (here / 'mended').exists(): sys.exit('no such bird')"
    )
    beside = (
        "(here / 'beside').touch()\n"
        "until(lambda: (here / 'pid').exists() and not alive((here / 'pid').read_text())); time.sleep(0.3)"
    )
    steps = [
        *(work.step("a"), work.step("b", fails, "a"), work.step("c", beside, "a")),
        *(work.step("d", "", "b"), work.step("e", "", "c")),
    ]
    log = work.logs / "b.log"
    with pytest.raises(ValueError, match="b failed with exit status 1: no such bird") as error:
        work.run(*steps, at_once=2)
    assert f"(all of it in {log}); what is done stays, the same command goes on" in str(error.value)
    assert (work.folder / "c").exists()
    assert sorted(work.begun) == ["a", "b", "c"]
    assert log.read_text() == "reading birds\nno such bird\n"

    (work.folder / "mended").touch()
    work.run(*steps, at_once=2)
    assert collections.Counter(work.begun) == {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1}
    assert log.read_text() == "reading birds\nno such bird\nreading birds\n"


def test_a_step_that_leaves_no_result_has_failed(work: Work) -> None:
    with pytest.raises(ValueError, match="a failed with exit status 0"):
        work.run(work.step("a", "os._exit(0)"))


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Files of a job's script: that a signal came, and where the job stopped."""
    asked, stopped = tmp_path / "asked", tmp_path / "stopped"
    monkeypatch.setenv("XCON_ASKED", str(asked))
    monkeypatch.setenv("XCON_STOPPED", str(stopped))
    return asked, stopped


@pytest.mark.parametrize("status", [75, 1])
def test_a_step_that_was_stopped_has_not_failed(
    status: int, work: Work, notes: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    """It saves and says so, a launcher ends with a status of its own; no other step begins, and then all go on."""
    stops = f"if not (here / 'stopped').exists(): (here / 'stopped').write_text('step 5'); sys.exit({status})"
    steps = [work.step("a"), work.step("b", stops), work.step("c")]
    with pytest.raises(SystemExit) as end:
        work.run(*steps)
    assert end.value.code == 75
    assert notes[1].read_text() == "1 of 3 done, step 5 of the next\n"
    line = "stopped by a signal, 1 of 3 done, step 5 of the next; give the same command again"
    assert capsys.readouterr().err == f"{work.folder}: {line}\n"
    assert work.begun == ["a", "b"]
    work.run(*steps)
    assert work.begun == ["a", "b", "b", "c"]


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_step_begins_after_a_signal(at_once: int, work: Work, notes: tuple[Path, Path]) -> None:
    """One that runs comes to its end where it saves by itself, and is done anew where it does not."""
    signalled = work.step("a", "(here / 'asked').touch(); time.sleep(1.5)")
    steps = [dataclasses.replace(signalled, saves=True), work.step("b", "", "a"), work.step("c", "", "b")]
    with pytest.raises(SystemExit):
        work.run(*steps, at_once=at_once)
    assert notes[1].read_text() == "1 of 3 done\n"
    assert work.begun == ["a"]
    with pytest.raises(SystemExit):
        work.run(*steps)
    assert work.begun == ["a"]
    notes[0].unlink()
    notes[1].unlink()
    ends_by_itself_never = "(here / 'asked').touch(); until(lambda: (here / 'again').exists())"
    steps = [steps[0], work.step("d", ends_by_itself_never), work.step("e", "", "d")]
    with pytest.raises(SystemExit):
        work.run(*steps, at_once=at_once)
    assert notes[1].read_text() == "1 of 3 done\n"
    notes[0].unlink()
    (work.folder / "again").touch()
    work.run(steps[1])
    assert work.begun == ["a", "d", "d"]


def test_a_signal_with_the_last_step_leaves_nothing_to_stop(work: Work, notes: tuple[Path, Path]) -> None:
    work.run(work.step("a", "(here / 'asked').touch()"))
    assert not notes[1].exists()


def test_a_program_that_is_not_there_is_named(work: Work) -> None:
    with pytest.raises(OSError, match="no-such-program"):
        work.run(Step("a", ("no-such-program",), work.folder / "a"))


# --------------------------------------------------------------------------------------------------------
# The whole table


@pytest.mark.slow
def test_the_table(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every row of size laptop: its numbers are those of its run; again, nothing runs and nothing changes."""
    out, again = tmp_path / "out", tmp_path / "again"
    argv = [
        "--size",
        "laptop",
        "--shards",
        str(tiny_shards),
        *TINY,
        "--seeds",
        "1",
        "--budget",
        "4",
        "--at-once",
        "2",
    ]
    assert commands.run(reproduce.main, [*argv, "--out", str(out)]) == 0, capsys.readouterr().err
    settings = Settings(tiny_shards, out, size="laptop", seeds=1)
    report = json.loads((out / "results.json").read_text())
    folders, names, titles = reproduce.evaluations(settings, "")
    assert [row["label"] for row in report["rows"]] == titles
    for row, folder, name in zip(report["rows"], folders, names, strict=True):
        measured = json.loads((folder / (f"metrics-{name}.json" if name else "metrics.json")).read_text())
        assert (row["n"], row["seeds"], row["runs"]) == (36, [0], [str(folder)])  # 6 species, 6 to test of each
        for part in ("top1", "top5", "mean_per_class", "ece"):
            assert row[part] == {"mean": measured[part], "spread": None}
        assert row["with_meta"] == measured["with_meta"] == ("without_meta" in row)
    assert [found["against"] for found in report["differences"] if found["row"] == titles[-1]] == [
        *titles[:-1],
        "itself without metadata",
    ]
    assert report["notes"][-1].startswith("Every system saw each training photograph 4 times")
    top1 = [row["top1"]["mean"] for row in report["rows"]]
    assert pq.read_table(out / "results.parquet")["top1"].to_pylist() == top1
    assert titles[-1] in (out / "results.md").read_text()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")

    made = {file: file.stat().st_mtime_ns for file in out.glob("*/metrics*.json")}
    logs = {file: file.read_bytes() for file in out.glob("logs/*")}
    before = (out / "results.json").read_bytes()
    assert len(logs) == 20
    assert commands.run(reproduce.main, [*argv, "--out", str(out)]) == 0
    assert (out / "results.json").read_bytes() == before
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/metrics*.json")} == made
    assert {file: file.read_bytes() for file in out.glob("logs/*")} == logs

    assert commands.run(reproduce.main, [*argv, "--out", str(again), "--rows", "inception", "softmax"]) == 0
    for name in ("inception-0", "softmax-0"):
        tables = [pq.read_table(folder / name / "predictions.parquet") for folder in (out, again)]
        assert tables[0].equals(tables[1])
    rows = json.loads((again / "results.json").read_text())["rows"]
    theirs = {row["label"]: row["top1"] for row in report["rows"]}
    assert [row["top1"] for row in rows] == [theirs[row["label"]] for row in rows]
