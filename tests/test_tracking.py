"""What a run tells of its speed: shares by hand, the GPU's by a made-up one, and a loader that is really slow."""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests import training
from xcon import bottleneck, clock, gradcache, pretrain, tracking
from xcon.bottleneck import Watch, loader_advice, workers_needed
from xcon.clock import Clock
from xcon.loader import Batch, Records, Share, make_loader
from xcon.model import ContrastiveModel, Tower
from xcon.sampler import Item, Order
from xcon.shardset import ShardSet


class Time:
    """A clock that stands still until told otherwise."""

    now = 0.0

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Time:
    hands = Time()
    monkeypatch.setattr(time, "perf_counter", lambda: hands.now)
    monkeypatch.setattr(time, "monotonic", lambda: hands.now)
    return hands


# ---- the clock


def test_the_clock_counts_steps_and_waiting(hands: Time) -> None:
    """Reading a batch takes 3 s, using it 1 s: two steps of 8 rows in 8 s are 2 images/s, 6 of 8 s waited."""

    def batches() -> Iterator[None]:
        for _ in range(2):
            hands.passes(3)
            yield None

    watched = Clock()
    for _ in watched.watch(batches()):
        hands.passes(1)
    assert watched.lap(8) == {"images_per_s": 2.0, "data_wait": 0.75}
    hands.passes(2)
    assert watched.lap(8) == {"images_per_s": 0.0, "data_wait": 0.0}


def test_what_is_paused_counts_nowhere(hands: Time) -> None:
    watched = Clock()
    for _ in watched.watch([None]):
        hands.passes(2)
        with watched.paused():
            hands.passes(100)
    assert watched.lap(4) == {"images_per_s": 2.0, "data_wait": 0.0}


class Work(torch.autograd.Function):
    """Takes time, in the forward pass and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hands: Time, forth: float, back: float) -> Tensor:
        ctx.back = lambda: hands.passes(back)
        hands.passes(forth)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.back()
        return gradient, None, None, None


class Encoder(nn.Module):
    """One layer, which takes 100 s and its gradient 1000 s."""

    width = 3

    def __init__(self, hands: Time) -> None:
        super().__init__()
        self.layer, self.hands = nn.Linear(2, 3), hands

    def forward(self, x: Tensor) -> Tensor:
        return Work.apply(self.layer(x), self.hands, 100.0, 1000.0)


@pytest.fixture
def accelerator() -> Accelerator:
    training.fresh_accelerator()
    return Accelerator(cpu=True)


def gradients(
    accelerator: Accelerator, hands: Time, around: Callable[[clock.Loss], clock.Loss], rows: int
) -> list[Tensor]:
    """Those of a loss that takes 3 s for each of two vectors, and 7 s back."""

    def loss(embeddings: Any, scale: Tensor) -> dict[str, Tensor]:
        worked = [Work.apply(z, hands, 3.0, 7.0) for z in embeddings.values()]
        return {"total": scale * (worked[0] * worked[1]).sum()}

    torch.manual_seed(0)
    towers = {m: Tower(Encoder(hands), 4) for m in ("image", "meta")}  # type: ignore[arg-type]
    module = ContrastiveModel(towers, temperature=0.1, max_scale=100.0)
    inputs = {m: torch.randn(4, 2) for m in towers}
    gradcache.backward(accelerator, module, inputs, around(loss), rows=rows)
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize(("rows", "whole"), [(0, 2 * 1100 + 20), (2, 2 * 2 * 1200 + 20)])
def test_the_loss_is_timed_forth_and_back_and_nothing_else(
    accelerator: Accelerator, hands: Time, rows: int, whole: float
) -> None:
    """2 x 3 s forth and 2 x 7 s back, encoders of 100 and 1000 s on either side; in two parts, encoded twice."""
    watched = Clock()
    timed = gradients(accelerator, hands, watched.loss, rows)
    assert hands.now == whole
    assert sum(clock.between(*loss) for loss in watched.losses) == 20
    assert watched.lap(4)["loss_share"] == pytest.approx(20 / whole, abs=5e-5)
    plain = gradients(accelerator, hands, lambda loss: loss, rows)
    assert len(plain) == 9
    assert all(torch.equal(one, two) for one, two in zip(timed, plain, strict=True))
    assert "loss_share" not in watched.lap(4)


class Event:
    """A CUDA event on a made-up stream, in milliseconds."""

    stream = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at, self.awaited = -1.0, False

    def record(self) -> None:
        self.at = Event.stream

    def synchronize(self) -> None:
        self.awaited = True

    def elapsed_time(self, other: "Event") -> float:
        assert other.awaited
        return other.at - self.at


def test_a_gpu_that_is_behind_does_not_wait(hands: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor waits 3 s for each batch; the GPU is idle for 0.5 s of them, and works for 3.5 s."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def batches() -> Iterator[None]:
        for _ in range(2):
            hands.passes(3)
            Event.stream += 500
            yield None

    watched = Clock()
    for _ in watched.watch(batches()):
        hands.passes(1)
        Event.stream += 3500
    assert not any(ended.awaited for _, ended in watched.waits)  # no step was held up
    assert watched.lap(8) == {"images_per_s": 2.0, "data_wait": 0.125}


# ---- what holds a training up


@pytest.mark.parametrize(
    ("workers", "wait", "needed"),
    [
        (2, 0.0, 3),  # 2.2: they just kept up
        (2, 0.5, 5),  # twice as many, and a tenth
        (4, 0.75, 18),  # 17.6
        (0, 0.5, 2),  # half the time is decoding: one would take all of it, and a tenth more
        (0, 0.2, 1),  # a quarter of a worker
    ],
)
def test_workers_by_hand(workers: int, wait: float, needed: int) -> None:
    assert workers_needed(workers, wait) == needed


@pytest.mark.parametrize(
    ("workers", "cores", "busy", "words"),
    [
        (2, 8, 1.0, "50% of the time is spent waiting for photographs: --workers 5 would keep up (now 2)"),
        (2, 4, 0.1, "the workers themselves wait for the disk, they compute 10% of it"),
        (2, 4, 0.9, "--workers 4 helps (now 2), but the cores are the limit, 4 for this process where 5"),
        (
            4,
            4,
            0.9,
            "photographs: the cores are the limit, 4 for this process where 9 workers would be needed; ask",
        ),
        (8, 4, 0.4, "photographs: the cores are the limit"),  # they wait for one another, not for the disk
    ],
)
def test_advice_is_honest_about_cores(workers: int, cores: int, busy: float, words: str) -> None:
    assert words in loader_advice(0.5, workers, cores=cores, busy=busy)


def said(hands: Time, lines: int, **timing: float) -> list[tuple[int, str]]:
    """What a watch says of lines of 10 steps, one every 10 s, the first of which is the start."""
    watch, found = Watch(2), []
    for number in range(lines):
        shares = {"data_wait": 0.9, "gpu_use": 0.0} if number == 0 else {"data_wait": 0.0, **timing}
        if words := watch.note(10 * number, shares):
            found.append((10 * number, words))
        hands.passes(10)
    return found


def test_a_loader_is_spoken_of_once_in_a_while(hands: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 30 s and 20 steps, and 900 s later; the start of the workers is no wait."""
    monkeypatch.setattr(bottleneck, "cores_per_process", lambda: 64)
    assert said(hands, 200, data_wait=0.09) == []
    found = said(hands, 200, data_wait=0.5)
    assert [step for step, _ in found] == [30, 930, 1830]
    assert all("--workers 5" in words for _, words in found)


def test_a_gpu_below_what_clusters_ask_for_is_spoken_of(hands: Time) -> None:
    assert said(hands, 5, gpu_use=0.6) == []
    ((_, words),) = said(hands, 5, gpu_use=0.41)
    assert words == (
        "the GPU computes 41% of the time, and clusters cancel jobs below 50 to 60 %; photographs arrive in time: "
        "take a larger --batch-size, or fewer GPUs"
    )
    ((_, words),) = said(hands, 5, gpu_use=0.41, data_wait=0.5)
    assert words.startswith("50% of the time is spent waiting")
    assert "photographs arrive in time" not in words


@dataclasses.dataclass
class Slow(Records):
    """Every record takes 20 ms longer."""

    def __getitem__(self, item: Item) -> Batch:
        time.sleep(0.02)
        return super().__getitem__(item)


@pytest.mark.slow
def test_the_number_proposed_removes_the_wait(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 records of 20 ms by one worker, 100 ms of training: it waits 60 of 160 ms; two workers take 80 ms."""
    monkeypatch.setattr(bottleneck, "SECONDS", 0.0)
    records = Slow(ShardSet(tiny_shards).split("train"), ("meta",))

    def train(workers: int) -> tuple[float, str | None]:
        """Of 20 steps the share waited, and what is said."""
        watch, watched = Watch(workers), Clock()
        batches = make_loader(records, Order(96, 8, 0), Share(workers=workers), steps=range(30))
        for step, _ in enumerate(watched.watch(batches), start=1):
            time.sleep(0.1)
            if step % 10 == 0:
                timing = watched.lap(8)
                words = watch.note(step, timing)
        return timing["data_wait"], words

    wait, words = train(1)
    assert wait > 0.25
    assert words is not None
    proposed = int(re.findall(r"--workers (\d+)", words)[-1])
    assert proposed == 2
    assert train(proposed) == (pytest.approx(0.0, abs=bottleneck.WAIT), None)


# ---- the log


def write(run: Path, **timing: float) -> dict[str, Any]:
    """The timing of a train line of a log with nothing else in it."""
    with tracking.Tracker(run, step=0, total=2000, workers=2) as tracker:
        tracker.write("train", 1, {"total": 2.5}, timing)
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)["timing"]


def test_a_line_reads_well(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    timing = {"images_per_s": 1234.5, "data_wait": 0.031, "loss_share": 0.012}
    assert write(tmp_path, **timing) == timing  # without a GPU nothing is said of one
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r"train 1/2000 [0-9:]+ left total 2\.5 \(1,234 images/s, data wait 3 %, loss 1\.2 %\)", line
    )


def test_on_a_terminal_a_bar_has_the_loss_and_the_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    write(tmp_path, images_per_s=1234.5, data_wait=0.031)
    assert "loss 2.5, 1,234 images/s, data wait 3 %" in re.sub(
        r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().err
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was busy for 40 per cent of the last second, of which 12.344 GB were taken."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12_344_000_000)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 40)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_in_the_log(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert write(tmp_path, data_wait=0.0) == {"data_wait": 0.0, "gpu_use": 0.4, "gpu_memory_gb": 12.34}
    assert "(data wait 0 %, GPU 40 %, 12.3 GB)" in capfd.readouterr().err


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_does_not_say_has_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def refuse() -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert write(tmp_path, data_wait=0.0) == {"data_wait": 0.0, "gpu_memory_gb": 12.34}
    assert capfd.readouterr().err.startswith("the log has no GPU utilisation: Not Supported")


@pytest.mark.slow
def test_a_training_says_what_it_waits_for(tiny_shards: Path, tmp_path: Path) -> None:
    """Decoding is done in the process itself: it waits, computes the loss, and neither takes all of the time."""
    settings = ["--shards", tiny_shards, "--out", tmp_path / "run", *training.RESNET, "--batch-size", "24"]
    assert training.run(pretrain.main, ["demo", *settings, "--epochs", "2", "--log-every", "4"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["timing"] for line in lines if line["event"] == "train"]
    assert len(found) == 2
    for timing in found:
        assert timing.keys() == {"images_per_s", "data_wait", "loss_share"}
        assert timing["data_wait"] > 0
        assert timing["loss_share"] > 0
        assert timing["data_wait"] + timing["loss_share"] < 1
