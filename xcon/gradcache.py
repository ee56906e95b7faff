"""Batches larger than the memory: gradients of the whole batch, encoded in parts (GradCache, Gao et al. 2021).

The vectors of all parts are computed without their graph, the loss of the whole batch gives the gradient of each
vector, and each part is encoded once more to pass its gradients on. The sum is the gradient of one large batch,
for about a third more computing. What sees only a part is BatchNorm in training: it normalises by the statistics
of the part, as small batches do, and its running statistics move once for each part.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

# Legend: b rows of this process, k vectors of a modality, D width.

Loss = Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]


def backward(
    accelerator: Accelerator, wrapped: nn.Module, inputs: Mapping[str, Tensor], loss: Loss, *, rows: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Adds the gradients of a loss of unit vectors to the parameters.

    Args:
        accelerator: of this process.
        wrapped: a prepared `ContrastiveModel`.
        inputs: modality -> what its tower takes, `[k, ...]`.
        loss: of modality -> vectors `[k, D]` and the scale, by name; the gradients are those of `"total"`.
        rows: to encode at a time; 0: all.

    Returns:
        The losses, and the scale.
    """
    longest = max(len(x) for x in inputs.values())
    count = math.ceil(longest / rows) if rows else 1
    if count == 1:
        embeddings, scale = wrapped(inputs)
        terms = loss(embeddings, scale)
        accelerator.backward(terms["total"])
        return {name: term.detach() for name, term in terms.items()}, scale.detach()  # the graph may go

    pieces = {m: x.tensor_split(count) for m, x in inputs.items()}
    # A modality of fewer vectors than parts, as captions may be, lends its first to the parts without: DDP and
    # ZeRO-3 want a gradient of every parameter, if only zero, in the last and in the first backward pass.
    parts = [{m: x[i] if len(x[i]) else x[0][:1] for m, x in pieces.items()} for i in range(count)]
    draws, encoded = [], []
    with torch.no_grad(), _buffers_kept(wrapped):
        for part in parts:
            draws.append(_random_state(accelerator.device))
            encoded.append(wrapped(part))
    after = _random_state(accelerator.device)
    vectors = {m: [z[m][: len(x)] for (z, _), x in zip(encoded, pieces[m], strict=True)] for m in inputs}
    leaves = {m: torch.cat(z).requires_grad_() for m, z in vectors.items()}  # [k, D]
    scale = encoded[0][1].clone().requires_grad_()
    terms = loss(leaves, scale)
    *found, scale_gradient = torch.autograd.grad(terms["total"], [*leaves.values(), scale])

    gradients = {m: gradient.tensor_split(count) for m, gradient in zip(leaves, found, strict=True)}
    for number, part in enumerate(parts):
        last = number == count - 1
        with contextlib.nullcontext() if last else _gradients_kept_local(accelerator, wrapped):
            _set_random_state(draws[number], accelerator.device)
            embeddings, part_scale = wrapped(part)
            along = [(z[: len(gradients[m][number])] * gradients[m][number]).sum() for m, z in embeddings.items()]
            accelerator.backward(torch.stack([*along, part_scale * scale_gradient * last]).sum())
    _set_random_state(after, accelerator.device)
    return {name: term.detach() for name, term in terms.items()}, scale.detach()


@contextlib.contextmanager
def _gradients_kept_local(accelerator: Accelerator, wrapped: nn.Module) -> Iterator[None]:
    """Processes do not exchange gradients, and DeepSpeed does not step."""
    accelerator.sync_gradients = False
    try:
        with accelerator.no_sync(wrapped):
            yield
    finally:
        accelerator.sync_gradients = True


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Puts buffers back: BatchNorm's running statistics count each part once, not twice."""
    before = [buffer.clone() for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, saved in zip(module.buffers(), before, strict=True):
            buffer.copy_(saved)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
