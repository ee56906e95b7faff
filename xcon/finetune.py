"""Fine-tuning of a classifier on image and metadata (paper, section 3.2).

    accelerate launch xcon/finetune.py RECIPE --shards DIR [--init RUN] --out RUN [--field value ...]

The same command given again resumes from the newest checkpoint; `--help` lists recipes, `RECIPE --help` settings.
"""

import dataclasses
import functools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import nn
from torch.nn.functional import cross_entropy

from xcon import (
    classifier,
    commandline,
    config,
    evaluation,
    gather,
    images,
    launch,
    mixing,
    model,
    optim,
    recipes,
    signals,
    start,
)
from xcon.checkpoint import Checkpoints, open_run
from xcon.classifier import Classifier
from xcon.clock import Clock
from xcon.config import FinetuneConfig
from xcon.images import ImageSpec
from xcon.loader import Records, Share, evaluation_loader, in_parts, make_loader, to_device
from xcon.losses import share_of_cross_entropies
from xcon.model import ModelSpec
from xcon.preemption import Saver
from xcon.sampler import Order
from xcon.shardset import ShardSet
from xcon.tracking import Silent, Tracker

# Legend: N records of the validation split, C classes.


def main() -> None:
    """Runs the command line."""
    with signals.Received() as received:
        commandline.guarded(functools.partial(train, received), "xcon finetune")


def train(received: signals.Received) -> None:
    """Parse, data, model, optimiser, resume, loop."""
    recipe, cfg = config.parse_recipe(recipes.FINETUNE, "xcon finetune")
    begun = model.load_spec(cfg.init, kind="contrastive") if cfg.init else None
    cfg = start.resolved(cfg, begun)
    accelerator = launch.make_accelerator(
        cfg.precision,
        batch_size=cfg.batch_size,
        clip_norm=cfg.clip_norm,
        accumulation_steps=cfg.accumulation_steps,
    )
    if cfg.ema:
        launch.check_whole(accelerator)
    if cfg.mixes:
        mixing.check_pairs(cfg.batch_size // accelerator.num_processes)

    # Data
    shards = ShardSet(cfg.shards)
    config.check_patience(cfg, validation=shards.has("val"))
    if begun:
        start.check_fits(cfg, begun, shards.card)
    train_split = shards.split("train")
    order = Order(len(train_split), cfg.batch_size, cfg.seed, cfg.per_class, train_split.class_id)
    facts = {"command": "finetune", "recipe": recipe, "shards_sha256": shards.card.sha256}
    facts |= (
        {"init_method": begun.method, "init_shards_sha256": begun.shards_sha256} if begun else {"init_method": ""}
    )

    # Model
    set_seed(cfg.seed)
    with accelerator.main_process_first():  # one process downloads, the others find it in the cache
        towers = start.make_towers(cfg, begun)
    spec = ModelSpec(
        kind="classifier", method=facts["init_method"],
        embed_dim=next(iter(towers.values())).projection.out_features,
        hidden=None if cfg.head == "captions" else cfg.hidden,
        classes=shards.card.class_facts(), shards_sha256=shards.card.sha256, fusion=cfg.fusion,
        **model.specs_of(towers),
    )  # fmt: skip
    prior = classifier.class_shares(train_split.class_id, len(spec.classes))
    network = classifier.build(spec, towers, prior=prior, doubt=cfg.doubt, dropout=cfg.dropout, joint=cfg.joint)
    if cfg.head == "captions":
        assert isinstance(network, classifier.Product)
        assert cfg.init is not None
        assert begun is not None
        network.begin_as(start.class_vectors(cfg.init, begun, shards))
    early, late_epoch = spec.image, cfg.epochs - cfg.late_epochs
    late = dataclasses.replace(early, size=cfg.late_size) if early and cfg.late_epochs else early
    augmented = functools.partial(images.train_transform, crop_scale=cfg.crop_scale, color_jitter=cfg.color_jitter)
    records = Records(
        train_split, cfg.modalities, augmented(early) if early else None, seed=cfg.seed,
        late=(late_epoch, augmented(late)) if late else None, meta_dropout=cfg.meta_dropout,
        meta_jitter_km=cfg.meta_jitter_km, meta_jitter_days=cfg.meta_jitter_days,
    )  # fmt: skip
    mixed = functools.partial(
        mixing.mixed, mixup=cfg.mixup, cutmix=cfg.cutmix, share=cfg.mix_share, classes=len(spec.classes),
        hide=cfg.fusion != "product",
    )  # fmt: skip
    share = Share(accelerator.process_index, accelerator.num_processes, cfg.workers)

    # Optimiser
    rates = {"image": cfg.image_lr, "meta": cfg.meta_lr, "head": cfg.head_lr}
    optimizer = optim.make_optimizer(network, rates, weight_decay=cfg.weight_decay, layer_decay=cfg.layer_decay)
    if open_run(cfg, **facts):  # now that all settings are known to fit
        accelerator.print(f"{cfg.out}: this run is complete")
        launch.finish(accelerator)
        return
    average = ModelEmaV3(network, decay=cfg.ema, use_warmup=True) if cfg.ema else None
    set_seed(cfg.seed, device_specific=True)
    wrapped, optimizer = launch.prepare(accelerator, network, optimizer)
    judged, believed = wrapped, network  # what is evaluated and kept, as a process trains it and as a classifier
    if average:
        judged = believed = average.to(accelerator.device).module
        accelerator.register_for_checkpointing(average)
    total = cfg.epochs * order.steps_per_epoch
    warmup = round(cfg.warmup_epochs * order.steps_per_epoch)

    # Resume
    checkpoints = Checkpoints(cfg.out, accelerator)
    at = checkpoints.restore()
    clock = Clock()
    saver = Saver(checkpoints, received, clock, every=cfg.checkpoint_every)
    signalled = saver.asked_before()
    steps = range(0) if signalled or at.ended(total, cfg.patience) else range(at.step, total)
    batches = make_loader(records, order, share, steps=steps)
    reports = accelerator.is_main_process
    tracker = Tracker(cfg.out, step=at.step, total=total, workers=cfg.workers) if reports else Silent()
    if at.step == 0:
        tracker.write("start", 0, {"processes": accelerator.num_processes, "records": order.samples})

    # Loop
    with tracker:
        for step, batch in enumerate(clock.watch(batches), start=at.step):
            wrapped.train()
            if step == late_epoch * order.steps_per_epoch:
                at = at.anew()
            optim.set_rates(optimizer, optim.schedule(step, warmup=warmup, total=total, decay=cfg.decay))
            loss = torch.zeros((), device=accelerator.device)
            rows = to_device(batch, accelerator.device)
            if cfg.mixes:
                rows = mixed(rows, seed=(cfg.seed, step, accelerator.process_index))
            for part in in_parts(rows, cfg.accumulation_steps):
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
            if average:
                average.update(network, at.step)
            if at.step % cfg.log_every == 0:
                values = {"loss": accelerator.reduce(loss, "sum").item(), "grad_norm": float(norm)}
                launch.check_finite(values["loss"], at.step)
                values["epoch"] = at.step / order.steps_per_epoch
                tracker.write("train", at.step, values, clock.lap(cfg.batch_size))
            if at.step % order.steps_per_epoch == 0 and shards.has("val"):
                with clock.paused():
                    seen = late if step >= late_epoch * order.steps_per_epoch else early
                    held_out = validate(judged, believed, cfg, seen, shards, share, accelerator)
                    launch.check_finite(held_out["loss"], at.step)
                    at = at.after((held_out["top1"], -held_out["loss"]))
                    if at.since_best == 0 and cfg.keep == "best":
                        checkpoints.keep_weights(judged, at.step)
                    tracker.write("val", at.step, held_out)
            signalled = saver.after_step(at, loss)
            tracker.advance(at.step)
            if signalled or at.ended(total, cfg.patience):
                break
        if signalled and not at.ended(total, cfg.patience):
            saver.stop(tracker, at, signalled)
        tracker.write("end", at.step, {"best": at.best})

    # The result: the weights of the best held-out result; without a validation split, or as asked for, the last
    chosen = at.best_step if at.best_step and cfg.keep == "best" else at.step
    if at.best is None or cfg.keep == "last":
        checkpoints.keep_weights(judged, at.step)
    if accelerator.is_main_process:
        spec = dataclasses.replace(spec, image=late)
        model.save(cfg.out, spec, checkpoints.weights(chosen).read_bytes())
    accelerator.print(f"{cfg.out}: complete, the weights of step {chosen}")
    launch.finish(accelerator)


def validate(
    judged: nn.Module, network: Classifier, cfg: FinetuneConfig, image: ImageSpec | None, shards: ShardSet,
    share: Share, accelerator: Accelerator,
) -> dict[str, float]:  # fmt: skip
    """Calibrates on the validation split; its `top1`, mean cross-entropy `loss` and `sharpness`."""
    gather.share_buffers(judged)
    judged.eval()
    split, device = shards.split("val"), accelerator.device
    transform = images.eval_transform(image) if image else None
    with launch.autocast(accelerator, cfg.precision):
        found = evaluation.collect(
            evaluation_loader(Records(split, cfg.modalities, transform), share, batch_size=cfg.batch_size),
            lambda rows: judged({m: rows[m] for m in cfg.modalities}),
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
