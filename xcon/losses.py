"""The label-matched cross-contrastive loss (paper, section 3.1, "Loss Function"), as pure functions.

Unit vectors, labels and a scale go in, numbers come out: no rank, no device, no settings. For several
processes see `xcon.gather`, which has the same arguments and the same result.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Legend: N rows of the batch, b of them at hand, D width of the shared space, C classes.


def cross_contrastive(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    scale: Tensor,
    *,
    present: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The loss of every ordered pair of modalities, and their sum.

    For three modalities these are the paper's six terms, L_total of section 3.1. Give every row a label of
    its own, and each pair is CLIP's loss (its figure 4) without the factor one half.

    Args:
        embeddings: modality -> unit vectors `[N, D]`, at least two modalities.
        labels: `[N]` integers; rows of equal label are positives of each other, in all modalities.
        scale: 1 / temperature, a scalar.
        present: modality -> `[N]` bool, the rows that have it; all rows where a modality is not named.
            A pair is computed on the rows that have both of its modalities.

    Returns:
        `"a->b"` -> the mean over the rows, a scalar, for every ordered pair, then `"total"`, their sum. A
        pair that no row has both modalities of is zero.

    Raises:
        ValueError: fewer than two modalities, sizes that do not agree, or a mask that is none of theirs.
    """
    present = present or {}
    _check(embeddings, labels, present)
    everyone = torch.ones_like(labels, dtype=torch.bool)
    losses = {}
    for a, b in itertools.combinations(embeddings, 2):
        rows = present.get(a, everyone) & present.get(b, everyone)  # [N]
        similarity = scale * embeddings[a][rows] @ embeddings[b][rows].T  # [n, n]
        positive = labels[rows, None] == labels[None, rows]  # [n, n]
        losses[f"{a}->{b}"] = _matched(similarity, positive)
        losses[f"{b}->{a}"] = _matched(similarity.T, positive)
    return {**losses, "total": torch.stack(list(losses.values())).sum()}


def _matched(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy of each row against the even distribution over its positives; the mean over rows.

    The paper's L_{I,T}, divided by the number of rows: its sum over the batch is read as a mean.

    Args:
        logits: `[n, n]`.
        positive: `[n, n]` bool; the diagonal is true, so no row is without a positive.
    """
    if logits.numel() == 0:
        return logits.sum()  # zero, and still part of the graph
    log_probability = logits.log_softmax(dim=1)  # [n, n]
    per_row = -(log_probability * positive).sum(dim=1) / positive.sum(dim=1)  # [n]
    return per_row.mean()


def _check(embeddings: Mapping[str, Tensor], labels: Tensor, present: Mapping[str, Tensor]) -> None:
    if len(embeddings) < 2:
        raise ValueError(f"a cross-modal loss needs two modalities or more, not {list(embeddings)}")
    first, *_ = embeddings.values()
    for modality, vectors in embeddings.items():
        if vectors.ndim != 2 or len(vectors) != len(labels):
            raise ValueError(
                f"{modality}: vectors are {list(vectors.shape)}, [{len(labels)}, D] is needed: a row a label"
            )
        if vectors.shape != first.shape:
            raise ValueError(f"{modality}: vectors are {list(vectors.shape)}, the others {list(first.shape)}")
    for modality, mask in present.items():
        if modality not in embeddings:
            raise ValueError(f"a mask for {modality}, where the modalities are {', '.join(embeddings)}")
        if mask.dtype != torch.bool or mask.shape != labels.shape:
            raise ValueError(
                f"{modality}: its mask is {list(mask.shape)} {mask.dtype}, {list(labels.shape)} bool is needed"
            )


def share_of_cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor, *, rows: int, label_smoothing: float = 0.0
) -> Tensor:
    """What some rows add to the mean cross-entropy of the global batch; the shares of all rows add up to it.

    Args:
        logits: `[b, C]`.
        labels: `[b]` class ids.
        weight: `[b]`, 0 for rows that only fill up the batch.
        rows: real rows of the global batch.
        label_smoothing: share of the target spread over all classes.
    """
    each = cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)  # [b]
    return (each * weight).sum() / rows
