"""Cross-contrastive pre-training (paper, section 3.1).

    accelerate launch xcon/pretrain.py RECIPE --shards DIR --out RUN [--field value ...]

The same command given again resumes from the newest checkpoint; `--help` lists recipes, `RECIPE --help` settings.
"""

import dataclasses
import functools

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from xcon import (
    commandline,
    config,
    evaluation,
    gather,
    gradcache,
    images,
    launch,
    model,
    optim,
    recipes,
    signals,
    start,
)
from xcon.checkpoint import Checkpoints, open_run
from xcon.clock import Clock
from xcon.config import PretrainConfig
from xcon.loader import Batch, ClassCaptions, Records, Share, evaluation_loader, make_loader, present, to_device
from xcon.model import ContrastiveModel, ModelSpec
from xcon.objective import Objective, neighbour_top1
from xcon.preemption import Saver
from xcon.sampler import Order
from xcon.shardset import ShardSet
from xcon.tracking import Silent, Tracker

# Legend: b rows of this process, N records of the validation split, C classes, D width of the shared space.


def main() -> None:
    """Runs the command line."""
    with signals.Received() as received:
        commandline.guarded(functools.partial(train, received), "xcon pretrain")


def train(received: signals.Received) -> None:
    """Parse, data, model, optimiser, resume, loop."""
    recipe, cfg = config.parse_recipe(recipes.PRETRAIN, "xcon pretrain")
    cfg = resolved(cfg)
    accelerator = launch.make_accelerator(cfg.precision, batch_size=cfg.batch_size, clip_norm=cfg.clip_norm)

    # Data
    shards = ShardSet(cfg.shards, cfg.caption)
    config.check_patience(cfg, validation=shards.has("val"))
    train_split = shards.split("train")
    order = Order(len(train_split), cfg.batch_size, cfg.seed, cfg.per_class, train_split.class_id)

    # Model
    set_seed(cfg.seed)
    with accelerator.main_process_first():  # one process downloads, the others find it in the cache
        towers, text = start.contrastive_towers(cfg, shards, accelerator.device)
    facts = {"command": "pretrain", "recipe": recipe, "method": cfg.method, "shards_sha256": shards.card.sha256}
    if open_run(cfg, **facts):
        accelerator.print(f"{cfg.out}: this run is complete")
        launch.finish(accelerator)
        return
    contrastive = ContrastiveModel(
        towers, temperature=cfg.temperature, max_scale=cfg.max_scale, learn_temperature=cfg.learn_temperature
    )
    objective = Objective(cfg.modalities, cfg.matching, cfg.views, cfg.term_weights)
    spec = ModelSpec(
        kind="contrastive", method=cfg.method, embed_dim=cfg.embed_dim, hidden=None,
        classes=shards.card.class_facts(), shards_sha256=shards.card.sha256,
        **model.specs_of(towers),
    )  # fmt: skip
    texts = text.inputs if text else None
    crop = None
    if spec.image:
        crop = images.train_transform(spec.image, crop_scale=cfg.crop_scale, color_jitter=cfg.color_jitter)
    shared = None
    if text and cfg.matching == "label" and shards.one_caption_per_class:
        shared = ClassCaptions(text.inputs[torch.from_numpy(shards.class_captions)], train_split.class_id)
    own = tuple(m for m in cfg.modalities if m != "text" or not shared)
    records = Records(
        train_split, own, crop, texts, views=cfg.views, seed=cfg.seed,
        meta_jitter_km=cfg.meta_jitter_km, meta_jitter_days=cfg.meta_jitter_days,
    )  # fmt: skip
    share = Share(accelerator.process_index, accelerator.num_processes, cfg.workers)

    # Optimiser
    rates = {"image": cfg.image_lr, "text": cfg.text_lr, "meta": cfg.meta_lr, "head": cfg.head_lr}
    optimizer = optim.make_optimizer(contrastive, rates, weight_decay=cfg.weight_decay)
    set_seed(cfg.seed, device_specific=True)
    wrapped, optimizer = launch.prepare(accelerator, contrastive, optimizer)
    total = cfg.epochs * order.steps_per_epoch
    warmup = round(cfg.warmup_epochs * order.steps_per_epoch)

    # Resume
    checkpoints = Checkpoints(cfg.out, accelerator)
    at = checkpoints.restore()
    clock = Clock()
    saver = Saver(checkpoints, received, clock, every=cfg.checkpoint_every)
    signalled = saver.asked_before()
    steps = range(0) if signalled or at.ended(total, cfg.patience) else range(at.step, total)
    batches = make_loader(records, order, share, steps=steps, captions=shared)
    reports = accelerator.is_main_process
    tracker = Tracker(cfg.out, step=at.step, total=total, workers=cfg.workers) if reports else Silent()
    if at.step == 0:
        tracker.write("start", 0, {"processes": accelerator.num_processes, "records": order.samples})

    # Loop
    with tracker:
        for step, batch in enumerate(clock.watch(batches), start=at.step):
            wrapped.train()
            rows = to_device(batch, accelerator.device)
            optim.set_rates(optimizer, optim.schedule(step, warmup=warmup, total=total, decay=cfg.decay))
            loss = clock.loss(functools.partial(objective.loss, rows))
            inputs, at_once = objective.inputs(rows), cfg.micro_batch * cfg.views
            terms, scale = gradcache.backward(accelerator, wrapped, inputs, loss, rows=at_once)
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), cfg.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

            at = dataclasses.replace(at, step=step + 1)
            if at.step % cfg.log_every == 0:
                values = {name: term.item() for name, term in terms.items()}
                launch.check_finite(values["total"], at.step)
                values |= {
                    "scale": scale.item(),
                    "grad_norm": float(norm),
                    "epoch": at.step / order.steps_per_epoch,
                }
                tracker.write("train", at.step, values, clock.lap(cfg.batch_size))
            if at.step % order.steps_per_epoch == 0 and shards.has("val"):
                with clock.paused():
                    held_out = validate(wrapped, cfg, spec, shards, texts, objective, share, accelerator.device)
                    launch.check_finite(held_out["loss"], at.step)
                    at = at.after((held_out.get("top1", 0.0), -held_out["loss"]))
                    if at.since_best == 0:
                        checkpoints.keep_weights(wrapped, at.step)
                    tracker.write("val", at.step, held_out)
            signalled = saver.after_step(at, terms["total"])
            tracker.advance(at.step)
            if signalled or at.ended(total, cfg.patience):
                break
        if signalled and not at.ended(total, cfg.patience):
            saver.stop(tracker, at, signalled)
        tracker.write("end", at.step, {"best": at.best})

    # The result: the weights of the best held-out result; without a validation split, the last
    if at.best is None:
        checkpoints.keep_weights(wrapped, at.step)
    if accelerator.is_main_process:
        weights = checkpoints.weights(at.best_step or at.step).read_bytes()
        if text:
            text.tokenizer.save_pretrained(cfg.out / "tokenizer")
            weights = model.with_whole_text(weights, text.encoder)
        model.save(cfg.out, spec, weights)
    accelerator.print(f"{cfg.out}: complete, the weights of step {at.best_step or at.step}")
    launch.finish(accelerator)


def resolved(cfg: PretrainConfig) -> PretrainConfig:
    """The settings with what was left open filled in, as the run saves them."""
    cfg = dataclasses.replace(cfg, precision=launch.resolve_precision(cfg.precision))
    if "image" not in cfg.modalities:
        return cfg
    return dataclasses.replace(
        cfg,
        image_backbone=cfg.image_backbone or config.BACKBONE,
        image_weights=cfg.image_weights or config.WEIGHTS,
    )


def validate(
    wrapped: nn.Module, cfg: PretrainConfig, spec: ModelSpec, shards: ShardSet, texts: Tensor | None,
    objective: Objective, share: Share, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """The loss on the validation split in batches of training's size, and how often the right caption is found.

    Returns:
        `loss`, the mean total; where there is text also `top1`, the share of records whose class has the caption
        most similar to image and metadata together, and `image_top1` and `meta_top1`, to one of them alone; of
        several views `top1` is the share whose nearest neighbour is of their class. The same on all processes.
    """
    gather.share_buffers(wrapped)
    wrapped.eval()
    split, transform = shards.split("val"), None
    if spec.image and cfg.views > 1:  # crops as in training, the same after every epoch
        transform = images.train_transform(spec.image, crop_scale=cfg.crop_scale, color_jitter=cfg.color_jitter)
    elif spec.image:
        transform = images.eval_transform(spec.image)
    records = Records(split, cfg.modalities, transform, texts, views=cfg.views, seed=cfg.seed)
    together = min(cfg.batch_size, cfg.micro_batch * share.world_size or cfg.batch_size)
    batches = evaluation_loader(records, share, batch_size=together)

    def embed(rows: Batch) -> dict[str, Tensor]:
        embeddings = objective.by_record(wrapped(objective.inputs(rows))[0])
        return {**embeddings, **{f"{m} present": mask for m, mask in present(rows).items()}}

    found = evaluation.collect(batches, embed, samples=len(split), device=device)
    embeddings: dict[str, Tensor] = {m: found[m] for m in cfg.modalities}  # [N, D] or [N, V, D] each
    masks: dict[str, Tensor] = {m: found[f"{m} present"] for m in cfg.modalities}  # [N] each
    accuracy = {}
    with torch.no_grad():
        _, scale = wrapped({})
        loss = objective.held_out_loss(embeddings, masks, found["label"], scale.cpu(), batch_size=cfg.batch_size)
        if texts is not None:
            class_texts = texts[torch.from_numpy(shards.class_captions)].to(device)
            captions_of = wrapped({"text": class_texts})[0]["text"].cpu()  # [C, D]
            accuracy = evaluation.caption_top1(embeddings, masks, captions_of, found["label"])
    if cfg.views > 1:
        accuracy = {"top1": neighbour_top1(embeddings["image"], found["label"])}
    return gather.agree({"loss": loss, **accuracy}, device)


if __name__ == "__main__":
    main()
