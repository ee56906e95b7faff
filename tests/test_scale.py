"""The planner: formulas by hand, against the notes of the loss, against real processes, and the command."""

import concurrent.futures
import csv
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 - starts the processes, gather.py uses them
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251 - for FSDP2
from torch.distributed.fsdp import fully_shard  # noqa: TID251 - FSDP2 itself

from benchmarks.live_bytes import LiveBytes
from tests import commands, training
from xcon import gather, launch, optim, pretrain, rehearsal, scale, scaling
from xcon.config import PretrainConfig
from xcon.model import ContrastiveModel, Tower
from xcon.scaling import STRATEGIES, Cluster, Prediction, Work

CLUSTER = Cluster(
    gpus_per_node=8, gpu_bytes=80e9, node_bandwidth=100e9, network_bandwidth=20e9, latency=1e-5, cpus_per_gpu=4,
    overlap=0.0,
)  # fmt: skip
# A hundred million numbers; 1 ms and 30 GFLOP a row.
WORK = Work(
    weights=100_000_000, trained=100_000_000, towers=3, largest=66_000_000, layers=100, norms=0,
    row_seconds=1e-3, step_seconds=0.0, operators=0, row_flops=30e9, row_bytes=50e6, step_bytes=0.0,
    photo_seconds=0.0, row_vectors=2, classes=555, width=256, loss_flops=0.0,
)  # fmt: skip


def changed(**changes: float) -> Work:
    return dataclasses.replace(WORK, **changes)


# ---- time, by hand


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_exchanges_nothing(strategy: scaling.Strategy) -> None:
    """32 rows of 1 ms, and 5 ms for every step."""
    work = changed(norms=53, step_seconds=5e-3)
    found = scaling.step_seconds(work, CLUSTER, strategy, 1, 32)
    assert found.pop("computing") == pytest.approx(37e-3)
    assert found.pop("loss") == pytest.approx(6 * 3 * 256 * 32**2 / 30e12)
    assert set(found.values()) == {0.0}
    assert scaling.held(work, strategy, 1) == 16 * 100_000_000


def test_ddp_on_eight_gpus() -> None:
    """400 MB: 2 x 7/8 x 0.4 GB at 100 GB/s are 7 ms; 16 buckets of 25 MiB by 2 x 3 hops of 10 us are 0.96 ms."""
    found = scaling.exposed(WORK, CLUSTER, "ddp", 8, parts=1, computing=30e-3)
    assert found == pytest.approx(7.96e-3)


def test_ddp_on_two_nodes() -> None:
    """Between the nodes half of 400 MB comes twice, at 20 GB/s: 20 ms more, and one hop of four."""
    found = scaling.exposed(WORK, CLUSTER, "ddp", 16, parts=1, computing=30e-3)
    assert found == pytest.approx(7e-3 + 20e-3 + 16 * 2 * 4 * 1e-5)


@pytest.mark.parametrize(
    ("computing", "parts", "seconds"), [(6e-3, 1, 3.96e-3), (6e-3, 4, 6.96e-3), (30e-3, 1, 0)]
)
def test_the_backward_pass_of_the_last_part_hides(computing: float, parts: int, seconds: float) -> None:
    """Of 6 ms 4 are the backward pass, of the last of four parts 1; of 30 ms 20, which hide all."""
    cluster = dataclasses.replace(CLUSTER, overlap=1.0)
    assert scaling.exposed(WORK, cluster, "ddp", 8, parts=parts, computing=computing) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("strategy", "parts", "passes"),  # each pass brings 7/8 of 400 MB once: 3.5 ms
    [
        *[("ddp", parts, 2) for parts in (1, 4)],
        *[("zero1", parts, 3) for parts in (1, 4)],
        *[("zero2", 1, 3), ("zero2", 4, 9)],  # the gradients of each part, the weights once
        *[("zero3", 1, 3), ("zero3", 4, 12 + 4)],  # weights forward, again forward and backward for each part
        *[("fsdp2", 1, 3), ("fsdp2", 4, 12 + 1)],
    ],
)
def test_what_strategies_exchange(strategy: scaling.Strategy, parts: int, passes: int) -> None:
    cluster = dataclasses.replace(CLUSTER, latency=0.0)
    found = scaling.exposed(WORK, cluster, strategy, 8, parts=parts, computing=0.0)
    assert found == pytest.approx(passes * 3.5e-3)


def test_batch_norm_costs_latency() -> None:
    """53 layers, each an all-gather and an all-reduce of 3 hops: 53 x 3 x 3 x 10 us."""
    found = scaling.step_seconds(changed(norms=53), CLUSTER, "ddp", 8, 64)
    assert found["BatchNorm"] == pytest.approx(53 * 3 * 3e-5)


def test_parts_take_a_third_more() -> None:
    whole, parts = (scaling.step_seconds(changed(micro_batch=m), CLUSTER, "ddp", 1, 32) for m in (0, 8))
    assert parts["computing"] == pytest.approx(4 / 3 * whole["computing"])
    assert changed(micro_batch=8).parts(20) == 3
    assert WORK.parts(20) == 1


def test_a_loader_that_is_slower_holds_the_step_up() -> None:
    """A photograph takes 10 ms of four workers, 2.5 ms a row where computing takes 1."""
    found = scaling.predict(changed(photo_seconds=0.01), CLUSTER, "ddp", 1, 32, reference=32)
    assert found.step == pytest.approx(32 * 2.5e-3)
    assert found.bound == "loading"
    assert found.workers == 10


def test_few_rows_do_not_fill_a_gpu() -> None:
    """1,000 operators are launched in 3 x 5 ms; four parts of them, a third longer each, in 80."""
    few, many = (scaling.step_seconds(changed(operators=1000), CLUSTER, "ddp", 1, rows) for rows in (4, 32))
    assert (few["computing"], many["computing"]) == pytest.approx((15e-3, 32e-3))
    parts = scaling.step_seconds(changed(operators=1000, micro_batch=1), CLUSTER, "ddp", 1, 4)
    assert parts["computing"] == pytest.approx(80e-3)


# ---- the loss, against facts/loss.md


@pytest.mark.parametrize(
    ("batch", "gpus", "gflop"),
    [(4096, 1, 44), (4096, 8, 8.2), (4096, 64, 1.0), (32768, 1, 2273), (32768, 8, 426), (131072, 64, 832)],
)
def test_the_products_of_the_loss(batch: int, gpus: int, gflop: float) -> None:
    assert scaling.loss_flops(WORK, gpus, batch) / 1e9 == pytest.approx(gflop, rel=0.03)


@pytest.mark.parametrize(("batch", "megabytes"), [(4096, 9.0), (32768, 68), (131072, 271)])
def test_what_the_loss_gathers(batch: int, megabytes: float) -> None:
    """Of 64 GPUs on one node at 1 GB/s each fetches 63/64, and of the log-sum-exps 16 bytes for 3 pairs a row."""
    cluster = dataclasses.replace(CLUSTER, gpus_per_node=64, latency=0.0, node_bandwidth=1e9)
    expected = 63 / 64 * (megabytes * 1e6 + 3 * 16 * batch) / 1e9
    assert scaling.embeddings_seconds(WORK, cluster, 64, batch) == pytest.approx(expected, rel=0.02)


def test_a_small_batch_has_its_table_on_every_gpu() -> None:
    assert scaling.loss_flops(WORK, 1, 256) == scaling.loss_flops(WORK, 8, 256) == 6 * 3 * 256 * 256**2


def test_captions_of_a_batch() -> None:
    """Two rows of two classes: one caption or two, 1.5; of very many rows, all."""
    assert changed(classes=2).captions(2) == pytest.approx(1.5)
    assert changed(classes=1).captions(7) == 1
    assert WORK.captions(100_000) == pytest.approx(555)
    assert changed(classes=0).captions(100) == 0
    assert (WORK.pairs, changed(classes=0).pairs, changed(classes=0, row_vectors=3).pairs) == (3, 1, 3)


# ---- memory


def test_memory_by_hand() -> None:
    """100 million numbers: DDP has 20 bytes of each, ZeRO-1 of 4 GPUs 8 + 3, and a bucket of 200 MB.

    ZeRO-2 holds no more gradients than the bucket: 4 + 3 bytes of each, and twice 200 MB.
    """
    found = {strategy: scaling.held(WORK, strategy, 4) / 1e9 for strategy in STRATEGIES}
    assert found == pytest.approx({"ddp": 2.0, "zero1": 1.3, "zero2": 1.1, "zero3": 1.3, "fsdp2": 1.192})
    bytes_of = scaling.step_bytes(changed(micro_batch=8), "ddp", 4, 64)
    assert bytes_of["activations"] == 8 * 50e6
    copies = scaling.step_bytes(changed(micro_batch=8, step_bytes=7e6), "ddp", 4, 64)
    assert copies["activations"] == 8 * 50e6 + 7e6
    assert bytes_of["embeddings"] == pytest.approx(2 * 4 * 256 * (128 + WORK.captions(64)))


def test_zero3_on_very_many_gpus() -> None:
    """A model beyond its limits: a thousand million weights, of gradients one bucket, and the bucket itself."""
    huge = changed(weights=10**10, trained=10**10)
    assert scaling.held(huge, "zero3", 10**9) == pytest.approx(4 * (1e9 + 5e7 + 5e7), rel=1e-6)
    assert scaling.held(huge, "zero2", 10**9) == pytest.approx(4 * (1e10 + 5e7 + 5e7), rel=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_gpus_never_hold_more_each_and_are_never_more_efficient(strategy: scaling.Strategy) -> None:
    powers = [2**i for i in range(1, 11)]
    held = [scaling.held(WORK, strategy, gpus) for gpus in powers]
    assert held == sorted(held, reverse=True)
    found = [scaling.predict(WORK, CLUSTER, strategy, gpus, 2048, reference=2048) for gpus in powers]
    efficiency = [p.efficiency for p in found]
    assert efficiency == sorted(efficiency, reverse=True)
    assert efficiency[0] <= 1
    assert all(p.step >= WORK.row_seconds * 2048 / p.gpus for p in found)


class Encoder(nn.Module):
    """Four layers of 256 x 256."""

    width = 256

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def contrastive() -> ContrastiveModel:
    towers = {m: Tower(Encoder(), 64) for m in ("image", "meta")}  # type: ignore[arg-type]
    return ContrastiveModel(towers, temperature=0.1, max_scale=200.0)


def test_what_is_kept_for_the_backward_pass() -> None:
    """Of a layer of 256 its input and what tanh gave, which is the next one's input; weights do not count.

    Each of two towers keeps 4 rows of 5 x 256 numbers, of its projection 64, and two lengths.
    """
    inputs = {m: torch.randn(4, 256) for m in ("image", "meta")}
    expected = 2 * 4 * 4 * (5 * 256 + 64)
    assert rehearsal.kept_bytes(contrastive(), inputs) == pytest.approx(expected, rel=0.02)


def test_autocast_keeps_copies_of_weights_whatever_the_rows() -> None:
    """In bf16 a row keeps 2 x 5 x 256 bytes of each tower, and its vector with its lengths in float32.

    For the gradient of its input a layer keeps its weights, the first apart: 3 x 256 x 256 + 64 x 256 of a tower.
    """
    model, sizes = contrastive(), (16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = [rehearsal.kept_bytes(model, {m: torch.randn(n, 256) for m in ("image", "meta")}) for n in sizes]
    per_row, rest = rehearsal.slope_and_rest(sizes, found)
    assert per_row == pytest.approx(2 * (2 * 5 * 256 + 4 * 64), rel=0.02)
    assert rest == pytest.approx(2 * 2 * (3 * 256 * 256 + 64 * 256), rel=1e-3)


def test_a_slope_that_noise_has_made_is_not_believed() -> None:
    assert rehearsal.slope_and_rest((16, 8), (40.0, 24.0)) == (2.0, 8.0)
    assert rehearsal.slope_and_rest((16, 8), (40.0, 10.0)) == (2.5, 0.0)  # the rest would be negative
    assert rehearsal.slope_and_rest((16, 8), (40.0, 41.0)) == (2.5, 0.0)
    assert rehearsal.slope_and_rest((1,), (40.0,)) == (40.0, 0.0)


# ---- choosing


def prediction(gpus: int, strategy: str, step: float, efficiency: float, gigabytes: float) -> Prediction:
    memory = {"weights": gigabytes * 1e9}
    return Prediction(gpus, 1, strategy, 100, {"computing": step}, memory, efficiency, 2, gigabytes <= 80)


def test_the_sentence() -> None:
    """Of 4 GPUs FSDP2 is faster by too little; 8 are put to too little use."""
    found = [
        prediction(1, "ddp", 1.0, 1.0, 10),
        prediction(4, "ddp", 0.28, 0.9, 10),
        prediction(4, "fsdp2", 0.27, 0.93, 9),
        prediction(8, "ddp", 0.2, 0.6, 10),
    ]
    said = scaling.recommend(found, least_efficiency=0.7)
    assert said == (
        "Take 4 GPUs on 1 node with ddp: 357 images/s at 90% efficiency, 10.0 GB each, bound by computing."
    )
    assert scaling.recommend(
        [prediction(2, "ddp", 1, 1, 99), prediction(2, "zero3", 1, 1, 90)], least_efficiency=0
    ) == ("Nothing fits: zero3 on 2 GPUs needs 90.0 GB; take a --micro-batch.")


# ---- real processes


def work(rank: int, strategy: str, folder: Path) -> None:
    """A process of two: the most that it held in its second step, but for the batch, two rows."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if strategy.startswith("zero"):
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": strategy[-1]}
        os.environ |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/{strategy}", rank=rank, world_size=2)
    accelerator = launch.make_accelerator("fp32", batch_size=4, clip_norm=1.0)
    rates = dict.fromkeys(("image", "meta", "head"), 1e-3)
    with LiveBytes() as live:
        module: nn.Module = contrastive()
        if strategy == "fsdp2":
            for tower in module.towers.values():
                fully_shard(tower, mesh=init_device_mesh("cpu", (2,)))
            wrapped = fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
            optimizer = optim.make_optimizer(module, rates, weight_decay=0.1)
        else:
            optimizer = optim.make_optimizer(module, rates, weight_decay=0.1)
            wrapped, optimizer = launch.prepare(accelerator, module, optimizer)
        for _ in range(2):
            live.peak = live.now
            embeddings, scale = wrapped({m: torch.randn(2, 256) for m in ("image", "meta")})
            terms = gather.cross_contrastive(embeddings, torch.tensor([0, 1]), scale)
            accelerator.backward(terms["total"])
            optimizer.step()
            pieces = in_pieces(module, optimizer) if strategy == "fsdp2" else 0
            optimizer.zero_grad()
    # FSDP2 resizes what it gathers, which `LiveBytes` does not see: what it holds besides is counted instead.
    (folder / f"{strategy}-{rank}.json").write_text(str(pieces or live.peak))
    dist.barrier()
    os._exit(0)


def in_pieces(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this process's pieces of weights, gradients and moments."""
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    held = [*module.parameters(), *(p.grad for p in module.parameters()), *moments]
    return sum(x.to_local().nbytes for x in held)


def start(folder: Path, strategies: tuple[str, ...]) -> None:
    importlib.import_module("deepspeed")
    torch.compile(nn.Identity())  # imports the compiler, as DeepSpeed's optimisers do
    for strategy in strategies:
        torch.multiprocessing.start_processes(work, (strategy, folder), nprocs=2, start_method="fork")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Strategy -> the bytes that each of two processes held."""
    folder = tmp_path_factory.mktemp("held")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            patch.delenv(name)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # ninja
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as host:
            host.submit(start, folder, STRATEGIES).result()
    return {s: [int((folder / f"{s}-{rank}.json").read_text()) for rank in (0, 1)] for s in STRATEGIES}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_is_what_two_processes_hold(measured: dict[str, list[int]], strategy: scaling.Strategy) -> None:
    """To a tenth of the weights, beside DeepSpeed's bucket and what FSDP2 gathers; two rows weigh nothing.

    559,233 numbers, below the limits from which on ZeRO lets go of what it gathers.
    """
    numbers = sum(p.numel() for p in contrastive().parameters())
    bucket = 4 * scaling.ZERO_BUCKET if strategy.startswith("zero") else 0
    gathered = 3 * 4 * numbers // 2 if strategy == "fsdp2" else 0  # of one of two towers; no part of the pieces
    model = changed(weights=numbers, trained=numbers, largest=numbers // 2)
    expected = (scaling.held(model, strategy, 2) - bucket - gathered) / numbers
    for peak in measured[strategy]:
        seen = (peak - bucket) / numbers
        print(f"{strategy}: {seen:.2f} bytes a number, predicted {expected:.2f}")  # noqa: T201
        assert seen == pytest.approx(expected, abs=0.4)


# ---- the command


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two lines in its log."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = ["--shards", tiny_shards, "--out", folder, *training.RESNET, "--batch-size", "24"]
    assert training.run(pretrain.main, ["demo", *settings, "--epochs", "2", "--log-every", "4"]) == 0
    return folder


def counts(**changes: float) -> Work:
    return changed(row_seconds=0.0, row_flops=0.0, row_bytes=0.0, **changes)


def write_log(folder: Path, *timings: dict[str, float], processes: int) -> None:
    lines = [{"event": "start", "step": 0, "processes": processes}]
    lines += [{"event": "train", "step": i, "timing": timing} for i, timing in enumerate(timings)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_pace_of_a_run(tmp_path: Path) -> None:
    """64 rows at 100 a second of which a fifth is waiting: 0.512 s for 32 rows of each of two processes."""
    steady = {"images_per_s": 100.0, "data_wait": 0.2}
    write_log(tmp_path, {"images_per_s": 1.0, "data_wait": 0.99}, steady, steady, processes=2)
    cfg = PretrainConfig(shards=tmp_path, out=tmp_path, batch_size=64)
    found = rehearsal.pace_of_run(tmp_path, cfg, counts())
    assert found.row_seconds == pytest.approx(0.016)
    assert found.loss_flops == 6 * 3 * 256 * 64**2
    in_parts = rehearsal.pace_of_run(tmp_path, dataclasses.replace(cfg, micro_batch=8), counts())
    assert in_parts.row_seconds == pytest.approx(0.012)


def test_a_log_of_one_line_is_too_short(tmp_path: Path) -> None:
    write_log(tmp_path, {"images_per_s": 1.0, "data_wait": 0.0}, processes=1)
    with pytest.raises(ValueError, match="fewer than two lines"):
        rehearsal.pace_of_run(tmp_path, PretrainConfig(shards=tmp_path, out=tmp_path), counts())


@pytest.mark.slow
def test_a_run_is_planned_by_its_pace(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Numbers of the real model, its real pace, on the GPUs that divide the batch."""
    tables = [tmp_path / "plan.json", tmp_path / "plan.csv"]
    argv = [run / "config.json", "--gpus", "1", "2", "5", "24", "--strategies", "ddp", "zero3", "--out", *tables]
    assert training.run(scale.main, argv) == 0
    found = json.loads(tables[0].read_text())
    assert [(row["gpus"], row["strategy"]) for row in found] == [
        *[(1, "single"), (2, "ddp"), (2, "zero3"), (24, "ddp"), (24, "zero3")]
    ]
    with tables[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["step_ms"]) for row in rows] == [row["step_ms"] for row in found]
    lines = training_lines(run)
    pace = 24 * (1 - lines[-1]["data_wait"]) / lines[-1]["images_per_s"]
    assert found[0]["computing_ms"] == pytest.approx(1000 * pace, rel=1e-3)
    state = load_file(run / "model.safetensors")
    numbers = sum(x.numel() for name, x in state.items() if "running_" not in name and "num_batches" not in name)
    assert found[0]["weights_gb"] == pytest.approx(16 * numbers / 1e9, abs=6e-4)
    assert re.search(r"Take \d+ GPUs?", capsys.readouterr().out)  # of the pace of this machine

    assert training.run(scale.main, [*argv, "--micro-batch", "6"]) == 0
    in_parts = json.loads(tables[0].read_text())
    assert in_parts[0]["computing_ms"] == pytest.approx(4 / 3 * found[0]["computing_ms"], rel=1e-3)
    assert in_parts[-1]["computing_ms"] == found[-1]["computing_ms"]  # one row is one part


def training_lines(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["timing"] for line in lines if line["event"] == "train"]


@pytest.mark.slow
def test_a_recipe_is_measured_here(tiny_shards: Path, capsys: pytest.CaptureFixture) -> None:
    settings = ["--shards", tiny_shards, *training.RESNET, "--batch-size", "8", "--batch", "per-gpu"]
    assert training.run(scale.main, ["demo", *settings, "--gpus", "1", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "A batch of 8 of each GPU, by the pace of this processor" in printed
    assert "1,024" in printed


@pytest.mark.slow
def test_a_large_batch_is_planned_by_some_of_its_rows(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of 96 photographs 64 are decoded and trained on; where not even those fit a line says what to do."""
    sizes: list[int] = []
    monkeypatch.setattr(rehearsal.Rehearsal, "seconds", lambda self, rows: sizes.append(len(rows["label"])) or 1.0)
    settings = ["--shards", tiny_shards, *training.RESNET, "--batch-size", "96", "--gpus", "1"]
    assert training.run(scale.main, ["demo", *settings]) == 0
    assert sizes == [64, 32]

    def no_room(self: rehearsal.Rehearsal, rows: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal.Rehearsal, "seconds", no_room)
    capsys.readouterr()
    assert training.run(scale.main, ["demo", *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no room for 64 rows at a time: give --micro-batch 32" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["pepar", "--shards", "s"], "no recipe 'pepar': one of paper, clip"),
        (["demo", "--shards", "s", "--gpu-memory-gb", "0"], "--gpu-memory-gb 0.0: a positive number is needed"),
        (["demo", "--shards", "s", "--overlap", "1.5"], "--overlap 1.5: a share in [0, 1] is needed"),
        (["demo", "--shards", "s", "--gpus", "0"], "--gpus and --strategies: name at least one"),
        (["demo", "--shards", "s", "--out", "plan.txt"], "--out plan.txt: a name ending in .csv, .json"),
        (["demo", "--shards", "/no/such/folder"], "/no/such/folder"),
        (["supcon", "--shards", "s"], "--views 2: only losses between modalities are planned for"),
        (["no/config.json"], "no/config.json: no such file"),
    ],
)
def test_wrong_usage_is_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert commands.run(scale.main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("xcon scale: ")
    assert words in line


@pytest.mark.slow
def test_a_run_is_not_planned_with_other_settings(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert training.run(scale.main, [run / "config.json", "--image-size", "64"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "measured with other settings (--image-size was 32, now 64); give the recipe instead" in line
