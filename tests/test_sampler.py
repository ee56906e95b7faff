"""The order of records: every record once, the same global batches for any number of processes."""

import itertools

import pytest

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
