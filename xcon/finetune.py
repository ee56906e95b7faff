"""Fine-tuning of a classifier on image and metadata (paper, section 3.2).

    accelerate launch xcon/finetune.py RECIPE --shards DIR [--init RUN] --out RUN [--field value ...]

The same command given again resumes from the newest checkpoint; `--help` lists recipes, `RECIPE --help` settings.
"""

import dataclasses

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import cross_entropy

from xcon import classifier, commandline, config, encoders, evaluation, gather, images, launch, model, optim
from xcon.checkpoint import Checkpoints, open_run
from xcon.classifier import Classifier
from xcon.config import FinetuneConfig
from xcon.loader import Batch, Records, Share, evaluation_loader, make_loader, to_device
from xcon.losses import share_of_cross_entropies
from xcon.model import ModelSpec, Tower
from xcon.records import Card
from xcon.sampler import Order
from xcon.shardset import ShardSet
from xcon.tracking import Clock, Silent, Tracker

# Legend: N records of the validation split, C classes.


def main() -> None:
    """Runs the command line."""
    commandline.guarded(train, "xcon finetune")


def train() -> None:
    """Parse, data, model, optimiser, resume, loop."""
    recipe, cfg = config.parse_recipe(config.FINETUNE, "xcon finetune")
    begun = model.load_spec(cfg.init, kind="contrastive") if cfg.init else None
    cfg = resolved(cfg, begun)
    accelerator = launch.make_accelerator(
        cfg.precision,
        batch_size=cfg.batch_size,
        clip_norm=cfg.clip_norm,
        accumulation_steps=cfg.accumulation_steps,
    )

    # Data
    shards = ShardSet(cfg.shards)
    config.check_patience(cfg, validation=shards.has("val"))
    if begun:
        check_fits(cfg, begun, shards.card)
    train_split = shards.split("train")
    order = Order(len(train_split), cfg.batch_size, cfg.seed, cfg.per_class, train_split.class_id)
    facts = {"command": "finetune", "recipe": recipe, "shards_sha256": shards.card.sha256}
    facts |= (
        {"init_method": begun.method, "init_shards_sha256": begun.shards_sha256} if begun else {"init_method": ""}
    )

    # Model
    set_seed(cfg.seed)
    with accelerator.main_process_first():  # one process downloads, the others find it in the cache
        towers = start_from(cfg, begun) if begun else start_anew(cfg)
    if open_run(cfg, accelerator, **facts):
        accelerator.print(f"{cfg.out}: this run is complete")
        launch.finish(accelerator)
        return
    spec = ModelSpec(
        kind="classifier", method=facts["init_method"],
        embed_dim=towers[cfg.modalities[0]].projection.out_features, hidden=cfg.hidden,
        classes=shards.card.class_facts(), shards_sha256=shards.card.sha256, fusion=cfg.fusion,
        **model.specs_of(towers),
    )  # fmt: skip
    prior = classifier.class_shares(shards.split("train").class_id, len(spec.classes))
    network = classifier.build(spec, towers, prior=prior, doubt=cfg.doubt, dropout=cfg.dropout)
    crop = images.train_transform(spec.image, crop_scale=cfg.crop_scale) if spec.image else None
    records = Records(shards.split("train"), cfg.modalities, crop, meta_dropout=cfg.meta_dropout, seed=cfg.seed)
    share = Share(accelerator.process_index, accelerator.num_processes, cfg.workers)

    # Optimiser
    rates = {"image": cfg.image_lr, "meta": cfg.meta_lr, "head": cfg.head_lr}
    optimizer = optim.make_optimizer(network, rates, weight_decay=cfg.weight_decay)
    set_seed(cfg.seed, device_specific=True)
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
    with tracker:
        for step, batch in enumerate(clock.watch(batches), start=at.step):
            wrapped.train()
            optim.set_rates(optimizer, optim.schedule(step, warmup=warmup, total=total))
            loss = torch.zeros((), device=accelerator.device)
            for part in in_parts(to_device(batch, accelerator.device), cfg.accumulation_steps):
                with accelerator.accumulate(wrapped):
                    scores = wrapped({m: part[m] for m in cfg.modalities})
                    mean = share_of_cross_entropies(
                        scores, part, rows=order.rows(step), label_smoothing=cfg.label_smoothing
                    )
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
            with clock.paused():
                if at.step % order.steps_per_epoch == 0 and shards.has("val"):
                    held_out = validate(wrapped, network, cfg, spec, shards, share, accelerator.device)
                    launch.check_finite(held_out["loss"], at.step)
                    at = at.after((held_out["top1"], -held_out["loss"]))
                    if at.since_best == 0:
                        checkpoints.keep_weights(wrapped, at.step)
                    tracker.write("val", at.step, held_out)
                if at.step % cfg.checkpoint_every == 0:
                    launch.check_finite(accelerator.reduce(loss, "sum").item(), at.step)
                    checkpoints.save(at)
            tracker.advance(at.step)
            if at.exhausted(cfg.patience):
                break
        tracker.write("end", at.step, {"best": at.best})

    # The result: the weights of the best held-out result; without a validation split, the last
    if at.best is None:
        checkpoints.keep_weights(wrapped, at.step)
    if accelerator.is_main_process:
        model.save(cfg.out, spec, checkpoints.weights(at.best_step or at.step).read_bytes())
    accelerator.print(f"{cfg.out}: complete, the weights of step {at.best_step or at.step}")
    launch.finish(accelerator)


def resolved(cfg: FinetuneConfig, begun: ModelSpec | None) -> FinetuneConfig:
    """The settings with what was left open filled in, as the run saves them."""
    cfg = dataclasses.replace(cfg, precision=launch.resolve_precision(cfg.precision))
    if "meta" in cfg.modalities:
        encoding = begun.meta.encoding if begun and begun.meta else encoders.MetaSpec.encoding
        cfg = dataclasses.replace(cfg, meta_encoding=cfg.meta_encoding or encoding)
    if "image" not in cfg.modalities:
        return cfg
    backbone = begun.image.backbone if begun and begun.image else config.BACKBONE
    return dataclasses.replace(
        cfg,
        image_backbone=cfg.image_backbone or backbone,
        image_weights=cfg.image_weights or ("none" if begun else config.WEIGHTS),
    )


def start_anew(cfg: FinetuneConfig) -> dict[str, Tower]:
    """Towers without contrastive pre-training: ImageNet's weights for the image, the paper's sizes elsewhere."""
    made: dict[str, encoders.ImageEncoder | encoders.TextEncoder | encoders.MetaEncoder] = {}
    if "image" in cfg.modalities:
        made["image"] = encoders.build_image(
            str(cfg.image_backbone), cfg.image_options, weights=str(cfg.image_weights), size=cfg.image_size
        )
    if "meta" in cfg.modalities:
        assert cfg.meta_encoding is not None
        made["meta"] = encoders.MetaEncoder(encoders.MetaSpec(encoding=cfg.meta_encoding))
    return {m: Tower(made[m], config.PretrainConfig.embed_dim) for m in cfg.modalities}


def start_from(cfg: FinetuneConfig, begun: ModelSpec) -> dict[str, Tower]:
    """Towers of a pre-trained run, with its weights."""
    assert cfg.init is not None
    image = dataclasses.replace(begun.image, size=cfg.image_size) if begun.image else None
    every = model.build_towers(dataclasses.replace(begun, image=image, text=None))
    towers: dict[str, Tower] = {m: every[m] for m in cfg.modalities}
    for modality, tower in towers.items():
        model.load_weights(cfg.init, tower, prefix=f"towers.{modality}.")
    return towers


def check_fits(cfg: FinetuneConfig, begun: ModelSpec, card: Card) -> None:
    """Raises ValueError where the pre-trained run of --init does not fit the settings or the shard set."""
    init = cfg.init
    for modality in cfg.modalities:
        if getattr(begun, modality) is None:
            raise ValueError(f"--init {init}: pre-trained without {modality}; choose --modalities without it")
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
    if begun.image is None or "image" not in cfg.modalities:
        return
    if cfg.image_backbone != begun.image.backbone:
        raise ValueError(
            f"--image-backbone {cfg.image_backbone}: --init {init} was pre-trained with {begun.image.backbone}"
        )
    if cfg.image_options and encoders.read_options(cfg.image_options) != dict(begun.image.options):
        raise ValueError(
            f"--image-options: --init {init} was pre-trained with {dict(begun.image.options) or 'none'}"
        )
    if cfg.image_weights != "none":
        raise ValueError(f"--image-weights {cfg.image_weights}: unused, the weights come from --init {init}")


def in_parts(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts, row by row."""
    pieces = {name: rows.chunk(parts) for name, rows in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(parts)]


def validate(
    wrapped: nn.Module, network: Classifier, cfg: FinetuneConfig, spec: ModelSpec, shards: ShardSet,
    share: Share, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """Calibrates on the validation split; its `top1`, mean cross-entropy `loss` and `sharpness`."""
    gather.share_buffers(wrapped)
    wrapped.eval()
    split = shards.split("val")
    transform = images.eval_transform(spec.image) if spec.image else None
    found = evaluation.collect(
        evaluation_loader(Records(split, cfg.modalities, transform), share, batch_size=cfg.batch_size),
        lambda rows: wrapped({m: rows[m] for m in cfg.modalities}),
        samples=len(split),
        device=device,
    )
    labels = found.pop("label").to(device)  # [N]
    trained = {name: scores.to(device).float() for name, scores in found.items()}  # [N, C] each
    network.calibrate(trained, labels)
    logits = network.combine(trained)  # [N, C]
    top1, loss = (logits.argmax(dim=1) == labels).double().mean(), cross_entropy(logits, labels)
    return gather.agree({"top1": top1.item(), "loss": loss.item(), "sharpness": network.sharpness.item()}, device)


if __name__ == "__main__":
    main()
