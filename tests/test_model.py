"""The contrastive model, and models saved in a run and read again."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from xcon import captions, encoders, model
from xcon.encoders import MetaEncoder, MetaSpec
from xcon.model import ContrastiveModel, ModelSpec, Tower

BIRDS = ("A photo of a Barn Owl", "A photo of an Osprey")
CLASSES = tuple(
    {
        "class_id": i,
        "raw_class_id": raw,
        "name": name,
        "scientific_name": None,
        "hierarchy": ["Birds"],
        "counts": {},
    }
    for i, (raw, name) in enumerate([(81, "Barn Owl"), (295, "Osprey")])
)


def towers() -> dict[str, Tower]:
    torch.manual_seed(0)
    image = encoders.build_image("test_resnet", {}, weights="none", size=32)
    text, _ = encoders.build_text("small-distilbert", BIRDS)
    return {m: Tower(e, 16) for m, e in (("image", image), ("text", text), ("meta", MetaEncoder(MetaSpec(8, 1))))}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "text": captions.tokenise(captions.build_tokenizer(BIRDS), BIRDS),
        "meta": torch.tensor([[10.0, 50.0, 0.3], [-70.0, 40.0, math.nan]]),
    }


def contrastive(temperature: float = 0.007, max_scale: float = 200.0) -> ContrastiveModel:
    return ContrastiveModel(towers(), temperature=temperature, max_scale=max_scale).eval()


def test_a_fixed_temperature_has_no_gradient_and_is_saved_as_the_learned_one_is() -> None:
    fixed, learned = (
        meta_only(temperature=0.1, max_scale=200.0, learn_temperature=learn) for learn in (False, True)
    )
    assert fixed.scale().item() == learned.scale().item() == pytest.approx(10)
    assert not fixed.scale().requires_grad
    assert learned.scale().requires_grad
    assert fixed.state_dict().keys() == learned.state_dict().keys()


def meta_only(**settings: float) -> ContrastiveModel:
    return ContrastiveModel({"meta": Tower(MetaEncoder(MetaSpec(4, 1)), 4)}, **settings)


# ---- the model


def test_embeddings_are_the_projections_at_unit_length() -> None:
    whole = contrastive()
    embeddings, _ = whole(inputs())
    for modality, vectors in embeddings.items():
        tower = whole.towers[modality]
        plain = tower.encoder(inputs()[modality]) @ tower.projection.weight.T + tower.projection.bias
        torch.testing.assert_close(vectors, plain / plain.square().sum(dim=1, keepdim=True).sqrt())
        assert vectors.square().sum(dim=1).tolist() == pytest.approx([1, 1])


def test_modalities_that_are_not_given_are_left_out() -> None:
    whole = contrastive()
    alone, scale = whole({"meta": inputs()["meta"]})
    assert alone.keys() == {"meta"}
    assert torch.equal(alone["meta"], whole(inputs())[0]["meta"])
    assert whole({})[0] == {}
    assert scale.item() == whole({})[1].item()


def test_bf16_towers_are_normalised_in_float32() -> None:
    """bf16 keeps 8 bits: a vector normalised in it is up to 1 in 256 off."""
    whole = contrastive()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, _ = whole(inputs())
    for vectors in embeddings.values():
        assert vectors.dtype == torch.float32
        assert vectors.square().sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_the_scale_starts_at_one_over_the_temperature() -> None:
    assert meta_only(temperature=0.007, max_scale=200.0).scale().item() == pytest.approx(142.857, abs=1e-3)
    assert meta_only(temperature=0.5, max_scale=200.0).scale().item() == pytest.approx(2)


@pytest.mark.parametrize(("wanted", "scale"), [(50.0, 50.0), (200.0, 200.0), (500.0, 200.0)])
def test_the_scale_is_bounded_and_its_gradient_passes(wanted: float, scale: float) -> None:
    """d exp(x) / dx = exp(x): the bounded scale where it is bounded, so that it can come back."""
    module = meta_only(temperature=0.007, max_scale=200.0)
    with torch.no_grad():
        module.log_scale.fill_(math.log(wanted))
    module.scale().backward()
    assert module.scale().shape == ()
    assert module.scale().item() == pytest.approx(scale, rel=1e-5)
    assert module.log_scale.grad is not None
    assert module.log_scale.grad.item() == pytest.approx(scale, rel=1e-5)


# ---- runs


def spec_of(whole: ContrastiveModel) -> ModelSpec:
    return ModelSpec(
        kind="contrastive", method="test", embed_dim=16, hidden=None, classes=CLASSES, shards_sha256="0" * 64,
        **model.specs_of(whole.towers),
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    whole = contrastive()
    model.save(tmp_path, spec_of(whole), model.weights_to_bytes(whole.state_dict()))
    return tmp_path


def test_a_saved_model_comes_back_bit_by_bit(run: Path) -> None:
    spec = model.load_spec(run, kind="contrastive")
    again = ContrastiveModel(model.build_towers(spec), temperature=0.5, max_scale=200.0).eval()
    model.load_weights(run, again)
    before, after = contrastive().state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected, scale = contrastive()(inputs())
    found, same_scale = again(inputs())
    assert scale.item() == same_scale.item()
    assert all(torch.equal(expected[m], found[m]) for m in expected)


def test_a_saved_spec_comes_back(run: Path) -> None:
    spec = model.load_spec(run, kind="contrastive")
    assert json.dumps(dataclasses.asdict(spec)) == json.dumps(dataclasses.asdict(spec_of(contrastive())))
    assert spec.raw_class_ids == [81, 295]
    assert "lon, lat in degrees" in spec.coordinates


def test_one_tower_can_be_loaded_alone(run: Path) -> None:
    tower = Tower(MetaEncoder(MetaSpec(8, 1)), 16)
    model.load_weights(run, tower, prefix="towers.meta.")
    assert torch.equal(tower(inputs()["meta"]), contrastive().towers["meta"](inputs()["meta"]))


def test_a_model_of_another_kind_is_refused(run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a contrastive model \(xcon pretrain\), here one of xcon finetune is needed"
    ):
        model.load_spec(run, kind="classifier")


def edit(name: str, old: str, new: str):
    def spoil(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "model.json").unlink(), "no model.json, so no finished run"),
        (lambda run: (run / "model.json").write_text("{"), "model.json: not JSON"),
        (lambda run: (run / "model.json").write_text("[1]"), "model.json: a JSON object is needed"),
        (edit("model.json", '"kind"', '"king"'), "model.json: not a model of this version of xcon"),
        (edit("model.json", '"backbone"', '"back"'), "model.json: not a model of this version of xcon"),
        (
            edit("model.json", '"contrastive"', '"other"'),
            "a other model .unknown., here one of xcon pretrain is needed",
        ),
    ],
)
def test_a_damaged_spec_is_refused(run: Path, spoil, message: str) -> None:
    spoil(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.load_spec(run, kind="contrastive")


def test_no_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing: no such run folder"):
        model.load_spec(tmp_path / "missing", kind="classifier")


@pytest.mark.parametrize("kept", [0, 5, 1000, -10])
def test_damaged_weights_are_refused(run: Path, kept: int) -> None:
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged, or weights of another model"):
        model.load_weights(run, contrastive())


def test_weights_of_another_model_are_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="damaged, or weights of another model"):
        model.load_weights(run, Tower(MetaEncoder(MetaSpec(9, 1)), 16), prefix="towers.meta.")
    (run / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        model.load_weights(run, contrastive())
