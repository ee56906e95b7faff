"""Prediction: an evaluated run from a shard set, or the ranking for photographs.

    xcon predict RUN --shards DIR [--split test] [--name NAME]  # RUN/predictions.parquet, RUN/metrics.json
    xcon predict PRETRAINED --shards DIR                        # zero-shot, probes, retrieval: RUN/metrics.json
    xcon predict RUN FILES... [--lon -73.9 --lat 40.7 --date 2026-05-01] [--out FILE.csv|json|parquet]

All work under `accelerate launch`; every record of a split is evaluated exactly once by any number of processes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from torch import Tensor

from xcon import (
    classifier,
    commandline,
    evaluation,
    images,
    launch,
    model,
    pretrained,
    probes,
    ranking,
    records,
    runfiles,
)
from xcon.loader import Batch, Records, Share, evaluation_loader
from xcon.model import ModelSpec
from xcon.shardset import ShardSet, Split

PROGRAM = "xcon predict"
FORMATS = (".csv", ".json", ".parquet")

# Legend: b rows of a batch, N records, C classes.


@dataclasses.dataclass(frozen=True)
class Settings:
    """Evaluates a run on a split of a shard set, or ranks the classes of photographs."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Fine-tuned run; with --shards also a pre-trained one."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES...")] = ()
    """Photographs."""
    shards: Path | None = None
    """Shard set to evaluate on, instead of photographs."""
    split: Literal["train", "val", "test"] | None = None
    """Split of the shard set; test where none is given."""
    name: str | None = None
    """What to call the results, as of other shards: RUN/predictions-NAME.parquet and RUN/metrics-NAME.json."""
    doubt: float | None = None
    """Of a product, in place of that of training: the probability that a place is wrong; 0 trusts all of them."""
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
        if self.files and (self.split or self.name):
            raise ValueError("--split and --name are for a shard set; photographs have none")
        if self.doubt is not None and not 0 <= self.doubt < 1:
            raise ValueError(f"--doubt {self.doubt}: a share in [0, 1) is needed")
        if self.name in records.SPLITS:
            raise ValueError(f"--name {self.name}: results of that split are called so, take another name")
        if self.name is not None:
            runfiles.check_name(self.name)
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
    settings = dataclasses.replace(settings, precision=launch.resolve_precision(settings.precision))
    accelerator = launch.make_accelerator(settings.precision, batch_size=0, clip_norm=1.0)
    if settings.shards is None:
        rank(settings, accelerator)
    elif model.read_spec(settings.run).kind == "contrastive":
        evaluate_pretrained(settings, ShardSet(settings.shards), accelerator)
    else:
        evaluate(settings, ShardSet(settings.shards), accelerator)
    launch.finish(accelerator)


# --------------------------------------------------------------------------------------------------------
# A split of a shard set


def evaluate(settings: Settings, shards: ShardSet, accelerator: Accelerator) -> None:
    """Scores with the records' own metadata, without, and with that of other records; writes both files."""
    if settings.doubt is not None and settings.name is None:
        raise ValueError(f"--doubt {settings.doubt}: give a --name too, or it would stand as the run's own result")
    network, spec = classifier.load(settings.run, doubt=settings.doubt)
    network.to(accelerator.device)
    evaluation.check_classes(settings.run, spec, shards)
    split = shards.split(settings.split or "test")
    others = torch.from_numpy(evaluation.others_of(split)).float().to(accelerator.device)
    score = functools.partial(evaluation.with_controls, network, others=others)
    found = collect(settings, split, network.modalities, spec, score, accelerator)
    if not accelerator.is_main_process:
        return
    probabilities = {name: rows.numpy() for name, rows in found.items() if name != "label"}
    name = called(settings, split)
    out, table = runfiles.predictions(settings.run, name), evaluation.prediction_table(split, probabilities)
    for path in (out, settings.out) if settings.out else (out,):
        evaluation.write_table(table, path)
    judged = evaluation.judge(probabilities, split.class_id, shards.card.classes)
    file, with_meta = runfiles.measures(settings.run, name), "meta" in network.modalities
    evaluation.write_measures(file, judged, run=settings.run, split=split, shards=shards, with_meta=with_meta)
    tell(split, accelerator, f"{evaluation.summary(judged)}\n{out}")


def evaluate_pretrained(settings: Settings, shards: ShardSet, accelerator: Accelerator) -> None:
    """What a pre-trained run knows: zero-shot by captions, linear probes, nearest neighbours, retrieval."""
    towers, spec = pretrained.load(settings.run, accelerator.device)
    evaluation.check_classes(settings.run, spec, shards)
    split = shards.split(settings.split or "test")
    only = f"{settings.run} is pre-trained only"
    if settings.doubt is not None:
        raise ValueError(f"--doubt {settings.doubt}: unused, {only}")
    if settings.out:
        raise ValueError(f"--out {settings.out}: {only} and predicts no classes")
    if split.name == "train":
        raise ValueError(f"--split train: {only}, and its probes learn from that split")
    seen = {m: tower for m, tower in towers.items() if m != "text"}
    embed = functools.partial(pretrained.with_features, seen)
    learnt = ("train", "val") if split.name == "test" and shards.has("val") else ("train",)
    parts = [*(shards.split(name) for name in learnt), split]
    found = {part.name: collect(settings, part, tuple(seen), spec, embed, accelerator) for part in parts}
    texts = pretrained.class_texts(settings.run, shards) if spec.text else []
    captions = pretrained.caption_vectors(settings.run, towers["text"], texts) if spec.text else None
    if accelerator.is_main_process:
        judged, with_meta = pretrained.judge(found, split.name, captions), "meta" in seen
        out = runfiles.measures(settings.run, called(settings, split))
        evaluation.write_measures(out, judged, run=settings.run, split=split, shards=shards, with_meta=with_meta)
        tell(split, accelerator, f"{probes.summary(judged)}\n{out}")


def collect(
    settings: Settings, split: Split, modalities: tuple[str, ...], spec: ModelSpec,
    compute: Callable[[Batch], Mapping[str, Tensor]], accelerator: Accelerator,
) -> dict[str, Tensor]:  # fmt: skip
    """What a function makes of every record of a split, in order, `[N, ...]` each."""
    share = Share(accelerator.process_index, accelerator.num_processes, settings.workers)
    transform = images.eval_transform(spec.image) if spec.image else None
    batches = evaluation_loader(Records(split, modalities, transform), share, batch_size=settings.batch_size)
    hidden = not accelerator.is_main_process
    shown = track(batches, f"{split.name} split", console=Console(stderr=True), disable=hidden)

    def computed(batch: Batch) -> Mapping[str, Tensor]:
        with launch.autocast(accelerator, settings.precision):
            return compute(batch)

    return evaluation.collect(shown, computed, samples=len(split), device=accelerator.device)


def called(settings: Settings, split: Split) -> str | None:
    """What the results are called: as --name has it, or by their split; those of test have no name."""
    return settings.name or (None if split.name == "test" else split.name)


def tell(split: Split, accelerator: Accelerator, what: str) -> None:
    """Prints the result."""
    counted = f"{len(split)} of {len(split)} {split.name} records, each evaluated once"
    commandline.say(f"{counted}, by {accelerator.num_processes} process(es): {what}")


# --------------------------------------------------------------------------------------------------------
# Photographs


def rank(settings: Settings, accelerator: Accelerator) -> None:
    """The most probable classes of each photograph, on the terminal or in a file."""
    network, spec = classifier.load(settings.run, doubt=settings.doubt)
    network.to(accelerator.device)
    told = {"lon": settings.lon, "lat": settings.lat, "date": settings.date}
    if "meta" not in network.modalities and any(value is not None for value in told.values()):
        raise ValueError(f"--lon, --lat, --date: {settings.run} was fine-tuned without metadata, they are unused")
    if spec.image is None:
        raise ValueError(f"{settings.run}: fine-tuned without images, it cannot rank photographs")
    known = [settings.lon, settings.lat, records.year_fraction(settings.date)]
    place = torch.tensor([[math.nan if v is None else v for v in known]])  # [1, 3]

    def score(photos: Tensor) -> Tensor:
        inputs = {"image": photos, "meta": place.expand(len(photos), -1)}
        with torch.inference_mode(), launch.autocast(accelerator, settings.precision):
            return network.score({m: inputs[m].to(accelerator.device) for m in network.modalities})

    found = ranking.rank(
        settings.files, images.eval_transform(spec.image), score,
        classes=spec.classes, top=settings.top or 5, batch_size=settings.batch_size,
    )  # fmt: skip
    rows = [{"file": row["file"], **told, **row} for row in found]
    if accelerator.is_main_process and settings.out:
        evaluation.write_table(pa.Table.from_pylist(rows), settings.out)
        commandline.say(f"{len(settings.files)} photographs ranked: {settings.out}")
    elif accelerator.is_main_process:
        ranking.show(rows)


if __name__ == "__main__":
    main()
