"""A pre-trained run as it is: its vectors, its captions, and what they say of the classes.

b: rows of a batch, N: records, C: classes, F: width of an encoder, D: width of the shared space.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from xcon import captions, config, evaluation, model, probes, records
from xcon.loader import Batch, present
from xcon.model import ModelSpec, Tower
from xcon.shardset import ShardSet


def load(run: Path, device: torch.device) -> tuple[dict[str, Tower], ModelSpec]:
    """The towers of a pre-trained run on a device, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as `model.load_spec` and `model.load_weights`.
    """
    spec = model.load_spec(run, kind="contrastive")
    towers = model.build_towers(spec)
    together = nn.ModuleDict(towers)
    model.load_weights(run, together, prefix="towers.")
    together.to(device).eval()
    return towers, spec


def with_features(towers: Mapping[str, Tower], batch: Batch) -> dict[str, Tensor]:
    """What a pre-trained model makes of records, modality by modality.

    Returns:
        `MODALITY features` `[b, F]` of its encoder, MODALITY `[b, D]` unit vectors in the shared space, and
        `MODALITY present` `[b]`.
    """
    found: dict[str, Tensor] = {f"{m} present": mask for m, mask in present(batch).items()}
    for modality, tower in towers.items():
        features = tower.encoder(batch[modality])
        found[f"{modality} features"] = features.float()
        found[modality] = model.unit(tower.projection(features))
    return found


def class_texts(run: Path, shards: ShardSet) -> list[str]:
    """The caption of each class, as the run was trained on: of its template, or of the shard set."""
    template = config.read_json(run / "config.json").get("caption")
    if template is None:
        return [shards.captions[number] for number in shards.class_captions]
    return [records.caption(template, info) for info in shards.card.classes]


@torch.inference_mode()
def caption_vectors(run: Path, tower: Tower, texts: Sequence[str]) -> Tensor:
    """`[C, D]` unit vectors of captions, on the CPU.

    Args:
        run: the pre-trained run, which has the tokenizer.
        tower: its text tower.
        texts: C captions.

    Raises:
        FileNotFoundError: no tokenizer.
        ValueError: it is damaged.
    """
    folder = run / "tokenizer"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, the run's tokenizer is missing")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: damaged ({error})") from None
    device = next(tower.parameters()).device
    parts = captions.tokenise(tokenizer, texts).to(device).split(64)
    return model.unit(torch.cat([tower(part) for part in parts])).cpu()


def judge(found: Mapping[str, Mapping[str, Tensor]], test: str, class_captions: Tensor | None) -> dict[str, Any]:
    """What `metrics.json` says of a pre-trained run.

    Args:
        found: split -> what `with_features` made of it, and `label`; `train`, `test` and, for the choice of the
            linear probe's regularisation, perhaps `val`.
        test: the split to judge by.
        class_captions: `[C, D]` unit vectors; None without text.

    Returns:
        `n`; with text `zero_shot`, as `caption_top1` has it; `linear_probe` and `knn` as `probes.probe` has them;
        `retrieval`, as `probes.retrieve` has it.
    """
    vectors = {name: _vectors(rows) for name, rows in found.items()}
    rows, held_out = found[test], vectors.get("val") if test != "val" else None
    shown = vectors[test].shared
    zero_shot = {}
    if class_captions is not None:
        masks = {m: rows[f"{m} present"] for m in shown}
        zero_shot["zero_shot"] = evaluation.caption_top1(
            {m: rows[m] for m in shown}, masks, class_captions, rows["label"]
        )
    return {
        "n": len(rows["label"]),
        **zero_shot,
        **probes.probe(vectors["train"], held_out, vectors[test]),
        "retrieval": probes.retrieve(vectors[test], None if class_captions is None else class_captions.numpy()),
    }


def _vectors(rows: Mapping[str, Tensor]) -> probes.Vectors:
    seen = [m for m in config.MODALITIES if m in rows]
    return probes.Vectors(
        features={m: rows[f"{m} features"].numpy() for m in seen},
        shared={m: rows[m].numpy() for m in seen},
        present={m: rows[f"{m} present"].numpy() for m in seen},
        labels=rows["label"].numpy(),
    )
