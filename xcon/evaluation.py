"""Evaluation over all processes: every record of a split exactly once, in the order of the split."""

import dataclasses
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from xcon import config, gather, labelspaces, metrics, records
from xcon.classifier import Classifier
from xcon.loader import Batch, to_device
from xcon.model import ModelSpec
from xcon.records import ClassInfo
from xcon.shardset import ShardSet, Split

# Legend: b rows of a batch, N records, C classes, D width of the shared space.


@torch.no_grad()  # not inference mode: ZeRO-3 gathers weights here that it goes on training with
def collect(
    batches: Iterable[Batch],
    compute: Callable[[Batch], Mapping[str, Tensor]],
    *,
    samples: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Runs a function over the batches of all processes and puts its rows in order.

    Args:
        batches: of this process, by an unshuffled `sampler.Order`.
        compute: batch on the device -> name -> rows, `[b, ...]` each.
        samples: records in the split.
        device: where to compute.

    Returns:
        Name -> `[samples, ...]` on the CPU, equal on all processes; also `label`.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        on_device = to_device(batch, device)
        beside = {name: on_device[name] for name in ("index", "weight", "label")}
        for name, rows in {**beside, **compute(on_device)}.items():
            parts[name].append(gather.rows(rows).cpu())
    whole = {name: torch.cat(rows) for name, rows in parts.items()}
    real = whole.pop("weight") > 0
    index = whole.pop("index")[real]
    order = index.argsort()
    assert torch.equal(index[order], torch.arange(samples)), "a record was missed or came twice"
    return {name: rows[real][order] for name, rows in whole.items()}


def others_of(split: Split) -> np.ndarray:
    """`[N, 3]` for each record the place and date of one drawn at random, each record's once: `shuffled_meta`.

    What a model makes of a place says nothing of the bird then. The draw depends on the number of records alone.
    """
    return split.place[np.random.default_rng(0).permutation(len(split))]


def with_controls(network: Classifier, batch: Mapping[str, Tensor], others: Tensor) -> dict[str, Tensor]:
    """Probabilities `[b, C]`: `scores`, and for a model with metadata `without_meta` and `shuffled_meta`.

    A model of image and metadata that has an expert for the metadata also gives `meta_only`.

    Args:
        network: the classifier.
        batch: with its modalities and `index`.
        others: `[N, 3]` the places to take instead of the records' own, as `others_of` draws them.
    """
    fixed = {m: network.embed(m, batch[m]) for m in network.modalities if m != "meta"}

    def with_places(places: Tensor) -> Tensor:
        return network.classify({**fixed, "meta": network.embed("meta", places)}).float().softmax(dim=1)

    if "meta" not in network.modalities:
        return {"scores": network.classify(fixed).float().softmax(dim=1)}
    found = {
        "scores": with_places(batch["meta"]),
        "without_meta": with_places(torch.full_like(batch["meta"], math.nan)),
        "shuffled_meta": with_places(others[batch["index"]]),
    }
    alone = network.experts({**fixed, "meta": network.embed("meta", batch["meta"])}).get("meta")
    return found if alone is None else {**found, metrics.META_ONLY: alone.float().softmax(dim=1)}


def judge(
    probabilities: Mapping[str, np.ndarray], labels: np.ndarray, classes: Sequence[ClassInfo]
) -> dict[str, Any]:
    """What `metrics.json` says of the scores of a split, and of each control beside them.

    Args:
        probabilities: `scores` and, by the name of each control, its own, `[N, C]` each.
        labels: `[N]`.
        classes: C.

    Returns:
        `n`, `n_labels`, what `metrics.summarise` returns, `reliability`, and `label_spaces`, the same measures of
        species and groups; and under the name of each control all of this again.
    """
    spaces = labelspaces.label_spaces(classes)
    found = {name: _judged(rows, labels, spaces) for name, rows in probabilities.items()}
    return {**found.pop("scores"), **found}


def _judged(rows: np.ndarray, labels: np.ndarray, spaces: Mapping[str, np.ndarray]) -> dict[str, Any]:
    coarse = {name: _measures(labelspaces.coarsen(rows, space), space[labels]) for name, space in spaces.items()}
    curve = dataclasses.asdict(metrics.reliability(rows, labels))
    return {"n": len(labels), **_measures(rows, labels), "reliability": curve, "label_spaces": coarse}


def _measures(rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"n_labels": rows.shape[1], **metrics.summarise(rows, labels)}


def summary(judged: Mapping[str, Any]) -> str:
    """What `judge` found, in one line."""
    line = f"top-1 {100 * judged['top1']:.2f} %, top-5 {100 * judged['top5']:.2f} %, ECE {judged['ece']:.3f}"
    told = {
        "without_meta": "without metadata",
        "shuffled_meta": "with shuffled metadata",
        "meta_only": "by metadata alone",
    }
    shares = [f"top-1 {words} {100 * judged[c]['top1']:.2f} %" for c, words in told.items() if c in judged]
    return "; ".join([line, ", ".join(shares)] if shares else [line])


def prediction_table(split: Split, probabilities: Mapping[str, np.ndarray]) -> pa.Table:
    """One row per record, in the order of the split."""
    own = probabilities["scores"]
    best = np.argsort(-own, axis=1, kind="stable")[:, :5]
    columns = {
        "image_id": pa.array(split.image_id),
        "class_id": pa.array(split.class_id),
        "predicted": pa.array(best[:, 0]),
        "probability": pa.array(own.max(axis=1)),
        "top5": pa.array(best.tolist(), pa.list_(pa.int32())),
        **{f"predicted_{n}": pa.array(p.argmax(axis=1)) for n, p in probabilities.items() if n != "scores"},
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(own.ravel()), own.shape[1]),
    }
    return pa.table(columns)


def caption_top1(
    embeddings: Mapping[str, Tensor], masks: Mapping[str, Tensor], class_captions: Tensor, labels: Tensor
) -> dict[str, float]:
    """Zero-shot accuracy: the class whose caption is most similar; a record that lacks a modality is wrong by it.

    Args:
        embeddings: modality -> `[N, D]` unit vectors.
        masks: modality -> `[N]` bool, the rows that have it.
        class_captions: `[C, D]` unit vectors.
        labels: `[N]`.
    """
    similarity = {
        m: masks[m][:, None] * z @ class_captions.T for m, z in embeddings.items() if m != "text"
    }  # [N, C]
    together = torch.stack(list(similarity.values())).sum(dim=0)
    choices = {"top1": together, **{f"{m}_top1": s for m, s in similarity.items()}}
    # Without a modality all similarities are 0, and the first class would be found.
    right = {name: (s.argmax(dim=1) == labels) & s.any(dim=1) for name, s in choices.items()}
    return {name: rows.double().mean().item() for name, rows in right.items()}


def check_classes(run: Path, spec: ModelSpec, shards: ShardSet) -> None:
    """Raises ValueError unless a run and a shard set number the same classes."""
    ours = [info.raw_class_id for info in shards.card.classes]
    if ours != spec.raw_class_ids:
        trained = "pre-trained" if spec.kind == "contrastive" else "fine-tuned"
        raise ValueError(
            f"{run}: {trained} on another class list ({len(spec.classes)} classes) than {shards.folder} has "
            f"({len(ours)})"
        )


def write_measures(
    out: Path, judged: Mapping[str, Any], *, run: Path, split: Split, shards: ShardSet, with_meta: bool
) -> None:
    """Writes `metrics.json`.

    Args:
        out: the file.
        judged: how good the run is, as `judge` or `pretrained.judge` has it.
        run: that was evaluated.
        split: of the shard set.
        shards: it was evaluated on.
        with_meta: whether it sees metadata.
    """
    facts = {
        "split": split.name,
        **judged,
        "label_space": f"{len(shards.card.classes)} classes of the source",
        "with_meta": with_meta,
        "seed": config.read_json(run / "config.json")["seed"],
        "shards_sha256": shards.card.sha256,
    }
    with records.atomic_write(out) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())


def write_table(table: pa.Table, out: Path) -> None:
    """Writes a table by the ending of its name: .csv, .json (a list of objects) or .parquet."""
    buffer = io.BytesIO()
    if out.suffix == ".parquet":
        pq.write_table(table, buffer, compression="zstd")
    elif out.suffix == ".csv":
        pyarrow.csv.write_csv(table, buffer)
    else:
        buffer.write((json.dumps(table.to_pylist(), indent=1) + "\n").encode())
    with records.atomic_write(out) as file:
        file.write(buffer.getvalue())
