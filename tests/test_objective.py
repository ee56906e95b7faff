"""What pre-training minimises, on records held out as on a batch; nearest neighbours by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from xcon import losses
from xcon.objective import Objective, neighbour_top1

LABELS = torch.tensor([0, 1, 1, 2, 0, 1])
MASKS = {"image": torch.ones(6, dtype=torch.bool), "meta": torch.arange(6) != 2}
SCALE = torch.tensor(5.0)


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


def batch(**changes: Tensor) -> dict[str, Tensor]:
    places = torch.zeros(6, 3).masked_fill(~MASKS["meta"][:, None], torch.nan)
    rows = {"label": LABELS, "index": torch.arange(6), "weight": torch.ones(6), "image": torch.zeros(6, 2)}
    return {**rows, "meta": places, **changes}


@pytest.mark.parametrize("matching", ["label", "diagonal"])
@pytest.mark.parametrize("weights", [{}, {"image->meta": 3.0}])
def test_the_loss_of_a_batch_held_out_is_that_of_training(matching: str, weights: dict[str, float]) -> None:
    objective = Objective(("image", "meta"), matching, weights=weights)  # type: ignore[arg-type]
    vectors = {"image": unit(6, 4, seed=0), "meta": unit(6, 4, seed=1)}
    trained = objective.loss(batch(), vectors, SCALE)
    labels = LABELS if matching == "label" else torch.arange(6)
    terms = losses.cross_contrastive(vectors, labels, SCALE, present=MASKS)
    total = sum(weights.get(name, 1.0) * loss.item() for name, loss in terms.items() if name != "total")
    assert trained["total"].item() == pytest.approx(total, rel=1e-6)
    held_out = objective.held_out_loss(vectors, MASKS, LABELS, SCALE, batch_size=6)
    assert held_out == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("matching", ["label", "diagonal"])
def test_views_come_back_by_record(matching: str) -> None:
    """What the tower gave for `[bV, ...]` is contrasted as `[b, V, D]`; filling rows take no part."""
    objective = Objective(("image",), matching, views=2)  # type: ignore[arg-type]
    photos = torch.arange(12).reshape(6, 2, 1)
    rows = batch(image=photos, weight=torch.tensor([1, 1, 1, 1, 0, 0.0]))
    del rows["meta"]
    assert objective.inputs(rows)["image"].flatten().tolist() == list(range(12))
    z = unit(6, 2, 4, seed=2)
    labels = LABELS if matching == "label" else torch.arange(6)
    expected = losses.supcon(z[:4], labels[:4], SCALE).item()
    assert objective.loss(rows, {"image": z.flatten(0, 1)}, SCALE)["total"].item() == pytest.approx(expected)
    masks = {"image": MASKS["image"]}
    held_out = objective.held_out_loss({"image": z}, masks, LABELS, SCALE, batch_size=4)
    last = losses.supcon(z[4:], labels[4:], SCALE).item()
    assert held_out == pytest.approx((4 * expected + 2 * last) / 6)


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_nearest_neighbours_by_hand(at_once: int) -> None:
    """Records at 0, 10, 40, 60 and 200 degrees of classes a, a, b, a, b.

    The nearest other record is that at 10, 0, 60, 40 and, 140 degrees away, 60: right for the first two alone.
    Each record is given by two views, 5 degrees to either side.
    """
    degrees = torch.tensor([0.0, 10, 40, 60, 200])[:, None] + torch.tensor([-5.0, 5])  # [N, V]
    angles = degrees * math.pi / 180
    views = torch.stack([angles.cos(), angles.sin()], dim=-1)  # [N, V, 2]
    labels = torch.tensor([0, 0, 1, 0, 1])
    assert neighbour_top1(views, labels, at_once=at_once) == pytest.approx(2 / 5)
    assert neighbour_top1(views, torch.zeros(5), at_once=at_once) == 1
