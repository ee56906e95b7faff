"""The classifier by hand, and what it does where metadata is missing."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xcon import classifier, encoders, evaluation, model
from xcon.classifier import Channels, Concatenation, Product, Similarity
from xcon.config import MetaEncoding
from xcon.encoders import MetaEncoder, MetaSpec
from xcon.model import ModelSpec, Tower

NAN = math.nan
CLASSES = tuple({"class_id": i, "raw_class_id": i + 5, "name": f"bird {i}"} for i in range(3))
PLACES = torch.tensor([[10.0, 50.0, 0.3], [NAN, NAN, NAN], [NAN, NAN, 0.6], [-70.0, 40.0, NAN]])


def towers() -> dict[str, Tower]:
    torch.manual_seed(0)
    image = encoders.build_image("test_resnet", {}, weights="none", size=32)
    return {"image": Tower(image, 6), "meta": Tower(MetaEncoder(MetaSpec(8, 1)), 6)}


def photos() -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def network() -> Concatenation:
    torch.manual_seed(2)
    made = Concatenation(towers(), embed_dim=6, hidden=5, classes=3).eval()
    with torch.no_grad():
        made.absent.copy_(torch.arange(6) / 3)
    return made


def test_two_layers_by_hand() -> None:
    """One number per modality: hidden = relu((i + m, i - m)), scores = (h1 + 1, 2 h2).

    (3, 1): hidden (4, 2), scores (5, 4). (1, 2): hidden (3, 0), scores (4, 0).
    """
    made = Concatenation({"image": nn.Identity(), "meta": nn.Identity()}, embed_dim=1, hidden=2, classes=2)
    with torch.no_grad():
        made.head[1].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        made.head[1].bias.zero_()
        made.head[4].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        made.head[4].bias.copy_(torch.tensor([1.0, 0.0]))
    embeddings = {"meta": torch.tensor([[1.0], [2.0]]), "image": torch.tensor([[3.0], [1.0]])}
    assert made.classify(embeddings).tolist() == [[5, 4], [4, 0]]


def test_scores_are_those_of_the_concatenated_embeddings() -> None:
    made = network()
    found = made.score({"image": photos(), "meta": PLACES})
    image, meta = made.towers["image"](photos()), made.towers["meta"](PLACES)
    meta = torch.stack([meta[0], made.absent, meta[2], meta[3]])
    torch.testing.assert_close(found, made.head(torch.cat([image, meta], dim=1)))


def test_the_absent_vector_stands_exactly_where_nothing_is_known() -> None:
    made = network()
    found = made.embed("meta", PLACES)
    assert torch.equal(found[1], made.absent)
    assert torch.equal(found[[0, 2, 3]], made.towers["meta"](PLACES)[[0, 2, 3]])


def test_the_absent_vector_learns_from_those_rows_alone() -> None:
    """The gradient of the sum is 1 for every row that stands in for it."""
    made = network()
    made.embed("meta", PLACES[[0, 1, 1, 2]]).sum().backward()
    assert made.absent.grad is not None
    assert made.absent.grad.tolist() == [2.0] * 6
    made.zero_grad()
    made.embed("meta", PLACES[:1]).sum().backward()
    assert made.absent.grad is None or made.absent.grad.tolist() == [0.0] * 6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.towers["meta"].parameters())


def test_an_image_classifier_needs_no_metadata() -> None:
    made = Concatenation({"image": towers()["image"]}, embed_dim=6, hidden=5, classes=3).eval()
    assert not hasattr(made, "absent")
    torch.testing.assert_close(made.score({"image": photos()}), made.head(made.towers["image"](photos())))


def test_dropout_is_before_each_layer_and_off_in_evaluation() -> None:
    made = Concatenation(towers(), embed_dim=6, hidden=5, classes=3, dropout=0.5)
    batch = {"image": photos(), "meta": PLACES}
    assert [m.p for m in made.head if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    made.eval()
    assert torch.equal(made.score(batch), made.score(batch))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = network()
    spec = ModelSpec(
        kind="classifier", method="test", embed_dim=6, hidden=5, classes=CLASSES, shards_sha256="0" * 64,
        **model.specs_of(made.towers),
    )  # fmt: skip
    model.save(tmp_path, spec, model.weights_to_bytes(made.state_dict()))
    return tmp_path


def test_a_saved_classifier_comes_back(run: Path) -> None:
    again, spec = classifier.load(run)
    batch = {"image": photos(), "meta": PLACES}
    assert not again.training
    assert torch.equal(again.score(batch), network().score(batch))
    assert torch.equal(again.absent, network().absent)
    assert spec.raw_class_ids == [5, 6, 7]


def test_the_order_of_the_modalities_comes_back(tmp_path: Path) -> None:
    """Concatenated as in training, also where that began with the metadata."""
    made = towers()
    turned = {"meta": made["meta"], "image": made["image"]}
    spec = ModelSpec(
        kind="classifier", method="test", embed_dim=6, hidden=5, classes=CLASSES, shards_sha256="0" * 64,
        **model.specs_of(turned),
    )  # fmt: skip
    trained = classifier.build(spec, turned, prior=torch.ones(3) / 3).eval()
    model.save(tmp_path, spec, model.weights_to_bytes(trained.state_dict()))
    again, _ = classifier.load(tmp_path)
    batch = {"image": photos(), "meta": PLACES}
    torch.testing.assert_close(again.score(batch), trained.score(batch))


# --------------------------------------------------------------------------------------------------------
# The product of experts

IMAGE, META = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.2, 0.8]]).log()


def product(doubt: float) -> Product:
    """Of two equally frequent classes."""
    torch.manual_seed(3)
    return Product(towers(), embed_dim=6, hidden=5, prior=torch.tensor([0.5, 0.5]), doubt=doubt).eval()


@pytest.mark.parametrize(
    ("doubt", "sharpness", "expected"),
    [
        (0.0, 1.0, (0.6 * 0.4, 0.4 * 1.6)),  # p(y | meta) / p(y) is 0.4 and 1.6
        (0.5, 1.0, (0.6 * 0.7, 0.4 * 1.3)),  # half of the way to 1
        (0.0, 2.0, (0.36 * 0.4, 0.16 * 1.6)),
    ],
)
def test_bayes_by_hand(doubt: float, sharpness: float, expected: tuple[float, float]) -> None:
    made = product(doubt)
    made.sharpness.fill_(sharpness)
    found = made.classify({"image": IMAGE, "meta": META}).softmax(dim=1)[0]
    torch.testing.assert_close(found, torch.tensor(expected) / sum(expected))


def test_a_photograph_alone_is_left_as_it_is() -> None:
    """No metadata, no say: the posterior is the image's own, and the metadata expert learns nothing of it."""
    made = product(0.2)
    photo, places = photos()[:1], torch.full((1, 3), NAN)
    trained = made({"image": photo, "meta": places})
    torch.testing.assert_close(made.combine(trained).softmax(dim=1), trained["image"].exp())
    trained["meta"].sum().requires_grad_().backward()
    assert all(p.grad is None or not p.grad.any() for p in made.parameters())


def test_a_wrong_place_counts_for_no_less_than_the_doubt() -> None:
    """A place that excludes the class costs it a factor of the doubt, and the other gains at most 2 - doubt."""
    made = product(0.1)
    sure = torch.tensor([[0.99, 0.01]]).log()
    excluded = torch.tensor([[1e-30, 1.0]]).log()
    odds = made.classify({"image": sure, "meta": excluded}).softmax(dim=1)[0]
    torch.testing.assert_close(odds[0] / odds[1], torch.tensor(99 * 0.1 / 1.9))


def test_a_class_that_a_place_excludes_stays_possible() -> None:
    """e^-200 is no number of float32: the wrong one of two classes costs a finite surprise, the gradient too."""
    made = product(0.0)
    meta = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    found = made.combine({"image": IMAGE, "meta": meta})
    tiny = math.log(torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(found[0, 0] - found[0, 1], torch.tensor(math.log(1.5) + tiny - math.log(2)))
    torch.nn.functional.cross_entropy(found, torch.tensor([0])).backward()
    assert meta.grad is not None
    assert meta.grad.isfinite().all()
    made.calibrate({"image": IMAGE, "meta": meta.detach()}, torch.tensor([0]))
    assert math.log(0.05) < math.log(made.sharpness.item()) < math.log(20)


def test_calibration_finds_the_temperature() -> None:
    """Scores (z, -z) that are right eight times in ten: 1 / (1 + exp(-2 a z)) = 0.8 at a = ln 4 / (2 z)."""
    made = Concatenation(towers(), embed_dim=6, hidden=5, classes=2)
    scores = torch.tensor([[3.0, -3.0]]).expand(10_000, 2)
    made.calibrate({"joint": scores}, torch.tensor([0] * 8_000 + [1] * 2_000))
    assert made.sharpness.item() == pytest.approx(math.log(4) / 6, rel=1e-3)
    assert torch.equal(made.combine({"joint": scores}), made.sharpness * scores)


def test_calibration_keeps_its_head_where_all_is_right() -> None:
    """Ten of ten: without the expectation a -> infinity. With it 10 * 2 z p(wrong) = log(a) / a."""
    made = Concatenation(towers(), embed_dim=6, hidden=5, classes=2)
    made.calibrate({"joint": torch.tensor([[2.0, -2.0]]).expand(10, 2)}, torch.zeros(10, dtype=torch.long))
    a = made.sharpness.item()
    assert 1 < a < 2
    assert 10 * 4 / (1 + math.exp(4 * a)) == pytest.approx(math.log(a) / a, rel=1e-3)


def test_calibration_leaves_the_metadata_as_it_is() -> None:
    """The image says nothing, so any sharpness does; the metadata's odds are those it was given."""
    made = product(0.0)
    flat = torch.full((4, 2), 0.5).log()
    made.calibrate({"image": flat, "meta": META.expand(4, 2)}, torch.tensor([1, 1, 1, 0]))
    torch.testing.assert_close(made.classify({"image": flat[:1], "meta": META}).softmax(dim=1), META.exp())


def test_a_saved_product_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(4)
    prior = torch.tensor([0.5, 0.3, 0.2])
    made = Product(towers(), embed_dim=6, hidden=5, prior=prior, doubt=0.25).eval()
    made.sharpness.fill_(1.5)
    spec = ModelSpec(
        kind="classifier", method="test", embed_dim=6, hidden=5, classes=CLASSES, shards_sha256="0" * 64,
        fusion="product", **model.specs_of(made.towers),
    )  # fmt: skip
    model.save(tmp_path, spec, model.weights_to_bytes(made.state_dict()))
    again, _ = classifier.load(tmp_path)
    batch = {"image": photos(), "meta": PLACES}
    assert isinstance(again, Product)
    assert (again.doubt.item(), again.sharpness.item()) == (0.25, 1.5)
    torch.testing.assert_close(again.log_prior.exp(), prior)
    assert torch.equal(again.score(batch), made.score(batch))


def test_a_product_trained_jointly_by_hand() -> None:
    """In training there is Bayes' posterior too, whatever the sharpness; elsewhere only the experts."""
    torch.manual_seed(3)
    made = Product(towers(), embed_dim=6, hidden=5, prior=torch.tensor([0.5, 0.5]), doubt=0.5, joint=True)
    made.sharpness.fill_(7.0)
    found = made.trained({"image": IMAGE, "meta": META})
    expected = torch.tensor([0.6 * 0.7, 0.4 * 1.3])
    torch.testing.assert_close(found["joint"].softmax(dim=1)[0], expected / expected.sum())
    assert list(made.eval().trained({"image": IMAGE, "meta": META})) == ["image", "meta"]


# --------------------------------------------------------------------------------------------------------
# Heads that begin as captions


def test_similarities_by_hand() -> None:
    """(3, 4) has the direction (0.6, 0.8); class vectors (10, 0) and (0, 5) give 6 and 4, whatever its length."""
    head = Similarity(2, 2, dropout=0.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[10.0, 0.0], [0.0, 5.0]]))
    torch.testing.assert_close(head(torch.tensor([[3.0, 4.0], [300.0, 400.0]])), torch.tensor([[6.0, 4.0]] * 2))


def test_heads_begin_as_captions_and_learn() -> None:
    """Of three classes in four dimensions; the experts are the softmax of unit vectors times captions."""
    torch.manual_seed(5)
    made = Product(towers(), embed_dim=6, hidden=None, prior=torch.ones(3) / 3, doubt=0.1).eval()
    captions = torch.randn(3, 6) * 4
    made.begin_as(captions)
    batch = {"image": photos(), "meta": PLACES}
    found = made(batch)
    for modality, x in batch.items():
        z = made.towers[modality](x)
        expected = (z / z.norm(dim=1, keepdim=True) @ captions.T).log_softmax(dim=1)
        known = [0, 2, 3]  # row 1 has no metadata
        torch.testing.assert_close(found[modality][known], expected[known])
    sum(scores[:, 0].sum() for scores in found.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in made.heads.parameters())


def test_a_saved_product_that_began_as_captions_comes_back(tmp_path: Path) -> None:
    made = Product(towers(), embed_dim=6, hidden=None, prior=torch.ones(3) / 3, doubt=0.0).eval()
    made.begin_as(torch.arange(18.0).view(3, 6) / 18)
    spec = ModelSpec(
        kind="classifier", method="test", embed_dim=6, hidden=None, classes=CLASSES, shards_sha256="0" * 64,
        fusion="product", **model.specs_of(made.towers),
    )  # fmt: skip
    model.save(tmp_path, spec, model.weights_to_bytes(made.state_dict()))
    again, _ = classifier.load(tmp_path)
    batch = {"image": photos(), "meta": PLACES}
    assert torch.equal(again.score(batch), made.score(batch))


# --------------------------------------------------------------------------------------------------------
# Metadata as channels of the photograph


def channels(places: MetaEncoding = "wrap") -> Channels:
    torch.manual_seed(7)
    image = encoders.build_image("test_resnet", {}, weights="none", size=32, places=places)
    made = Channels({"image": Tower(image, 6)}, embed_dim=6, hidden=5, classes=3)
    with torch.no_grad():  # as after training: the channels say something
        image.network.conv1[0].weight[:, 3:].normal_()
    return made.eval()


def test_channels_are_seen_together_with_the_photograph() -> None:
    """By parts or by hand; of the same photograph, other places give other scores."""
    made = channels()
    tower = made.towers["image"]
    expected = made.head(tower.projection(tower.encoder(photos(), PLACES)))
    assert made.modalities == ("image", "meta")
    torch.testing.assert_close(made.score({"image": photos(), "meta": PLACES}), expected)
    one = photos()[:1].expand(70, -1, -1, -1)  # more than are evaluated at once
    places = PLACES[:1].repeat(70, 1)
    places[69] = PLACES[3]
    kept = {"image": made.embed("image", one), "meta": made.embed("meta", places)}
    found = made.classify(kept)
    torch.testing.assert_close(found[:69], found[:1].expand(69, -1))
    assert not torch.allclose(found[69], found[0])


def test_controls_of_a_model_with_channels() -> None:
    """Its own places, none, and those of others, each as if the model had been given them."""
    made = channels("xyz")
    batch = {"image": photos(), "meta": PLACES, "index": torch.arange(4)}
    others = PLACES.flip(0)
    found = evaluation.with_controls(made, batch, others)
    for name, places in {
        "scores": PLACES, "without_meta": torch.full_like(PLACES, NAN), "shuffled_meta": others,
    }.items():  # fmt: skip
        expected = made.score({"image": photos(), "meta": places}).softmax(dim=1)
        torch.testing.assert_close(found[name], expected)
    assert not torch.allclose(found["scores"], found["without_meta"])


def test_a_saved_model_with_channels_comes_back(tmp_path: Path) -> None:
    made = channels("sphere2vec")
    spec = ModelSpec(
        kind="classifier", method="", embed_dim=6, hidden=5, classes=CLASSES, shards_sha256="0" * 64,
        fusion="channels", **model.specs_of(made.towers),
    )  # fmt: skip
    model.save(tmp_path, spec, model.weights_to_bytes(made.state_dict()))
    again, found = classifier.load(tmp_path)
    assert found.image is not None
    assert found.image.places == "sphere2vec"
    batch = {"image": photos(), "meta": PLACES}
    assert torch.equal(again.score(batch), made.score(batch))


def test_class_shares_by_hand() -> None:
    """Records 2, 0, 1, and one more of each: 3, 1, 2 of 6."""
    found = classifier.class_shares(np.array([0, 2, 0]), 3)
    torch.testing.assert_close(found, torch.tensor([3, 1, 2]) / 6)
