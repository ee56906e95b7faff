"""The classifier by hand, and what it does where metadata is missing."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from xcon import classifier, encoders, model
from xcon.classifier import Classifier
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


def network() -> Classifier:
    torch.manual_seed(2)
    made = Classifier(towers(), embed_dim=6, hidden=5, classes=3).eval()
    with torch.no_grad():
        made.absent.copy_(torch.arange(6) / 3)
    return made


def test_two_layers_by_hand() -> None:
    """One number per modality: hidden = relu((i + m, i - m)), scores = (h1 + 1, 2 h2).

    (3, 1): hidden (4, 2), scores (5, 4). (1, 2): hidden (3, 0), scores (4, 0).
    """
    made = Classifier({"image": nn.Identity(), "meta": nn.Identity()}, embed_dim=1, hidden=2, classes=2)
    with torch.no_grad():
        made.head[1].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        made.head[1].bias.zero_()
        made.head[4].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        made.head[4].bias.copy_(torch.tensor([1.0, 0.0]))
    embeddings = {"meta": torch.tensor([[1.0], [2.0]]), "image": torch.tensor([[3.0], [1.0]])}
    assert made.classify(embeddings).tolist() == [[5, 4], [4, 0]]


def test_scores_are_those_of_the_concatenated_embeddings() -> None:
    made = network()
    found = made({"image": photos(), "meta": PLACES})
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
    made = Classifier({"image": towers()["image"]}, embed_dim=6, hidden=5, classes=3).eval()
    assert not hasattr(made, "absent")
    torch.testing.assert_close(made({"image": photos()}), made.head(made.towers["image"](photos())))


def test_dropout_is_before_each_layer_and_off_in_evaluation() -> None:
    made = Classifier(towers(), embed_dim=6, hidden=5, classes=3, dropout=0.5)
    batch = {"image": photos(), "meta": PLACES}
    assert [m.p for m in made.head if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    made.eval()
    assert torch.equal(made(batch), made(batch))


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
    assert torch.equal(again(batch), network()(batch))
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
    trained = classifier.build(spec, turned).eval()
    model.save(tmp_path, spec, model.weights_to_bytes(trained.state_dict()))
    again, _ = classifier.load(tmp_path)
    batch = {"image": photos(), "meta": PLACES}
    torch.testing.assert_close(again(batch), trained(batch))
