"""Towers, the contrastive model, and how a model is saved in a run and loaded from it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn import functional

from xcon.config import Fusion, read_json
from xcon.encoders import Encoder, ImageEncoder, MetaEncoder, MetaSpec, TextEncoder, TextSpec
from xcon.images import ImageSpec
from xcon.records import atomic_write

# Legend: b rows, F width of an encoder, D width of the shared space.

COORDINATES = "lon, lat in degrees (WGS-84), date as the fraction of the year in [0, 1]; NaN where unknown"


class Tower(nn.Module):
    """An encoder and its projection to the shared width."""

    def __init__(self, encoder: Encoder, embed_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(encoder.width, embed_dim)

    def forward(self, *x: Tensor) -> Tensor:
        """Whatever the encoder takes -> `[b, D]`, not of unit length."""
        return self.projection(self.encoder(*x))


class ContrastiveModel(nn.Module):
    """Towers by modality and the temperature (paper, section 3.1).

    Args:
        towers: modality -> tower, all of one output width.
        temperature: where it starts; it is held, and learned, in log space.
        max_scale: bound on 1 / temperature.
        learn_temperature: else it stays where it starts.
    """

    def __init__(
        self, towers: Mapping[str, Tower], *, temperature: float, max_scale: float, learn_temperature: bool = True
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        # Of shape (1,): DeepSpeed does not take parameters without dimensions.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]), learn_temperature)
        self.max_log_scale = math.log(max_scale)

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Unit vectors of the modalities that are given, and the scale.

        Args:
            inputs: modality -> what its encoder takes, b rows each.

        Returns:
            Modality -> `[b, D]` unit vectors in float32 (or wider); 1 / temperature, a scalar.
        """
        embeddings = {m: unit(tower(inputs[m])) for m, tower in self.towers.items() if m in inputs}
        return embeddings, self.scale()

    def scale(self) -> Tensor:
        """1 / temperature, at most `max_scale`; beyond the bound the gradient still passes, to lead back."""
        excess = functional.relu(self.log_scale - self.max_log_scale).detach()
        return (self.log_scale - excess).exp().sum()  # of one: `[0]` would be a view, of which FSDP2 warns


def unit(vectors: Tensor) -> Tensor:
    """`[b, D]` of unit length, in float32 or wider."""
    # Normalised outside half precision: bf16 keeps eight bits of an angle.
    return functional.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


# --------------------------------------------------------------------------------------------------------
# A model in a run folder: model.json and model.safetensors


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """`model.json`: all that a later step needs beside the weights.

    Attributes:
        kind: contrastive or classifier.
        method: how it was pre-trained, for tables.
        embed_dim: width of the shared space.
        hidden: width of the classifier's hidden layer; None for a contrastive model, and for a classifier whose
            heads began as captions.
        image, text, meta: the encoders' specs; None where the model has no such tower.
        classes: as on the card of the shard set, `records.ClassInfo` as dictionaries, in order of class id.
        shards_sha256: of the shard set it was trained on.
        fusion: how a classifier joins image and metadata, `config.Fusion`.
        coordinates: the contract of places and dates.
    """

    kind: str
    method: str
    embed_dim: int
    hidden: int | None
    image: ImageSpec | None
    text: TextSpec | None
    meta: MetaSpec | None
    classes: tuple[Mapping[str, Any], ...]
    shards_sha256: str
    fusion: Fusion = "concatenation"
    coordinates: str = COORDINATES

    @property
    def with_meta(self) -> bool:
        """Whether place and date go in, to an encoder of their own or as channels of the photograph."""
        return self.meta is not None or (self.image is not None and self.image.places is not None)

    @property
    def raw_class_ids(self) -> list[int | str]:
        """The source's class ids in order of class id."""
        return [c["raw_class_id"] for c in self.classes]


def build_towers(spec: ModelSpec) -> dict[str, Tower]:
    """The towers of a spec, without trained weights."""
    encoders: dict[str, Encoder] = {}
    if spec.image:
        encoders["image"] = ImageEncoder(spec.image)
    if spec.text:
        encoders["text"] = TextEncoder(spec.text)
    if spec.meta:
        encoders["meta"] = MetaEncoder(spec.meta)
    return {modality: Tower(encoder, spec.embed_dim) for modality, encoder in encoders.items()}


def specs_of(towers: Mapping[str, Tower]) -> dict[str, Any]:
    """Modality -> spec of its encoder, None where there is no tower: three fields of a `ModelSpec`."""
    return {m: towers[m].encoder.spec if m in towers else None for m in ("image", "text", "meta")}


def weights_to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state dictionary as the bytes of a safetensors file."""
    return safetensors.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def with_whole_text(weights: bytes, text: TextEncoder) -> bytes:
    """Weights of a contrastive model, and in them the text encoder with all its token embeddings.

    Args:
        weights: a safetensors file; of a frozen text encoder it holds nothing.
        text: the encoder that was trained, or was frozen.
    """
    state, prefix = safetensors.load(weights), "towers.text.encoder."
    trained = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    return weights_to_bytes(state | {prefix + name: t for name, t in text.restored(trained).items()})


def save(run: Path, spec: ModelSpec, weights: bytes) -> None:
    """Writes `model.safetensors`, then `model.json`: with the latter, the run is complete."""
    with atomic_write(run / "model.safetensors") as file:
        file.write(weights)
    with atomic_write(run / "model.json") as file:
        file.write((json.dumps(dataclasses.asdict(spec), indent=1) + "\n").encode())


def load_spec(run: Path, *, kind: str) -> ModelSpec:
    """Reads a run's `model.json`.

    Raises:
        FileNotFoundError: no such folder, or no finished run in it.
        ValueError: damaged, or a model of another kind.
    """
    spec = read_spec(run)
    if spec.kind != kind:
        made_by = {"contrastive": "xcon pretrain", "classifier": "xcon finetune"}
        maker = made_by.get(spec.kind, "unknown")
        raise ValueError(f"{run}: a {spec.kind} model ({maker}), here one of {made_by[kind]} is needed")
    return spec


def read_spec(run: Path) -> ModelSpec:
    """Reads a run's `model.json`, whatever kind of model it is.

    Raises:
        FileNotFoundError: no such folder, or no finished run in it.
        ValueError: damaged.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder")
    path = run / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no model.json, so no finished run: let its training end first")
    values = read_json(path)
    parts = {"image": ImageSpec, "text": TextSpec, "meta": MetaSpec}
    try:
        built = {name: values[name] and part(**values[name]) for name, part in parts.items()}
        return ModelSpec(**{**values, **built, "classes": tuple(values["classes"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a model of this version of xcon ({error})") from None


def load_weights(run: Path, module: nn.Module, *, prefix: str = "") -> None:
    """Loads a run's weights into a module, strictly.

    Args:
        run: the run folder.
        module: receives the tensors whose names begin with `prefix`, which is cut off.
        prefix: as `towers.image.`.

    Raises:
        FileNotFoundError: no weights.
        ValueError: damaged, or they do not fit the module.
    """
    path = run / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state = safetensors.load_file(path)
        module.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged, or weights of another model ({error})") from None
