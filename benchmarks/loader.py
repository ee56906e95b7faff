"""What a photograph costs on its way to a batch: ours against ImageFolder, webdataset and the decoder alone.

    python benchmarks/loader.py --root NABIRDS [--photographs 300] [--repeats 5]

NABIRDS is a folder of JPEGs in the layout of the release. Its photographs are tiled to 1024 x 683 px, NABirds'
median size, and saved with quality 90: the originals. They are made small as `xcon-shards build` does it,
shorter side 256 px. One thread, no workers, CPU time, each way measured in turns; medians, and the ratio of ours
to each.
"""

import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from webdataset import WebDataset

from shards.build import Sample, write_shard
from shards.photographs import fit
from xcon import images
from xcon.images import ImageSpec
from xcon.loader import Records, Share, make_loader
from xcon.records import Card, ClassInfo, Record, Shard
from xcon.sampler import Order
from xcon.shardset import ShardSet, Split

SIZE, SHORTER_SIDE, CROP_SCALE, BATCH = 224, 256, 0.35, 64
SPEC = ImageSpec("any", {}, SIZE, (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear")
CAPTION = "This is a photograph of a bird"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    root: Path
    """Folder with JPEGs, in folders of any depth."""
    photographs: int = 300
    """How many are made."""
    repeats: int = 5
    """Times that each way is measured."""


def main() -> None:
    """Makes the photographs, runs every way in turns, prints a table."""
    settings = tyro.cli(Settings)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = write_originals(settings, folder / "originals")
        shards = write_shards(originals, folder / "shards")
        split = ShardSet(shards).split("train")
        ways = {
            "ImageFolder, originals": partial(by_image_folder, folder / "originals"),
            "webdataset, our shards": partial(by_webdataset, shards),
            "ours": partial(by_ours, split),
            "simplejpeg alone, in memory": partial(by_decoder, list(photographs(split))),
            "ours, nothing decoded": partial(by_index, split),
            "webdataset, nothing decoded": partial(by_raw_webdataset, shards),
        }
        seconds = in_turns(settings.repeats, ways)
    rates = {way: settings.photographs / statistics.median(s) for way, s in seconds.items()}
    table = Table("way", "photographs/s", "ours is")
    for way, rate in rates.items():
        ours = rates["ours, nothing decoded" if "nothing" in way else "ours"]
        table.add_row(way, f"{rate:,.0f}", f"{ours / rate:.2f} x")
    Console().print(table)


def in_turns(repeats: int, ways: dict[str, Callable[[], int]]) -> dict[str, list[float]]:
    """CPU seconds of each way, after one turn to warm up; each goes through all photographs."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, body in ways.items():
            start = time.process_time()
            count = body()
            if turn:
                seconds[way].append(time.process_time() - start)
            assert count > 0
    return seconds


def write_originals(settings: Settings, folder: Path) -> list[bytes]:
    """Photographs of 1024 x 683 px, tiles of real ones; also as files of one class."""
    paths = sorted(settings.root.rglob("*.jpg"))
    rng = np.random.default_rng(0)
    (folder / "bird").mkdir(parents=True)
    made = []
    for number in range(settings.photographs):
        canvas = Image.new("RGB", (1024, 683))
        for x, y in np.ndindex(5, 4):
            with Image.open(paths[rng.integers(len(paths))]) as tile:
                canvas.paste(tile.convert("RGB"), (x * 227, y * 227))
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
        (folder / "bird" / f"{number}.jpg").write_bytes(made[-1])
    return made


def write_shards(originals: list[bytes], folder: Path) -> Path:
    """The same photographs as a shard set of one class."""
    folder.mkdir()
    shards: list[Shard] = []
    for first in range(0, len(originals), 100):
        samples = [
            Sample(
                Record(f"{first + i}", 0, 0, "bird", None, None, None, "train"),
                fit(data, f"{first + i}", size=SHORTER_SIDE, quality=90),
                CAPTION,
            )
            for i, data in enumerate(originals[first : first + 100])
        ]
        shards.append(write_shard(folder / f"train-{len(shards):06d}.tar", samples)[0])
    bird = ClassInfo(0, 0, "bird", None, (), {"train": len(originals)})
    Card((bird,), {"train": tuple(shards)}, {}).save(folder)
    return folder


def usual() -> v2.Transform:
    """What ImageNet's training scripts do to a Pillow image: crop, flip, normalised floats."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(CROP_SCALE, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def by_image_folder(folder: Path) -> int:
    """ImageFolder, with Pillow."""
    loader = torch.utils.data.DataLoader(ImageFolder(folder, usual()), batch_size=BATCH, shuffle=True)
    return sum(len(batch) for batch, _ in loader)


def by_webdataset(folder: Path) -> int:
    """Its own pipeline, with Pillow."""
    data = WebDataset(tars(folder), shardshuffle=100, seed=0).shuffle(1000).decode("pil").to_tuple("jpg", "json")
    batches = data.map_tuple(usual(), lambda facts: facts["class_id"]).batched(BATCH)
    return sum(len(photos) for photos, _ in batches)


def by_ours(split: Split) -> int:
    """The loader of training, without workers."""
    records = Records(split, ("image",), images.train_transform(SPEC, crop_scale=CROP_SCALE))
    order = Order(len(split), BATCH, seed=0)
    batches = make_loader(records, order, Share(), steps=range(order.steps_per_epoch))
    return sum(len(batch["image"]) for batch in batches)


def by_decoder(photos: list[bytes]) -> int:
    """Decodes each, and nothing else."""
    return sum(len(simplejpeg.decode_jpeg(photo, colorspace="RGB")) > 0 for photo in photos)


def by_index(split: Split) -> int:
    """Every photograph's bytes in random order."""
    return sum(len(photo) > 0 for photo in photographs(split))


def photographs(split: Split) -> Iterator[bytes]:
    """Every photograph's bytes in random order."""
    for index in np.random.default_rng(0).permutation(len(split)).tolist():
        yield split.photo(index)


def by_raw_webdataset(folder: Path) -> int:
    """Every record's bytes, in the order of the tars."""
    return sum(len(sample["jpg"]) > 0 for sample in WebDataset(tars(folder), shardshuffle=False))


def tars(folder: Path) -> list[str]:
    """The tars of a folder."""
    return [str(path) for path in sorted(folder.glob("*.tar"))]


if __name__ == "__main__":
    main()
