"""A shard set as others publish theirs: plain WebDataset, or a folder that `datasets.load_dataset` reads.

Photographs and records stay as they are, byte for byte and value for value; the index and the card do not come
along, a `README.md` does. For `datasets` the records become Parquet with typed columns: a `ClassLabel` and columns
of known kinds are there without decoding anything, rows can be chosen, filtered and streamed, and the hub shows
them; its own reader of tars would give each record's JSON as it stands, without a label that has names.
"""

import itertools
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData
from rich.console import Console

from shards.build import add_member
from shards.members import MEMBERS, Stored, stored
from shards.progress import progress
from shards.workspace import full_disk
from xcon.records import CARD_NAME, Card, Record, Shard, atomic_write, sha256, year_fraction

Target = Literal["webdataset", "datasets"]

_GROUP = 100  # rows of a row group: what a reader of one photograph has to load
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


class Form(Protocol):
    """One way to publish records."""

    def name(self, split: str, number: int, shards: int) -> str:
        """Of the file for one shard of so many, below the folder."""

    def pattern(self, split: str) -> str:
        """Of all files of a split."""

    def write(self, path: Path, split: str, records: Iterator[Stored]) -> int:
        """Writes one file and returns how many records it has."""

    def describe(self, data: DatasetCardData) -> str:
        """Adds what the form knows to the front matter; returns how to read it, for people."""


def export(
    card: Card, folder: Path, out: Path, console: Console, *, to: Target, licence: str | None
) -> Mapping[str, int]:
    """Writes all records in another form.

    Args:
        card: of the set.
        folder: of the set.
        out: a new or empty folder; it is there when all of it is there.
        console: for the progress.
        to: the form.
        licence: identifier of the photographs' licence, for the README.

    Returns:
        Records per split.

    Raises:
        ValueError: `out` holds something, or the set is damaged.
        OSError: a file cannot be read or written.
    """
    if card.made_by.get("source") == "index":
        raise ValueError(f"{folder}: was made by index, of somebody's tars, which are plain WebDataset already")
    form: Form = WebDataset() if to == "webdataset" else Parquet(card)
    counts: Counter[str] = Counter()
    total = sum(card.samples(split) for split in card.splits)
    with _beside(out) as new, progress(console, "export", total, "photographs") as advance:
        for split, shards in card.splits.items():
            for number, shard in enumerate(shards):
                path = new / form.name(split, number, len(shards))
                path.parent.mkdir(exist_ok=True)
                counts[split] += _export_shard(folder, split, shard, form, path)
                advance(shard.samples)
        data = DatasetCardData(
            license=licence,
            task_categories=["image-classification"],
            size_categories=[next((name for below, name in _SIZES if total < below), "n>10M")],
            configs=[
                {
                    "config_name": "default",
                    "data_files": [{"split": split, "path": form.pattern(split)} for split in card.splits],
                }
            ],
        )
        usage = form.describe(data)
        (new / "README.md").write_text(_readme(card, out.resolve().name, data, usage), encoding="utf-8")
    return counts


def _export_shard(folder: Path, split: str, shard: Shard, form: Form, path: Path) -> int:
    source = folder / shard.file
    if not source.is_file() or sha256(source) != shard.sha256:
        raise ValueError(f"{source}: not what the card says; xcon-shards verify {folder} tells more")
    written = form.write(path, split, stored(source))
    if written != shard.samples:
        raise ValueError(f"{source}: holds {written} records, the card says {shard.samples}")
    return written


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and is removed otherwise."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out {out}: holds something already; name a new or empty folder")
    try:
        new = Path(tempfile.mkdtemp(dir=out.resolve().parent, prefix=f".{out.name}."))
    except OSError as error:
        raise OSError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        yield new
        new.chmod(0o755)
        new.replace(out)
    except OSError as error:
        if number := full_disk(error):
            raise OSError(f"--out {out}: {os.strerror(number).lower()}; name a folder on another disk") from None
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)  # gone where it became `out`


class WebDataset:
    """Tars with a photograph, its caption, its record and its class id: `jpg`, `txt`, `json`, `cls`."""

    def name(self, split: str, number: int, shards: int) -> str:
        """`train-000000.tar`."""
        return f"{split}-{number:06d}.tar"

    def pattern(self, split: str) -> str:
        """All tars of a split."""
        return f"{split}-*.tar"

    def write(self, path: Path, split: str, records: Iterator[Stored]) -> int:
        """Writes one tar."""
        count = 0
        with (
            atomic_write(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar,
        ):
            for record in records:
                count += 1
                for kind in MEMBERS:
                    add_member(tar, f"{record.key}.{kind}", record.members[kind])
                class_id = Record.from_json(record.members["json"]).class_id
                add_member(tar, f"{record.key}.cls", str(class_id).encode())
        return count

    def describe(self, data: DatasetCardData) -> str:
        """How to read the tars."""
        return """```python
import webdataset

for sample in webdataset.WebDataset("train-000000.tar").decode("pil"):
    image, label, caption, record = sample["jpg"], sample["cls"], sample["txt"], sample["json"]
```

Every sample has a photograph (`jpg`), a caption (`txt`), its class id (`cls`) and its record (`json`: `image_id`,
`class_id`, `raw_class_id`, `class_name`, `lon` and `lat` in degrees, `date` as ISO date or fraction of the year,
`split`, and what else is known; null where unknown).
"""


class Parquet:
    """Rows with a photograph, a `ClassLabel` and typed columns."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.size: Counter[str] = Counter()  # bytes of the rows in memory, by split
        self.files: list[Path] = []
        numbers = all(isinstance(info.raw_class_id, int) for info in card.classes)
        self.raw: type[int] | type[str] = int if numbers else str
        self.features = datasets.Features(
            {
                "image_id": datasets.Value("string"),
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=label_names(card)),
                "caption": datasets.Value("string"),
                "lon": datasets.Value("float64"),
                "lat": datasets.Value("float64"),
                "date": datasets.Value("string"),
                "year_fraction": datasets.Value("float64"),
                "raw_class_id": datasets.Value("int64" if numbers else "string"),
                "class_name": datasets.Value("string"),
                "scientific_name": datasets.Value("string"),
                "extra": datasets.Value("string"),
            }
        )

    def name(self, split: str, number: int, shards: int) -> str:
        """`data/train-00000-of-00005.parquet`, as `datasets` names its own."""
        return f"data/{split}-{number:05d}-of-{shards:05d}.parquet"

    def pattern(self, split: str) -> str:
        """All files of a split."""
        return f"data/{split}-*"

    def write(self, path: Path, split: str, records: Iterator[Stored]) -> int:
        """Writes one file, so many rows in memory at a time."""
        count = 0
        schema = self.features.arrow_schema  # with what `datasets` has to know of the columns
        with atomic_write(path) as file, pq.ParquetWriter(file, schema) as writer:
            while rows := [self._row(record) for record in itertools.islice(records, _GROUP)]:
                table = pa.Table.from_pylist(rows, schema=schema)
                writer.write_table(table)
                self.size[split] += table.nbytes
                count += len(rows)
        self.files.append(path)
        return count

    def _row(self, stored_record: Stored) -> dict[str, Any]:
        record = Record.from_json(stored_record.members["json"])
        fraction = year_fraction(record.date)
        return {
            "image_id": record.image_id,
            "image": {"bytes": stored_record.members["jpg"], "path": f"{stored_record.key}.jpg"},
            "label": record.class_id,
            "caption": stored_record.members["txt"].decode(),
            "lon": record.lon,
            "lat": record.lat,
            "date": record.date if isinstance(record.date, str) else None,
            "year_fraction": None if record.date is None else fraction,
            "raw_class_id": self.raw(record.raw_class_id),
            "class_name": record.class_name,
            "scientific_name": self.card.classes[record.class_id].scientific_name,
            "extra": json.dumps(record.extra, ensure_ascii=False),
        }

    def describe(self, data: DatasetCardData) -> str:
        """Adds features and sizes; returns how to read the rows."""
        on_disk = sum(path.stat().st_size for path in self.files)
        splits = datasets.SplitDict()
        for split in self.card.splits:
            splits.add(datasets.SplitInfo(split, self.size[split], self.card.samples(split)))
        info = datasets.DatasetInfo(
            features=self.features, splits=splits, download_size=on_disk, dataset_size=sum(self.size.values())
        )
        DatasetInfosDict(default=info).to_dataset_card_data(data)
        return """```python
import datasets

rows = datasets.load_dataset("path/of/this/folder", split="train")
image, label = rows[0]["image"], rows.features["label"].int2str(rows[0]["label"])
```

`lon` and `lat` are degrees (WGS-84), `date` is an ISO date where the day is known, `year_fraction` the day as a
fraction of its year (0 on 1 January, 1 on 31 December), `extra` a JSON object with what else is known; null where
unknown. `raw_class_id` and `class_name` are those of the source, `label` counts from 0.
"""


def label_names(card: Card) -> list[str]:
    """A name for each class, all different: of classes with one name, each has its raw id behind it."""
    names = [" ".join(info.name.split()) for info in card.classes]
    often = Counter(names)
    return [
        f"{name} [{info.raw_class_id}]" if often[name] > 1 else name
        for name, info in zip(names, card.classes, strict=True)
    ]


def _readme(card: Card, title: str, data: DatasetCardData, usage: str) -> str:
    lines = [f"| {split} | {card.samples(split):,} |" for split in card.splits]
    source = card.made_by.get("source", "unknown")
    return "\n".join(
        [
            "---",
            data.to_yaml().rstrip(),
            "---",
            "",
            f"# {title}",
            "",
            f"Photographs of {len(card.classes):,} classes with captions, places and dates, exported from a shard "
            f"set of xcon (source `{source}`, `{CARD_NAME}` sha256 `{card.sha256}`).",
            "",
            "| split | photographs |",
            "| --- | ---: |",
            *lines,
            "",
            usage,
        ]
    )
