"""Runs of two processes, killed at random moments and stopped by signals: they go on as if nothing had been.

One process imports everything once and forks the ranks of every launch, which run the real command.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import itertools
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist  # noqa: TID251 - starts the processes, gather.py uses them
from accelerate import Accelerator

from tests import commands, training
from xcon import encoders, evaluation, finetune, pretrain

pytestmark = pytest.mark.slow

PROCESSES, EVERY = 2, 3
STOPPED, KILLED = os.EX_TEMPFAIL, -signal.SIGKILL
MAINS = {"pretrain": pretrain.main, "finetune": finetune.main}
SETTINGS = (*training.VIT, *training.EVERY_STEP, "--checkpoint-every", str(EVERY))
# 24 records of training in a batch, 4 steps an epoch. What draws at random, and the average weights, go on, too.
FINETUNE = ("image", *SETTINGS, "--batch-size", "24", "--dropout", "0.2", "--ema", "0.9", "--mixup", "0.4")
PRETRAIN = ("demo", *SETTINGS, "--batch-size", "24")

# --------------------------------------------------------------------------------------------------------
# Launches, in the process that forks


@dataclasses.dataclass(frozen=True)
class Strike:
    """A signal, and when it is sent.

    Attributes:
        number: of the signal.
        ranks: who gets it; with `helpers` also their DataLoader workers.
        after: steps logged since the launch; or of checkpoints begun since, where `saving`.
        saving: counts checkpoints begun instead.
        delay: seconds from then.
        within: seconds after which it is sent all the same.
    """

    number: int
    ranks: tuple[int, ...]
    after: int
    saving: bool = False
    delay: float = 0.0
    helpers: bool = False
    within: float = math.inf


@dataclasses.dataclass(frozen=True)
class Ended:
    """What came of a launch: exit statuses, what was printed, what the file says that tells of a stop.

    And how many workers outlived their parent.
    """

    statuses: list[int | None]
    told: str
    stopped: str | None
    orphans: int


def rank_main(rank: int, folder: Path, script: str, argv: list[str], prepare: Callable[[], None] | None) -> None:
    """One process of a launch, as the launcher would start it."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(PROCESSES), "XCON_STOPPED": str(folder / "stopped")}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    if prepare and rank == 1:
        prepare()
    os._exit(commands.run(MAINS[script], argv))


def launch(folder: Path, script: str, argv: list[str], strike: Strike | None, prepare=None) -> Ended:
    """Runs a command on forked processes until all have ended; where one is killed, it ends the others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(r, folder, script, argv, prepare)) for r in range(PROCESSES)]
    for rank in ranks:
        rank.start()
    helpers: list[psutil.Process] = []
    if strike:
        wait_for(strike, Path(argv[-1]), ranks)
        helpers = [child for rank in ranks if rank.is_alive() for child in psutil.Process(rank.pid).children()]
        targets = [ranks[r].pid for r in strike.ranks] + [h.pid for h in helpers if strike.helpers]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):  # a worker may just have done its work
                os.kill(pid, strike.number)
        if strike.number == signal.SIGKILL:
            ranks[1 - strike.ranks[0]].join(0.2)
            ranks[1 - strike.ranks[0]].kill()
    for rank in ranks:
        rank.join()
    _, orphans = psutil.wait_procs(helpers, timeout=20)
    told = "".join((folder / f"{r}.log").read_text() for r in range(PROCESSES))
    stopped = (folder / "stopped").read_text() if (folder / "stopped").exists() else None
    return Ended([rank.exitcode for rank in ranks], told, stopped, len(orphans))


def wait_for(strike: Strike, run: Path, ranks: list) -> None:
    """Returns when it is time to strike, or when the ranks have ended."""
    before, until = steps(run), time.monotonic() + strike.within
    begun, left = set[str](), partials(run)  # those of the launch before go first
    while all(rank.is_alive() for rank in ranks) and time.monotonic() < until:
        left &= partials(run)
        begun |= partials(run) - left
        if (len(begun) if strike.saving else steps(run) - before) >= strike.after:
            break
        time.sleep(0.002)
    time.sleep(strike.delay)


def partials(run: Path) -> set[str]:
    """Checkpoints that are being written or removed."""
    return {path.name for path in (run / "checkpoints").glob(".step-*.partial")}


def disturb(owner: object, name: str, which: int, act: Callable[[], None]) -> None:
    """Lets this process act before its n-th call of a function."""
    function, calls = getattr(owner, name), itertools.count(1)

    def disturbed(*arguments: object, **options: object) -> object:
        if next(calls) == which:
            act()
        return function(*arguments, **options)

    setattr(owner, name, disturbed)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail_to_write() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_the_model() -> None:
    disturb(encoders, "build_image", 1, send(signal.SIGTERM))


def in_the_first_validation() -> None:
    disturb(evaluation, "collect", 1, send(signal.SIGTERM))


def in_the_second_step_and_while_it_saves() -> None:
    disturb(Accelerator, "clip_grad_norm_", 2, send(signal.SIGUSR1))
    disturb(Accelerator, "save_state", 1, send(signal.SIGTERM))


def in_the_first_step_and_no_space_is_left() -> None:
    disturb(Accelerator, "clip_grad_norm_", 1, send(signal.SIGTERM))
    disturb(Accelerator, "save_state", 1, fail_to_write)


# --------------------------------------------------------------------------------------------------------
# In the process of the tests


def steps(run: Path) -> int:
    """Steps of the log so far."""
    log = run / "metrics.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


def saved(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def check_equal(found: Path, expected: Path) -> None:
    assert training.lines(found) == training.lines(expected)
    for name in ("model.safetensors", "model.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    assert not list(found.rglob(".*"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ended]]:
    """`launch` in the process that has imported everything."""
    folder = tmp_path_factory.mktemp("launches") / "launch"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            patch.delenv(name)
        for name, value in {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }.items():
            patch.setenv(name, value)
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as host:
            yield lambda *arguments: host.submit(launch, folder, *arguments).result()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def argv(settings: tuple[str, ...], shards: Path, run: Path, *more: str) -> list[str]:
    return [*settings, "--shards", str(shards), *more, "--out", str(run)]


@pytest.fixture(scope="module")
def undisturbed(launched: Callable[..., Ended], tiny_shards: Path, folder: Path) -> Path:
    """Fine-tuning of 96 steps from start to end."""
    run = folder / "undisturbed"
    ended = launched("finetune", argv(FINETUNE, tiny_shards, run, "--epochs", "24"), None)
    assert ended.statuses == [0, 0], ended.told
    return run


def strikes(draw: random.Random) -> list[Strike]:
    """Twenty kills of one rank: ten when a checkpoint is begun, seven anywhere in training, three at its start."""
    saving = [Strike(signal.SIGKILL, (), 1 + i % 2, saving=True, delay=i // 5 * 0.01) for i in range(10)]
    training_ = [Strike(signal.SIGKILL, (), draw.randrange(1, 5), delay=draw.uniform(0, 0.05)) for _ in range(7)]
    starting = [Strike(signal.SIGKILL, (), 2, within=draw.uniform(0, 2)) for _ in range(3)]
    every = [dataclasses.replace(s, ranks=(draw.randrange(2),)) for s in (*saving, *training_, *starting)]
    draw.shuffle(every)
    return every


def test_killed_twenty_times(
    launched: Callable[..., Ended], undisturbed: Path, tiny_shards: Path, folder: Path
) -> None:
    """Always resumable, nothing lost beyond the interval, and at the end the same run, to the last bit."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    run, kept, unfinished = folder / "killed", 0, 0
    command = argv(FINETUNE, tiny_shards, run, "--epochs", "24")
    for i, strike in enumerate(strikes(random.Random(seed))):
        helped = argv(FINETUNE, tiny_shards, run, "--epochs", "24", *(("--workers", "1") if i % 3 == 0 else ()))
        ended = launched("finetune", helped, strike)
        assert ended.statuses[strike.ranks[0]] == KILLED, ended.told
        assert ended.orphans == 0
        assert steps(run) - saved(run) <= EVERY
        assert saved(run) >= kept
        kept = saved(run)
        unfinished += bool(partials(run))
    print(f"killed 20 times, {unfinished} in saving; step {kept} of 96")  # noqa: T201
    assert unfinished > 0
    ended = launched("finetune", command, None)
    assert ended.statuses == [0, 0], ended.told
    check_equal(run, undisturbed)


def test_stopped_by_every_signal_to_one_and_to_all(
    launched: Callable[..., Ended], tiny_shards: Path, folder: Path
) -> None:
    """Both ranks stop at the same step, which is saved, with status 75; the run goes on to the same end."""
    run, reference = folder / "stopped", folder / "reference"
    strikes = [
        Strike(signal.SIGTERM, (1,), after=1),
        Strike(signal.SIGUSR1, (0, 1), after=2, helpers=True),
        Strike(signal.SIGTERM, (0, 1), after=2, helpers=True),
        Strike(signal.SIGUSR1, (0,), after=1, saving=True),
    ]
    command = argv(PRETRAIN, tiny_shards, run, "--workers", "1", "--epochs", "6")
    for strike in strikes:
        ended = launched("pretrain", command, strike)
        name = signal.Signals(strike.number).name
        assert ended.statuses == [STOPPED, STOPPED], ended.told
        assert ended.orphans == 0
        assert f"{run}: stopped at step {saved(run)} by {name}; give the same command again\n" in ended.told
        assert training.lines(run)[-1] == {"event": "stop", "step": saved(run), "signal": name}
        assert steps(run) == saved(run)
        assert ended.stopped == f"step {saved(run)}\n"
        assert "Traceback" not in ended.told
    assert 6 < saved(run) < 24
    for again in (command, argv(PRETRAIN, tiny_shards, reference, "--epochs", "6")):
        ended = launched("pretrain", again, None)
        assert ended.statuses == [0, 0], ended.told
    check_equal(run, reference)


def test_signals_at_the_worst_moments(launched: Callable[..., Ended], tiny_shards: Path, folder: Path) -> None:
    """One run of eight steps, validated after four and eight; always the second rank alone is disturbed."""
    run, reference = folder / "disturbed", folder / "calm"
    command = argv(PRETRAIN, tiny_shards, run, "--epochs", "2")

    ended = launched("pretrain", command, None, in_the_model)
    assert ended.statuses == [STOPPED, STOPPED], ended.told
    assert (ended.stopped, saved(run), steps(run)) == ("step 0\n", 0, 0)

    ended = launched("pretrain", command, None, in_the_first_validation)
    assert ended.statuses == [STOPPED, STOPPED], ended.told
    assert (ended.stopped, saved(run), steps(run)) == ("step 4\n", 4, 4)
    assert [line["step"] for line in training.lines(run, "val")] == [4]

    ended = launched("pretrain", command, None, in_the_first_step_and_no_space_is_left)
    assert ended.statuses == [2, 2], ended.told
    assert (ended.stopped, saved(run), steps(run)) == (None, 4, 5)
    told = f"{run}/checkpoints: the checkpoint of step 5 could not be written ([Errno 28] No space left on device)"
    assert ended.told.count(told) == PROCESSES
    assert "Traceback" not in ended.told
    assert not list((run / "checkpoints").glob(".*"))

    ended = launched("pretrain", command, None, in_the_second_step_and_while_it_saves)
    assert ended.statuses == [STOPPED, STOPPED], ended.told
    assert (ended.stopped, saved(run), steps(run)) == ("step 6\n", 6, 6)
    assert "stopped at step 6 by SIGUSR1; " in ended.told
    assert f"{run}: SIGTERM came while it stopped: ignored\n" in ended.told

    ended = launched("pretrain", command, None, in_the_first_validation)
    assert ended.statuses == [0, 0], ended.told
    assert ended.stopped is None
    assert f"{run}: complete" in ended.told

    ended = launched("pretrain", argv(PRETRAIN, tiny_shards, reference, "--epochs", "2"), None)
    assert ended.statuses == [0, 0], ended.told
    check_equal(run, reference)
