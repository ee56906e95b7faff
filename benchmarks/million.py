"""A shard set of a million records: how fast it is built, how large it is, what opening and loading it takes.

    python benchmarks/million.py --out DIR [--records 1000000] [--workers 2]

Photographs are 16 x 16 pixels, made from the record's number, so that what is measured is everything but decoding.
Reading is measured in processes of their own, so that each figure is that of a fresh start.
"""

import dataclasses
import datetime
import hashlib
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import simplejpeg
import tyro
from rich.console import Console

from shards import build
from shards.plan import Photograph, Plan, count
from shards.workspace import Share, workspace
from xcon.records import CARD_NAME, PAPER_CAPTION, ClassInfo, Record

CLASSES = 10_000
SIDE = 16  # pixels


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    out: Path
    """New folder for the shard set; one that is there already is only read."""
    records: int = 1_000_000
    """Records, one in ten of them test."""
    per_shard: int = 5_000
    """Records per tar."""
    workers: int = 2
    """Processes that build, and that load."""
    batches: int = 100
    """Batches of 256 to load."""
    read: bool = False
    """Only measure reading, in this process."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One colour, from the record's number."""

    def __call__(self, image_id: str) -> Photograph:
        """The photograph of a record."""
        colour = np.frombuffer(int(image_id).to_bytes(3, "big"), np.uint8)
        pixels = np.broadcast_to(colour, (SIDE, SIDE, 3))
        jpg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90)
        # The number itself, for two records whose colours end as the same JPEG.
        return Photograph(jpg, hashlib.sha256(image_id.encode()).digest(), SIDE)


def main() -> None:
    """Builds, then reads in a process of its own."""
    settings = tyro.cli(Settings)
    if settings.read:
        read(settings)
        return
    if not (settings.out / CARD_NAME).is_file():
        make(settings)
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--read"], check=True)


def make(settings: Settings) -> None:
    """Makes the plan and builds it."""
    start = time.monotonic()
    plan = plan_of(settings.records)
    say("plan", f"{time.monotonic() - start:,.0f} s, {peak()} at most")
    one = build.Settings(
        PAPER_CAPTION, settings.per_shard, 0, frozenset(), 1, settings.workers, {"source": "drawn"}
    )
    jobs = one.jobs(plan)
    say("to a worker at its start", f"{len(pickle.dumps(one.maker(plan, settings.out))) / 1e6:,.1f} MB")
    say("to a worker for a shard", f"{len(pickle.dumps(jobs[0])) / 1e6:,.1f} MB")
    start = time.monotonic()
    with workspace(settings.out, Share()) as space:
        card = build.pack(plan, space, Console(soft_wrap=True, highlight=False), one)
    seconds = time.monotonic() - start
    assert card is not None
    say("build", f"{seconds:,.0f} s, {settings.records / seconds:,.0f} records/s, {settings.workers} workers")
    say("memory of the parent", f"{peak()} at most")
    say("memory of a worker", f"{peak(resource.RUSAGE_CHILDREN)} at most")
    for kind in ("*.tar", "*.parquet", CARD_NAME):
        sizes = [path.stat().st_size for path in settings.out.glob(kind)]
        say(kind, f"{len(sizes):,} files, {sum(sizes) / 1e6:,.1f} MB")


def plan_of(records: int) -> Plan:
    """A plan of so many records, with places, dates and photographers."""
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-180, 180, records).round(5).tolist(), rng.uniform(-90, 90, records).round(5).tolist()
    first = datetime.date(2020, 1, 1)
    days = [(first + datetime.timedelta(n)).isoformat() for n in range(366)]
    day, user = rng.integers(366, size=records).tolist(), rng.integers(records // 20, size=records).tolist()
    names = [f"Genus{c // 10} species{c}" for c in range(CLASSES)]
    rows = tuple(
        Record(
            image_id=f"{n:08d}",
            class_id=n % CLASSES,
            raw_class_id=n % CLASSES,
            class_name=names[n % CLASSES],
            lon=lon[n],
            lat=lat[n],
            date=days[day[n]],
            split="test" if n // CLASSES % 10 == 9 else "train",
            extra={"user_id": user[n]},
        )
        for n in range(records)
    )
    classes = tuple(ClassInfo(c, c, name, name, ("Aves",), {}) for c, name in enumerate(names))
    return Plan(count(classes, rows), rows, Drawn(), {})


def read(settings: Settings) -> None:
    """Opens the set and loads batches."""
    from torchvision.transforms import v2  # noqa: PLC0415 - a build needs no torch

    from xcon.loader import Records, Share, make_loader  # noqa: PLC0415
    from xcon.sampler import Order  # noqa: PLC0415
    from xcon.shardset import ShardSet  # noqa: PLC0415

    process = psutil.Process()
    before, start = process.memory_info().rss, time.monotonic()
    train = ShardSet(settings.out).split("train")
    say(
        "ShardSet", f"{time.monotonic() - start:,.1f} s, {(process.memory_info().rss - before) / 1e6:,.0f} MB more"
    )
    order = Order(len(train), 256, seed=0)
    records = Records(train, ("image", "meta"), transform=v2.Identity())
    loader = make_loader(records, order, Share(workers=settings.workers), steps=range(settings.batches))
    start = time.monotonic()
    batches = iter(loader)
    next(batches)
    say("first batch", f"{time.monotonic() - start:,.1f} s")
    for number, _ in enumerate(batches, start=2):
        if number == settings.batches - 1:  # while the workers are still there
            for worker in process.children():
                memory = worker.memory_full_info()
                say("a worker", f"RSS {memory.rss / 1e6:,.0f} MB, PSS {memory.pss / 1e6:,.0f} MB")
    rate = settings.batches * 256 / (time.monotonic() - start)
    say("loading", f"{rate:,.0f} records/s from the first request on, {settings.workers} workers")
    say("the process itself", f"RSS {process.memory_info().rss / 1e6:,.0f} MB")


def peak(who: int = resource.RUSAGE_SELF) -> str:
    """The most memory that this process, or the largest of its children, has had."""
    return f"{resource.getrusage(who).ru_maxrss / 1e3:,.0f} MB"


def say(name: str, value: str) -> None:
    """One line."""
    print(f"{name:<26}{value}", flush=True)


if __name__ == "__main__":
    main()
