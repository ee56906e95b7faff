"""Fine-tuning of a classifier on image and metadata (paper, section 3.2).

    accelerate launch xcon/finetune.py RECIPE --shards DIR [--init RUN] --out RUN [--field value ...]

The same command given again resumes from the newest checkpoint; `--help` lists recipes, `RECIPE --help` settings.
"""

import dataclasses
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from xcon import classifier, commandline, config, encoders, evaluation, images, launch, model, optim
from xcon.checkpoint import Checkpoints, open_run
from xcon.config import FinetuneConfig
from xcon.loader import Batch, Records, Share, evaluation_loader, make_loader, to_device
from xcon.model import ModelSpec, Tower
from xcon.records import Card
from xcon.sampler import Order
from xcon.shardset import ShardSet
from xcon.tracking import Clock, Silent, Tracker

# Legend: b rows of one part of this process's batch, N records of the validation split, C classes.


def main() -> None:
    """Runs the command line."""
    commandline.guarded(train, "xcon finetune")


def train() -> None:
    """Parse, data, model, optimiser, resume, loop."""
    recipe, cfg = config.parse_recipe(config.FINETUNE, "xcon finetune")
    accelerator = launch.make_accelerator(
        cfg.precision,
        batch_size=cfg.batch_size,
        clip_norm=cfg.clip_norm,
        accumulation_steps=cfg.accumulation_steps,
    )

    # Data
    shards = ShardSet(cfg.shards)
    config.check_patience(cfg, validation=shards.has("val"))
    order = Order(len(shards.split("train")), cfg.batch_size, cfg.seed)

    # Model
    set_seed(cfg.seed)
    with accelerator.main_process_first():  # one process downloads, the others find it in the cache
        spec, towers = start_from(cfg, shards.card) if cfg.init else start_anew(cfg, shards.card)
    network = classifier.build(spec, towers, dropout=cfg.dropout)
    facts = {
        "command": "finetune",
        "recipe": recipe,
        "init_recipe": spec.method,
        "shards_sha256": spec.shards_sha256,
    }
    if open_run(cfg, accelerator, **facts):
        accelerator.print(f"{cfg.out}: this run is complete")
        return
    crop = images.train_transform(spec.image, crop_scale=cfg.crop_scale) if spec.image else None
    records = Records(shards.split("train"), cfg.modalities, crop, meta_dropout=cfg.meta_dropout, seed=cfg.seed)
    share = Share(accelerator.process_index, accelerator.num_processes, cfg.workers)

    # Optimiser
    rates = {"image": cfg.image_lr, "meta": cfg.meta_lr, "head": cfg.head_lr}
    optimizer = optim.make_optimizer(network, rates, weight_decay=cfg.weight_decay)
    wrapped, optimizer = launch.prepare(accelerator, network, optimizer)
    total = cfg.epochs * order.steps_per_epoch
    warmup = round(cfg.warmup_epochs * order.steps_per_epoch)

    # Resume
    checkpoints = Checkpoints(cfg.out, accelerator)
    at = checkpoints.restore()
    steps = range(0) if at.exhausted(cfg.patience) else range(at.step, total)
    batches = make_loader(records, order, share, steps=steps)
    tracker = Tracker(cfg.out, step=at.step, total=total) if accelerator.is_main_process else Silent()
    if at.step == 0:
        tracker.write("start", 0, {"processes": accelerator.num_processes, "records": order.samples})

    # Loop
    clock = Clock()
    for step, batch in enumerate(clock.watch(batches), start=at.step):
        wrapped.train()
        optim.set_rates(optimizer, optim.schedule(step, warmup=warmup, total=total))
        loss = torch.zeros((), device=accelerator.device)
        for part in split(to_device(batch, accelerator.device), cfg.accumulation_steps):
            with accelerator.accumulate(wrapped):
                logits = wrapped({m: part[m] for m in cfg.modalities})
                mean = share_of_mean(logits, part, order.rows(step), cfg.label_smoothing)
                # DDP takes the mean over processes, Accelerate that over parts: both are undone.
                accelerator.backward(mean * accelerator.num_processes * cfg.accumulation_steps)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(wrapped.parameters(), cfg.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss += mean.detach()

        at = dataclasses.replace(at, step=step + 1)
        if at.step % cfg.log_every == 0:
            values = {"loss": accelerator.reduce(loss, "sum").item(), "grad_norm": float(norm)}
            launch.check_finite(values["loss"], at.step)
            values["epoch"] = at.step / order.steps_per_epoch
            tracker.write("train", at.step, values, clock.lap(cfg.batch_size))
        if at.step % order.steps_per_epoch == 0 and shards.has("val"):
            held_out = validate(wrapped, cfg, spec, shards=shards, share=share, device=accelerator.device)
            at = at.after((held_out["top1"], -held_out["loss"]))
            if at.since_best == 0:
                checkpoints.save_best(wrapped)
            tracker.write("val", at.step, held_out)
        if at.step % cfg.checkpoint_every == 0:
            checkpoints.save(at)
        tracker.advance(at.step)
        if at.exhausted(cfg.patience):
            break

    # The result: the weights of the best held-out result; without a validation split, the last
    if at.best is None:
        checkpoints.save_best(wrapped)
    tracker.write("end", at.step, {"best": at.best})
    tracker.close()
    if accelerator.is_main_process:
        model.save(cfg.out, spec, checkpoints.best.read_bytes())
    accelerator.end_training()


def start_anew(cfg: FinetuneConfig, card: Card) -> tuple[ModelSpec, dict[str, Tower]]:
    """Towers without contrastive pre-training: ImageNet's weights for the image, the paper's sizes elsewhere."""
    made: dict[str, encoders.ImageEncoder | encoders.TextEncoder | encoders.MetaEncoder] = {}
    if "image" in cfg.modalities:
        made["image"] = encoders.build_image(
            cfg.image_backbone or "resnet50",
            cfg.image_options,
            weights=cfg.image_weights or "imagenet",
            size=cfg.image_size,
        )
    if "meta" in cfg.modalities:
        made["meta"] = encoders.MetaEncoder(encoders.MetaSpec())
    embed_dim = config.PretrainConfig.embed_dim
    towers: dict[str, Tower] = {m: Tower(made[m], embed_dim) for m in cfg.modalities}
    return classifier_spec(cfg, card, towers, method="", embed_dim=embed_dim), towers


def start_from(cfg: FinetuneConfig, card: Card) -> tuple[ModelSpec, dict[str, Tower]]:
    """Towers of a pre-trained run.

    Raises:
        ValueError: it lacks a tower, knows other classes, or was trained with another backbone than asked for.
    """
    assert cfg.init is not None
    begun = model.load_spec(cfg.init, kind="contrastive")
    check_fits(cfg, cfg.init, begun, card)
    if begun.image:
        begun = dataclasses.replace(begun, image=dataclasses.replace(begun.image, size=cfg.image_size))
    every = model.build_towers(begun)
    towers: dict[str, Tower] = {m: every[m] for m in cfg.modalities}
    for modality, tower in towers.items():
        model.load_weights(cfg.init, tower, prefix=f"towers.{modality}.")
    return classifier_spec(cfg, card, towers, method=begun.method, embed_dim=begun.embed_dim), towers


def check_fits(cfg: FinetuneConfig, init: Path, begun: ModelSpec, card: Card) -> None:
    """Raises ValueError where a pre-trained run does not fit the settings or the shard set."""
    for modality in cfg.modalities:
        if getattr(begun, modality) is None:
            raise ValueError(f"--init {init}: pre-trained without {modality}; choose --modalities without it")
    theirs, ours = begun.raw_class_ids, [c.raw_class_id for c in card.classes]
    if theirs != ours:
        raise ValueError(
            f"--init {init}: pre-trained on another class list ({len(theirs)} classes, raw ids {theirs[0]} to "
            f"{theirs[-1]}) than {cfg.shards} has ({len(ours)}, {ours[0]} to {ours[-1]})"
        )
    if begun.image and cfg.image_backbone not in (None, begun.image.backbone):
        raise ValueError(
            f"--image-backbone {cfg.image_backbone}: --init {init} was pre-trained with {begun.image.backbone}"
        )
    if (
        begun.image
        and cfg.image_options
        and {n: str(v) for n, v in begun.image.options.items()} != cfg.image_options
    ):
        raise ValueError(
            f"--image-options: --init {init} was pre-trained with {dict(begun.image.options) or 'none'}"
        )
    if cfg.image_weights not in (None, "none"):
        raise ValueError(f"--image-weights {cfg.image_weights}: unused, the weights come from --init {init}")


def classifier_spec(
    cfg: FinetuneConfig, card: Card, towers: dict[str, Tower], *, method: str, embed_dim: int
) -> ModelSpec:
    """What the finished run says of its model."""
    return ModelSpec(
        kind="classifier", method=method, embed_dim=embed_dim, hidden=cfg.hidden, classes=card.class_facts(),
        shards_sha256=card.sha256, **model.specs_of(towers),
    )  # fmt: skip


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts, row by row."""
    pieces = {name: rows.chunk(parts) for name, rows in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(parts)]


def share_of_mean(logits: Tensor, part: Batch, rows: int, label_smoothing: float) -> Tensor:
    """What these rows add to the mean cross-entropy of the global batch.

    Args:
        logits: `[b, C]`.
        part: with `label` and `weight`, `[b]`; rows that fill up a batch weigh nothing.
        rows: real rows of the global batch.
        label_smoothing: share of the target spread over all classes.
    """
    each = cross_entropy(logits.float(), part["label"], reduction="none", label_smoothing=label_smoothing)  # [b]
    return (each * part["weight"]).sum() / rows


def validate(
    wrapped: nn.Module,
    cfg: FinetuneConfig,
    spec: ModelSpec,
    *,
    shards: ShardSet,
    share: Share,
    device: torch.device,
) -> dict[str, float]:
    """`top1` and the mean cross-entropy `loss` on the validation split."""
    wrapped.eval()
    split_ = shards.split("val")
    transform = images.eval_transform(spec.image) if spec.image else None
    batches = evaluation_loader(Records(split_, cfg.modalities, transform), share, batch_size=cfg.batch_size)
    found = evaluation.collect(
        batches,
        lambda rows: {"logits": wrapped({m: rows[m] for m in cfg.modalities})},
        samples=len(split_),
        device=device,
    )
    logits, labels = found["logits"].float(), found["label"]  # [N, C], [N]
    return {
        "top1": (logits.argmax(dim=1) == labels).double().mean().item(),
        "loss": cross_entropy(logits, labels).item(),
    }


if __name__ == "__main__":
    main()
