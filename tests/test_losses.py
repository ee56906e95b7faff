"""The loss against values by hand, against torch's own cross-entropy, and against itself on parts of a batch."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from xcon import losses

MODALITIES = ("image", "text", "meta")


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def batch(rows: int) -> dict[str, Tensor]:
    return {m: unit(rows, 5, seed=i) for i, m in enumerate(MODALITIES)}


def reference(embeddings: dict[str, Tensor], labels: Tensor, scale: float) -> dict[str, Tensor]:
    """Direction by direction: torch's cross-entropy against a table of target probabilities."""
    found = {}
    for a, b in itertools.permutations(embeddings, 2):
        logits = scale * embeddings[a] @ embeddings[b].T
        targets = torch.zeros_like(logits)
        for i, label in enumerate(labels.tolist()):
            same = [j for j, other in enumerate(labels.tolist()) if other == label]
            targets[i, same] = 1 / len(same)
        found[f"{a}->{b}"] = cross_entropy(logits, targets)
    return {**found, "total": sum(found.values(), torch.zeros((), dtype=logits.dtype))}


def test_two_rows_by_hand() -> None:
    """u = v = (1, 0), (0, 1) and scale ln 3: each row's logits are ln 3 and 0, its probabilities 3/4 and 1/4.

    Two classes: every row costs -ln 3/4, in both directions. One class: (-ln 3/4 - ln 1/4) / 2 = ln(16/3) / 2.
    """
    both = {"image": torch.eye(2), "meta": torch.eye(2)}
    scale = torch.tensor(math.log(3))
    apart = losses.cross_contrastive(both, torch.tensor([5, 9]), scale)
    assert apart["image->meta"].item() == pytest.approx(math.log(4 / 3))
    assert apart["meta->image"].item() == pytest.approx(math.log(4 / 3))
    assert apart["total"].item() == pytest.approx(2 * math.log(4 / 3))
    alike = losses.cross_contrastive(both, torch.tensor([7, 7]), scale)
    assert alike["total"].item() == pytest.approx(math.log(16 / 3))


def test_three_rows_by_hand_where_the_directions_differ() -> None:
    """u = (1,0), (1,0), (0,1); v = (1,0), (0,1), (-1,0); labels 0, 0, 1; scale ln 2, so exp of the logits is

        2 1 1/2        rows add to 7/2, 7/2, 4
        2 1 1/2        columns to 5, 4, 2
        1 2 1

    u->v: rows 1 and 2 have positives 1 and 2: (-ln 4/7 - ln 2/7) / 2 = ln(49/8) / 2 each; row 3: -ln 1/4.
    Their mean is ln(49/8 * 4) / 3 = ln(24.5) / 3.
    v->u: columns 1 and 2 have positives 1 and 2: -ln 2/5 and -ln 1/4; column 3: -ln 1/2. Mean ln(20) / 3.
    """
    u = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = losses.cross_contrastive({"u": u, "v": v}, torch.tensor([0, 0, 1]), torch.tensor(math.log(2)))
    assert found["u->v"].item() == pytest.approx(math.log(24.5) / 3)
    assert found["v->u"].item() == pytest.approx(math.log(20) / 3)
    assert found["total"].item() == pytest.approx(math.log(490) / 3)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [3, 1, 3, 3, 0, 1]])
@pytest.mark.parametrize("scale", [0.5, 14.3, 100.0])
def test_six_terms_equal_torch_cross_entropy(labels: list[int], scale: float) -> None:
    embeddings = batch(6)
    found = losses.cross_contrastive(embeddings, torch.tensor(labels), torch.tensor(scale, dtype=torch.float64))
    expected = reference(embeddings, torch.tensor(labels), scale)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-13), name


def test_float32_is_near_float64() -> None:
    labels = torch.arange(64) % 9
    exact = losses.cross_contrastive(batch(64), labels, torch.tensor(1 / 0.007, dtype=torch.float64))
    single = {m: z.float() for m, z in batch(64).items()}
    found = losses.cross_contrastive(single, labels, torch.tensor(1 / 0.007))
    for name, value in exact.items():
        assert found[name].item() == pytest.approx(value.item(), rel=5e-6), name


def test_a_label_per_row_is_clip() -> None:
    """CLIP's figure: cross-entropy with the row's own number, once along rows, once along columns."""
    pair = {m: unit(7, 4, seed=i) for i, m in enumerate(("image", "text"))}
    found = losses.cross_contrastive(pair, torch.arange(7) + 40, torch.tensor(9.0, dtype=torch.float64))
    logits = 9.0 * pair["image"] @ pair["text"].T
    assert found["image->text"].item() == pytest.approx(cross_entropy(logits, torch.arange(7)).item())
    assert found["text->image"].item() == pytest.approx(cross_entropy(logits.T, torch.arange(7)).item())


def test_masks_equal_the_part_of_the_batch_they_leave() -> None:
    """Image and text on the rows of both, whatever the third modality has."""
    embeddings, labels, scale = batch(8), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1]), torch.tensor(7.0).double()
    image = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1]).bool()
    meta = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0]).bool()
    found = losses.cross_contrastive(embeddings, labels, scale, present={"image": image, "meta": meta})
    masks = {"image": image, "text": torch.ones(8).bool(), "meta": meta}
    total = 0.0
    for a, b in itertools.permutations(MODALITIES, 2):
        rows = masks[a] & masks[b]
        part = {m: embeddings[m][rows] for m in (a, b)}
        expected = reference(part, labels[rows], 7.0)[f"{a}->{b}"].item()
        assert found[f"{a}->{b}"].item() == pytest.approx(expected, rel=1e-12)
        total += expected
    assert found["total"].item() == pytest.approx(total, rel=1e-12)


def test_without_rows_the_loss_and_its_gradients_are_zero() -> None:
    embeddings = {m: z.requires_grad_() for m, z in batch(4).items()}
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    nowhere = {m: torch.zeros(4, dtype=torch.bool) for m in MODALITIES}
    found = losses.cross_contrastive(embeddings, torch.arange(4), scale, present=nowhere)
    assert [value.item() for value in found.values()] == [0.0] * 7
    found["total"].backward()
    for leaf in (*embeddings.values(), scale):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_modality_without_rows_leaves_the_others_alone() -> None:
    embeddings, labels, scale = batch(4), torch.tensor([0, 0, 1, 1]), torch.tensor(10.0).double()
    found = losses.cross_contrastive(embeddings, labels, scale, present={"meta": torch.zeros(4).bool()})
    assert found["image->meta"].item() == found["meta->text"].item() == 0
    pair = {m: embeddings[m] for m in ("image", "text")}
    assert found["total"].item() == pytest.approx(reference(pair, labels, 10.0)["total"].item())


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_scales_stay_finite_in_float32(scale: float) -> None:
    """Two opposite rows of two classes: v = u costs nothing, v = -u the whole gap between logits, 2 scale."""
    u = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for v, expected in ((u, 0.0), (-u, 2 * scale)):
        leaf, factor = u.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)
        found = losses.cross_contrastive({"u": leaf, "v": v}, torch.tensor([0, 1]), factor)
        assert found["u->v"].item() == expected
        found["total"].backward()
        assert leaf.grad is not None
        assert factor.grad is not None
        assert leaf.grad.isfinite().all()
        assert factor.grad.item() == pytest.approx(2 * expected / scale)


def test_the_order_of_rows_does_not_matter() -> None:
    embeddings, labels, scale = batch(9), torch.tensor([0, 1, 0, 2, 2, 2, 3, 1, 0]), torch.tensor(20.0).double()
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1]).bool()
    there = losses.cross_contrastive(embeddings, labels, scale, present={"meta": mask})
    moved = {m: z[shuffled] for m, z in embeddings.items()}
    back = losses.cross_contrastive(moved, labels[shuffled], scale, present={"meta": mask[shuffled]})
    for name, value in there.items():
        assert back[name].item() == pytest.approx(value.item(), rel=1e-13), name


def test_what_classes_are_called_does_not_matter() -> None:
    embeddings, scale = batch(5), torch.tensor(20.0).double()
    one = losses.cross_contrastive(embeddings, torch.tensor([0, 1, 0, 2, 1]), scale)
    two = losses.cross_contrastive(embeddings, torch.tensor([77, -3, 77, 554, -3]), scale)
    assert [v.item() for v in one.values()] == [v.item() for v in two.values()]


def test_gradients_are_those_of_finite_differences() -> None:
    labels, mask = torch.tensor([0, 1, 0, 2]), torch.tensor([True, True, True, False])

    def total(image: Tensor, text: Tensor, meta: Tensor, scale: Tensor) -> Tensor:
        embeddings = {"image": image, "text": text, "meta": meta}
        return losses.cross_contrastive(embeddings, labels, scale, present={"meta": mask})["total"]

    leaves = [z.requires_grad_() for z in batch(4).values()]
    assert torch.autograd.gradcheck(total, (*leaves, torch.tensor(3.0, dtype=torch.float64, requires_grad=True)))


def test_arguments_are_left_as_they_are() -> None:
    embeddings, labels = batch(3), torch.tensor([0, 0, 1])
    present = {"meta": torch.tensor([True, True, False])}
    before = {m: z.clone() for m, z in embeddings.items()}
    losses.cross_contrastive(embeddings, labels, torch.tensor(2.0).double(), present=present)
    assert present.keys() == {"meta"}
    assert all(torch.equal(before[m], z) for m, z in embeddings.items())


@st.composite
def masked_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Labels, the mask of the metadata, a seed."""
    rows = draw(st.integers(1, 12))
    classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    mask = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return torch.tensor(labels), torch.tensor(mask), draw(st.integers(0, 1000))


@settings(max_examples=60, deadline=None)
@given(masked_batches())
def test_any_batch_equals_the_reference_and_is_bounded_below_by_entropy(case: tuple[Tensor, Tensor, int]) -> None:
    """Cross-entropy is at least the entropy of its targets: the mean over rows of ln n_c."""
    labels, mask, seed = case
    pair = {"image": unit(len(labels), 3, seed=seed), "meta": unit(len(labels), 3, seed=seed + 1)}
    found = losses.cross_contrastive(pair, labels, torch.tensor(12.0).double(), present={"meta": mask})
    if not mask.any():
        assert found["total"].item() == 0
        return
    kept = labels[mask]
    expected = reference({m: z[mask] for m, z in pair.items()}, kept, 12.0)
    entropy = (kept[:, None] == kept).sum(dim=1).double().log().mean().item()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-14)
    assert found["image->meta"].item() >= entropy - 1e-12


@pytest.mark.parametrize(
    ("embeddings", "present", "message"),
    [
        ({"image": torch.eye(3)}, {}, "two modalities or more"),
        ({"image": torch.eye(3), "meta": torch.eye(4)}, {}, r"meta: vectors are \[4, 4\], \[3, D\] is needed"),
        ({"image": torch.eye(3), "meta": torch.ones(3)}, {}, r"meta: vectors are \[3\]"),
        (
            {"image": torch.eye(3), "meta": torch.ones(3, 2)},
            {},
            r"meta: vectors are \[3, 2\], the others \[3, 3\]",
        ),
        (
            {"image": torch.eye(3), "meta": torch.eye(3)},
            {"meta": torch.ones(4).bool()},
            r"meta: its mask is \[4\]",
        ),
        (
            {"image": torch.eye(3), "meta": torch.eye(3)},
            {"meta": torch.ones(3)},
            "meta: its mask is .* bool is needed",
        ),
        ({"image": torch.eye(3), "meta": torch.eye(3)}, {"mate": torch.ones(3).bool()}, "a mask for mate"),
    ],
)
def test_sizes_and_names_that_do_not_agree_are_refused(
    embeddings: dict[str, Tensor], present: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        losses.cross_contrastive(embeddings, torch.arange(3), torch.tensor(1.0), present=present)
