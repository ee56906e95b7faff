"""The order of records: which rows make up step k, for any number of processes and workers.

The order is a function of (seed, epoch) alone, and a step is a slice of it. So every record comes once per
epoch, all processes take the same number of steps, and a run resumed at step k goes on as if never stopped.
An order may be a plain shuffle, or one whose steps hold several records of each of their classes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

# Legend: N records, S steps of an epoch, C classes.

# One row of a batch: (epoch, index of the record, weight). Weight 0 marks a row that only fills up the batch.
Item = tuple[int, int, float]


@dataclasses.dataclass(frozen=True, eq=False)  # a key of the cache below by what it is, not by its class ids
class Order:
    """The global order of `samples` records in batches of `batch_size`.

    Attributes:
        samples: number of records, at least 1.
        batch_size: rows of a global batch.
        seed: of the permutations; None keeps the order of the shards (evaluation).
        per_class: records of one class that come together, a divisor of `batch_size`; 0 for a plain shuffle.
        class_id: `[N]` of the records; needed where they come together.
    """

    samples: int
    batch_size: int
    seed: int | None
    per_class: int = 0
    class_id: np.ndarray | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the last one filled up with rows of weight 0."""
        return math.ceil(self.samples / self.batch_size)

    def rows(self, step: int) -> int:
        """Records in the batch of a step, without the rows that fill it up."""
        position = step % self.steps_per_epoch
        return min(self.batch_size, self.samples - position * self.batch_size)

    def batch(self, step: int, part: slice = slice(None)) -> list[Item]:
        """The global batch of a step counted from the start of training: `batch_size` items, or a part of them."""
        epoch, rows = step // self.steps_per_epoch, self.rows(step)
        places = range(self.batch_size)[part]
        indices = self.indices(step)[part].tolist()
        return [(epoch, index, float(place < rows)) for place, index in zip(places, indices, strict=True)]

    def indices(self, step: int) -> np.ndarray:
        """`[batch_size]` the records of the global batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _permutation(self, epoch)
        places = np.arange(position * self.batch_size, (position + 1) * self.batch_size)
        # Filling rows are real records from the front of the epoch: they keep BatchNorm's statistics sane.
        return order[places % self.samples]

    def local_batches(self, *, steps: range, rank: int, world_size: int) -> Iterator[list[Item]]:
        """The part of each global batch that falls to one process: a contiguous slice."""
        rows = self.batch_size // world_size
        assert rows * world_size == self.batch_size
        for step in steps:
            yield self.batch(step, slice(rank * rows, (rank + 1) * rows))


@functools.lru_cache(maxsize=2)
def _permutation(order: Order, epoch: int) -> np.ndarray:
    if order.seed is None:
        return np.arange(order.samples)
    rng = np.random.default_rng([order.seed, epoch])
    if order.per_class:
        assert order.class_id is not None
        return by_class(order.class_id, per_class=order.per_class, batch_size=order.batch_size, rng=rng)
    return rng.permutation(order.samples)


# --------------------------------------------------------------------------------------------------------
# Batches of P classes with K records each


def by_class(class_id: np.ndarray, *, per_class: int, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """A random order whose batches hold groups of K records of one class (Hermans et al. 2017, "PK batches").

    Each class gives as many groups of K as it has. What is left of it, fewer than K, is a smaller group. No batch
    has two groups of K of one class where there are batches enough. Smaller groups are filled in by a single pass,
    which keeps them whole, and away from other groups of their class, as far as it can.

    Args:
        class_id: `[N]`.
        per_class: K, a divisor of `batch_size`.
        batch_size: of the order's slices; the last one may be shorter.
        rng: draws all.

    Returns:
        `[N]` every record once; within a batch they are shuffled, so that each process has a mixture.
    """
    classes = _shuffled_classes(class_id, rng)  # from here on a class is its place in this list
    whole = [[m[i : i + per_class] for i in range(0, len(m) - per_class + 1, per_class)] for m in classes]
    counts = np.array([len(groups) for groups in whole])  # [C]
    left = [(c, m[counts[c] * per_class :]) for c, m in enumerate(classes) if len(m) % per_class]
    left.sort(key=lambda group: -counts[group[0]])  # first those that have the fewest batches to go to
    sizes = np.diff([*range(0, len(class_id), batch_size), len(class_id)])  # [S]
    for_left = (sizes // per_class).sum() - counts.sum()  # places for K records that smaller groups fill
    dealt = _deal(np.append(counts, for_left), steps=len(sizes), in_last=sizes[-1] // per_class, rng=rng)
    batches = [np.empty(0, np.int64)] * len(sizes)
    for step in rng.permutation(len(sizes)):  # no step has the first choice in every epoch
        inside = [c for c in dealt[step] if c < len(classes)]
        groups = [whole[c].pop() for c in inside]
        groups += _smaller(left, rows=sizes[step] - per_class * len(groups), beside=inside)
        batches[step] = rng.permutation(np.concatenate(groups))
    return np.concatenate(batches)


def _shuffled_classes(class_id: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The records of each class in random order, the classes in random order."""
    shuffled = rng.permutation(len(class_id))
    records = shuffled[np.argsort(class_id[shuffled], kind="stable")]  # [N]
    classes = np.split(records, np.flatnonzero(np.diff(class_id[records])) + 1)
    return [classes[c] for c in rng.permutation(len(classes))]


def _deal(counts: np.ndarray, *, steps: int, in_last: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deals groups to batches, one class to as many batches as it has groups.

    Args:
        counts: of groups, by class; the last of them stands for groups of any classes.
        steps: number of batches, which take as many groups each, but for the last.
        in_last: groups that the last batch takes.
        rng: draws the rest.

    Returns:
        The classes of each batch.
    """
    groups = np.repeat(np.arange(len(counts)), counts)  # class by class
    nth = np.concatenate([np.arange(count) for count in counts])
    # The last batch takes one of each class, first of those that every batch must have, else at random.
    can_do_without = (counts[groups] < steps) | (groups == len(counts) - 1)
    last = np.lexsort((rng.random(len(groups)), can_do_without, nth))[:in_last]
    # The others are dealt round and round: the groups of a class lie side by side and so go to different batches.
    others = np.delete(groups, last)
    return [*(others[first :: steps - 1] for first in rng.permutation(steps - 1)), groups[last]]


def _smaller(left: list[tuple[int, np.ndarray]], *, rows: int, beside: list[int]) -> list[np.ndarray]:
    """Takes groups of `rows` records in all out of `left`, of other classes than those beside where there are."""
    inside, taken = set(beside), []
    while rows:
        other = (i for i, (c, _) in enumerate(left) if c not in inside)
        whole = (i for i, (c, records) in enumerate(left) if c not in inside and len(records) <= rows)
        c, records = left.pop(next(itertools.chain(whole, other, [0])))
        if len(records) > rows:
            left.insert(0, (c, records[rows:]))
        taken.append(records[:rows])
        inside.add(c)
        rows -= len(taken[-1])
    return taken
