"""Evaluation over all processes: every record of a split exactly once, in the order of the split."""

import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from xcon import gather, metrics, records
from xcon.classifier import Classifier
from xcon.loader import Batch, to_device
from xcon.shardset import Split

# Legend: b rows of a batch, N records, C classes, D width of the shared space.


@torch.inference_mode()
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


def with_controls(network: Classifier, batch: Mapping[str, Tensor], others: Tensor) -> dict[str, Tensor]:
    """Probabilities `[b, C]`: `scores`, and for a model with metadata `without_meta` and `shuffled_meta`.

    Args:
        network: the classifier.
        batch: with its modalities and `index`.
        others: `[N, 3]` the places to take instead of the records' own.
    """
    fixed = {m: network.embed(m, batch[m]) for m in network.modalities if m != "meta"}

    def with_places(places: Tensor) -> Tensor:
        return network.classify({**fixed, "meta": network.embed("meta", places)}).float().softmax(dim=1)

    if "meta" not in network.modalities:
        return {"scores": network.classify(fixed).float().softmax(dim=1)}
    return {
        "scores": with_places(batch["meta"]),
        "without_meta": with_places(torch.full_like(batch["meta"], math.nan)),
        "shuffled_meta": with_places(others[batch["index"]]),
    }


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
        **{
            f"predicted_{n}": pa.array(p.argmax(axis=1)) for n, p in probabilities.items() if n in metrics.CONTROLS
        },
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(own.ravel()), own.shape[1]),
    }
    return pa.table(columns)


def caption_top1(
    embeddings: Mapping[str, Tensor], masks: Mapping[str, Tensor], class_captions: Tensor, labels: Tensor
) -> dict[str, float]:
    """Zero-shot accuracy: the class whose caption is most similar.

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
    return {name: (s.argmax(dim=1) == labels).double().mean().item() for name, s in choices.items()}


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
