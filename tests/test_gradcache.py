"""A batch encoded in parts against the same batch encoded at once."""

import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.training import fresh_accelerator
from xcon import gather, gradcache
from xcon.model import ContrastiveModel, Tower
from xcon.objective import Objective

ROWS, CAPTIONS, NUMBERS = 12, 3, 5


class Encoder(nn.Module):
    """A small network that may drop out or normalise by its batch."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.width = 8
        self.layers = nn.Sequential(nn.Linear(NUMBERS, 8), *between, nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def accelerator() -> Accelerator:
    fresh_accelerator()
    return Accelerator(cpu=True)


def contrastive(*between: nn.Module) -> ContrastiveModel:
    torch.manual_seed(1)
    encoders = {"image": Encoder(*between), "text": Encoder(), "meta": Encoder()}
    towers = {m: Tower(encoder, 4) for m, encoder in encoders.items()}  # type: ignore[arg-type]
    return ContrastiveModel(towers, temperature=0.1, max_scale=200.0).double()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = {"image": ROWS, "text": CAPTIONS, "meta": ROWS}
    return {m: torch.randn(n, NUMBERS, generator=generator, dtype=torch.float64) for m, n in rows.items()}


def loss(embeddings: Any, scale: Tensor) -> dict[str, Tensor]:
    labels = torch.arange(ROWS) % CAPTIONS
    known = torch.arange(ROWS) != 4
    classes = {"text": torch.arange(CAPTIONS)}
    return gather.cross_contrastive(embeddings, labels, scale, present={"meta": known}, classes=classes)


def step(accelerator: Accelerator, model: nn.Module, rows: int) -> tuple[float, dict[str, Tensor]]:
    model.train()
    torch.manual_seed(3)
    terms, _ = gradcache.backward(accelerator, model, inputs(), loss, rows=rows)
    return terms["total"].item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 2, 5, 11, 12, 100])
def test_parts_have_the_loss_and_gradients_of_the_whole(accelerator: Accelerator, rows: int) -> None:
    """With one row at a time there are 12 parts, and three captions."""
    expected, gradients = step(accelerator, contrastive(), 0)
    found, parts = step(accelerator, contrastive(), rows)
    assert found == pytest.approx(expected, rel=1e-12)
    assert parts.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-12, msg=name)
    assert gradients["log_scale"].abs() > 1e-3


def test_a_part_draws_the_same_dropout_both_times(accelerator: Accelerator) -> None:
    """Else the gradient passed on would be of other vectors than the loss saw."""
    model = contrastive(nn.Dropout(0.5))
    seen: list[Tensor] = []
    model.towers["image"].register_forward_hook(lambda *arguments: seen.append(arguments[2].detach()))
    step(accelerator, model, 5)
    first, second = seen[:3], seen[3:]
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[0], contrastive().towers["image"](inputs()["image"][:4]))


def test_the_next_step_draws_anew(accelerator: Accelerator) -> None:
    """The generator stands where one pass over the parts leaves it."""
    step(accelerator, contrastive(nn.Dropout(0.5)), 5)
    after = torch.rand(3)
    torch.manual_seed(3)
    for part in inputs()["image"].tensor_split(3):
        nn.functional.dropout(part.new_empty(len(part), 8), 0.5)
    assert torch.equal(after, torch.rand(3))


def test_running_statistics_count_a_batch_once(accelerator: Accelerator) -> None:
    """Momentum 1/2 from mean 0: after parts of means x1, x2, x3 it is x1/8 + x2/4 + x3/2."""
    model = contrastive(nn.BatchNorm1d(8, momentum=0.5, dtype=torch.float64))
    encoder = model.towers["image"].encoder.layers
    parts = inputs()["image"].tensor_split(3)
    expected = sum(encoder[0](x).mean(dim=0) * f for x, f in zip(parts, (1 / 8, 1 / 4, 1 / 2), strict=True))
    step(accelerator, model, 4)
    torch.testing.assert_close(encoder[1].running_mean, expected.detach(), rtol=1e-12, atol=1e-12)
    assert encoder[1].num_batches_tracked == 3


def test_gradients_are_added_to_those_there_are(accelerator: Accelerator) -> None:
    model = contrastive()
    _, once = step(accelerator, model, 4)
    once = {name: gradient.clone() for name, gradient in once.items()}
    _, twice = step(accelerator, model, 4)
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], 2 * gradient, rtol=1e-12, atol=1e-12)


def test_views_in_parts_have_the_gradients_of_the_whole(accelerator: Accelerator) -> None:
    """12 rows are 6 photographs of two views; a part of 5 rows divides a photograph's views."""
    gradients = []
    for rows in (0, 5):
        model = ContrastiveModel(
            {"image": Tower(Encoder(), 4)}, temperature=0.1, max_scale=200.0, learn_temperature=False
        ).double()  # type: ignore[arg-type]
        model.load_state_dict(contrastive().state_dict(), strict=False)
        objective = Objective(("image",), views=2)
        batch = {"label": torch.tensor([0, 1, 0, 1, 2, 2]), "weight": torch.ones(6), "image": inputs()["image"]}
        batch["image"] = batch["image"].unflatten(0, (6, 2))  # [b, V, ...]
        loss = functools.partial(objective.loss, batch)
        gradcache.backward(accelerator, model, objective.inputs(batch), loss, rows=rows)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12, msg=name)
    assert gradients[0]["towers.image.projection.weight"].abs().max() > 1e-3
