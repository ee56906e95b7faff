"""What the losses are: values by hand, torch's cross-entropy, parts of a batch, and other people's libraries."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from xcon import contrast, losses

MODALITIES = ("image", "text", "meta")
WAYS = ("tables", "blocks")

Loss = Callable[..., dict[str, Tensor]]


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def batch(rows: int) -> dict[str, Tensor]:
    return {m: unit(rows, 5, seed=i) for i, m in enumerate(MODALITIES)}


def double(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def go(patch: pytest.MonkeyPatch, way: str) -> None:
    """Makes `cross_contrastive` go one of its two ways whatever the batch: tables, or blocks of a few rows."""
    patch.setattr(losses, "TABLE_ROWS", 10**9 if way == "tables" else 0)
    patch.setattr(contrast, "_BLOCK", 12)
    patch.setattr(contrast, "_BLOCK_ROWS", 2)


@pytest.fixture(params=["by definition", *WAYS])
def loss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Loss:
    """The loss as the paper writes it, and as it is computed for small and for large batches."""
    if request.param == "by definition":
        return losses.by_definition
    go(monkeypatch, request.param)
    return losses.cross_contrastive


def one_by_one(embeddings: dict[str, Tensor], labels: list[int], scale: float) -> dict[str, Tensor]:
    """Row by row: the mean, over its positives, of torch's cross-entropy with that positive as the only answer."""
    found = {}
    for a, b in itertools.permutations(embeddings, 2):
        rows = []
        for i, label in enumerate(labels):
            logits = scale * embeddings[b] @ embeddings[a][i]
            positives = [j for j, other in enumerate(labels) if other == label]
            rows.append(torch.stack([cross_entropy(logits, torch.tensor(j)) for j in positives]).mean())
        found[f"{a}->{b}"] = torch.stack(rows).mean()
    return {**found, "total": torch.stack(list(found.values())).sum()}


# --------------------------------------------------------------------------------------------------------
# Values


def test_two_rows_by_hand(loss: Loss) -> None:
    """u = v = (1, 0), (0, 1) and scale ln 3: each row's logits are ln 3 and 0, its probabilities 3/4 and 1/4.

    Two classes: every row costs -ln 3/4, in both directions. One class: (-ln 3/4 - ln 1/4) / 2 = ln(16/3) / 2.
    """
    both = {"image": torch.eye(2), "meta": torch.eye(2)}
    scale = torch.tensor(math.log(3))
    apart = loss(both, torch.tensor([5, 9]), scale)
    assert apart["image->meta"].item() == pytest.approx(math.log(4 / 3))
    assert apart["meta->image"].item() == pytest.approx(math.log(4 / 3))
    assert apart["total"].item() == pytest.approx(2 * math.log(4 / 3))
    alike = loss(both, torch.tensor([7, 7]), scale)
    assert alike["total"].item() == pytest.approx(math.log(16 / 3))


def test_three_rows_by_hand_where_the_directions_differ(loss: Loss) -> None:
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
    found = loss({"u": u, "v": v}, torch.tensor([0, 0, 1]), torch.tensor(math.log(2)))
    assert found["u->v"].item() == pytest.approx(math.log(24.5) / 3)
    assert found["v->u"].item() == pytest.approx(math.log(20) / 3)
    assert found["total"].item() == pytest.approx(math.log(490) / 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_vector_per_class_by_hand(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The three rows above, where v is a vector per class: (1,0) for 0, (-1,0) for 1; exp of the logits is

        2 2 1/2        rows add to 9/2, 9/2, 3
        2 2 1/2        columns to 5, 5, 2
        1 1 1

    u->v: rows 1 and 2 cost -ln 4/9 each, row 3 -ln 1/3: ln(81/16 * 3) / 3. v->u: columns 1 and 2 cost -ln 2/5,
    column 3 -ln 1/2: ln(25/4 * 2) / 3. Vectors come in any order; that of class 9, which no row has, is nothing.
    """
    go(monkeypatch, way)
    u = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    v = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    classes = {"v": torch.tensor([1, 9, 0])}
    scale = torch.tensor(math.log(2))
    found = losses.cross_contrastive({"u": u, "v": v}, torch.tensor([0, 0, 1]), scale, classes=classes)
    assert found["u->v"].item() == pytest.approx(math.log(243 / 16) / 3)
    assert found["v->u"].item() == pytest.approx(math.log(12.5) / 3)
    assert found["total"].item() == pytest.approx(math.log(243 * 12.5 / 16) / 3)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [3, 1, 3, 3, 0, 1]])
@pytest.mark.parametrize("scale", [0.5, 14.3, 100.0])
def test_six_terms_equal_torch_cross_entropy(loss: Loss, labels: list[int], scale: float) -> None:
    found = loss(batch(6), torch.tensor(labels), double(scale))
    expected = one_by_one(batch(6), labels, scale)
    assert found.keys() == expected.keys()
    assert list(found)[-1] == "total"
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name


def test_a_label_per_row_is_clip(loss: Loss) -> None:
    """CLIP's figure: cross-entropy with the row's own number, once along rows, once along columns."""
    pair = {m: unit(7, 4, seed=i) for i, m in enumerate(("image", "text"))}
    found = loss(pair, torch.arange(7) + 40, double(9.0))
    logits = 9.0 * pair["image"] @ pair["text"].T
    assert found["image->text"].item() == pytest.approx(cross_entropy(logits, torch.arange(7)).item())
    assert found["text->image"].item() == pytest.approx(cross_entropy(logits.T, torch.arange(7)).item())


def test_masks_equal_the_part_of_the_batch_they_leave(loss: Loss) -> None:
    """Image and text on the rows of both, whatever the third modality has."""
    embeddings, labels = batch(8), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    image = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1]).bool()
    meta = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0]).bool()
    found = loss(embeddings, labels, double(7.0), present={"image": image, "meta": meta})
    masks = {"image": image, "text": torch.ones(8).bool(), "meta": meta}
    total = 0.0
    for a, b in itertools.permutations(MODALITIES, 2):
        rows = masks[a] & masks[b]
        part = {m: embeddings[m][rows] for m in (a, b)}
        expected = one_by_one(part, labels[rows].tolist(), 7.0)[f"{a}->{b}"].item()
        assert found[f"{a}->{b}"].item() == pytest.approx(expected, rel=1e-12)
        total += expected
    assert found["total"].item() == pytest.approx(total, rel=1e-12)


def test_without_rows_the_loss_and_its_gradients_are_zero(loss: Loss) -> None:
    embeddings = {m: z.requires_grad_() for m, z in batch(4).items()}
    scale = double(10.0).requires_grad_()
    nowhere = {m: torch.zeros(4, dtype=torch.bool) for m in MODALITIES}
    found = loss(embeddings, torch.arange(4), scale, present=nowhere)
    assert [value.item() for value in found.values()] == [0.0] * 7
    found["total"].backward()
    for leaf in (*embeddings.values(), scale):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_a_modality_without_rows_leaves_the_others_alone(loss: Loss) -> None:
    embeddings, labels = batch(4), torch.tensor([0, 0, 1, 1])
    found = loss(embeddings, labels, double(10.0), present={"meta": torch.zeros(4).bool()})
    assert found["image->meta"].item() == found["meta->text"].item() == 0
    pair = {m: embeddings[m] for m in ("image", "text")}
    assert found["total"].item() == pytest.approx(one_by_one(pair, labels.tolist(), 10.0)["total"].item())


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_scales_stay_finite_in_float32(loss: Loss, scale: float) -> None:
    """Two opposite rows of two classes: v = u costs nothing, v = -u the whole gap between logits, 2 scale."""
    u = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for v, expected in ((u, 0.0), (-u, 2 * scale)):
        leaf, factor = u.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)
        found = loss({"u": leaf, "v": v}, torch.tensor([0, 1]), factor)
        assert found["u->v"].item() == pytest.approx(expected, abs=1e-6)
        found["total"].backward()
        assert leaf.grad is not None
        assert factor.grad is not None
        assert leaf.grad.isfinite().all()
        assert factor.grad.item() == pytest.approx(2 * expected / scale)


def test_the_order_of_rows_does_not_matter(loss: Loss) -> None:
    embeddings, labels = batch(9), torch.tensor([0, 1, 0, 2, 2, 2, 3, 1, 0])
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1]).bool()
    there = loss(embeddings, labels, double(20.0), present={"meta": mask})
    moved = {m: z[shuffled] for m, z in embeddings.items()}
    back = loss(moved, labels[shuffled], double(20.0), present={"meta": mask[shuffled]})
    for name, value in there.items():
        assert back[name].item() == pytest.approx(value.item(), rel=1e-13), name


def test_what_classes_are_called_does_not_matter(loss: Loss) -> None:
    one = loss(batch(5), torch.tensor([0, 1, 0, 2, 1]), double(20.0))
    two = loss(batch(5), torch.tensor([77, -3, 77, 554, -3]), double(20.0))
    for name, value in one.items():
        assert two[name].item() == pytest.approx(value.item(), rel=1e-14), name


def test_arguments_are_left_as_they_are(loss: Loss) -> None:
    embeddings, labels = batch(3), torch.tensor([0, 0, 1])
    present = {"meta": torch.tensor([True, True, False])}
    before = {m: z.clone() for m, z in embeddings.items()}
    loss(embeddings, labels, double(2.0), present=present)
    assert present.keys() == {"meta"}
    assert torch.equal(present["meta"], torch.tensor([True, True, False]))
    assert torch.equal(labels, torch.tensor([0, 0, 1]))
    assert all(torch.equal(before[m], z) for m, z in embeddings.items())


@st.composite
def masked_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Labels, the mask of the metadata, a seed."""
    rows = draw(st.integers(1, 12))
    classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    mask = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return torch.tensor(labels), torch.tensor(mask), draw(st.integers(0, 1000))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40, deadline=None)
@given(case=masked_batches())
def test_the_loss_is_bounded_below_by_entropy(way: str, case: tuple[Tensor, Tensor, int]) -> None:
    """Cross-entropy is at least the entropy of its targets: the mean over rows of ln n_c."""
    labels, mask, seed = case
    pair = {"image": unit(len(labels), 3, seed=seed), "meta": unit(len(labels), 3, seed=seed + 1)}
    with pytest.MonkeyPatch.context() as patch:
        go(patch, way)
        found = losses.cross_contrastive(pair, labels, double(12.0), present={"meta": mask})
    kept = labels[mask]
    entropy = (kept[:, None] == kept).sum(dim=1).double().log().sum().item() / max(1, len(kept))
    assert found["image->meta"].item() >= entropy - 1e-12
    assert found["meta->image"].item() >= entropy - 1e-12


def test_vectors_that_all_agree_cost_the_entropy(loss: Loss) -> None:
    """One vector per class, the classes orthogonal, a large scale: rows pick evenly among their own class.

    Classes of 3 and 1 rows: (3 ln 3 + 0) / 4 in each of the six directions.
    """
    labels = torch.tensor([0, 1, 0, 0])
    agreed = {m: torch.eye(2, dtype=torch.float64)[labels] for m in MODALITIES}
    assert loss(agreed, labels, double(200.0))["total"].item() == pytest.approx(6 * 0.75 * math.log(3))


# --------------------------------------------------------------------------------------------------------
# Errors

THREE = {"image": torch.eye(3), "text": torch.eye(3), "meta": torch.eye(3)}


@pytest.mark.parametrize(
    ("embeddings", "present", "message"),
    [
        ({"image": torch.eye(3)}, {}, r"two modalities or more, not \['image'\]"),
        ({"image": torch.eye(3), "meta": torch.eye(4)}, {}, r"meta: vectors are \[4, 4\], \[3, 3\] is needed"),
        ({"image": torch.eye(3), "meta": torch.ones(3)}, {}, r"meta: vectors are \[3\]"),
        ({"image": torch.eye(3), "meta": torch.ones(3, 2)}, {}, r"meta: vectors are \[3, 2\], \[3, 3\] is needed"),
        ({"image": torch.eye(4), "meta": torch.eye(4)}, {}, r"image: .* \[3, 4\] is needed, a vector per label"),
        (THREE, {"meta": torch.ones(4).bool()}, r"meta: its mask is \[4\] torch.bool, \[3\] bool is needed"),
        (THREE, {"meta": torch.ones(3)}, r"meta: its mask is \[3\] torch.float32, \[3\] bool is needed"),
        (THREE, {"mate": torch.ones(3).bool()}, "a mask for mate, where the modalities are image, text, meta"),
    ],
)
def test_sizes_and_names_that_do_not_agree_are_refused(
    embeddings: dict[str, Tensor], present: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        losses.cross_contrastive(embeddings, torch.arange(3), torch.tensor(1.0), present=present)
    with pytest.raises(ValueError, match=message):
        losses.siglip(embeddings, torch.arange(3), torch.tensor(1.0), torch.tensor(0.0), present=present)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"mate": torch.arange(3)}, "classes for mate, where the modalities are image, text, meta"),
        ({"text": torch.arange(2)}, r"text: vectors are \[3, 3\], \[2, 3\] is needed, a vector per class"),
        ({"text": torch.tensor([0, 7, 1])}, "text: label 2 has 0 vectors in its classes, 1 is needed"),
        ({"text": torch.tensor([-1, 2, 1])}, "text: label 0 has 0 vectors in its classes"),
        ({"meta": torch.tensor([1, 0, 1])}, "meta: label 1 has 2 vectors in its classes, 1 is needed"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_classes_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, way: str, classes: dict[str, Tensor], message: str
) -> None:
    go(monkeypatch, way)
    with pytest.raises(ValueError, match=message):
        losses.cross_contrastive(THREE, torch.tensor([1, 2, 0]), torch.tensor(1.0), classes=classes)


@pytest.mark.parametrize("shape", [(3, 2), (4, 2, 2), (2, 2, 2)])
def test_views_that_do_not_fit_their_labels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"views are \[.*\], \[3, V, D\] is needed"):
        losses.supcon(torch.ones(shape), torch.arange(3), torch.tensor(1.0))


# --------------------------------------------------------------------------------------------------------
# Relatives, beside other people's


def leaves(rows: int, count: int = 2) -> list[Tensor]:
    """Vectors of any length: some of the others bring theirs to unit length themselves."""
    generator = torch.Generator().manual_seed(rows)
    drawn = torch.randn(count, rows, 6, generator=generator, dtype=torch.float64)
    return [vectors.clone().requires_grad_() for vectors in drawn]


def assert_equal_with_gradients(ours: Tensor, theirs: Tensor, variables: list[Tensor]) -> None:
    """Two losses of the same variables, to 1e-10."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    gradients = torch.autograd.grad(ours, variables, retain_graph=True), torch.autograd.grad(theirs, variables)
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("way", WAYS)
def test_clip_is_half_of_open_clips(monkeypatch: pytest.MonkeyPatch, way: str, scale: float) -> None:
    """Theirs is the mean of the two directions, our total their sum."""
    go(monkeypatch, way)
    raw, factor = leaves(9), double(scale).requires_grad_()
    image, text = (normalize(z, dim=1) for z in raw)
    ours = losses.clip({"image": image, "text": text}, factor)["total"] / 2
    assert_equal_with_gradients(ours, ClipLoss()(image, text, factor), [*raw, factor])


def test_clip_of_some_rows_is_open_clips_of_those() -> None:
    raw, factor = leaves(9), double(5.0).requires_grad_()
    image, text = (normalize(z, dim=1) for z in raw)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0]).bool()
    ours = losses.clip({"image": image, "text": text}, factor, present={"text": mask})["total"] / 2
    assert_equal_with_gradients(ours, ClipLoss()(image[mask], text[mask], factor), [*raw, factor])


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (100.0, 3.0)])
def test_siglip_of_a_label_per_row_is_open_clips(scale: float, bias: float) -> None:
    raw = leaves(9)
    factor, shift = double(scale).requires_grad_(), double(bias).requires_grad_()
    image, text = (normalize(z, dim=1) for z in raw)
    ours = losses.siglip({"image": image, "text": text}, torch.arange(9) - 4, factor, shift)["total"]
    assert_equal_with_gradients(ours, SigLipLoss()(image, text, factor, shift), [*raw, factor, shift])


def test_siglip_of_three_modalities_pair_by_pair() -> None:
    """Each pair of rows by hand, ln(1 + exp(-logit)) where the labels agree, ln(1 + exp(logit)) where not."""
    embeddings, labels = batch(5), [1, 0, 1, 2, 0]
    mask = [True, False, True, True, True]
    found = losses.siglip(
        embeddings, torch.tensor(labels), double(6.0), double(-2.0), present={"meta": torch.tensor(mask)}
    )
    assert list(found) == ["image<->text", "image<->meta", "text<->meta", "total"]
    for a, b in itertools.combinations(MODALITIES, 2):
        rows = [i for i in range(5) if mask[i] or "meta" not in {a, b}]
        expected = 0.0
        for i, j in itertools.product(rows, rows):
            logit = 6.0 * (embeddings[a][i] @ embeddings[b][j]).item() - 2.0
            expected += math.log1p(math.exp(-logit if labels[i] == labels[j] else logit))
        assert found[f"{a}<->{b}"].item() == pytest.approx(expected / len(rows)), (a, b)
    assert found["total"].item() == pytest.approx(sum(v.item() for k, v in found.items() if k != "total"))


def test_siglip_without_rows_is_zero() -> None:
    nowhere = {"text": torch.zeros(3).bool()}
    found = losses.siglip(THREE, torch.arange(3), torch.tensor(9.0), torch.tensor(-9.0), present=nowhere)
    assert found["image<->text"].item() == found["text<->meta"].item() == 0
    assert found["total"].item() == found["image<->meta"].item() > 0


@pytest.mark.parametrize(
    ("labels", "views"),
    [
        ([0, 1, 0, 2, 2, 2, 1], 1),
        ([0, 1, 0, 2, 2, 3, 4], 1),  # rows 1, 5 and 6 have no positive
        ([0, 1, 0, 2, 2, 3, 4], 2),
        ([0, 1, 2, 3, 4, 5, 6], 3),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_supcon_is_pytorch_metric_learnings(labels: list[int], views: int, scale: float) -> None:
    """Theirs takes all views as rows, and a temperature; it leaves out anchors without positives, too."""
    raw = leaves(7, views)
    z = torch.stack([normalize(view, dim=1) for view in raw], dim=1)  # [N, V, D]
    ours = losses.supcon(z, torch.tensor(labels), double(scale))
    theirs = SupConLoss(temperature=1 / scale)(
        z.flatten(0, 1), torch.tensor(labels).repeat_interleave(views), ref_emb=None
    )
    assert_equal_with_gradients(ours, theirs, raw)


@pytest.mark.parametrize("scale", [2.0, 14.3])
def test_supcon_of_two_views_of_distinct_rows_is_simclrs_loss(scale: float) -> None:
    """NT-Xent: torch's cross-entropy of each view against all others, the other view of its row the target."""
    raw = leaves(8)
    views = [normalize(view, dim=1) for view in raw]
    every = torch.cat(views)
    logits = (scale * every @ every.T).fill_diagonal_(-torch.inf)
    expected = cross_entropy(logits, torch.arange(16).roll(8))
    ours = losses.supcon(torch.stack(views, dim=1), torch.arange(8), double(scale))
    assert_equal_with_gradients(ours, expected, raw)


def test_supcon_of_one_class_by_hand() -> None:
    """Three anchors at (1,0), (1,0), (0,1) with scale ln 2: exp of the logits is 2, 1 for the first two and 1, 1.

    Each has the two others as positives and candidates: (-ln 2/3 - ln 1/3) / 2 twice, and -ln 1/2.
    """
    z = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    found = losses.supcon(z, torch.zeros(3).long(), torch.tensor(math.log(2)))
    assert found.item() == pytest.approx((math.log(9 / 2) + math.log(2)) / 3)


def test_supcon_without_positives_is_zero() -> None:
    views, scale = unit(4, 1, 5).requires_grad_(), double(1000.0).requires_grad_()
    found = losses.supcon(views, torch.arange(4), scale)
    assert found.item() == 0
    for gradient in torch.autograd.grad(found, (views, scale)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_supcon_leaves_out_rows_that_are_not_present() -> None:
    """They are no anchors, no positives and no candidates, whatever stands in them, and get no gradient."""
    views, labels = unit(6, 2, 5), torch.tensor([0, 1, 0, 1, 0, 2])
    present = torch.tensor([True, True, True, True, False, False])
    views[4:] = torch.nan
    views.requires_grad_()
    found = losses.supcon(views, labels, double(7.0), present=present)
    expected = losses.supcon(views[:4], labels[:4], double(7.0))
    assert found.item() == expected.item()
    assert torch.equal(torch.autograd.grad(found, views)[0][4:], torch.zeros(2, 2, 5))


def test_a_weighted_total_by_hand() -> None:
    """1 + 2 x 2 + 0.5 x 4 = 7; the losses themselves stay."""
    terms = {"a->b": double(1.0), "b->a": double(2.0), "a->c": double(4.0), "total": double(7.5)}
    found = losses.weighted(terms, {"b->a": 2.0, "a->c": 0.5})
    assert {name: loss.item() for name, loss in found.items()} == {"a->b": 1, "b->a": 2, "a->c": 4, "total": 7}


def test_shares_of_cross_entropy_add_up_to_that_of_all_rows() -> None:
    """Two processes of 4 places each, of which the last only fills up: the mean over the 7 rows."""
    logits, labels = 3 * unit(8, 5, seed=4), torch.tensor([0, 4, 1, 1, 2, 0, 3, 3])
    weight = torch.tensor([1.0] * 7 + [0.0])
    for smoothing in (0.0, 0.1):
        shares = [
            losses.share_of_cross_entropy(logits[p], labels[p], weight[p], rows=7, label_smoothing=smoothing)
            for p in (slice(0, 4), slice(4, 8))
        ]
        expected = cross_entropy(logits[:7], labels[:7], label_smoothing=smoothing)
        assert sum(share.item() for share in shares) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("labels", [torch.arange(3)[:, None], torch.arange(3.0)])
def test_labels_that_are_no_row_of_integers_are_refused(labels: Tensor) -> None:
    embeddings = {m: unit(3, 4) for m in MODALITIES}
    with pytest.raises(ValueError, match=r"labels are \[3.*\] torch.* a row of integers is needed"):
        losses.cross_contrastive(embeddings, labels, double(2.0))
    with pytest.raises(ValueError, match="a row of integers is needed"):
        losses.supcon(unit(3, 2, 4), labels, double(2.0))


def test_a_batch_without_rows_costs_nothing_and_a_scale_may_have_a_dimension() -> None:
    empty = {m: torch.zeros(0, 4) for m in MODALITIES}
    nothing = losses.cross_contrastive(empty, torch.zeros(0, dtype=torch.long), torch.tensor(2.0))
    assert nothing["total"].item() == 0
    full = {m: unit(3, 4, seed=i) for i, m in enumerate(MODALITIES)}
    totals = [
        losses.cross_contrastive(full, torch.arange(3), scale)["total"]
        for scale in (double(2.0), double(2.0)[None], 2.0)
    ]
    assert {total.shape for total in totals} == {torch.Size([])}
    assert len({total.item() for total in totals}) == 1
