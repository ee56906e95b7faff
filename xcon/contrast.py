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
from torch.nn.functional import threshold

# Legend: N rows, K and J vectors of two sides, D width, G classes, P pairs of modalities, m rows of a block.

# Similarities in a block, and rows at least: a processor's cache holds it, a GPU wants larger products.
_BLOCK, _BLOCK_ON_GPU, _BLOCK_ROWS = 2**20, 2**25, 256
# Exponentials are kept for the backward pass where one side has no more vectors, captions as a rule.
_KEPT = 1024


# --------------------------------------------------------------------------------------------------------
# Exponentials


@dataclasses.dataclass(frozen=True)
class LogitGradient:
    """The gradient with respect to the similarities, `g exp(S_kl - r_k) + h exp(S_kl - c_l)`.

    Log-sum-exps are float64 in all of this module: a last digit of float32 would be an error that all weights of a
    row or column share, several times that of the similarities' own last digits, which are independent.

    Attributes:
        row: `[K]` r, float64.
        column: `[J]` c, float64.
        g: gradient of `L_{a->b}`, a scalar.
        h: gradient of `L_{b->a}`, a scalar.
    """

    row: Tensor
    column: Tensor
    g: Tensor
    h: Tensor

    def offset(self) -> float | None:
        """What one exponential for rows and columns is relative to; None where their range is too wide."""
        every = torch.cat([self.row, self.column])
        low, high = (x.item() for x in every.aminmax())
        offset = _shared_offset(high, self.g.dtype)
        return offset if low - offset >= math.log(_smallest_safe_sum(self.g.dtype, len(every))) else None

    @functools.cached_property
    def _parts(self) -> tuple[float | None, Tensor, Tensor, Tensor, Tensor]:
        """The offset; without one, what is subtracted, of rows and of columns; the factors `[K]`, `[J]` after."""
        offset, dtype = self.offset(), self.g.dtype
        row, column = self.row.to(dtype), self.column.to(dtype)
        factors = self._factors(row, column) if offset is None else self._factors(offset, offset)
        return offset, row, column, *factors

    def _factors(self, row: Tensor | float, column: Tensor | float) -> tuple[Tensor, Tensor]:
        """`[K]` and `[J]`, what turns exponentials relative to these numbers into rows' and columns' softmax."""
        row_factor, column_factor = self.g * (row - self.row).exp(), self.h * (column - self.column).exp()
        return row_factor.to(self.g.dtype), column_factor.to(self.g.dtype)

    def overwrite_(self, block: Tensor, rows: slice, scratch: Tensor) -> Tensor:
        """Similarities `[m, J]` of some rows -> their gradient, in the scratch; both are overwritten."""
        offset, row, column, row_factor, column_factor = self._parts
        if offset is None:
            _exp_(torch.sub(block, column, out=scratch)).mul_(column_factor)
            return scratch.add_(_exp_(block.sub_(row[rows, None])).mul_(row_factor[rows, None]))
        torch.add(row_factor[rows, None], column_factor, out=scratch)
        return scratch.mul_(_exp_(block.sub_(offset) if offset else block))

    def of_kept(self, kept: "Kept") -> Iterator[tuple[slice, Tensor]]:
        """Rows and their gradient `[m, J]`, from exponentials that were kept."""
        row_factor, column_factor = self._factors(kept.offset, kept.offset)
        for rows, exponentials in kept.blocks:
            yield rows, torch.add(row_factor[rows, None], column_factor).mul_(exponentials)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Blocks of `exp(S - offset)` with their rows."""

    blocks: list[tuple[slice, Tensor]]
    offset: float


def _wide(numbers: Tensor) -> Tensor:
    """As float64, which only Apple's GPUs do not have."""
    return numbers if numbers.device.type == "mps" else numbers.double()


def _shared_offset(peak: float, dtype: torch.dtype) -> float:
    """What shared exponentials are relative to, given the largest similarity.

    As near to zero as goes, for the digits of the logarithm, and so far below the peak that little underflows: in
    float32 zero up to a peak of 62, and 80 for the 143 that the paper's scale allows.
    """
    if not math.isfinite(peak):
        return 0.0
    offset = min(peak, max(0.0, peak - 0.7 * math.log(torch.finfo(dtype).max)))
    return float(math.floor(offset))  # a whole number, so that it is subtracted without rounding


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
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, labels: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Losses `[P]` of the first sides and of the second.

        Args:
            ctx: autograd's.
            a: `[P, N, D]` first sides.
            b: `[P, N, D]` second sides.
            scale: a scalar.
            labels: `[N]`.
            valid: `[P, N]` bool, rows that have both sides; None: all.
        """
        target = (labels[:, None] == labels).to(a.dtype)  # [N, N]
        n: Tensor | int = len(labels)
        missing = None
        if valid is not None:
            a, b = (side.masked_fill(~valid[..., None], 0) for side in (a, b))
            missing = ~(valid[:, :, None] & valid[:, None, :])  # [P, N, N]
            target, n = target.expand_as(missing).masked_fill(missing, 0), valid.sum(dim=1).clamp_(min=1)  # [P]
        target /= target.sum(dim=-1, keepdim=True).clamp_(min=1)
        similarity = (scale * a) @ b.mT  # [P, N, N]
        flat, flat_target = similarity.flatten(1), target.flatten(-2)  # [P, N N], [N N] or [P, N N]
        positive = flat @ flat_target if valid is None else torch.linalg.vecdot(flat, flat_target)  # [P]
        row, column, ctx.kept = _table_lse(similarity, missing)  # [P, N]
        ctx.save_for_backward(a, b, scale, target)
        ctx.n = n
        if valid is not None:
            row, column = row * valid, column * valid
        return (row.sum(dim=1) - positive) / n, (column.sum(dim=1) - positive) / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients `[P]` of the two sides' losses -> those of a, b and the scale."""
        a, b, scale, target = ctx.saved_tensors
        g, h = ((scale / ctx.n * x)[:, None, None] for x in (g, h))  # [P, 1, 1]
        with torch.autocast(a.device.type, enabled=False):
            if len(ctx.kept) == 3:
                exponentials, row_sum, column_sum = ctx.kept
                slope = (g / row_sum[..., None] + h / column_sum[:, None]).mul_(exponentials)
            else:
                slope = torch.addcmul(g * ctx.kept[0], h, ctx.kept[1])
            slope.addcmul_(target, g + h, value=-1)
            da, db = slope @ b, slope.mT @ a  # [P, N, D]
            return da, db, torch.dot(a.flatten(), da.flatten()) / scale, None, None


def _table_lse(similarity: Tensor, missing: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Log-sum-exp of the rows and columns of tables, and what is kept for their gradient.

    Args:
        similarity: `[P, N, N]`.
        missing: `[P, N, N]` bool, where there is none; None: nowhere.

    Returns:
        `[P, N]` each, any number where a whole row or column is missing; then exponentials `[P, N, N]` and their
        sums over rows and columns; or, where one exponential cannot serve both, the softmax of rows and that of
        columns.
    """
    low, high = (x.item() for x in similarity.aminmax())
    offset = _shared_offset(high, similarity.dtype)
    smallest = _smallest_safe_sum(similarity.dtype, similarity.shape[-1])
    exponentials = _exp_(similarity - offset if offset else similarity.clone(), lowest=low - offset)
    if missing is not None:
        exponentials.masked_fill_(missing, 0)
    sums = exponentials.sum(dim=2), exponentials.sum(dim=1)
    if missing is not None:
        whole = missing.all(dim=2)  # and the columns' alike
        sums = sums[0].masked_fill_(whole, 1), sums[1].masked_fill_(whole, 1)
    if low - offset >= math.log(smallest) or min(x.min().item() for x in sums) >= smallest:
        row, column = (x.log().add_(offset) for x in sums)
        return row, column, (exponentials, *sums)
    if missing is not None:
        similarity.masked_fill_(missing, torch.finfo(similarity.dtype).min)
    row, column = similarity.logsumexp(dim=2), similarity.logsumexp(dim=1)
    tiny = torch.finfo(similarity.dtype).tiny  # smaller numbers cost a processor 30 times as much
    softmax = [threshold(similarity.softmax(dim=dim), tiny, 0, inplace=True) for dim in (2, 1)]
    if missing is not None:
        softmax = [x.masked_fill_(missing, 0) for x in softmax]
    return row, column, tuple(softmax)


def _exp_(block: Tensor, *, lowest: float = -math.inf) -> Tensor:
    """Exponentials in place, of no less than normal numbers: a processor takes 30 times as long below them.

    Args:
        block: of any shape.
        lowest: known not to be above any of its numbers.
    """
    least = math.ceil(math.log(torch.finfo(block.dtype).tiny))
    return block.exp_() if lowest >= least else block.clamp_(min=least).exp_()


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
    """Both losses of a pair, by blocks; the backward pass computes them again unless they are few (`_KEPT`)."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, a_members: Members, b_members: Members
    ) -> tuple[Tensor, Tensor]:
        """`[K, D]` and `[J, D]`, at least one vector each -> `L_{a->b}` and `L_{b->a}`, scalars."""
        row, column, ctx.kept = both_lse(a, b, scale, a_members, b_members)
        ctx.save_for_backward(a, b, scale, row, column)
        ctx.members = a_members, b_members
        return from_lse(a, b, scale, a_members, b_members, row=row, column=column)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the two losses -> those of a, b and the scale."""
        a, b, scale, row, column = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            slope = LogitGradient(row, column, g, h)
            da, db = both_gradients(a, b, scale, slope, *ctx.members, kept=ctx.kept)
            return da, db, torch.dot(a.flatten(), da.flatten()) / scale, None, None


def from_lse(
    a: Tensor, b: Tensor, scale: Tensor, a_members: Members, b_members: Members, *, row: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    """`L_{a->b}` and `L_{b->a}` from the vectors `[K, D]`, `[J, D]` and the log-sum-exps `[K]`, `[J]`."""
    products = torch.linalg.vecdot(a_members.sums(a), b_members.sums(b))  # [G]
    positive = _wide(scale) * _wide(products / a_members.counts(a)).sum()
    a_rows, b_rows = a_members.rows(a), b_members.rows(b)
    n = a_rows.sum().clamp(min=1)
    forth, back = (torch.dot(_wide(w), lse) - positive for w, lse in ((a_rows, row), (b_rows, column)))
    return (forth / n).to(a.dtype), (back / n).to(a.dtype)


def both_lse(
    a: Tensor, b: Tensor, scale: Tensor, a_members: Members, b_members: Members
) -> tuple[Tensor, Tensor, Kept | None]:
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
        `[K]` and `[J]`; and where few vectors face many, the exponentials.
    """
    a_rows, b_rows = a_members.rows(a), b_members.rows(b)
    row_sum, column_sum = a.new_empty(len(a)), b.new_zeros(len(b))
    offset = 0.0
    keep, blocks = min(len(a), len(b)) <= _KEPT, []
    for rows, block in _similarities(a, b, scale, apart=keep):
        if keep:
            blocks.append((rows, block))
        if rows.start == 0:
            offset = _shared_offset(block.max().item(), a.dtype)
        _exp_(block.sub_(offset) if offset else block)  # [m, J]
        torch.mv(block, b_rows, out=row_sum[rows])
        column_sum.addmv_(block.T, a_rows[rows])
    every = torch.cat([row_sum, column_sum])
    if bool((every.min() >= _smallest_safe_sum(a.dtype, len(every))) & (every.max() <= torch.finfo(a.dtype).max)):
        row, column = _wide(row_sum).log() + offset, _wide(column_sum).log() + offset
        return row, column, Kept(blocks, offset) if keep else None
    return *_both_lse_apart(a, b, scale, a_rows, b_rows), None


def _both_lse_apart(a: Tensor, b: Tensor, scale: Tensor, a_rows: Tensor, b_rows: Tensor) -> tuple[Tensor, Tensor]:
    row = _wide(a.new_empty(len(a)))
    peak, column_sum = b.new_full((len(b),), -math.inf), b.new_zeros(len(b))  # of the columns so far
    for rows, block in _similarities(a, b, scale):
        higher = torch.maximum(peak, block.amax(dim=0))  # [J]
        column_sum.mul_(torch.exp(peak - higher)).addmv_(_exp_(block - higher).T, a_rows[rows])
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
    return _wide(torch.mv(_exp_(block.sub_(peak[:, None])), b_rows)).log() + peak


def both_gradients(
    a: Tensor, b: Tensor, scale: Tensor, slope: LogitGradient, a_members: Members, b_members: Members,
    *, kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dL/da `[K, D]` and dL/db `[J, D]` in one pass.

    The arguments are `row_gradient`'s, a complete as well, and what `both_lse` kept.
    """
    a_vectors, b_vectors = a_members.times(a), b_members.times(b)
    da = _towards_positives(a_members, b, b_members, slope)
    db = _towards_positives(b_members, a, a_members, slope)
    for rows, weights in slope.of_kept(kept) if kept else _weights(a, b, scale, slope):
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
    return other_members.sums(other).mul_(factor[:, None]).index_select(0, members.group)


def _weights(a: Tensor, b: Tensor, scale: Tensor, slope: LogitGradient) -> Iterator[tuple[slice, Tensor]]:
    """Rows and the `[m, J]` gradient with respect to their similarities."""
    scratch = None
    for rows, block in _similarities(a, b, scale):
        scratch = torch.empty_like(block) if scratch is None else scratch[: len(block)]
        yield rows, slope.overwrite_(block, rows, scratch)


def _similarities(a: Tensor, b: Tensor, scale: Tensor, *, apart: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their `[m, J]` similarities times the scale, in one memory that the next block takes over.

    Or, where the blocks are to be kept, each apart.
    """
    size = max(_BLOCK_ROWS, (_BLOCK_ON_GPU if a.is_cuda else _BLOCK) // max(1, len(b)))
    memory = a.new_empty(len(a) if apart else min(size, len(a)), len(b))
    for start in range(0, len(a), size):
        rows = slice(start, min(start + size, len(a)))
        block = memory[rows] if apart else memory[: rows.stop - start]
        yield rows, torch.mm(a[rows] * scale, b.T, out=block)
