"""What holds for any layout: each record once per epoch, the same global batches, stopped anywhere and gone on."""

import dataclasses
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import get_worker_info

from tests.training import ROOT, environment
from xcon.loader import Batch, Records, Share, make_loader
from xcon.sampler import Order
from xcon.shardset import Split, Tars

# Real workers are started for this many layouts: each takes a second.
WITH_WORKERS = 6


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shards and processes, and at which step the processes become others."""

    shards: list[int]  # records in each
    rows: int  # of one process, for the ranks before the stop
    per_class: int
    ranks: int
    workers: int
    later_ranks: int
    stop: int

    @property
    def batch_size(self) -> int:
        return self.rows * int(np.lcm(self.ranks, self.later_ranks)) * max(self.per_class, 1)

    @property
    def split(self) -> Split:
        """Records whose class, place and number say which they are; there is no photograph."""
        n = sum(self.shards)
        numbers = np.arange(n)
        return Split(
            name="train",
            tars=Tars([Path(f"{i}.tar") for i in range(len(self.shards))]),
            shard=np.repeat(np.arange(len(self.shards)), self.shards),
            ids=pa.chunked_array([numbers.astype(str)]),
            offset=numbers,
            size=numbers,
            class_id=numbers % 7,
            place=np.stack([numbers % 180, numbers % 90, numbers / n], axis=1).astype(float),
            caption=numbers % 7,
            users=pa.array([None] * n, pa.string()).dictionary_encode(),
        )

    @property
    def order(self) -> Order:
        split = self.split
        return Order(len(split), self.batch_size, 3, self.per_class, split.class_id)


layouts = st.builds(
    Layout,
    shards=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    rows=st.integers(1, 5),
    per_class=st.sampled_from([0, 0, 1, 2, 3]),
    ranks=st.integers(1, 8),
    workers=st.integers(0, 3),
    later_ranks=st.integers(1, 8),
    stop=st.integers(0, 10_000),
)


def pure(order: Order, ranks: int, steps: range) -> Iterator[list[tuple[int, int, float]]]:
    """The global batches of some steps, put together from what each process is given."""
    parts = [order.local_batches(steps=steps, rank=rank, world_size=ranks) for rank in range(ranks)]
    for pieces in zip(*parts, strict=True):  # as many steps on all
        assert len({len(piece) for piece in pieces}) == 1
        yield list(itertools.chain(*pieces))


@settings(max_examples=200, deadline=None)
@given(layouts)
def test_each_record_once_and_resumed_anywhere_by_any_number_of_processes(layout: Layout) -> None:
    """Two epochs by some processes, stopped at any step and gone on with by others."""
    order = layout.order
    steps = 2 * order.steps_per_epoch
    stop = layout.stop % (steps + 1)
    whole = [order.batch(step) for step in range(steps)]
    resumed = [
        *pure(order, layout.ranks, range(stop)),
        *pure(order, layout.later_ranks, range(stop, steps)),
    ]
    assert resumed == whole
    for epoch in range(2):
        real = [i for e, i, weight in itertools.chain(*whole) if e == epoch and weight == 1]
        assert sorted(real) == list(range(order.samples))
    assert sum(weight for *_, weight in itertools.chain(*whole)) == 2 * order.samples


class Told(Records):
    """Records that say in which worker they were made."""

    def __getitem__(self, item: tuple[int, int, float]) -> Batch:
        info = get_worker_info()
        return {**super().__getitem__(item), "worker": torch.tensor(-1 if info is None else info.id)}


def by_loaders(layout: Layout, ranks: int, steps: range) -> list[Batch]:
    """The same with loaders, whose workers are processes."""
    records = Told(layout.split, ("meta",), meta_dropout=0.3, seed=1)
    loaders = [
        make_loader(records, layout.order, Share(rank, ranks, layout.workers), steps=steps)
        for rank in range(ranks)
    ]
    return [{n: torch.cat([b[n] for b in batches]) for n in batches[0]} for batches in zip(*loaders, strict=True)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@settings(max_examples=WITH_WORKERS, deadline=None)
@given(layouts.filter(lambda layout: layout.ranks * layout.workers <= 8))
def test_loaders_and_their_workers_give_that_order(layout: Layout) -> None:
    """An epoch and a step of the next; draws too are those of one process without workers."""
    steps = layout.order.steps_per_epoch + 1
    stop = layout.stop % (steps + 1)
    alone = dataclasses.replace(layout, workers=0)
    found = [
        *by_loaders(layout, layout.ranks, range(stop)),
        *by_loaders(alone, layout.later_ranks, range(stop, steps)),
    ]
    records = Records(layout.split, ("meta",), meta_dropout=0.3, seed=1)
    expected = list(make_loader(records, layout.order, Share(), steps=range(steps)))
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        helped = step < stop and layout.workers > 0
        assert set(one.pop("worker").tolist()) <= ({*range(layout.workers)} if helped else {-1})
        for name in other:
            assert np.array_equal(one[name].numpy(), other[name].numpy(), equal_nan=name == "meta"), name


# ---- what is left behind

DIES = """
import os, signal, sys
from tests.test_loader_properties import Layout
from xcon.loader import Records, Share, make_loader

layout = Layout([30] * 4, rows=4, per_class=0, ranks=1, workers=2, later_ranks=1, stop=0)
batches = iter(make_loader(Records(layout.split, ("meta",)), layout.order, Share(workers=2), steps=range(30)))
next(batches)
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
print(os.getpid(), *children, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
def test_a_killed_loader_leaves_no_shared_memory() -> None:
    """On Linux torch hands tensors over by file descriptor: the names it gives them in /dev/shm it takes away."""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    died = subprocess.run(
        [sys.executable, "-c", DIES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    processes = died.stdout.split()
    assert len(processes) >= 3
    patience = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in processes):  # workers see that their parent is gone
        assert time.monotonic() < patience
        time.sleep(0.1)
    new = {path.name for path in Path("/dev/shm").iterdir()} - before
    assert not [name for name in new if any(process in name for process in processes)]
