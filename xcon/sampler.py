"""The order of records: which rows make up step k, for any number of processes and workers.

The order is a function of (seed, epoch) alone, and a step is a slice of it. So every record comes once per
epoch, all processes take the same number of steps, and a run resumed at step k goes on as if never stopped.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

# One row of a batch: (epoch, index of the record, weight). Weight 0 marks a row that only fills up the batch.
Item = tuple[int, int, float]


@dataclasses.dataclass(frozen=True)
class Order:
    """The global order of `samples` records in batches of `batch_size`.

    Attributes:
        samples: number of records, at least 1.
        batch_size: rows of a global batch.
        seed: of the permutations; None keeps the order of the shards (evaluation).
    """

    samples: int
    batch_size: int
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the last one filled up with rows of weight 0."""
        return math.ceil(self.samples / self.batch_size)

    def rows(self, step: int) -> int:
        """Records in the batch of a step, without the rows that fill it up."""
        position = step % self.steps_per_epoch
        return min(self.batch_size, self.samples - position * self.batch_size)

    def batch(self, step: int) -> list[Item]:
        """The global batch of a step counted from the start of training: `batch_size` items."""
        epoch, rows = step // self.steps_per_epoch, self.rows(step)
        return [(epoch, int(index), float(place < rows)) for place, index in enumerate(self.indices(step))]

    def indices(self, step: int) -> np.ndarray:
        """`[batch_size]` the records of the global batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permutation(self.samples, self.seed, epoch)
        places = np.arange(position * self.batch_size, (position + 1) * self.batch_size)
        # Filling rows are real records from the front of the epoch: they keep BatchNorm's statistics sane.
        return order[places % self.samples]

    def local_batches(self, *, steps: range, rank: int, world_size: int) -> Iterator[list[Item]]:
        """The part of each global batch that falls to one process: a contiguous slice."""
        rows = self.batch_size // world_size
        assert rows * world_size == self.batch_size
        for step in steps:
            yield self.batch(step)[rank * rows : (rank + 1) * rows]


@functools.lru_cache(maxsize=2)
def _permutation(samples: int, seed: int | None, epoch: int) -> np.ndarray:
    if seed is None:
        return np.arange(samples)
    return np.random.default_rng([seed, epoch]).permutation(samples)
