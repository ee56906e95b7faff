"""Mixed photographs by hand: what is left of which, and whose metadata."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from xcon import losses, mixing
from xcon.loader import Batch

ROWS, SIZE, CLASSES = 8, 16, 4
ON = {"share": 1.0, "classes": CLASSES, "hide": True, "seed": (3, 5, 0)}


def batch() -> Batch:
    """Photograph i is 10 i at every pixel; the last two rows have the class of the first two."""
    values = 10 * torch.arange(ROWS, dtype=torch.uint8)
    return {
        "image": values[:, None, None, None].expand(-1, 3, SIZE, SIZE).contiguous(),
        "meta": torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(0)),
        "label": torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]),
        "weight": torch.tensor([1.0] * 7 + [0.0]),
    }


def targets(own: Tensor) -> Tensor:
    """What the share `[b]` of itself makes of a row that is mixed with row b - 1 - i."""
    classes = torch.eye(CLASSES)[batch()["label"]]
    return own[:, None] * classes + (1 - own[:, None]) * classes.flip(0)


def test_mixup_by_hand() -> None:
    """Row i is 10 (a i + (1 - a) (7 - i)), which tells a, the share of its class."""
    before = batch()
    found = mixing.mixed(before, mixup=1.0, cutmix=0.0, **ON)
    assert torch.equal(found["image"], found["image"][:, :1, :1, :1].expand(-1, 3, SIZE, SIZE))
    value = found["image"][:, 0, 0, 0] / 10
    i = torch.arange(ROWS)
    own = (value - (7 - i)) / (2 * i - 7)  # [b]
    assert ((own > 0) & (own < 1)).all()
    assert len(own.unique()) == ROWS
    torch.testing.assert_close(found["target"], targets(own), rtol=0, atol=1e-5)
    assert before["image"].dtype == torch.uint8  # and as it was
    assert torch.equal(before["image"], batch()["image"])


def test_cutmix_by_hand() -> None:
    """The share of pixels that are still its own is the share of its class."""
    found = mixing.mixed(batch(), mixup=0.0, cutmix=1.0, **ON)
    i = torch.arange(ROWS)[:, None, None, None]
    assert ((found["image"] == 10 * i) | (found["image"] == 10 * (7 - i))).all()
    own = (found["image"] == 10 * i).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found["target"], targets(own))


@pytest.mark.parametrize("hide", [True, False])
def test_the_metadata_of_mixed_photographs_is_hidden(hide: bool) -> None:
    found = mixing.mixed(batch(), mixup=1.0, cutmix=1.0, **{**ON, "share": 0.5, "hide": hide})
    mixed = (found["image"] != batch()["image"]).flatten(1).any(dim=1)
    assert 0 < mixed.sum() < ROWS
    assert torch.equal(found["meta"][~mixed], batch()["meta"][~mixed])
    assert found["meta"][mixed].isnan().all() if hide else torch.equal(found["meta"], batch()["meta"])
    # Rows 3 and 4 have one class: it is theirs wholly, mixed or not.
    assert torch.equal(found["target"][3:5], torch.eye(CLASSES)[[3, 3]])


def test_a_share_of_the_photographs_is_mixed() -> None:
    """A quarter of 300 x 8: 600, standard deviation 21. CutMix's patch has no area now and then."""
    settings = {**ON, "share": 0.25}
    found = [mixing.mixed(batch(), mixup=1.0, cutmix=0.0, **{**settings, "seed": (0, s, 0)}) for s in range(300)]
    assert abs(sum(int(f["meta"].isnan().all(dim=1).sum()) for f in found) - 600) < 4 * 21


def test_draws_are_those_of_the_seed_alone() -> None:
    np.random.seed(1)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = mixing.mixed(batch(), mixup=0.4, cutmix=1.0, **ON)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    again = mixing.mixed(batch(), mixup=0.4, cutmix=1.0, **ON)
    assert torch.equal(first["image"], again["image"])
    for seed in ((3, 6, 0), (4, 5, 0), (3, 5, 1)):
        other = mixing.mixed(batch(), mixup=0.4, cutmix=1.0, **{**ON, "seed": seed})
        assert not torch.equal(first["image"], other["image"])


def test_the_loss_of_a_mixed_batch_by_hand() -> None:
    """Two classes, scores (0, ln 3) are probabilities 1/4, 3/4. Half of each class: (ln 4 + ln 4/3) / 2.

    Metadata alone is not mixed: its target is class 0, -ln 1/4. The row that fills up the batch does not count.
    """
    scores = torch.tensor([[0.0, math.log(3)]]).expand(2, 2)
    rows = {
        "label": torch.tensor([0, 1]), "weight": torch.tensor([1.0, 0.0]), "target": torch.full((2, 2), 0.5),
    }  # fmt: skip
    found = losses.share_of_cross_entropies({"image": scores, "meta": scores}, rows, rows=1, label_smoothing=0.0)
    assert found.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2 + math.log(4), rel=1e-6)


def test_an_odd_number_of_rows_is_refused() -> None:
    mixing.check_pairs(6)
    with pytest.raises(ValueError, match="mixes its 7 rows in pairs"):
        mixing.check_pairs(7)
