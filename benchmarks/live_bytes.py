"""Peak memory without the allocator's noise: the bytes of all tensors that are alive at a time.

What a process holds depends on what ran before and on how its allocator rounds, keeps and returns memory; this
does not, and is the same on every run and machine. It sees what PyTorch's operators return, forward and backward,
on the CPU; not what a single operator takes and frees within itself.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_live_bytes(computation: Callable[[], object]) -> int:
    """The most bytes that tensors made by a computation held together at any time, its results included."""
    with LiveBytes() as live:
        computation()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts what is made under it: every storage once, however many tensors view it, until it is freed.

    Attributes:
        now: bytes alive.
        peak: the most there have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator; what it is given was there before, unless it was counted when it was made."""
        for storage in storages((args, kwargs)):
            self._meet(storage, 0)
        made = func(*args, **(kwargs or {}))
        for storage in storages(made):
            self._meet(storage, storage.nbytes())
        return made

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, key, size).atexit = False

    def _leave(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Those of all tensors in nested lists, tuples and dictionaries that have memory."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
