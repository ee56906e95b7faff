"""The schedule and the first step of the optimiser by hand."""

import itertools

import pytest
import torch
from torch import nn

from xcon import optim
from xcon.classifier import Concatenation
from xcon.encoders import MetaEncoder, MetaSpec, build_image
from xcon.model import ContrastiveModel, Tower

RATES = {"image": 1e-4, "text": 1e-5, "meta": 5e-5, "head": 1e-3}


def towers() -> dict[str, Tower]:
    image = build_image("test_resnet", {}, weights="none", size=32)
    return {"image": Tower(image, 8), "meta": Tower(MetaEncoder(MetaSpec(8, 1)), 8)}


def contrastive() -> ContrastiveModel:
    return ContrastiveModel(towers(), temperature=0.007, max_scale=200.0)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        *[(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0)],  # a rise of four steps, the last of them at the peak
        *[(4, 1.0), (6, 0.8535533906), (8, 0.5), (10, 0.1464466094), (12, 0.0)],  # (1 + cos(k pi / 8)) / 2
    ],
)
def test_schedule_by_hand(step: int, factor: float) -> None:
    assert optim.schedule(step, warmup=4, total=12) == pytest.approx(factor, abs=1e-10)


def test_schedule_without_a_rise_begins_at_the_peak() -> None:
    assert [optim.schedule(s, warmup=0, total=2) for s in (0, 1, 2)] == pytest.approx([1, 0.5, 0])


def test_a_training_of_nothing_but_rise_ends_at_the_peak() -> None:
    assert [optim.schedule(s, warmup=3, total=3) for s in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_schedule_without_decay_stays_at_the_peak() -> None:
    assert [optim.schedule(s, warmup=2, total=9, decay="none") for s in range(9)] == [0.5, *[1.0] * 8]


def test_the_schedule_never_rises_after_the_warm_up() -> None:
    factors = [optim.schedule(s, warmup=7, total=100) for s in range(100)]
    assert all(a < b for a, b in itertools.pairwise(factors[:7]))
    assert all(a >= b for a, b in itertools.pairwise(factors[7:]))
    assert 0 < factors[-1] < 0.001


@pytest.mark.parametrize("module", [contrastive(), Concatenation(towers(), embed_dim=8, hidden=4, classes=3)])
def test_every_parameter_has_the_rate_and_decay_of_its_name(module: nn.Module) -> None:
    optimizer = optim.make_optimizer(module, RATES, weight_decay=0.1)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(settings) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        part = next((m for m in ("image", "meta") if name.startswith(f"towers.{m}.encoder.")), "head")
        assert settings[id(parameter)] == (RATES[part], 0.1 if parameter.ndim > 1 else 0.0), name


def test_the_temperature_and_the_projections_learn_with_the_head() -> None:
    optimizer = optim.make_optimizer(module := contrastive(), RATES, weight_decay=0.1)
    head = {id(p) for g in optimizer.param_groups if g["part"] == "head" for p in g["params"]}
    projections = [p for tower in module.towers.values() for p in tower.projection.parameters()]
    assert head == {id(p) for p in (module.log_scale, *projections)}


def test_frozen_parameters_are_left_out() -> None:
    module = contrastive()
    module.towers["image"].encoder.requires_grad_(False)
    optimizer = optim.make_optimizer(module, RATES, weight_decay=0.0)
    assert {group["part"] for group in optimizer.param_groups} == {"meta", "head"}


def test_the_first_step_by_hand() -> None:
    """Adam's first step is rate x sign of the gradient; before it, decay takes rate x decay x weight."""
    module = contrastive()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = optim.make_optimizer(module, RATES, weight_decay=0.1)
    optim.set_rates(optimizer, 0.5)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    optimizer.step()
    for name, parameter in module.named_parameters():
        part = next((m for m in ("image", "meta") if name.startswith(f"towers.{m}.encoder.")), "head")
        rate = 0.5 * RATES[part]
        decay = 0.1 if parameter.ndim > 1 else 0.0
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - rate * decay) + rate, msg=name)


def test_layers_learn_less_the_lower_they_lie() -> None:
    """test_resnet has a stem and four stages of a block each: five layers, the last one at the rate itself."""
    module = contrastive()
    optimizer = optim.make_optimizer(module, RATES, weight_decay=0.1, layer_decay=0.5)
    settings = {id(p): (g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    prefix = "towers.image.encoder.network."
    exponents = {"conv1": 4, "bn1": 4, "layer1": 3, "layer2": 2, "layer3": 1, "layer4": 0}
    for name, parameter in module.named_parameters():
        if name.startswith(prefix):
            layer = name.removeprefix(prefix).split(".")[0]
            rate = RATES["image"] * 0.5 ** exponents[layer]
        else:
            part = "meta" if name.startswith("towers.meta.encoder.") else "head"
            rate = RATES[part]
        assert settings[id(parameter)] == (rate, 0.1 if parameter.ndim > 1 else 0.0), name


def test_a_network_without_layers_is_refused() -> None:
    module = nn.Module()
    module.towers = nn.ModuleDict(
        {"image": nn.ModuleDict({"encoder": nn.ModuleDict({"network": nn.Linear(2, 2)})})}
    )
    with pytest.raises(ValueError, match="--layer-decay: timm groups no layers of a Linear"):
        optim.make_optimizer(module, RATES, weight_decay=0.0, layer_decay=0.5)


def test_rates_are_set_from_the_peak_and_not_from_one_another() -> None:
    optimizer = optim.make_optimizer(contrastive(), RATES, weight_decay=0.0)
    for factor in (0.1, 0.5, 0.0, 1.0):
        optim.set_rates(optimizer, factor)
        assert {g["part"]: g["lr"] for g in optimizer.param_groups} == {
            part: RATES[part] * factor for part in ("image", "meta", "head")
        }
