"""Where the time of a training step goes: waiting for data, the loss, the rest.

On a GPU stretches are timed by events on its own stream, which nobody waits for: the processor runs ahead of it,
and its own clock would call waiting what is none. Everywhere else the processor's clock will do.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from xcon import launch

# Legend: k vectors of a modality, D width.

Mark = float | torch.cuda.Event
Loss = Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]


def mark() -> Mark:
    """Now: where the GPU stands in its work, or the time."""
    if not launch.uses_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begun: Mark, ended: Mark) -> float:
    """Seconds; on a GPU it waits until the second mark is reached."""
    if isinstance(begun, torch.cuda.Event):
        assert isinstance(ended, torch.cuda.Event)
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000
    assert isinstance(ended, float)
    return ended - begun


class Clock:
    """Time per step, and how much of it went into waiting for data and into the loss."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps = 0
        self.waits: list[tuple[Mark, Mark]] = []
        self.losses: list[tuple[Mark, Mark]] = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside: validation, saving."""
        begun = time.perf_counter()
        yield
        self.start += time.perf_counter() - begun

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Passes batches through and counts the time until each arrives; of a GPU, that it has nothing to do."""
        iterator = iter(batches)
        while True:
            asked = mark()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waits.append((asked, mark()))
            self.steps += 1
            yield batch

    def loss(self, compute: Loss) -> Loss:
        """The same loss, and the time that it and its gradient take: what processes exchange for it is part of it.

        Args:
            compute: of modality -> vectors `[k, D]` and the scale, by name; the gradient is that of `"total"`.
        """

        def timed(embeddings: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
            begun = mark()
            backward: list[Mark] = []
            inside = _Border.apply(lambda: self.losses.append((backward[0], mark())), *embeddings.values())
            terms = compute(dict(zip(embeddings, inside, strict=True)), scale)
            terms["total"].register_hook(lambda _: backward.append(mark()))
            self.losses.append((begun, mark()))
            return terms

        return timed

    def lap(self, rows: int) -> dict[str, float]:
        """Images per second, and the shares of the time since the last lap.

        Args:
            rows: of one global batch.

        Returns:
            `images_per_s`; `data_wait`, of this process, where that of another is part of what they exchange; and
            `loss_share`, where a loss was timed.
        """
        seconds = time.perf_counter() - self.start
        facts = {
            "images_per_s": round(self.steps * rows / seconds, 1),
            "data_wait": round(sum(between(*wait) for wait in self.waits) / seconds, 3),
        }
        if self.losses:
            facts["loss_share"] = round(sum(between(*loss) for loss in self.losses) / seconds, 4)
        self.waits.clear()
        self.losses.clear()
        self.start, self.steps = time.perf_counter(), 0
        return facts


class _Border(torch.autograd.Function):
    """Passes vectors on as they are; its backward is where the loss's ends and that of the encoders begins.

    Autograd takes the nodes that are ready in the reverse of the order that they were made in: none of an
    encoder's comes before this one, which waits for the gradients of all vectors.
    """

    @staticmethod
    def forward(ctx: Any, reached: Callable[[], None], *vectors: Tensor) -> tuple[Tensor, ...]:
        """`[k, D]` each, unchanged."""
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return tuple(z.view_as(z) for z in vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients as they are."""
        ctx.reached()
        return None, *gradients
