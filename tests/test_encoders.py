"""Encoders against timm's and transformers' own ways, and a residual block by hand."""

import copy
import dataclasses
import json
import math
import typing
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, CamembertConfig, Gemma3TextConfig

from xcon import captions, encoders, model
from xcon.config import MetaEncoding
from xcon.encoders import ImageEncoder, MetaEncoder, MetaSpec, TextEncoder, TextSpec
from xcon.model import Tower

BIRDS = ("A photo of a Barn Owl", "A photo of an Osprey", "A photo of a Snow Goose (White morph)")


def photographs(rows: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)


def without_gradient(module: nn.Module) -> list[str]:
    """Parameters that the last backward pass did not reach: DDP refuses them."""
    return [name for name, parameter in module.named_parameters() if parameter.grad is None]


# ---- image


def test_normalisation_is_timms() -> None:
    encoder = encoders.build_image("test_resnet", {}, weights="none", size=48)
    seen: list[Tensor] = []
    encoder.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    photos = photographs(2, 48)
    encoder(photos)
    facts = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    transform = timm.data.create_transform((3, 48, 48), mean=facts["mean"], std=facts["std"], crop_pct=1.0)
    expected = torch.stack([transform(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in photos])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)


def test_features_are_those_of_timms_network_without_its_classifier() -> None:
    encoder = encoders.build_image("test_resnet", {}, weights="none", size=48).eval()
    network = timm.create_model("test_resnet", num_classes=10).eval()
    network.load_state_dict(encoder.network.state_dict(), strict=False)
    pixels = (photographs(2, 48) / 255 - torch.tensor(encoder.spec.mean).view(3, 1, 1)) / torch.tensor(
        encoder.spec.std
    ).view(3, 1, 1)
    expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(encoder(photographs(2, 48)), expected, rtol=1e-4, atol=1e-5)
    assert encoder.width == expected.shape[1]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_width_is_that_of_the_features_and_all_parameters_learn(backbone: str) -> None:
    """mobilenetv3 has a layer after the pooling, so that its features are not as wide as its last block."""
    options = {"img_size": "32"} if backbone == "test_vit" else {}
    encoder = encoders.build_image(backbone, options, weights="none", size=32)
    features = encoder(photographs(2, 32))
    assert features.shape == (2, encoder.width)
    features.square().sum().backward()
    assert without_gradient(encoder) == []


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Random weights of test_resnet with a classifier, in a file that says its statistics."""
    torch.manual_seed(8)
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file({n: t.contiguous() for n, t in state.items()}, path, {"mean": "0.1 0.2 0.3", "std": "0.4 0.5 0.6"})
    return path


def test_a_weights_file_is_loaded_and_its_statistics_are_kept(weights: Path) -> None:
    encoder = encoders.build_image("test_resnet", {}, weights=str(weights), size=48).eval()
    torch.manual_seed(8)
    network = timm.create_model("test_resnet", num_classes=7).eval()
    photos = photographs(2, 48)
    pixels = photos / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    pixels /= torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(encoder(photos), expected, rtol=1e-4, atol=1e-5)
    assert (encoder.spec.mean, encoder.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_without_metadata_in_the_file_timms_statistics_stay(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "plain.safetensors")
    encoder = encoders.build_image("test_resnet", {}, weights=str(tmp_path / "plain.safetensors"), size=48)
    assert encoder.spec == encoders.build_image("test_resnet", {}, weights="none", size=48).spec


def test_options_are_read_as_json_where_they_are_json() -> None:
    encoder = encoders.build_image("test_vit", {"img_size": "32", "global_pool": "avg"}, weights="none", size=32)
    assert encoder.spec.options == {"img_size": 32, "global_pool": "avg"}


@pytest.mark.parametrize("encoding", ["wrap", "xyz"])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_channels_of_metadata_say_nothing_at_first(backbone: str, encoding: MetaEncoding) -> None:
    """The features are those of the photograph alone, whatever the place; then the channels learn."""
    options = {"img_size": "32"} if backbone == "test_vit" else {}
    torch.manual_seed(6)
    plain = encoders.build_image(backbone, options, weights="none", size=32).eval()
    torch.manual_seed(6)
    wide = encoders.build_image(backbone, options, weights="none", size=32, places=encoding).eval()
    photos, places = photographs(3, 32), torch.tensor([[10.0, 50.0, 0.3], [math.nan] * 3, [-70.0, 40.0, 0.9]])
    torch.testing.assert_close(wide(photos, places), plain(photos), rtol=1e-5, atol=1e-6)
    wide(photos, places).square().sum().backward()
    assert without_gradient(wide) == []
    first = next(p for p in wide.network.parameters() if p.ndim == 4 and p.shape[1] == wide.channels)
    assert wide.channels == 3 + {"wrap": 6, "xyz": 5}[encoding]
    assert first.grad is not None
    assert first.grad[:, 3:].any()


def test_channels_of_metadata_are_constant_over_the_photograph() -> None:
    """Each is one feature of `geotime.encode`, and 0 where nothing is known."""
    encoder = encoders.build_image("test_resnet", {}, weights="none", size=32, places="wrap")
    seen: list[Tensor] = []
    encoder.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    places = torch.tensor([[30.0, 15.0, 7 / 12], [math.nan] * 3])
    encoder(photographs(2, 32), places)
    root = math.sqrt(3) / 2
    expected = torch.tensor([[0.5, 0.5, root, root, 0.5, root], [0.0] * 6])
    torch.testing.assert_close(seen[0][:, 3:], expected[:, :, None, None].expand(-1, -1, 32, 32))


def test_channels_of_metadata_leave_the_weights_of_a_file_as_they_are(weights: Path) -> None:
    encoder = encoders.build_image("test_resnet", {}, weights=str(weights), size=48, places="wrap").eval()
    plain = encoders.build_image("test_resnet", {}, weights=str(weights), size=48).eval()
    photos, places = photographs(2, 48), torch.tensor([[10.0, 50.0, 0.3], [-70.0, 40.0, 0.9]])
    torch.testing.assert_close(encoder(photos, places), plain(photos), rtol=1e-5, atol=1e-6)
    assert encoder.spec == dataclasses.replace(plain.spec, places="wrap")
    again = ImageEncoder(encoder.spec).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(photos, places), encoder(photos, places))


def test_a_network_that_takes_no_further_channels_is_refused() -> None:
    """tresnet folds 4 x 4 pixels into channels before its first layer: their order would change."""
    with pytest.raises(ValueError, match=r"--image-backbone tresnet_m: its .* takes no further channels"):
        encoders.build_image("tresnet_m", {}, weights="none", size=64, places="wrap")


def test_the_spec_rebuilds_the_encoder() -> None:
    encoder = encoders.build_image("test_vit", {"img_size": "32"}, weights="none", size=32).eval()
    again = ImageEncoder(encoder.spec).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(photographs(2, 32)), encoder(photographs(2, 32)))


@pytest.mark.parametrize(
    ("backbone", "options", "given", "message"),
    [
        ("no_such_network", {}, "none", "--image-backbone no_such_network: timm refuses it"),
        ("test_resnet", {"no_such_option": "1"}, "none", "--image-backbone test_resnet: timm refuses it"),
        ("test_resnet", {}, "missing.safetensors", "--image-weights .*missing.safetensors: no such file"),
        ("test_resnet", {}, "text.safetensors", "--image-weights .*text.safetensors: not a safetensors file"),
        (
            "test_vit",
            {},
            "weights.safetensors",
            r"not weights of this network, it has no \w+ \(\d+ of \d+ tensors",
        ),
        ("test_byobnet", {}, "imagenet", "ImageNet weights of test_byobnet are not in the local cache"),
    ],
)
def test_what_does_not_fit_is_refused(
    weights: Path, backbone: str, options: dict[str, str], given: str, message: str
) -> None:
    (weights.parent / "text.safetensors").write_text("not weights")
    path = str(weights.parent / given) if given.endswith(".safetensors") else given
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        encoders.build_image(backbone, options, weights=path, size=48)


# ---- text


@pytest.fixture(scope="module")
def text() -> tuple[TextEncoder, Tensor]:
    """An encoder in float64 and the tokens of three captions."""
    torch.manual_seed(0)
    encoder, tokenizer = encoders.build_text("small-distilbert", BIRDS)
    return encoder.double(), captions.tokenise(tokenizer, BIRDS)


def one_by_one(encoder: TextEncoder, tokens: Tensor) -> Tensor:
    """Every caption alone and without its padding."""
    rows = [row[row != encoder.spec.pad_id] for row in tokens]
    states = [encoder.network(input_ids=row[None]).last_hidden_state[0] for row in rows]
    return torch.stack([s[0] if encoder.spec.pooling == "cls" else s.mean(dim=0) for s in states])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_captions_in_a_batch_have_the_vectors_they_have_alone(
    text: tuple[TextEncoder, Tensor], pooling: str
) -> None:
    encoder, tokens = text
    pooled = TextEncoder(TextSpec(encoder.spec.config, encoder.spec.pad_id, pooling), encoder.network)
    rows = tokens[[0, 2, 0, 1, 2, 0]]
    assert (tokens == encoder.spec.pad_id).any()
    torch.testing.assert_close(pooled(rows), one_by_one(pooled, rows), rtol=1e-10, atol=1e-10)


def test_equal_captions_are_encoded_once(text: tuple[TextEncoder, Tensor]) -> None:
    encoder, tokens = text
    seen: list[int] = []
    hook = encoder.network.register_forward_pre_hook(
        lambda _, __, named: seen.append(len(named["input_ids"])), with_kwargs=True
    )
    vectors = encoder(tokens[[0, 2, 0, 0, 2, 0]])
    hook.remove()
    assert seen == [2]
    assert torch.equal(vectors[0], vectors[5])
    assert not torch.allclose(vectors[0], vectors[1])


def test_gradients_of_equal_captions_add_up(text: tuple[TextEncoder, Tensor]) -> None:
    encoder, tokens = text
    encoder.zero_grad()
    encoder(tokens[[0, 0, 0, 1]]).sum().backward()
    found = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    (3 * encoder(tokens[:1]).sum() + encoder(tokens[1:2]).sum()).backward()
    expected = [p.grad for p in encoder.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
NETWORKS = {
    "bert": (BertConfig(**SMALL), 0),
    # Counts positions from its padding's id on: ids that are renumbered would stand elsewhere.
    "camembert": (CamembertConfig(**SMALL, pad_token_id=1), 1),
    # Scales its token embeddings in the table's own forward.
    "gemma": (Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, pad_token_id=0), 0),
}


@pytest.fixture(params=NETWORKS)
def whole_and_tokens(request: pytest.FixtureRequest) -> tuple[TextEncoder, Tensor]:
    """A network with 100 rows of vocabulary, and two captions of five of its tokens, the padding among them."""
    torch.manual_seed(6)
    config, pad = NETWORKS[request.param]
    encoder = TextEncoder(TextSpec(config.to_dict(), pad, "mean"), AutoModel.from_config(config)).train()
    return encoder, torch.tensor([[5, 55, 97, 3], [5, 55, 3, pad]])


def five_steps(encoder: TextEncoder, tokens: Tensor) -> Tensor:
    """AdamW without weight decay on an arbitrary loss; the vectors at the end."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        (encoder(tokens) * torch.linspace(-1, 1, encoder.width)).exp().sum().backward()
        optimizer.step()
    return encoder(tokens).detach()


def test_a_pruned_vocabulary_learns_the_same_bit_for_bit(whole_and_tokens: tuple[TextEncoder, Tensor]) -> None:
    """Rows without gradient do not move; the other 5 of 100 do what they do in the whole table."""
    whole, tokens = whole_and_tokens
    before = whole.network.get_input_embeddings().weight.detach().clone()
    pruned = copy.deepcopy(whole)
    pruned.prune(tokens)
    assert pruned.network.get_input_embeddings().weight.shape == (5, 16)
    assert torch.equal(five_steps(pruned, tokens), five_steps(whole, tokens))
    restored = pruned.restored({})
    assert restored.keys() == whole.state_dict().keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in whole.state_dict().items())
    table = next(tensor for name, tensor in restored.items() if tensor.shape == (100, 16))
    moved = (table != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [3, 5, 55, 97]  # the padding is never looked at


def test_a_pruned_encoder_refuses_tokens_it_left_out(whole_and_tokens: tuple[TextEncoder, Tensor]) -> None:
    encoder, tokens = whole_and_tokens
    encoder.prune(tokens)
    with pytest.raises(IndexError):
        encoder(torch.tensor([[5, 56, 3, 3]]))


def test_a_frozen_text_encoder_is_encoded_once_and_saved_whole() -> None:
    """The tower gets vectors, has no parameters of the encoder, and the saved weights have all of them."""
    torch.manual_seed(0)
    text = encoders.text_for("small-distilbert", BIRDS, frozen=True, device=torch.device("cpu"))
    tokens = captions.tokenise(text.tokenizer, BIRDS)
    assert torch.equal(text.inputs, text.encoder(tokens))
    assert not text.inputs.requires_grad
    tower = Tower(text.tower, 8)
    assert [name for name, _ in tower.named_parameters()] == ["projection.weight", "projection.bias"]
    trained = {f"towers.text.{name}": tensor for name, tensor in tower.state_dict().items()}
    saved = safetensors.torch.load(model.with_whole_text(model.weights_to_bytes(trained), text.encoder))
    again = Tower(TextEncoder(text.encoder.spec), 8)
    again.load_state_dict({name.removeprefix("towers.text."): tensor for name, tensor in saved.items()})
    assert torch.equal(again(tokens), tower(text.inputs))


def test_there_is_no_dropout_in_training(text: tuple[TextEncoder, Tensor]) -> None:
    encoder, tokens = text
    evaluated = encoder.eval()(tokens)
    encoder.train()
    assert torch.equal(encoder(tokens), evaluated)


def test_all_parameters_learn_also_those_of_a_model_with_a_pooler() -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    encoder = TextEncoder(TextSpec(config.to_dict(), 0, "cls"), BertModel(config)).train()
    tokens = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    assert torch.equal(encoder(tokens), encoder(tokens))
    encoder(tokens).square().sum().backward()
    assert without_gradient(encoder) == []


def test_the_spec_survives_json_and_rebuilds_the_encoder(text: tuple[TextEncoder, Tensor]) -> None:
    encoder, tokens = text
    config = json.loads(json.dumps(encoder.spec.config))
    again = TextEncoder(TextSpec(config, encoder.spec.pad_id, encoder.spec.pooling)).double()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(tokens), encoder(tokens))


def test_a_folder_with_a_model_is_read(text: tuple[TextEncoder, Tensor], tmp_path: Path) -> None:
    encoder, tokens = text
    encoder.network.save_pretrained(tmp_path)
    captions.build_tokenizer(BIRDS).save_pretrained(tmp_path)
    again, tokenizer = encoders.build_text(str(tmp_path), BIRDS)
    assert torch.equal(captions.tokenise(tokenizer, BIRDS), tokens)
    torch.testing.assert_close(again.double()(tokens), encoder(tokens))


def test_a_text_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("nobody/no-such-model", str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(FileNotFoundError, match=f"--text-model {name}: no folder with a model"):
            encoders.build_text(name, BIRDS)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    captions.build_tokenizer(BIRDS).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"--text-model {tmp_path}: no folder with a model"):
        encoders.build_text(str(tmp_path), BIRDS)


def test_a_folder_with_damaged_weights_is_refused(text: tuple[TextEncoder, Tensor], tmp_path: Path) -> None:
    text[0].network.save_pretrained(tmp_path)
    captions.build_tokenizer(BIRDS).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"--text-model {tmp_path}: its weights are damaged"):
        encoders.build_text(str(tmp_path), BIRDS)


def test_captions_too_long_for_the_model_are_refused() -> None:
    """70 words, [CLS] and [SEP] are 72 tokens."""
    with pytest.raises(
        ValueError, match="the longest caption has 72 tokens, --text-model small-distilbert takes 64"
    ):
        encoders.build_text("small-distilbert", ["bird " * 70])


# ---- metadata


def test_metadata_encoder_by_hand() -> None:
    """Width 2, one block. The first layer takes sine and cosine of the longitude, 1/2 and sqrt(3)/2 at 30 degrees.

    The block doubles the first (through ReLU) and turns the sign of the second, which ReLU then cuts off:
    x + block(x) = (1/2 + 1, sqrt(3)/2 + 0). At -30 degrees the first layer's ReLU leaves (0, sqrt(3)/2).
    """
    encoder = MetaEncoder(MetaSpec(width=2, depth=1))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.first[0].weight[0, 0] = encoder.first[0].weight[1, 2] = 1
        block = encoder.blocks[0].layers
        block[0].weight.copy_(torch.eye(2))
        block[2].weight.copy_(torch.diag(torch.tensor([2.0, -1.0])))
    found = encoder(torch.tensor([[30.0, 0.0, 0.5], [-30.0, 0.0, 0.5]]))
    expected = torch.tensor([[1.5, math.sqrt(3) / 2], [0.0, math.sqrt(3) / 2]])
    torch.testing.assert_close(found, expected)


def test_metadata_encoder_has_its_depth_and_is_finite_without_metadata() -> None:
    encoder = MetaEncoder(MetaSpec(width=8, depth=3))
    assert sum(isinstance(m, nn.Linear) for m in encoder.modules()) == 1 + 2 * 3
    found = encoder(torch.tensor([[np.nan] * 3, [10.0, 50.0, np.nan]]))
    assert found.isfinite().all()
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("encoding", typing.get_args(MetaEncoding))
def test_every_encoding_of_places_can_be_learned(encoding: MetaEncoding) -> None:
    """A linear layer on the encoder learns which of three places a record is from; unknown rows stay finite."""
    torch.manual_seed(0)
    encoder = MetaEncoder(MetaSpec(width=16, depth=2, encoding=encoding))
    head = torch.nn.Linear(16, 3)
    labels = torch.arange(3).repeat(20)
    places = torch.tensor([[10.0, 50.0, 0.5], [-100.0, 40.0, 0.2], [30.0, -20.0, 0.9]])[labels]
    places = places + torch.randn(60, 3) * torch.tensor([3.0, 3.0, 0.02])
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(encoder(places)), labels).backward()
        optimizer.step()
    assert (head(encoder(places)).argmax(dim=1) == labels).float().mean() > 0.95
    assert encoder(torch.full((1, 3), np.nan)).isfinite().all()


def test_the_network_of_sines_by_hand() -> None:
    """Width 1, one block: sin(w sin(30 (a f))), where f is the first harmonic, 1 / sqrt(4 pi), and no bias."""
    encoder = MetaEncoder(MetaSpec(width=1, depth=1, encoding="harmonics"))
    bound = 1 / 102
    assert encoder.first.linear.weight.abs().max() <= bound < 1.1 * encoder.first.linear.weight.abs().max()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.first.linear.weight[0, 0], encoder.blocks[0].linear.weight[0, 0] = 0.1, 2.0
    expected = math.sin(2 * math.sin(30 * 0.1 / math.sqrt(4 * math.pi)))
    assert encoder(torch.tensor([[12.0, 34.0, 0.5]])).item() == pytest.approx(expected, abs=1e-5)
