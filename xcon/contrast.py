"""How `losses.cross_contrastive` is computed: tables of all similarities for small batches, blocks for large ones.

Vectors a_k and b_l of two modalities stand for w_k and w_l rows of the batch, n in all, n_y of them of class y.
With S = s a b^T,

    r_k = log sum_l w_l exp(S_kl)        L_{a->b} = 1/n (sum_k w_k r_k - s sum_y <A_y, B_y> / n_y)
    c_l = log sum_k w_k exp(S_kl)        L_{b->a} = 1/n (sum_l w_l c_l - s sum_y <A_y, B_y> / n_y)

where A_y and B_y are the sums over a class's rows: blocks need no n x n mask of positives, and both directions
share one S. The gradients are written by hand, so that no block outlives its turn. For gradients g, h of the two
losses,

    dL/da_k = s/n w_k (sum_l (g exp(S_kl - r_k) + h exp(S_kl - c_l)) w_l b_l - (g + h) B_y / n_y)

and b's alike. The loss depends on s and a through s a alone, hence s dL/ds = sum_k <a_k, dL/da_k> (Euler).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Legend: N rows, K and J vectors of two sides, D width, G classes, P pairs of modalities, m rows of a block.

# Similarities in a block, and rows at least: a processor's cache holds it, a GPU wants larger products.
_BLOCK, _BLOCK_ON_GPU, _BLOCK_ROWS = 2**20, 2**25, 128


# --------------------------------------------------------------------------------------------------------
# Exponentials


@dataclasses.dataclass(frozen=True)
class LogitGradient:
    """The gradient with respect to the similarities, `g exp(S_kl - r_k) + h exp(S_kl - c_l)`.

    Log-sum-exps are float64 in all of this module: a last digit of float32 would be an error that all weights of a
    row or column share, several times that of the similarities' own last digits, which are independent.

    Attributes:
        row: `[..., K]` r, float64.
        column: `[..., J]` c, float64.
        g: `[...]` gradients of `L_{a->b}`.
        h: `[...]` gradients of `L_{b->a}`.
    """

    row: Tensor
    column: Tensor
    g: Tensor
    h: Tensor

    def offset(self) -> Tensor | None:
        """What one exponential for rows and columns is relative to; None where their range is too wide."""
        every = torch.cat([self.row, self.column], dim=-1)
        offset = _shared_offset(every.max().to(self.g.dtype))
        smallest = _smallest_safe_sum(offset.dtype, every.shape[-1])
        return offset if bool((every.min() - offset).exp() >= smallest) else None

    @functools.cached_property
    def _parts(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        """The offset; for rows `[..., K, 1]` and columns `[..., 1, J]` what to subtract, and the factor after."""
        offset, found = self.offset(), []
        for lse, gradient, dim in ((self.row, self.g, -1), (self.column, self.h, -2)):
            subtracted = lse.to(gradient.dtype) if offset is None else offset.expand_as(lse)
            factor = gradient[..., None] * (subtracted - lse).exp().to(gradient.dtype)
            found += [subtracted.unsqueeze(dim), factor.unsqueeze(dim)]
        return offset, *found  # type: ignore[return-value]

    def overwrite_(self, block: Tensor, rows: slice, scratch: Tensor) -> Tensor:
        """Similarities `[..., m, J]` of some rows -> their gradient, in the scratch; both are overwritten."""
        offset, row, row_factor, column, column_factor = self._parts
        if offset is None:
            torch.sub(block, column, out=scratch).exp_().mul_(column_factor)
            return scratch.add_(block.sub_(row[..., rows, :]).exp_().mul_(row_factor[..., rows, :]))
        torch.add(row_factor[..., rows, :], column_factor, out=scratch)
        return scratch.mul_(block.sub_(offset).exp_())


def _wide(numbers: Tensor) -> Tensor:
    """As float64, which only Apple's GPUs do not have."""
    return numbers if numbers.device.type == "mps" else numbers.double()


def _shared_offset(peak: Tensor) -> Tensor:
    """What shared exponentials are relative to, given the largest similarity.

    As near to zero as goes, for the digits of the logarithm, and so far below the peak that little underflows: in
    float32 zero up to a peak of 62, and 81 for the 143 that the paper's scale allows.
    """
    headroom = 0.7 * math.log(torch.finfo(peak.dtype).max)
    return (peak - headroom).clamp(min=0).minimum(peak)


def _smallest_safe_sum(dtype: torch.dtype, terms: int) -> float:
    """What a sum of shared exponentials must reach: whatever underflowed is then less than its rounding error.

    In float32, 1e-28 for 1,024 terms: 64 below the offset, so 145 below the peak of a scale of 143.
    """
    return terms * torch.finfo(dtype).tiny / torch.finfo(dtype).eps


# --------------------------------------------------------------------------------------------------------
# Tables


class TableLoss(torch.autograd.Function):
    """Both losses of P pairs at once, by tables `[P, N, N]` that are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, labels: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses `[P]` of the first sides and of the second.

        Args:
            ctx: autograd's.
            a: `[P, N, D]` first sides.
            b: `[P, N, D]` second sides.
            scale: a scalar.
            labels: `[N]`.
            valid: `[P, N]` bool, rows that have both sides.
        """
        a, b = (side.masked_fill(~valid[..., None], 0) for side in (a, b))
        both = valid[:, :, None] & valid[:, None, :]  # [P, N, N]
        target = ((labels[:, None] == labels) & both).to(a.dtype)
        target /= target.sum(dim=-1, keepdim=True).clamp_(min=1)
        similarity = (scale * a) @ b.mT  # [P, N, N]
        positive = (similarity * target).sum(dim=(1, 2))  # [P]
        similarity.masked_fill_(~both, torch.finfo(a.dtype).min)
        row, column = _table_lse(similarity, valid)  # [P, N]
        n = valid.sum(dim=1).clamp_(min=1)
        ctx.save_for_backward(a, b, scale, target, similarity, row, column, n)
        forth, back = (((lse * valid).sum(dim=1) - positive) / n for lse in (row, column))
        return forth.to(a.dtype), back.to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients `[P]` of the two sides' losses -> those of a, b and the scale."""
        a, b, scale, target, similarity, row, column, n = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            slope = LogitGradient(row, column, scale / n * g, scale / n * h)
            weights = slope.overwrite_(similarity.clone(), slice(None), torch.empty_like(similarity))
            weights -= (slope.g + slope.h)[:, None, None] * target
            da, db = weights @ b, weights.mT @ a  # [P, N, D]
            return da, db, torch.dot(a.flatten(), da.flatten()) / scale, None, None


def _table_lse(similarity: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """`[P, N, N]` -> log-sum-exp of rows and columns `[P, N]`; where `valid` is not, a number in their range."""
    peak = similarity.max()
    offset = _shared_offset(peak)
    table = (similarity - offset).exp_()
    row, column = (table.sum(dim=dim).masked_fill_(~valid, 1) for dim in (2, 1))
    if bool(torch.minimum(row.min(), column.min()) >= _smallest_safe_sum(row.dtype, row.shape[-1])):
        return _wide(row).log() + offset, _wide(column).log() + offset
    return tuple(_wide(similarity).logsumexp(dim=dim).where(valid, peak) for dim in (2, 1))  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------------
# Blocks


@dataclasses.dataclass(frozen=True)
class Members:
    """What the vectors of one side stand for.

    Attributes:
        group: `[K]` numbers of their classes, from 0.
        groups: number of classes G.
        weight: `[K]` rows that each stands for, at least 1; None: one each.
    """

    group: Tensor
    groups: int
    weight: Tensor | None = None

    def rows(self, like: Tensor) -> Tensor:
        """`[K]` weights in the type of a tensor."""
        return like.new_ones(len(self.group)) if self.weight is None else self.weight.to(like.dtype)

    def times(self, vectors: Tensor) -> Tensor:
        """`[K, D]` vectors times their weights."""
        return vectors if self.weight is None else vectors * self.rows(vectors)[:, None]

    def sums(self, vectors: Tensor) -> Tensor:
        """`[K, D]` vectors -> `[G, D]` sums over the rows of each class."""
        return vectors.new_zeros(self.groups, vectors.shape[1]).index_add_(0, self.group, self.times(vectors))

    def counts(self, like: Tensor) -> Tensor:
        """`[G]` rows of each class, 1 where there are none."""
        return like.new_zeros(self.groups).index_add_(0, self.group, self.rows(like)).clamp_(min=1)

    def __getitem__(self, vectors: Any) -> "Members":
        """Those of some of the vectors."""
        weight = None if self.weight is None else self.weight[vectors]
        return Members(self.group[vectors], self.groups, weight)


class Participants:
    """Which vectors take part in a pair of modalities, and what they stand for.

    Args:
        labels: `[N]` integers.
        present: modality -> `[N]` bool; all rows where a modality is not named.
        classes: modality -> `[K]` label of each of its vectors; a vector per row where a modality is not named.
    """

    def __init__(self, labels: Tensor, present: Mapping[str, Tensor], classes: Mapping[str, Tensor]) -> None:
        names, self.group = labels.unique(return_inverse=True)  # [G], [N]
        self.groups = len(names)
        self.present = {m: mask for m, mask in present.items() if not mask.all()}
        self.vector = {m: vector_of_rows(m, labels, c) for m, c in classes.items()}  # [N] each
        self.vectors = {m: len(c) for m, c in classes.items()}

    def pair(self, a: str, b: str) -> tuple[tuple[Tensor, Members], tuple[Tensor, Members]]:
        """For both modalities, `[K]` bool, the vectors that take part, and what all K of them stand for."""
        valid = valid_rows(self.group, self.present, a, b)
        return self._side(a, valid), self._side(b, valid)

    def _side(self, modality: str, valid: Tensor) -> tuple[Tensor, Members]:
        if modality not in self.vector:
            return valid, Members(self.group, self.groups)
        vector = self.vector[modality]  # [N]
        weight = self.group.new_zeros(self.vectors[modality]).index_add_(0, vector, valid.to(vector.dtype))
        group = torch.zeros_like(weight).scatter_(0, vector, self.group)
        return weight > 0, Members(group, self.groups, weight)


def valid_rows(labels: Tensor, present: Mapping[str, Tensor], a: str, b: str) -> Tensor:
    """`[N]` bool, the rows that have both modalities."""
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    return present.get(a, everywhere) & present.get(b, everywhere)


def vector_of_rows(modality: str, labels: Tensor, classes: Tensor) -> Tensor:
    """`[N]` labels and the `[K]` labels of a modality's vectors -> `[N]` number of each row's vector.

    Raises:
        ValueError: a label has no vector, or several.
    """
    ordered, order = classes.sort()
    first = torch.searchsorted(ordered, labels)
    found = torch.searchsorted(ordered, labels, right=True) - first  # [N]
    if bool((found != 1).any()):
        wrong = labels[found != 1][0].item()
        number = found[found != 1][0].item()
        raise ValueError(f"{modality}: label {wrong} has {number} vectors in its classes, 1 is needed")
    return order[first]


def take(vectors: Tensor, kept: Tensor) -> Tensor:
    """`[K, D]` vectors and a mask `[K]` -> those kept, the same tensor where that is all."""
    return vectors if bool(kept.all()) else vectors[kept]


class PairLoss(torch.autograd.Function):
    """Both losses of a pair, by blocks that are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, a_members: Members, b_members: Members
    ) -> tuple[Tensor, Tensor]:
        """`[K, D]` and `[J, D]`, at least one vector each -> `L_{a->b}` and `L_{b->a}`, scalars."""
        row, column = both_lse(a, b, scale, a_members, b_members)
        ctx.save_for_backward(a, b, scale, row, column)
        ctx.members = a_members, b_members
        return from_lse(a, b, scale, a_members, b_members, row=row, column=column)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the two losses -> those of a, b and the scale."""
        a, b, scale, row, column = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            da, db = both_gradients(a, b, scale, LogitGradient(row, column, g, h), *ctx.members)
            return da, db, torch.dot(a.flatten(), da.flatten()) / scale, None, None


def from_lse(
    a: Tensor, b: Tensor, scale: Tensor, a_members: Members, b_members: Members, *, row: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    """`L_{a->b}` and `L_{b->a}` from the vectors `[K, D]`, `[J, D]` and the log-sum-exps `[K]`, `[J]`."""
    products = torch.linalg.vecdot(a_members.sums(a), b_members.sums(b))  # [G]
    positive = scale * (products / a_members.counts(a)).sum()
    a_rows, b_rows = a_members.rows(a), b_members.rows(b)
    n = a_rows.sum().clamp(min=1)
    forth, back = (torch.dot(_wide(w), lse) - positive for w, lse in ((a_rows, row), (b_rows, column)))
    return (forth / n).to(a.dtype), (back / n).to(a.dtype)


def both_lse(a: Tensor, b: Tensor, scale: Tensor, a_members: Members, b_members: Members) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of rows and of columns in one pass over the similarities.

    One exponential serves rows and columns as long as none of them vanishes beside the largest; where one does,
    the pass is repeated with a maximum for each row and column.

    Args:
        a: `[K, D]`.
        b: `[J, D]`.
        scale: a scalar.
        a_members: what a's vectors stand for.
        b_members: what b's vectors stand for.

    Returns:
        `[K]` and `[J]`.
    """
    a_rows, b_rows = a_members.rows(a), b_members.rows(b)
    row_sum, column_sum = a.new_empty(len(a)), b.new_zeros(len(b))
    offset = a.new_zeros(())
    for rows, block in _similarities(a, b, scale):
        if rows.start == 0:
            offset = _shared_offset(block.max())
        block.sub_(offset).exp_()  # [m, J]
        torch.mv(block, b_rows, out=row_sum[rows])
        column_sum.addmv_(block.T, a_rows[rows])
    every = torch.cat([row_sum, column_sum])
    if bool((every.min() >= _smallest_safe_sum(a.dtype, len(every))) & (every.max() <= torch.finfo(a.dtype).max)):
        return _wide(row_sum).log() + offset, _wide(column_sum).log() + offset
    return _both_lse_apart(a, b, scale, a_rows, b_rows)


def _both_lse_apart(a: Tensor, b: Tensor, scale: Tensor, a_rows: Tensor, b_rows: Tensor) -> tuple[Tensor, Tensor]:
    row = _wide(a.new_empty(len(a)))
    peak, column_sum = b.new_full((len(b),), -math.inf), b.new_zeros(len(b))  # of the columns so far
    for rows, block in _similarities(a, b, scale):
        higher = torch.maximum(peak, block.amax(dim=0))  # [J]
        column_sum.mul_(torch.exp(peak - higher)).addmv_(torch.exp(block - higher).T, a_rows[rows])
        peak = higher
        row[rows] = _lse_(block, b_rows)
    return row, _wide(column_sum).log() + peak


def row_lse(a: Tensor, b: Tensor, scale: Tensor, b_members: Members) -> Tensor:
    """Log-sum-exp of rows alone: `[K, D]`, `[J, D]` and a scalar -> `[K]`."""
    row, b_rows = _wide(a.new_empty(len(a))), b_members.rows(b)
    for rows, block in _similarities(a, b, scale):
        row[rows] = _lse_(block, b_rows)
    return row


def _lse_(block: Tensor, b_rows: Tensor) -> Tensor:
    """`[m, J]` similarities, which are overwritten, and `[J]` weights -> `[m]`."""
    peak = block.amax(dim=1)  # [m]
    return _wide(torch.mv(block.sub_(peak[:, None]).exp_(), b_rows)).log() + peak


def both_gradients(
    a: Tensor, b: Tensor, scale: Tensor, slope: LogitGradient, a_members: Members, b_members: Members
) -> tuple[Tensor, Tensor]:
    """dL/da `[K, D]` and dL/db `[J, D]` in one pass; the arguments are `row_gradient`'s, a complete as well."""
    a_vectors, b_vectors = a_members.times(a), b_members.times(b)
    da = _towards_positives(a_members, b, b_members, slope)
    db = _towards_positives(b_members, a, a_members, slope)
    for rows, weights in _weights(a, b, scale, slope):
        da[rows].addmm_(weights, b_vectors)
        db.addmm_(weights.T, a_vectors[rows])
    factor = scale / a_members.rows(a).sum()
    return a_members.times(da.mul_(factor)), b_members.times(db.mul_(factor))


def row_gradient(
    a: Tensor, b: Tensor, scale: Tensor, slope: LogitGradient, a_members: Members, b_members: Members
) -> Tensor:
    """dL/da `[K, D]` of some vectors of one side against all vectors of the other.

    Args:
        a: `[K, D]`.
        b: `[J, D]`.
        scale: a scalar.
        slope: of a's rows and b's columns.
        a_members: what a's vectors stand for.
        b_members: what b's vectors stand for: every row of the batch.
    """
    b_vectors = b_members.times(b)
    da = _towards_positives(a_members, b, b_members, slope)
    for rows, weights in _weights(a, b, scale, slope):
        da[rows].addmm_(weights, b_vectors)
    return a_members.times(da.mul_(scale / b_members.rows(b).sum()))


def _towards_positives(members: Members, other: Tensor, other_members: Members, slope: LogitGradient) -> Tensor:
    """The second part of the gradient, `-(g + h) B_y / n_y` for each vector of one side: `[K, D]`."""
    factor = -(slope.g + slope.h) / other_members.counts(other)  # [G]
    return other_members.sums(other).mul_(factor[:, None])[members.group]


def _weights(a: Tensor, b: Tensor, scale: Tensor, slope: LogitGradient) -> Iterator[tuple[slice, Tensor]]:
    """Rows and the `[m, J]` gradient with respect to their similarities."""
    scratch = None
    for rows, block in _similarities(a, b, scale):
        scratch = torch.empty_like(block) if scratch is None else scratch[: len(block)]
        yield rows, slope.overwrite_(block, rows, scratch)


def _similarities(a: Tensor, b: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their `[m, J]` similarities times the scale, in one memory that the next block takes over."""
    size = max(_BLOCK_ROWS, (_BLOCK_ON_GPU if a.is_cuda else _BLOCK) // max(1, len(b)))
    memory = a.new_empty(min(size, len(a)), len(b))
    for start in range(0, len(a), size):
        rows = slice(start, min(start + size, len(a)))
        yield rows, torch.mm(a[rows] * scale, b.T, out=memory[: rows.stop - start])
