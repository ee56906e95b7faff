"""The label-matched cross-contrastive loss (paper, section 3.1, "Loss Function") and its relatives.

Pure functions: unit vectors, labels and a scale go in, numbers come out; no rank, no device, no settings.
`by_definition` says what the loss is; `cross_contrastive` computes the same numbers and gradients faster, with
memory that grows with the batch and not with its square, as `xcon.contrast` explains. For several processes see
`xcon.gather`, which has the same arguments and results.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, logsigmoid

from xcon.contrast import PairLoss, Participants, TableLoss, take, valid_rows, vector_of_rows

# Legend: N rows of the batch, b of them at hand, D width, C classes, K vectors, P pairs of modalities, V views.

# Up to here whole tables of similarities are faster than blocks of them; benchmarks/loss.py measures both.
TABLE_ROWS = 256


def by_definition(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    scale: Tensor,
    *,
    present: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`cross_contrastive` as the paper writes it: the reference of the tests, for reading rather than running.

    For each ordered pair of modalities, the cross-entropy of each row's similarities against the even distribution
    over the rows of its class: L_{I,T} of section 3.1 and its five siblings, whose sums over the batch are read as
    means.
    """
    losses = {}
    for a, b in itertools.permutations(embeddings, 2):
        rows = valid_rows(labels, present or {}, a, b)  # [N]
        logits = scale * embeddings[a][rows] @ embeddings[b][rows].T  # [n, n]
        positive = (labels[rows, None] == labels[rows]).to(logits.dtype)  # [n, n]
        targets = positive / positive.sum(dim=1, keepdim=True)
        losses[f"{a}->{b}"] = cross_entropy(logits, targets) if rows.any() else logits.sum()
    return with_total(losses)


def cross_contrastive(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    scale: Tensor,
    *,
    present: Mapping[str, Tensor] | None = None,
    classes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The loss of every ordered pair of modalities, and their sum.

    For three modalities these are the paper's six terms, L_total of section 3.1. Computed in float32 or wider,
    under autocast too; bring vectors of half precision to unit length in float32. Differentiable once.

    Args:
        embeddings: modality -> unit vectors `[N, D]`, at least two modalities.
        labels: `[N]` integers; rows of equal label are positives of each other, in all modalities.
        scale: 1 / temperature, a positive scalar.
        present: modality -> `[N]` bool, the rows that have it; all rows where a modality is not named. A pair is
            computed on the rows that have both of its modalities; what stands in the others does not matter.
        classes: modality -> `[K]` the label of each of its vectors, for a modality whose rows share one vector per
            label, as captions do: its embeddings are `[K, D]`. Every label of the batch comes once; others take no
            part and may stand for padding.

    Returns:
        `"a->b"` -> the mean over the rows, a scalar, for every ordered pair, then `"total"`, their sum. A pair
        that no row has both modalities of is zero.

    Raises:
        ValueError: fewer than two modalities, sizes that do not agree, a mask that is none of theirs, or a label
            that `classes` does not have exactly once.
    """
    present, classes = present or {}, classes or {}
    check(embeddings, labels, present, classes)
    with torch.autocast(labels.device.type, enabled=False):
        vectors, scale = widened(embeddings, scale)
        compute = _by_tables if 0 < len(labels) <= TABLE_ROWS else _by_blocks
        return compute(vectors, labels, scale, present, classes)


def _by_tables(
    vectors: Mapping[str, Tensor], labels: Tensor, scale: Tensor, present: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    pairs = pairs_of(vectors)
    rows = {
        m: embedding(vector_of_rows(m, labels, classes[m]), z) if m in classes else z for m, z in vectors.items()
    }  # [N, D]
    valid = torch.stack([valid_rows(labels, present, a, b) for a, b in pairs]) if present else None  # [P, N]
    valid = None if valid is None or valid.all() else valid
    first, second = (torch.stack([rows[pair[side]] for pair in pairs]) for side in (0, 1))  # [P, N, D]
    forth, back = TableLoss.apply(first, second, scale, labels, valid)  # [P], [P]
    terms = named(pairs, zip(forth.unbind(), back.unbind(), strict=True))
    return {**terms, "total": (forth + back).sum()}


def _by_blocks(
    vectors: Mapping[str, Tensor], labels: Tensor, scale: Tensor, present: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    participants = Participants(labels, present, classes)
    found = []
    for a, b in pairs_of(vectors):
        (a_kept, a_members), (b_kept, b_members) = participants.pair(a, b)
        z_a, z_b = take(vectors[a], a_kept), take(vectors[b], b_kept)
        if len(z_a) > 0:
            found.append(PairLoss.apply(z_a, z_b, scale, a_members[a_kept], b_members[b_kept]))
        else:
            zero = z_a.sum() + z_b.sum() + 0 * scale  # part of the graph
            found.append((zero, zero))
    return with_total(named(pairs_of(vectors), found))


def widened(embeddings: Mapping[str, Tensor], scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The vectors and the scale, a scalar, in one type: float32 or wider."""
    dtype = functools.reduce(torch.promote_types, (z.dtype for z in embeddings.values()), torch.float32)
    device = next(iter(embeddings.values())).device
    scale = torch.as_tensor(scale, dtype=dtype, device=device).reshape(())  # a plain number will do
    return {m: z.to(dtype) for m, z in embeddings.items()}, scale


def pairs_of(embeddings: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The unordered pairs of modalities."""
    return list(itertools.combinations(embeddings, 2))


def named(pairs: Iterable[tuple[str, str]], losses: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The losses of each pair in both directions, by name."""
    terms: dict[str, Tensor] = {}
    for (a, b), (forth, back) in zip(pairs, losses, strict=True):
        terms |= {f"{a}->{b}": forth, f"{b}->{a}": back}
    return terms


def with_total(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The losses and `"total"`, their sum."""
    return {**terms, "total": torch.stack(list(terms.values())).sum()}


def check(
    embeddings: Mapping[str, Tensor], labels: Tensor, present: Mapping[str, Tensor], classes: Mapping[str, Tensor]
) -> None:
    """Raises ValueError where the arguments of `cross_contrastive` do not agree in size or name."""
    if len(embeddings) < 2:
        raise ValueError(f"a cross-modal loss needs two modalities or more, not {list(embeddings)}")
    for name, ids in {"labels": labels, **{f"classes of {m}": c for m, c in classes.items()}}.items():
        _check_ids(name, ids)
    for name in {**present, **classes}:
        if name not in embeddings:
            kind = "a mask" if name in present else "classes"
            raise ValueError(f"{kind} for {name}, where the modalities are {', '.join(embeddings)}")
    width = next(iter(embeddings.values())).shape[-1]
    for modality, vectors in embeddings.items():
        rows = len(classes.get(modality, labels))
        if vectors.shape != (rows, width):
            raise ValueError(
                f"{modality}: vectors are {list(vectors.shape)}, {[rows, width]} is needed, a vector per "
                f"{'class' if modality in classes else 'label'} and one width for all modalities"
            )
    for modality, mask in present.items():
        if mask.dtype != torch.bool or mask.shape != labels.shape:
            raise ValueError(
                f"{modality}: its mask is {list(mask.shape)} {mask.dtype}, {list(labels.shape)} bool is needed"
            )


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"{name} are {list(ids.shape)} {ids.dtype}, a row of integers is needed")


def clip(
    embeddings: Mapping[str, Tensor], scale: Tensor, *, present: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """CLIP's loss (Radford et al. 2021, figure 3; the paper's figure 4): each row is its own only positive.

    The recipe `clip` reaches it by labels that are the records' numbers, which hold over processes as well.

    Args:
        embeddings: modality -> unit vectors `[N, D]`, two for CLIP itself.
        scale: 1 / temperature, a positive scalar.
        present: as in `cross_contrastive`.

    Returns:
        As `cross_contrastive`; CLIP's own loss is half the total.
    """
    first = next(iter(embeddings.values()))
    labels = torch.arange(len(first), device=first.device)
    return cross_contrastive(embeddings, labels, scale, present=present)


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The losses of `cross_contrastive`, and as `"total"` their weighted sum.

    Args:
        terms: as `cross_contrastive` returns them.
        weights: `"a->b"` -> factor of that loss in the total; 1 where a loss is not named.
    """
    losses = {name: loss for name, loss in terms.items() if name != "total"}
    total = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
    return {**losses, "total": total}


def supcon(views: Tensor, labels: Tensor, scale: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Supervised contrastive loss of one modality (Khosla et al. 2020, equation 2, L_out).

    Every view of every row is an anchor; all other views of its class are its positives, all other views its
    candidates. With a label of its own for each row it is SimCLR's (Chen et al. 2020, equation 1).

    Args:
        views: `[N, V, D]` unit vectors.
        labels: `[N]` integers.
        scale: 1 / temperature, a positive scalar.
        present: `[N]` bool, the rows that take part; all where it is not given.

    Returns:
        The mean over the anchors that have a positive, a scalar; zero where none has.

    Raises:
        ValueError: sizes that do not agree.
    """
    _check_ids("labels", labels)
    if views.ndim != 3 or len(views) != len(labels):
        raise ValueError(f"views are {list(views.shape)}, [{len(labels)}, V, D] is needed")
    if present is not None:
        views, labels = views[present], labels[present]
    with torch.autocast(views.device.type, enabled=False):
        vectors, scale = widened({"views": views}, scale)
        z = vectors["views"].flatten(0, 1)  # [NV, D]
        label = labels.repeat_interleave(views.shape[1])  # [NV]
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = (label[:, None] == label) & ~itself  # [NV, NV]
        logits = (scale * z @ z.T).masked_fill(itself, torch.finfo(z.dtype).min)  # [NV, NV]
        anchors = positive.any(dim=1)
        per_anchor = -(logits.log_softmax(dim=1) * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
        return per_anchor.sum() / anchors.sum().clamp(min=1)


def siglip(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    present: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The sigmoid loss (Zhai et al. 2023, equation 1), where every row of the same class is a positive.

    Args:
        embeddings: modality -> unit vectors `[N, D]`, at least two modalities.
        labels: `[N]` integers; a label of its own for each row is SigLIP itself.
        scale: 1 / temperature, a positive scalar.
        bias: added to all similarities, a scalar; SigLIP starts it at -10.
        present: as in `cross_contrastive`.

    Returns:
        `"a<->b"` -> the sum over all pairs of rows divided by the rows, a scalar, for every pair of modalities,
        then `"total"`, their sum. Zero for a pair that no row has both modalities of.
    """
    present = present or {}
    check(embeddings, labels, present, {})
    terms = {}
    with torch.autocast(labels.device.type, enabled=False):
        vectors, scale = widened(embeddings, scale)
        for a, b in pairs_of(vectors):
            rows = valid_rows(labels, present, a, b)  # [N]
            z_a, z_b = vectors[a][rows], vectors[b][rows]  # [n, D]
            sign = 2 * (labels[rows, None] == labels[rows]).to(z_a.dtype) - 1  # [n, n]
            logits = scale * z_a @ z_b.T + bias  # [n, n]
            terms[f"{a}<->{b}"] = -logsigmoid(sign * logits).sum() / max(1, len(z_a))
    return with_total(terms)


def share_of_cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor, *, rows: int, label_smoothing: float = 0.0
) -> Tensor:
    """What some rows add to the mean cross-entropy of the global batch; the shares of all rows add up to it.

    Args:
        logits: `[b, C]`.
        labels: `[b]` class ids, or `[b, C]` the shares of the classes.
        weight: `[b]`, 0 for rows that only fill up the batch.
        rows: real rows of the global batch.
        label_smoothing: share of the target spread over all classes.
    """
    each = cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)  # [b]
    return (each * weight).sum() / rows


def share_of_cross_entropies(
    trained: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, rows: int, label_smoothing: float
) -> Tensor:
    """What some rows add to the loss of the global batch: the cross-entropies of all that is trained.

    Targets are not smoothed for metadata alone: a place leaves the species open by itself.

    Args:
        trained: what a classifier gave for training, name -> `[b, C]`.
        batch: with `label` and `weight`, `[b]`, and for mixed photographs `target` `[b, C]`, the shares of their
            classes. Metadata alone is not mixed.
        rows: real rows of the global batch.
        label_smoothing: share of the target spread over all classes.
    """
    labels, weight = batch["label"], batch["weight"]
    mixed = batch.get("target", labels)
    each = [
        share_of_cross_entropy(s, labels, weight, rows=rows)
        if name == "meta"
        else share_of_cross_entropy(s, mixed, weight, rows=rows, label_smoothing=label_smoothing)
        for name, s in trained.items()
    ]
    return torch.stack(each).sum()
