"""What processes exchange: the only module that uses `torch.distributed`.

The losses of the global batch, exact on every process, with gradients that DDP, ZeRO and FSDP average: the mean
over processes of the parameter gradients is what one process would compute with all rows, the scale's included.
Nothing is sent in the backward pass.

Small batches: every process gathers all rows and computes the whole loss L. The gather's backward gives W dL/dz to
the process that owns a row, the sum of W equal gradients; the scale gets dL/ds. In the mean the factor W of the
rows cancels, because each row lives on one process and the scale lives on all of them.

Large batches: every process computes the log-sum-exps of its own rows against all columns, in blocks, and gathers
the others'. With them it knows the gradient of its own rows completely, and its part of the scale's.
"""

import dataclasses
import datetime
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.api import CheckpointException

from xcon import contrast, losses
from xcon.contrast import LogitGradient, Members, Participants

Found = TypeVar("Found")

# As long one process waits for another before it takes it for lost.
PATIENCE = datetime.timedelta(minutes=10)

# Where processes write a checkpoint together, as under FSDP2: what each of them raises, with the errors of all.
CheckpointFailed = CheckpointException

# Legend: W processes, b rows here, D width, K vectors of a modality on all processes, k of them here, V views.


def cross_contrastive(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    scale: Tensor,
    *,
    present: Mapping[str, Tensor] | None = None,
    classes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`losses.cross_contrastive` of the rows of all processes; see there.

    Every process must call it with as many rows (leave out or fill up a last batch that is shorter), with the same
    modalities and masks in the same order, and with the same scale.

    Args:
        embeddings: modality -> unit vectors `[b, D]`, the rows of this process.
        labels: `[b]` integers.
        scale: 1 / temperature, the same positive scalar on all processes.
        present: modality -> `[b]` bool, the rows that have it.
        classes: modality -> `[k]` labels of its vectors `[k, D]`: this process's part of those that the labels of
            the global batch need. Each label has its vector on one process alone, and all have as many: parts that
            fall short are filled up with any vector and a label that no row has, as -1.

    Returns:
        The losses of the global batch, equal on all processes.
    """
    if world_size() == 1:
        return losses.cross_contrastive(embeddings, labels, scale, present=present, classes=classes)
    batch = _Batch(labels, present or {}, classes or {})
    losses.check(embeddings, batch.labels, batch.present, batch.classes)
    if world_size() * len(labels) <= losses.TABLE_ROWS:
        vectors, everyones = _gather_batch(embeddings, batch)
        return losses.cross_contrastive(
            vectors, everyones.labels, scale, present=everyones.present, classes=everyones.classes
        )
    with torch.autocast(labels.device.type, enabled=False):
        vectors, scale = losses.widened(embeddings, scale)
        found = _Blocks.apply(scale, batch, tuple(vectors), *vectors.values())
        terms = losses.named(losses.pairs_of(vectors), zip(found[::2], found[1::2], strict=True))
        return losses.with_total(terms)


def supcon(views: Tensor, labels: Tensor, scale: Tensor, *, present: Tensor | None = None) -> Tensor:
    """`losses.supcon` of the views `[b, V, D]`, labels `[b]` and mask `[b]` of all processes; see there."""
    masks = {} if present is None else {"views": present}
    vectors, everyones = _gather_batch({"views": views}, _Batch(labels, masks, {}))
    return losses.supcon(vectors["views"], everyones.labels, scale, present=everyones.present.get("views"))


def siglip(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    present: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`losses.siglip` of the rows of all processes; see there."""
    vectors, everyones = _gather_batch(embeddings, _Batch(labels, present or {}, {}))
    return losses.siglip(vectors, everyones.labels, scale, bias, present=everyones.present)


def agree(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """The first process's numbers on all processes, so that what is decided by them is decided alike.

    Processors of different kinds may differ in the last bit of the same sum.

    Args:
        values: name -> number, the same names on all processes.
        device: of this process.
    """
    if world_size() == 1:
        return dict(values)
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.broadcast(numbers, src=0)
    return dict(zip(values, numbers.tolist(), strict=True))


def decided(action: Callable[[], Found]) -> Found:
    """What an action on files gives on the first process, on all of them; called by all processes.

    What a folder holds is not for each process to see: those of another node may see an older list of it.

    Raises:
        ValueError, OSError: it failed; on all processes.
    """
    found: list[Any] = [None, None]
    if world_size() == 1 or dist.get_rank() == 0:
        try:
            found[0] = action()
        except (ValueError, OSError) as error:
            found[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(found, src=0, group=_processors())
    result, failure = found
    if failure is not None:
        raise failure
    return result


def largest(number: int) -> int:
    """The largest of the numbers that the processes give, on all of them; called by all processes.

    Between processors, over gloo: no GPU is waited for.
    """
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_processors())
    return int(found)


@functools.cache
def _processors() -> dist.ProcessGroup:
    """All processes once more, for what they exchange between processors; as patient as NCCL, not thrice that."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def share_buffers(module: nn.Module) -> None:
    """Gives all processes the first one's buffers: BatchNorm's running statistics, which nothing else equates."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def world_size() -> int:
    """Number of processes; 1 where none were launched together."""
    return dist.get_world_size() if dist.is_initialized() else 1


# --------------------------------------------------------------------------------------------------------
# Gathering


def rows(tensor: Tensor) -> Tensor:
    """The rows of all processes in order of rank, `[b, ...]` -> `[W b, ...]`, without gradient."""
    return _gathered([tensor])[0]


def _gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`rows` of several tensors of any types, in one collective."""
    if world_size() == 1:
        return list(tensors)
    pieces = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    mine = torch.cat(pieces)
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyones, mine)
    parts = zip(*(part.split([len(piece) for piece in pieces]) for part in everyones), strict=True)
    return [
        torch.cat(part).view(tensor.dtype).view(-1, *tensor.shape[1:])
        for part, tensor in zip(parts, tensors, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Arguments of `cross_contrastive` that have no gradient."""

    labels: Tensor
    present: Mapping[str, Tensor]
    classes: Mapping[str, Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.labels, *self.present.values(), *self.classes.values()]

    def of(self, tensors: Sequence[Tensor]) -> "_Batch":
        """The same of other rows: what `tensors` gave, gathered."""
        labels, *others = tensors
        present = dict(zip(self.present, others, strict=False))
        return _Batch(labels, present, dict(zip(self.classes, others[len(present) :], strict=True)))


def _gather_batch(embeddings: Mapping[str, Tensor], batch: _Batch) -> tuple[dict[str, Tensor], _Batch]:
    """The vectors and the rest of all processes, the vectors with gradient."""
    parts = _Gather.apply(len(embeddings), *embeddings.values(), *batch.tensors())
    return dict(zip(embeddings, parts, strict=False)), batch.of(parts[len(embeddings) :])


class _Gather(torch.autograd.Function):
    """`_gathered`; its backward gives each process W times the gradient of its own rows of the first tensors.

    That is the sum over processes that a gather calls for: all of them compute the same loss of the same rows.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`[b, ...]` -> `[W b, ...]` each; the first `count` are differentiable."""
        found = [everyones.view_as(everyones) for everyones in _gathered(tensors)]
        ctx.lengths = [len(tensor) for tensor in tensors[:count]]
        ctx.mark_non_differentiable(*found[count:])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """`[W b, ...]` -> `[b, ...]` each."""
        own = [world_size() * g[_own(b)] for g, b in zip(gradients, ctx.lengths, strict=False)]
        return None, *own, *(None for _ in gradients[len(own) :])


def _own(length: int) -> slice:
    """This process's part of what all processes gathered, `length` from each."""
    start = dist.get_rank() * length if dist.is_initialized() else 0
    return slice(start, start + length)


# --------------------------------------------------------------------------------------------------------
# Large batches


class _Side:
    """One modality of a pair: the vectors of all processes that take part in it, and which of them are here.

    Args:
        own: `[k, D]`.
        everyones: `[K, D]`.
        kept: `[K]` bool, those that take part.
        members: what all K stand for.
    """

    def __init__(self, own: Tensor, everyones: Tensor, kept: Tensor, members: Members) -> None:
        self.mine = _own(len(own))
        self.kept, self.own_kept = kept, kept[self.mine]
        self.vectors, self.members = contrast.take(everyones, kept), members[kept]
        self.own, self.own_members = contrast.take(own, self.own_kept), members[self.mine][self.own_kept]

    def lse(self, other: "_Side", scale: Tensor) -> Tensor:
        """`[k]` log-sum-exps of this process's vectors over the other modality's; zero where they take no part."""
        lse = contrast.row_lse(self.own, other.vectors, scale, other.members)
        found = lse.new_zeros(len(self.own_kept))
        found[self.own_kept] = lse
        return found

    def gradient(self, other: "_Side", scale: Tensor, slope: LogitGradient) -> Tensor:
        """That of this process's vectors that take part, from the slope of all K and all of the other."""
        row, column = slope.row[self.mine][self.own_kept], slope.column[other.kept]
        local = LogitGradient(row, column, slope.g, slope.h)
        return contrast.row_gradient(self.own, other.vectors, scale, local, self.own_members, other.members)


class _Blocks(torch.autograd.Function):
    """The losses of the global batch by blocks: two gathers forward, none backward."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, batch: _Batch, names: Sequence[str], *own: Tensor) -> tuple[Tensor, ...]:
        """`[k, D]` for each name -> `L_{a->b}` and `L_{b->a}`, scalars, for each pair of names."""
        parts = _gathered([*own, *batch.tensors()])
        everyones = batch.of(parts[len(names) :])
        participants = Participants(everyones.labels, everyones.present, everyones.classes)
        ctx.pairs = []
        for pair in itertools.combinations(range(len(names)), 2):
            kept = participants.pair(*(names[i] for i in pair))
            ctx.pairs.append((pair, [_Side(own[i], parts[i], *k) for i, k in zip(pair, kept, strict=True)]))
        ctx.lse = _gathered([lse for _, (a, b) in ctx.pairs for lse in (a.lse(b, scale), b.lse(a, scale))])
        ctx.save_for_backward(scale, *own)
        terms: list[Tensor] = []
        for (_, (a, b)), row, column in zip(ctx.pairs, ctx.lse[::2], ctx.lse[1::2], strict=True):
            terms += contrast.from_lse(
                a.vectors, b.vectors, scale, a.members, b.members, row=row[a.kept], column=column[b.kept]
            )
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the losses -> W times those of this process's vectors, and its part of the scale's."""
        scale, *own = ctx.saved_tensors
        d_own = [torch.zeros_like(vectors) for vectors in own]
        euler = torch.zeros_like(scale)  # s dL/ds: the sum of <a_k, dL/da_k>
        upstream = zip(ctx.lse[::2], ctx.lse[1::2], gradients[::2], gradients[1::2], strict=True)
        with torch.autocast(scale.device.type, enabled=False):
            for ((i, j), (a, b)), (row, column, g, h) in zip(ctx.pairs, upstream, strict=True):
                if not len(a.vectors):
                    continue
                da = a.gradient(b, scale, LogitGradient(row, column, g, h))
                db = b.gradient(a, scale, LogitGradient(column, row, h, g))
                euler += torch.dot(a.own.flatten(), da.flatten())
                d_own[i][a.own_kept] += da
                d_own[j][b.own_kept] += db
        return world_size() * euler / scale, None, None, *(world_size() * d for d in d_own)
