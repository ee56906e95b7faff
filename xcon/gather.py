"""What processes exchange: the only module that uses `torch.distributed`.

The loss of the global batch, exact on every process, for gradients that DDP and ZeRO average.

Every process gathers the rows of all W processes and computes the whole loss L. The gather's backward gives W
dL/dz to the process that owns a row, the sum of W equal gradients, and sends nothing; the scale gets dL/ds. The
mean over processes that DDP and ZeRO take then gives dL/dz and dL/ds exactly: the factor W of the rows cancels
because each row lives on one process, and the scale lives on all of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xcon import losses


def cross_contrastive(
    embeddings: Mapping[str, Tensor],
    labels: Tensor,
    scale: Tensor,
    *,
    present: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`losses.cross_contrastive` of the rows of all processes; see there.

    Every process must call it with the same number of rows and the same modalities. The mean over processes
    of the parameter gradients equals the gradients that one process would compute with all rows.

    Args:
        embeddings: modality -> unit vectors `[b, D]`, the rows of this process.
        labels: `[b]` integers.
        scale: 1 / temperature, the same scalar on all processes.
        present: modality -> `[b]` bool, the rows that have it.

    Returns:
        The losses of the global batch, equal on all processes.
    """
    return losses.cross_contrastive(
        {modality: _rows_with_gradient(vectors) for modality, vectors in embeddings.items()},
        rows(labels),
        scale,
        present={modality: rows(mask) for modality, mask in (present or {}).items()},
    )


def rows(tensor: Tensor) -> Tensor:
    """The rows of all processes in order of rank, `[b, ...]` -> `[W b, ...]`, without gradient."""
    if world_size() == 1:
        return tensor
    mine = tensor.contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]  # NCCL refuses strided ones
    dist.all_gather(parts, mine)
    return torch.cat(parts)


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


def share_buffers(module: nn.Module) -> None:
    """Gives all processes the first one's buffers: BatchNorm's running statistics, which nothing else equates."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def world_size() -> int:
    """Number of processes; 1 where none were launched together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _rows_with_gradient(tensor: Tensor) -> Tensor:
    """As `rows`, and differentiable."""
    return tensor if world_size() == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """`rows`; its backward gives each process W times the gradient of its own rows.

    That is the sum over processes that a gather calls for: all of them compute the same loss of the same rows.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """`[b, D]` -> `[W b, D]`."""
        ctx.rows = len(tensor)
        return rows(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """`[W b, D]` -> `[b, D]`."""
        own = gradients[0][dist.get_rank() * ctx.rows :][: ctx.rows]
        return world_size() * own  # the sum over W processes of equal gradients, without asking them
