"""Two processes compute what one does: the loss, its gradients, a whole trajectory."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 - the test starts the processes, gather.py uses them
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests import training
from xcon import captions, encoders, gather, images, model, pretrain
from xcon.geotime import known
from xcon.loader import Batch, Records, Share, make_loader, present
from xcon.model import Tower
from xcon.sampler import Order
from xcon.shardset import ShardSet

pytestmark = pytest.mark.slow

BATCH, STEPS, RATE = 48, 2, 1e-2  # both batches of an epoch: every training record once
MODALITIES = ("image", "text", "meta")


def towers(shards: ShardSet) -> tuple[dict[str, Tower], torch.Tensor]:
    """The real encoders, small and without BatchNorm, and the tokens of the captions."""
    image = encoders.build_image("test_vit", {"img_size": "32"}, weights="none", size=32)
    text, tokenizer = encoders.build_text("small-distilbert", shards.captions)
    meta = encoders.MetaEncoder(encoders.MetaSpec(width=64, depth=2))
    made = {"image": Tower(image, 32), "text": Tower(text, 32), "meta": Tower(meta, 32)}
    return made, captions.tokenise(tokenizer, shards.captions)


def two_steps(folder: Path, share: Share) -> dict[str, Any]:
    """Losses of two SGD steps in float64 and the parameters after each, on this process's rows."""
    torch.manual_seed(0)
    shards = ShardSet(folder)
    made, tokens = towers(shards)
    contrastive = model.ContrastiveModel(made, temperature=0.07, max_scale=200.0).double()
    wrapped = DistributedDataParallel(contrastive) if share.world_size > 1 else contrastive
    spec = made["image"].encoder.spec
    records = Records(
        shards.split("train"), MODALITIES, images.train_transform(spec, crop_scale=0.35), tokens, seed=3
    )
    optimizer = torch.optim.SGD(contrastive.parameters(), lr=RATE)

    def parameters() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in contrastive.named_parameters()}

    found: dict[str, Any] = {"before": parameters(), "losses": [], "after": [], "without_meta": 0}
    batches = make_loader(records, Order(len(records.split), BATCH, 0), share, steps=range(STEPS))
    for batch in batches:
        terms, scale = loss_of(wrapped, batch)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        found["losses"].append({name: term.item() for name, term in terms.items()} | {"scale": scale.item()})
        found["after"].append(parameters())
        found["without_meta"] += int((~known(batch["meta"])).sum())
    return found


def loss_of(wrapped: torch.nn.Module, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    embeddings, scale = wrapped({m: batch[m] for m in MODALITIES})
    return gather.cross_contrastive(embeddings, batch["label"], scale, present=present(batch)), scale


def worker(rank: int, folder: Path, meeting: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting / 'point'}", rank=rank, world_size=2)
    torch.save(two_steps(folder, Share(rank, 2)), meeting / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_loss_and_parameters_equal_in_float64(tiny_shards: Path, tmp_path: Path) -> None:
    """The loss of the global batch, its terms, and what two SGD steps make of every parameter.

    A gather without gradient, a missing factor W, a mask of local rows or a mean of local losses each miss
    1e-6 by orders of magnitude: the parameters move by more than 1e-2.
    """
    multiprocessing.spawn(worker, (tiny_shards, tmp_path), nprocs=2)
    one = two_steps(tiny_shards, Share())
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]

    assert one["without_meta"] == sum(rank["without_meta"] for rank in ranks) > 0
    losses = max(
        abs(rank["losses"][step][name] - value)
        for rank in ranks
        for step in range(STEPS)
        for name, value in one["losses"][step].items()
    )
    distance = {
        name: max((rank["after"][step][name] - p[name]).abs().max().item() for rank in ranks)
        for step, p in enumerate(one["after"])
        for name in p
    }
    moved = {name: (p - one["before"][name]).abs().max().item() for name, p in one["after"][0].items()}
    print(f"float64: losses within {losses:.1e}, parameters within {max(distance.values()):.1e},")  # noqa: T201
    print(f"log_scale within {distance['log_scale']:.1e}; it moved by {moved['log_scale']:.1e}")  # noqa: T201
    assert losses < 1e-6
    assert max(distance.values()) < 1e-6
    assert max(moved.values()) > 1e-2
    assert moved["log_scale"] > 1e-6


def test_the_same_trajectory_in_float32(tiny_shards: Path, tmp_path: Path) -> None:
    """54 steps of the real command by one and by two processes: every logged number within 1e-4.

    `test_launch.py` compares the strategies of `accelerate_configs/` with one another; this one is the bound.
    The network has no BatchNorm, whose statistics are those of each process's own rows.
    """
    settings = ["--shards", tiny_shards, *training.VIT, *training.EVERY_STEP, "--batch-size", "16"]
    argv = ["demo", *settings, "--epochs", "9", "--image-lr", "1e-4", "--meta-lr", "5e-5", "--text-lr", "1e-5"]
    assert training.run(pretrain.main, [*argv, "--out", tmp_path / "one"]) == 0
    training.torchrun("pretrain", *argv, "--out", tmp_path / "two")

    one, two = (training.lines(tmp_path / name, "train") for name in ("one", "two"))
    assert len(one) == 54
    deviation = training.largest_deviation(two, one)
    print(f"float32, 54 steps: {', '.join(f'{n} {d:.1e}' for n, d in deviation.items())}")  # noqa: T201
    losses = {name: d for name, d in deviation.items() if "->" in name or name in ("total", "scale")}
    assert len(losses) == 8
    assert max(losses.values()) < 1e-4
    assert one[-1]["scale"] != pytest.approx(one[0]["scale"], abs=1e-2)  # the temperature is learned
    held_out = training.largest_deviation(
        training.lines(tmp_path / "two", "val"), training.lines(tmp_path / "one", "val")
    )
    assert held_out["loss"] < 1e-4


def test_views_in_groups_and_parts_have_the_same_trajectory(tiny_shards: Path, tmp_path: Path) -> None:
    """15 steps of supervised contrastive learning: in one process, and in two that encode 3 photographs at a time.

    The last batch of an epoch has 16 records and 4 rows that fill it up. The loss falls, the temperature stays.
    """
    settings = ["--shards", tiny_shards, *training.VIT, *training.EVERY_STEP, "--batch-size", "20"]
    argv = ["supcon", *settings, "--per-class", "4", "--epochs", "3", "--patience", "0"]
    assert training.run(pretrain.main, [*argv, "--out", tmp_path / "one"]) == 0
    training.torchrun("pretrain", *argv, "--micro-batch", "3", "--out", tmp_path / "two")

    one, two = (training.lines(tmp_path / name, "train") for name in ("one", "two"))
    assert len(one) == 15
    deviation = training.largest_deviation(two, one)
    assert deviation["total"] < 1e-4
    assert [line["scale"] for line in two] == pytest.approx([10] * 15)
    held_out = [training.lines(tmp_path / name, "val") for name in ("one", "two")]
    assert training.largest_deviation(*held_out)["loss"] < 1e-4
    assert held_out[0][-1]["loss"] < held_out[0][0]["loss"]
