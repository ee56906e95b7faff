"""The order of records: every record once, the same global batches for any number of processes."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from xcon.sampler import Order

SIZES = [(1, 4), (3, 8), (7, 4), (8, 4), (96, 32), (97, 16), (5, 1), (30, 12)]
LAYOUTS = [(s, b, w) for (s, b), w in itertools.product(SIZES, (1, 2, 4)) if b % w == 0]


def epoch_of(order: Order, epoch: int) -> list[list[tuple[int, int, float]]]:
    first = epoch * order.steps_per_epoch
    return [order.batch(step) for step in range(first, first + order.steps_per_epoch)]


@pytest.mark.parametrize(("samples", "batch_size"), SIZES)
@pytest.mark.parametrize("seed", [None, 0])
def test_every_record_comes_once_per_epoch(samples: int, batch_size: int, seed: int | None) -> None:
    order = Order(samples, batch_size, seed)
    for epoch in range(3):
        items = list(itertools.chain(*epoch_of(order, epoch)))
        assert sorted(index for _, index, weight in items if weight == 1) == list(range(samples))
        assert {e for e, _, _ in items} == {epoch}
        assert {weight for *_, weight in items} <= {0.0, 1.0}


@pytest.mark.parametrize(("samples", "batch_size", "world_size"), LAYOUTS)
def test_processes_share_the_global_batch(samples: int, batch_size: int, world_size: int) -> None:
    order = Order(samples, batch_size, seed=3)
    steps = range(2 * order.steps_per_epoch)
    ranks = [list(order.local_batches(steps=steps, rank=r, world_size=world_size)) for r in range(world_size)]
    assert [len(batches) for batches in ranks] == [len(steps)] * world_size
    for step, parts in zip(steps, zip(*ranks, strict=True), strict=True):
        assert [len(part) for part in parts] == [batch_size // world_size] * world_size
        assert list(itertools.chain(*parts)) == order.batch(step)


@pytest.mark.parametrize(("samples", "batch_size"), SIZES)
def test_rows_are_those_that_weigh(samples: int, batch_size: int) -> None:
    order = Order(samples, batch_size, seed=0)
    for step in range(2 * order.steps_per_epoch):
        assert order.rows(step) == sum(weight for *_, weight in order.batch(step))


def test_steps_and_rows_by_hand() -> None:
    """10 records in batches of 4: 4, 4 and 2, then again."""
    order = Order(10, 4, seed=0)
    assert order.steps_per_epoch == 3
    assert [order.rows(step) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert [weight for *_, weight in order.batch(5)] == [1, 1, 0, 0]


def test_without_a_seed_the_order_is_that_of_the_shards() -> None:
    """5 records in batches of 3; the last batch is filled up from the front."""
    order = Order(5, 3, seed=None)
    assert order.batch(0) == [(0, 0, 1.0), (0, 1, 1.0), (0, 2, 1.0)]
    assert order.batch(1) == [(0, 3, 1.0), (0, 4, 1.0), (0, 0, 0.0)]


def test_fewer_records_than_a_batch_go_round() -> None:
    assert Order(2, 5, seed=None).batch(0) == [(0, 0, 1.0), (0, 1, 1.0), (0, 0, 0.0), (0, 1, 0.0), (0, 0, 0.0)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def indices(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(index for batch in epoch_of(Order(64, 16, seed), epoch) for _, index, _ in batch)

    drawn = [indices(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(drawn)) == 6
    assert drawn == [indices(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]


def test_the_order_does_not_depend_on_the_size_of_batches() -> None:
    small, large = Order(48, 4, seed=5), Order(48, 16, seed=5)
    assert list(itertools.chain(*epoch_of(small, 1))) == list(itertools.chain(*epoch_of(large, 1)))


@pytest.mark.parametrize("step", [0, 1, 3, 4, 9])
def test_resumed_batches_are_those_that_remain(step: int) -> None:
    """20 records in batches of 6: four steps per epoch, so that steps 1 to 3 resume within one."""
    order = Order(20, 6, seed=2)
    whole = list(order.local_batches(steps=range(12), rank=1, world_size=2))
    assert list(order.local_batches(steps=range(step, 12), rank=1, world_size=2)) == whole[step:]


# ---- groups of a class

counts_of_classes = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def grouped(counts: list[int], batch_size: int, per_class: int, seed: int) -> Order:
    """An order over classes of these many records, which lie in the split in disorder."""
    class_id = np.random.default_rng(9).permutation(np.repeat(np.arange(len(counts)), counts))
    return Order(len(class_id), batch_size, seed, per_class, class_id)


def in_batches(order: Order, epoch: int = 0) -> np.ndarray:
    """`[S, C]` how many real records of each class every batch of an epoch has."""
    classes = [[order.class_id[i] for _, i, weight in batch if weight] for batch in epoch_of(order, epoch)]
    return np.stack([np.bincount(c, minlength=order.class_id.max() + 1) for c in classes])


@given(counts_of_classes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_a_grouped_epoch_has_every_record_once_and_as_many_steps(
    counts: list[int], per_class: int, classes: int, seed: int
) -> None:
    order = grouped(counts, per_class * classes, per_class, seed)
    plain = Order(order.samples, order.batch_size, seed)
    assert order.steps_per_epoch == plain.steps_per_epoch
    for epoch in (0, 3):
        items = list(itertools.chain(*epoch_of(order, epoch)))
        assert sorted(index for _, index, weight in items if weight == 1) == list(range(order.samples))
    for step in range(order.steps_per_epoch):
        assert [weight for *_, weight in order.batch(step)] == [weight for *_, weight in plain.batch(step)]


@given(counts_of_classes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_a_class_comes_in_as_many_groups_as_it_has(
    counts: list[int], per_class: int, classes: int, seed: int
) -> None:
    """n records are n // K groups of K, each of them within one batch."""
    found = in_batches(grouped(counts, per_class * classes, per_class, seed))
    assert (found // per_class).sum(axis=0).tolist() == [n // per_class for n in counts]


@given(counts_of_classes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_no_batch_has_two_groups_of_a_class_where_there_are_batches_enough(
    counts: list[int], per_class: int, classes: int, seed: int
) -> None:
    """A class with as many groups as there are batches needs a place in the last, shorter batch too."""
    found = in_batches(grouped(counts, per_class * classes, per_class, seed))
    groups, steps = [n // per_class for n in counts], len(found)
    in_last = (found[-1].sum()) // per_class
    if max(groups) <= steps and groups.count(steps) <= in_last:
        assert found.max() < 2 * per_class


def test_equal_classes_by_hand() -> None:
    """5 classes of 8 records in batches of 10, 2 of a class: 4 batches, each with 2 of every class."""
    for epoch in range(3):
        assert in_batches(grouped([8] * 5, 10, 2, seed=1), epoch).tolist() == [[2] * 5] * 4


def test_classes_as_in_nabirds_have_no_second_group_in_a_batch() -> None:
    """555 classes of 4 to 60: with K = 4 a batch of 32 has 4 of a class at most, and 1.5 classes too many."""
    counts = np.random.default_rng(0).integers(4, 61, 555)
    found = in_batches(grouped(counts.tolist(), 32, 4, seed=0))
    assert found.max() == 4
    left = np.count_nonzero(counts % 4)
    pieces = np.count_nonzero((found > 0) & (found < 4))
    assert left <= pieces <= 1.1 * left  # few are divided between two batches


def test_a_grouped_order_is_one_of_seed_and_epoch_for_all_processes() -> None:
    counts = [5, 3, 8, 1, 7]
    whole = [grouped(counts, 8, 2, seed=2).batch(step) for step in range(9)]
    parts = [grouped(counts, 8, 2, seed=2).local_batches(steps=range(4, 9), rank=r, world_size=2) for r in (0, 1)]
    assert [one + two for one, two in zip(*parts, strict=True)] == whole[4:]
    assert whole[0] != [(0, *item[1:]) for item in whole[3]]
    assert whole[0] != grouped(counts, 8, 2, seed=3).batch(0)


def test_the_last_batch_is_filled_up_from_the_front_of_the_epoch() -> None:
    """24 records in batches of 16: the last 8 rows are the first 8."""
    order = grouped([6] * 4, 16, 4, seed=0)
    assert order.indices(1)[8:].tolist() == order.indices(0)[:8].tolist()


# ---- how well a shuffle mixes


def labels_of_nabirds() -> np.ndarray:
    """`[N]` the class of every photograph for training, class by class; invented counts where NABirds is not."""
    folder = Path(os.environ.get("XCON_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "nabirds_index"
    if not (folder / "train_test_split.txt").is_file():
        return np.repeat(np.arange(555), np.random.default_rng(0).integers(4, 61, 555))
    training = [line.split()[1] == "1" for line in (folder / "train_test_split.txt").read_text().splitlines()]
    labels = [int(line.split()[1]) for line in (folder / "image_class_labels.txt").read_text().splitlines()]
    return np.sort([label for label, kept in zip(labels, training, strict=True) if kept])


@pytest.mark.parametrize("batch_size", [32, 256, 1024])
def test_batches_of_ordered_shards_are_as_mixed_as_a_shuffle_can_be(batch_size: int) -> None:
    """Records lie class by class; a batch has as many classes as one drawn without replacement, within 2 %.

    A class of n records among N is missing from a batch of B with probability C(N - n, B) / C(N, B), so that the
    ideal is the sum over classes of 1 - C(N - n, B) / C(N, B): for the counts of NABirds 31.0 of 32, 201.6 of 256.
    """
    labels = labels_of_nabirds()
    counts = np.unique(labels, return_counts=True)[1]
    ideal = (1 - hypergeom.pmf(0, len(labels), counts, batch_size)).sum()
    order = Order(len(labels), batch_size, seed=0)
    whole = range(len(labels) // batch_size)  # the last batch, filled up, is left out
    found = np.mean([len(np.unique(labels[order.indices(step)])) for step in whole])
    assert 0.98 < found / ideal < 1.02
