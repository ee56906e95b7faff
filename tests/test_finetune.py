"""What fine-tuning can be asked for, by whole runs of seconds and numbers known otherwise."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tests import training
from xcon import (
    classifier,
    config,
    encoders,
    evaluation,
    finetune,
    images,
    launch,
    maps,
    model,
    predict,
    pretrain,
    start,
)
from xcon.classifier import Product
from xcon.loader import Records, Share, evaluation_loader
from xcon.model import ContrastiveModel
from xcon.records import PAPER_CAPTION, caption
from xcon.shardset import ShardSet

pytestmark = pytest.mark.slow

STEPS = 4  # of an epoch: 96 photographs in batches of 24
SETTINGS = (*training.RESNET, *training.EVERY_STEP, "--batch-size", "24")
STILL = ("--image-lr", "0", "--meta-lr", "0", "--head-lr", "0", "--weight-decay", "0")  # no weight moves


def finetuned(shards: Path, run: Path, *more: str | Path, settings: tuple[str, ...] = SETTINGS) -> Path:
    assert training.run(finetune.main, ["demo", "--shards", shards, "--out", run, *settings, *more]) == 0
    return run


def written(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "model.json").read_text())
    return values


@pytest.fixture(scope="module")
def pretrained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without BatchNorm, whose statistics move where weights do not."""
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    settings = (*training.VIT, "--batch-size", "24", "--epochs", "1")
    assert training.run(pretrain.main, ["demo", "--shards", tiny_shards, "--out", run, *settings]) == 0
    return run


# ---- heads that begin as captions


def zero_shot(run: Path, shards: ShardSet) -> tuple[dict[str, Tensor], Tensor, float]:
    """Unit vectors `[N, D]` of the test records, those `[C, D]` of the class captions, the scale: by the trainer's
    own tokens and towers."""
    spec = model.load_spec(run, kind="contrastive")
    network = ContrastiveModel(model.build_towers(spec), temperature=1.0, max_scale=200.0).eval()
    model.load_weights(run, network)
    assert spec.image is not None
    records = Records(shards.split("test"), ("image", "meta"), images.eval_transform(spec.image))
    (batch,) = evaluation_loader(records, Share(), batch_size=36)
    _, tokenizer = encoders.build_text("small-distilbert", shards.captions)
    texts = encoders.captions.tokenise(tokenizer, [shards.captions[c] for c in shards.class_captions])
    with torch.inference_mode():
        found, scale = network({"image": batch["image"], "meta": batch["meta"], "text": texts})
    return {m: found[m] for m in ("image", "meta")}, found["text"], scale.item()


def test_heads_that_begin_as_captions_are_the_zero_shot_scores(
    pretrained: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """Trained with rates of zero, the experts are those that `evaluation.caption_top1` compares."""
    shards = ShardSet(tiny_shards)
    vectors, captions, scale = zero_shot(pretrained, shards)
    asked = ("--fusion", "product", "--meta-dropout", "0", "--head", "captions", "--keep", "last")
    settings = ("--image-size", "32", "--precision", "fp32", "--workers", "0", "--batch-size", "24")
    run = finetuned(
        tiny_shards, tmp_path / "run", "--init", pretrained, *asked, *STILL, "--epochs", "1", settings=settings
    )
    network, spec = classifier.load(run)
    assert isinstance(network, Product)
    assert spec.hidden is None
    split = shards.split("test")
    assert spec.image is not None
    (batch,) = evaluation_loader(
        Records(split, ("image", "meta"), images.eval_transform(spec.image)), Share(), batch_size=36
    )
    with torch.inference_mode():
        experts = network({m: batch[m] for m in ("image", "meta")})
    known = ~batch["meta"].isnan().all(dim=1)
    for modality, z in vectors.items():
        rows = known if modality == "meta" else torch.ones_like(known)
        expected = (scale * z @ captions.T).log_softmax(dim=1)
        torch.testing.assert_close(experts[modality][rows], expected[rows], rtol=1e-4, atol=1e-4)
    ours = (experts["image"].argmax(dim=1) == batch["label"]).double().mean().item()
    masks = {"image": torch.ones_like(known), "meta": known}
    assert ours == evaluation.caption_top1(vectors, masks, captions, batch["label"])["image_top1"]


def test_captions_that_pre_training_worded_itself(pretrained: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """Its template renders them; the paper's own gives what the shard set has."""
    shards = ShardSet(tiny_shards)
    spec = model.load_spec(pretrained, kind="contrastive")
    plain = start.class_vectors(pretrained, spec, shards)

    def worded(template: str) -> Tensor:
        run = shutil.copytree(pretrained, tmp_path / template.split(maxsplit=1)[0])
        settings = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**settings, "caption": template}))
        return start.class_vectors(run, spec, shards)

    template = PAPER_CAPTION
    assert [caption(template, c) for c in shards.card.classes] == [
        shards.captions[c] for c in shards.class_captions
    ]
    torch.testing.assert_close(worded(template), plain)
    other = worded("{name} of the family {family}")
    torch.testing.assert_close(other.norm(dim=1), plain.norm(dim=1))
    assert not torch.allclose(other, plain)


def test_a_damaged_tokenizer_is_named(pretrained: Path, tiny_shards: Path, tmp_path: Path) -> None:
    run = shutil.copytree(pretrained, tmp_path / "run")
    spec = model.load_spec(run, kind="contrastive")
    (run / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer: damaged"):
        start.class_vectors(run, spec, ShardSet(tiny_shards))
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer: no such folder, the run's tokenizer is missing"):
        start.class_vectors(run, spec, ShardSet(tiny_shards))


@pytest.mark.parametrize("head", [(), ("--head", "captions")])
def test_heads_of_captions_have_no_hidden_layer(
    head: tuple[str, ...], pretrained: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether they are asked for, or are what --init leads to."""
    words = ["demo", "--shards", tiny_shards, "--out", tmp_path / "run", "--init", pretrained, *head]
    product = ["--fusion", "product", "--meta-dropout", "0", "--hidden", "9"]
    assert training.run(finetune.main, [*words, *product]) == 2
    assert "--hidden 9: unused, --head captions has no hidden layer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- average weights


def test_average_weights_by_hand(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After step k the average moves by 1 - min(0.6, 1 - k^(-2/3)) to the weights; after the first it is they."""
    seen: list[dict[str, Tensor]] = []
    update = ModelEmaV3.update

    def recorded(self: ModelEmaV3, network: nn.Module, step: int) -> None:
        assert step == len(seen) + 1
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        update(self, network, step)

    monkeypatch.setattr(ModelEmaV3, "update", recorded)
    run = finetuned(tiny_shards, tmp_path / "run", "--ema", "0.6", "--keep", "last", "--epochs", "2")
    assert len(seen) == 2 * STEPS
    expected = {name: tensor.double() for name, tensor in seen[0].items()}
    for k, weights in enumerate(seen[1:], start=2):
        decay = min(0.6, 1 - k ** (-2 / 3))
        expected = {n: decay * expected[n] + (1 - decay) * weights[n].double() for n in expected}
    found = load_file(run / "model.safetensors")
    for name, tensor in found.items():
        if "sharpness" in name:
            assert tensor.item() == pytest.approx(training.lines(run, "val")[-1]["sharpness"])
        elif "num_batches" not in name:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    last = load_file(run / "checkpoints" / "weights-8.safetensors")
    assert all(torch.equal(found[name], last[name]) for name in found)
    assert not torch.allclose(found["head.4.weight"], seen[-1]["head.4.weight"])


@pytest.mark.parametrize(
    ("kind", "stage", "refused"),
    [
        (DistributedType.NO, None, False),
        (DistributedType.DEEPSPEED, 2, False),
        (DistributedType.DEEPSPEED, 3, True),
        (DistributedType.FSDP, None, True),
    ],
)
def test_weights_in_pieces_have_no_average(kind: DistributedType, stage: int | None, refused: bool) -> None:
    plugin = SimpleNamespace(zero_stage=stage) if stage else None
    accelerator: Any = SimpleNamespace(distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match="--ema: not under ZeRO-3 or FSDP") if refused else nullcontext():
        launch.check_whole(accelerator)


# ---- which weights, and at which size


def scripted(monkeypatch: pytest.MonkeyPatch, *top1: float) -> None:
    """Held-out results epoch by epoch, as if these were found."""
    found = iter(top1)
    monkeypatch.setattr(finetune, "validate", lambda *_: {"top1": next(found), "loss": 1.0})


def kept(run: Path, epoch: int) -> bool:
    """Whether the weights of an epoch are the run's."""
    weights = run / "checkpoints" / f"weights-{STEPS * epoch}.safetensors"
    return weights.is_file() and weights.read_bytes() == (run / "model.safetensors").read_bytes()


def test_the_last_epochs_at_another_size(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four epochs the last two at 48 px: their best is kept, not the first epoch, which was better at 32 px."""
    scripted(monkeypatch, 0.9, 0.1, 0.4, 0.2)
    late = ("--epochs", "4", "--late-size", "48", "--late-epochs", "2")
    run = finetuned(tiny_shards, tmp_path / "run", *late)
    assert kept(run, 3)
    assert written(run)["image"]["size"] == 48
    _, spec = classifier.load(run)
    assert spec.image is not None
    assert images.eval_transform(spec.image)(torch.zeros(3, 60, 70, dtype=torch.uint8)).shape == (3, 48, 48)


def test_the_first_epochs_are_those_of_a_run_without_a_late_size(tiny_shards: Path, tmp_path: Path) -> None:
    """Up to there the schedule is the same, and so is every number."""
    plain = finetuned(tiny_shards, tmp_path / "plain", "--epochs", "3")
    late = finetuned(tiny_shards, tmp_path / "late", "--epochs", "3", "--late-size", "48", "--late-epochs", "1")
    one, two = training.lines(plain), training.lines(late)
    first = [i for i, line in enumerate(one) if line["step"] <= 2 * STEPS]
    assert [one[i] for i in first] == [two[i] for i in first]
    assert one[-2] != two[-2]


@pytest.mark.parametrize(("keep", "epoch"), [("best", 2), ("last", 3)])
def test_the_best_or_the_last_weights_are_kept(
    keep: str, epoch: int, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 0.5, 0.9, 0.4)
    run = finetuned(tiny_shards, tmp_path / "run", "--epochs", "3", "--keep", keep, "--checkpoint-every", "12")
    assert kept(run, epoch)
    last = load_file(run / "checkpoints" / "step-12" / "model.safetensors")
    found = load_file(run / "model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in found.items()) == (keep == "last")


# ---- what pre-training shares


@pytest.mark.parametrize("setting", ["color-jitter", "meta-jitter-km", "meta-jitter-days"])
def test_pre_training_moves_colours_and_places_too(setting: str, tiny_shards: Path, tmp_path: Path) -> None:
    """The first loss, before any weight has moved, is another one."""
    settings = (*training.VIT, *training.EVERY_STEP, "--batch-size", "48", "--epochs", "1")
    argv = ["demo", "--shards", tiny_shards, *settings]
    assert training.run(pretrain.main, [*argv, "--out", tmp_path / "plain"]) == 0
    assert training.run(pretrain.main, [*argv, "--out", tmp_path / "moved", f"--{setting}", "1"]) == 0
    plain, moved = (training.lines(tmp_path / name, "train")[0]["total"] for name in ("plain", "moved"))
    assert plain != moved


# ---- metadata as channels


def test_a_model_with_channels_is_evaluated_and_mapped(tiny_shards: Path, tmp_path: Path) -> None:
    """By `xcon predict` with its controls, by `xcon map` at each place as the model alone says there."""
    run = finetuned(tiny_shards, tmp_path / "run", "--fusion", "channels", "--epochs", "2", "--head-lr", "0.01")
    assert written(run)["image"]["places"] == "wrap"
    assert training.run(predict.main, [run, "--shards", tiny_shards, "--precision", "fp32"]) == 0
    facts = config.read_json(run / "metrics.json")
    assert facts["with_meta"]
    assert facts["without_meta"]["n"] == facts["shuffled_meta"]["n"] == 36

    network, spec = classifier.load(run)
    photo = tmp_path / "bird.jpg"
    photo.write_bytes(ShardSet(tiny_shards).split("test").photo(0))
    held = maps.held_constant(network, spec, photo)
    lon, lat = np.array([-100.0, 20.0]), np.array([50.0, 10.0, -30.0])
    found = maps.species_probability(network, held, [1], lon=lon, lat=lat, date="2026-07-02", batch=4)
    place = torch.tensor([[20.0, 10.0, maps.records.year_fraction("2026-07-02")]])
    with torch.inference_mode():
        alone = network.score({"image": held["image"], "meta": place}).softmax(dim=1)
    assert found.shape == (3, 2)
    assert found[1, 1] == pytest.approx(alone[0, 1].item(), rel=1e-4)
