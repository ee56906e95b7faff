"""Prediction: an evaluated run from a shard set, or the ranking for photographs.

    xcon predict RUN --shards DIR [--split test]            # RUN/predictions.parquet, RUN/metrics.json
    xcon predict RUN FILES... [--lon -73.9 --lat 40.7 --date 2026-05-01] [--out FILE.csv|json|parquet]

Both work under `accelerate launch`; every record of a split is evaluated exactly once by any number of processes.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from xcon import classifier, commandline, config, evaluation, images, launch, metrics, records
from xcon.classifier import Classifier
from xcon.loader import Batch, Records, Share, evaluation_loader
from xcon.model import ModelSpec
from xcon.shardset import ShardSet

PROGRAM = "xcon predict"
FORMATS = (".csv", ".json", ".parquet")

# Legend: b rows of a batch, N records, C classes.


@dataclasses.dataclass(frozen=True)
class Settings:
    """Evaluates a run on a split of a shard set, or ranks the classes of photographs."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Fine-tuned run."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES...")] = ()
    """Photographs."""
    shards: Path | None = None
    """Shard set to evaluate on, instead of photographs."""
    split: Literal["train", "val", "test"] | None = None
    """Split of the shard set; test where none is given."""
    lon: float | None = None
    """Degrees east of the photographs."""
    lat: float | None = None
    """Degrees north of the photographs."""
    date: str | None = None
    """Day of the photographs, as an ISO date."""
    out: Path | None = None
    """The ranking is written here (.csv, .json, .parquet), or a copy of RUN/predictions.parquet (not .csv)."""
    top: int | None = None
    """Classes to list per photograph; 5 where none is given."""
    batch_size: int = 64
    """Photographs at once, over all processes."""
    workers: int = 2
    """Processes that decode, per process that computes."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """As in training."""

    def __post_init__(self) -> None:
        """Refuses settings that have no meaning together.

        Raises:
            ValueError: names the setting.
        """
        if (self.shards is None) == (not self.files):
            raise ValueError("give either --shards DIR or photographs")
        if self.batch_size < 1 or (self.top is not None and self.top < 1) or self.workers < 0:
            raise ValueError("--batch-size and --top are at least 1, --workers at least 0")
        if self.shards and (self.lon, self.lat, self.date, self.top) != (None, None, None, None):
            raise ValueError("--lon, --lat, --date and --top are for photographs; a shard set has its own places")
        if self.files and self.split:
            raise ValueError("--split is for a shard set; photographs have none")
        formats = FORMATS[1:] if self.shards else FORMATS  # scores of all classes are no column of a .csv
        if self.out and self.out.suffix not in formats:
            raise ValueError(f"--out {self.out}: a name ending in {' or '.join(formats)} is needed")
        if self.out and not self.out.parent.is_dir():
            raise ValueError(f"--out {self.out}: no such folder as {self.out.parent}")
        records.check_place(lon=self.lon, lat=self.lat)
        records.year_fraction(self.date)


def main() -> None:
    """Runs the command line."""
    commandline.guarded(predict, PROGRAM)


def predict() -> None:
    """Parse, model, data, loop, results."""
    settings = commandline.parse(Settings, PROGRAM)
    network, spec = classifier.load(settings.run)
    settings = dataclasses.replace(settings, precision=launch.resolve_precision(settings.precision))
    accelerator = launch.make_accelerator(settings.precision, batch_size=0, clip_norm=1.0)
    network.to(accelerator.device)
    if settings.shards:
        evaluate(settings, network, spec, ShardSet(settings.shards), accelerator)
    else:
        rank(settings, network, spec, accelerator)
    launch.finish(accelerator)


# --------------------------------------------------------------------------------------------------------
# A split of a shard set


def evaluate(
    settings: Settings, network: Classifier, spec: ModelSpec, shards: ShardSet, accelerator: Accelerator
) -> None:
    """Scores with the records' own metadata, without, and with that of other records; writes both files."""
    split = shards.split(settings.split or "test")
    ours = [info.raw_class_id for info in shards.card.classes]
    if ours != spec.raw_class_ids:
        raise ValueError(
            f"{settings.run}: fine-tuned on another class list ({len(spec.classes)} classes) than "
            f"{settings.shards} has ({len(ours)})"
        )
    share = Share(accelerator.process_index, accelerator.num_processes, settings.workers)
    transform = images.eval_transform(spec.image) if spec.image else None
    batches = evaluation_loader(
        Records(split, network.modalities, transform), share, batch_size=settings.batch_size
    )
    # Metadata of another record drawn at random: what the model makes of a place says nothing of the bird then.
    permuted = split.place[np.random.default_rng(0).permutation(len(split))]
    others = torch.from_numpy(permuted).float().to(accelerator.device)

    def score(batch: Batch) -> dict[str, Tensor]:
        with launch.autocast(accelerator, settings.precision):
            return evaluation.with_controls(network, batch, others)

    shown = track(
        batches, f"{split.name} split", console=Console(stderr=True), disable=not accelerator.is_main_process
    )
    found = evaluation.collect(shown, score, samples=len(split), device=accelerator.device)
    if not accelerator.is_main_process:
        return
    probabilities = {name: rows.numpy() for name, rows in found.items() if name != "label"}
    own, *controls = [
        {"n": len(split), **metrics.summarise(rows, split.class_id)} for rows in probabilities.values()
    ]
    facts = {
        "split": split.name,
        **own,
        "label_space": f"{len(ours)} classes of the source",
        "with_meta": "meta" in network.modalities,
        "seed": config.read_json(settings.run / "config.json")["seed"],
        "shards_sha256": shards.card.sha256,
        **dict(zip(metrics.CONTROLS, controls, strict=False)),
    }
    suffix = "" if split.name == "test" else f"-{split.name}"
    table, out = evaluation.prediction_table(split, probabilities), settings.run / f"predictions{suffix}.parquet"
    for path in (out, settings.out) if settings.out else (out,):
        evaluation.write_table(table, path)
    with records.atomic_write(settings.run / f"metrics{suffix}.json") as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())
    Console().print(
        f"{len(split)} of {len(split)} {split.name} records, each evaluated once, by "
        f"{accelerator.num_processes} process(es): {summary(facts)}\n{out}",
        highlight=False,
        soft_wrap=True,
    )


def summary(facts: Mapping[str, Any]) -> str:
    """The figures of an evaluation in one line."""
    line = f"top-1 {100 * facts['top1']:.2f} %, top-5 {100 * facts['top5']:.2f} %, ECE {facts['ece']:.3f}"
    if not facts["with_meta"]:
        return line
    without, shuffled = facts["without_meta"]["top1"], facts["shuffled_meta"]["top1"]
    return f"{line}; top-1 without metadata {100 * without:.2f} %, with shuffled metadata {100 * shuffled:.2f} %"


# --------------------------------------------------------------------------------------------------------
# Photographs


def rank(settings: Settings, network: Classifier, spec: ModelSpec, accelerator: Accelerator) -> None:
    """The most probable classes of each photograph, on the terminal or in a file."""
    if "meta" not in network.modalities and (settings.lon, settings.lat, settings.date) != (None, None, None):
        raise ValueError(f"--lon, --lat, --date: {settings.run} was fine-tuned without metadata, they are unused")
    if spec.image is None:
        raise ValueError(f"{settings.run}: fine-tuned without images, it cannot rank photographs")
    transform = images.eval_transform(spec.image)
    known = [settings.lon, settings.lat, records.year_fraction(settings.date)]
    place = torch.tensor([[math.nan if v is None else v for v in known]])  # [1, 3]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(settings.files), settings.batch_size):
        files = settings.files[start : start + settings.batch_size]
        photos = torch.stack([transform(read(file)) for file in files])  # [b, 3, S, S]
        inputs = {"image": photos, "meta": place.expand(len(files), -1)}
        with torch.inference_mode(), launch.autocast(accelerator, settings.precision):
            logits = network.score({m: inputs[m].to(accelerator.device) for m in network.modalities})
        best = logits.float().softmax(dim=1).cpu().topk(min(settings.top or 5, len(spec.classes)))
        for file, values, ids in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
            for n, (c, p) in enumerate(zip(ids, values, strict=True), start=1):
                info = {name: spec.classes[c][name] for name in ("raw_class_id", "name")}
                told = {"lon": settings.lon, "lat": settings.lat, "date": settings.date}
                rows.append({"file": str(file), **told, "rank": n, "class_id": c, **info, "probability": p})
    if not accelerator.is_main_process:
        return
    if settings.out:
        evaluation.write_table(pa.Table.from_pylist(rows), settings.out)
        Console().print(
            f"{len(settings.files)} photographs ranked: {settings.out}", highlight=False, soft_wrap=True
        )
    else:
        show(rows)


def read(file: Path) -> Tensor:
    """The pixels of a photograph, `[3, H, W]` uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not decode; the message names it.
    """
    if file.is_dir():
        raise ValueError(f"{file}: a folder; give its files, as {file}/*.jpg")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return images.decode(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the ranking."""
    table = Table("file", "rank", "class", "probability")
    for row in rows:
        table.add_row(Path(row["file"]).name, str(row["rank"]), row["name"], f"{row['probability']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
