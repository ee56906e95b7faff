"""What a training starts from: ImageNet's weights, a text model, or the towers and captions of a pre-trained run.

A part of `pretrain` and `finetune`, whose settings it takes.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from xcon import config, encoders, launch, model, pretrained
from xcon.config import FinetuneConfig, PretrainConfig
from xcon.images import ImageSpec
from xcon.model import ContrastiveModel, ModelSpec, Tower
from xcon.records import Card
from xcon.shardset import ShardSet

# Legend: C classes, D width of the shared space.


def contrastive_towers(
    cfg: PretrainConfig, shards: ShardSet, device: torch.device
) -> tuple[dict[str, Tower], encoders.Text | None]:
    """The towers with their pre-trained weights, and what belongs to the text tower where there is one."""
    made: dict[str, encoders.Encoder] = {}
    text = None
    for modality in cfg.modalities:
        if modality == "image":
            made["image"] = encoders.build_image(
                str(cfg.image_backbone), cfg.image_options, weights=str(cfg.image_weights), size=cfg.image_size,
            )  # fmt: skip
        elif modality == "text":
            text = encoders.text_for(cfg.text_model, shards.captions, frozen=cfg.text_frozen, device=device)
            made["text"] = text.tower
        else:
            made["meta"] = encoders.MetaEncoder(
                encoders.MetaSpec(cfg.meta_width, cfg.meta_depth, cfg.meta_encoding)
            )
    return {modality: Tower(encoder, cfg.embed_dim) for modality, encoder in made.items()}, text


def resolved(cfg: FinetuneConfig, begun: ModelSpec | None) -> FinetuneConfig:
    """The settings with what was left open filled in, as the run saves them."""
    cfg = dataclasses.replace(cfg, precision=launch.resolve_precision(cfg.precision))
    if "meta" in cfg.modalities:
        encoding = begun.meta.encoding if begun and begun.meta else encoders.MetaSpec.encoding
        cfg = dataclasses.replace(cfg, meta_encoding=cfg.meta_encoding or encoding)
    if cfg.fusion == "product" and cfg.head is None:
        cfg = dataclasses.replace(cfg, head="captions" if begun and begun.text else "random")
    if cfg.head == "captions" and cfg.hidden != FinetuneConfig.hidden:
        raise ValueError(f"--hidden {cfg.hidden}: unused, --head captions has no hidden layer")
    if "image" not in cfg.modalities:
        return cfg
    backbone = begun.image.backbone if begun and begun.image else config.BACKBONE
    return dataclasses.replace(
        cfg,
        image_backbone=cfg.image_backbone or backbone,
        image_weights=cfg.image_weights or ("none" if begun else config.WEIGHTS),
    )


def make_towers(cfg: FinetuneConfig, begun: ModelSpec | None) -> dict[str, Tower]:
    """The towers, in the order of the settings; the image's takes photographs of both sizes."""
    towers = _from_run(cfg, begun) if begun else _anew(cfg)
    if cfg.late_epochs:
        encoder = towers["image"].encoder
        assert isinstance(encoder, encoders.ImageEncoder)
        encoder.check_size(cfg.late_size, "--late-size")
    return towers


def _anew(cfg: FinetuneConfig) -> dict[str, Tower]:
    """Towers without contrastive pre-training: ImageNet's weights for the image, the paper's sizes elsewhere."""
    made: dict[str, encoders.ImageEncoder | encoders.TextEncoder | encoders.MetaEncoder] = {}
    channels = cfg.fusion == "channels"
    if "image" in cfg.modalities:
        made["image"] = encoders.build_image(
            str(cfg.image_backbone), cfg.image_options, weights=str(cfg.image_weights), size=cfg.image_size,
            places=cfg.meta_encoding if channels else None,
        )  # fmt: skip
    if "meta" in cfg.modalities and not channels:
        assert cfg.meta_encoding is not None
        made["meta"] = encoders.MetaEncoder(encoders.MetaSpec(encoding=cfg.meta_encoding))
    return {m: Tower(made[m], config.PretrainConfig.embed_dim) for m in cfg.modalities if m in made}


def _from_run(cfg: FinetuneConfig, begun: ModelSpec) -> dict[str, Tower]:
    """Towers of a pre-trained run, with its weights."""
    assert cfg.init is not None
    image = dataclasses.replace(begun.image, size=cfg.image_size) if begun.image else None
    every = model.build_towers(dataclasses.replace(begun, image=image, text=None))
    towers: dict[str, Tower] = {m: every[m] for m in cfg.modalities}
    for modality, tower in towers.items():
        model.load_weights(cfg.init, tower, prefix=f"towers.{modality}.")
    return towers


@torch.inference_mode()
def class_vectors(init: Path, begun: ModelSpec, shards: ShardSet) -> Tensor:
    """`[C, D]` the vector of each class's caption in a pre-trained run, as long as the run's scale.

    A unit vector times these are the scores that the run was trained on.

    Args:
        init: the run, with a text tower.
        begun: its spec.
        shards: the classes, and their captions where the run did not word them itself.

    Raises:
        ValueError, OSError: the run is damaged.
    """
    max_scale = config.read_json(init / "config.json")["max_scale"]
    towers = model.build_towers(begun)
    trained = ContrastiveModel(towers, temperature=1.0, max_scale=max_scale).eval()
    model.load_weights(init, trained)
    texts = pretrained.class_texts(init, shards)
    return trained.scale() * pretrained.caption_vectors(init, towers["text"], texts)


def check_fits(cfg: FinetuneConfig, begun: ModelSpec, card: Card) -> None:
    """Raises ValueError where the pre-trained run of --init does not fit the settings or the shard set."""
    init = cfg.init
    for modality in cfg.modalities:
        if getattr(begun, modality) is None:
            raise ValueError(f"--init {init}: pre-trained without {modality}; choose --modalities without it")
    if cfg.head == "captions" and begun.text is None:
        raise ValueError(f"--head captions: --init {init} was pre-trained without text")
    theirs, ours = begun.raw_class_ids, [c.raw_class_id for c in card.classes]
    if theirs != ours:
        raise ValueError(
            f"--init {init}: pre-trained on another class list ({len(theirs)} classes, raw ids {theirs[0]} to "
            f"{theirs[-1]}) than {cfg.shards} has ({len(ours)}, {ours[0]} to {ours[-1]})"
        )
    if begun.meta and "meta" in cfg.modalities and cfg.meta_encoding != begun.meta.encoding:
        raise ValueError(
            f"--meta-encoding {cfg.meta_encoding}: --init {init} was pre-trained with {begun.meta.encoding}"
        )
    if begun.image and "image" in cfg.modalities:
        _check_image(cfg, begun.image)


def _check_image(cfg: FinetuneConfig, theirs: ImageSpec) -> None:
    """Raises ValueError where the settings of the image are not those of the pre-trained run."""
    if cfg.image_backbone != theirs.backbone:
        raise ValueError(
            f"--image-backbone {cfg.image_backbone}: --init {cfg.init} was pre-trained with {theirs.backbone}"
        )
    if cfg.image_options and encoders.read_options(cfg.image_options) != dict(theirs.options):
        raise ValueError(
            f"--image-options: --init {cfg.init} was pre-trained with {dict(theirs.options) or 'none'}"
        )
    if cfg.image_weights != "none":
        raise ValueError(f"--image-weights {cfg.image_weights}: unused, the weights come from --init {cfg.init}")
