"""A few steps of a pre-training on this machine, to know what many would take: counts, times, bytes.

On a GPU where there is one. Weights are random: they cost what others do.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from xcon import config, gradcache, images, launch, model, optim, scaling, start
from xcon.clock import between, mark
from xcon.config import PretrainConfig
from xcon.images import ImageSpec
from xcon.loader import Batch, ClassCaptions, Records, Share, make_loader, to_device
from xcon.model import ContrastiveModel
from xcon.objective import Objective
from xcon.sampler import Order
from xcon.scaling import Work
from xcon.shardset import ShardSet
from xcon.tracking import LOG

STEPS = 5  # timed, after one to warm up
LARGE = 100_000  # numbers: DeepSpeed's stage3_param_persistence_threshold, below which ZeRO-3 gathers nothing
ROWS = 64  # that are encoded at a time, at most: more take longer, and teach nothing of a row
FEW = 16  # that are enough to count what a row needs


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a step computes.

    Attributes:
        row_seconds: for every row of a GPU, encoded at once.
        step_seconds: for every step.
        loss_flops: the loss's, which are part of it.
    """

    row_seconds: float
    step_seconds: float
    loss_flops: float


class Rehearsal:
    """A pre-training made ready, and one batch of it.

    Args:
        cfg: its settings; the batch is one that is encoded at a time.
        most: rows of that batch, though the settings have more.

    Raises:
        ValueError: settings that this cannot plan for.
    """

    def __init__(self, cfg: PretrainConfig, most: int = ROWS) -> None:
        if cfg.views > 1:
            raise ValueError(f"--views {cfg.views}: only losses between modalities are planned for")
        unit = max(1, cfg.per_class)
        rows = max(1, min(cfg.micro_batch or cfg.batch_size, most) // unit) * unit
        shards = ShardSet(cfg.shards, cfg.caption)  # refused before anything is made
        # A processor has no fp16; what is counted is the same in bf16.
        on_processor = cfg.precision == "fp16" and not torch.cuda.is_available()
        precision = launch.resolve_precision("bf16" if on_processor else cfg.precision)
        self.accelerator = launch.make_accelerator(precision, batch_size=rows, clip_norm=cfg.clip_norm)
        self.cfg = dataclasses.replace(
            cfg, image_backbone=cfg.image_backbone or config.BACKBONE, image_weights="none", micro_batch=0
        )
        self.micro_batch = cfg.micro_batch
        self.objective = Objective(cfg.modalities, cfg.matching, weights=cfg.term_weights)
        self.classes = len(shards.card.classes)
        towers, text = start.contrastive_towers(self.cfg, shards, self.accelerator.device)
        self.module = ContrastiveModel(towers, temperature=cfg.temperature, max_scale=cfg.max_scale)
        spec = model.specs_of(towers)["image"]
        self.photo_seconds, self.batch = self._batch(shards, spec, text.inputs if text else None, rows)
        rates = dict.fromkeys(("image", "text", "meta", "head"), 1e-6)
        optimizer = optim.make_optimizer(self.module, rates, weight_decay=cfg.weight_decay)
        self.wrapped, self.optimizer = launch.prepare(self.accelerator, self.module, optimizer)

    def _batch(
        self, shards: ShardSet, spec: ImageSpec | None, texts: Tensor | None, rows: int
    ) -> tuple[float, Batch]:
        """Seconds that a row takes a worker, and a batch."""
        split, cfg = shards.split("train"), self.cfg
        self.shared = texts is not None and cfg.matching == "label" and shards.one_caption_per_class
        own, captions = cfg.modalities, None
        if texts is not None and self.shared:
            captions = ClassCaptions(texts[torch.from_numpy(shards.class_captions)], split.class_id)
            own = tuple(m for m in own if m != "text")
        crop = None
        if spec:
            crop = images.train_transform(spec, crop_scale=cfg.crop_scale, color_jitter=cfg.color_jitter)
        records = Records(split, own, crop, texts, seed=cfg.seed)
        order = Order(len(split), rows, cfg.seed, cfg.per_class, split.class_id)
        share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        batches = iter(make_loader(records, order, share, steps=range(2), captions=captions))
        next(batches)  # opens files
        begun = time.perf_counter()
        batch = next(batches)
        return (time.perf_counter() - begun) / len(batch["label"]), to_device(batch, self.accelerator.device)

    def work(self, pace: Pace) -> Work:
        """What there is to do, at a pace measured here or elsewhere."""
        few = self._rows(min(FEW, len(self.batch["label"])))
        flops, calls = FlopCounterMode(display=False), _Calls()
        with flops, calls, torch.no_grad():
            self.wrapped(self.objective.inputs(few))
        row_bytes, step_bytes = self._kept(len(few["label"]))
        return dataclasses.replace(
            self.counts(),
            row_seconds=pace.row_seconds,
            step_seconds=pace.step_seconds,
            loss_flops=pace.loss_flops,
            operators=calls.count,
            row_flops=3 * flops.get_total_flops() / len(few["label"]),  # the backward pass twice the forward
            row_bytes=row_bytes,
            step_bytes=step_bytes,
        )

    def _kept(self, rows: int) -> tuple[float, float]:
        """Bytes kept for every row, and for every part: twice the rows keep twice the former."""
        sizes = [rows, rows // 2] if rows > 1 else [rows]
        found = [kept_bytes(self.wrapped, self.objective.inputs(self._rows(size))) for size in sizes]
        return slope_and_rest(sizes, found)

    def pace(self) -> Pace:
        """That of this machine: of a batch, and of half of one, what a row takes and what a step takes anyway."""
        rows = len(self.batch["label"])
        sizes = [rows, rows // 2] if rows >= 4 else [rows]
        seconds = [self.seconds(self._rows(size)) for size in sizes]
        per_row, per_step = slope_and_rest(sizes, seconds)
        return Pace(per_row, per_step, scaling.loss_flops(self.counts(), 1, rows))

    def counts(self) -> Work:
        """What is known without measuring a step."""
        sizes = [sum(p.numel() for p in tower.parameters()) for tower in self.module.towers.values()]
        own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in self.module.modules()]
        norms = [module for module in self.module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        return Work(
            weights=sum(p.numel() for p in self.module.parameters()),
            trained=sum(p.numel() for p in self.module.parameters() if p.requires_grad),
            towers=len(sizes),
            largest=max(sizes),
            layers=sum(numbers >= LARGE for numbers in own),
            norms=len(norms),
            row_seconds=0.0,
            step_seconds=0.0,
            operators=0,
            row_flops=0.0,
            row_bytes=0.0,
            step_bytes=0.0,
            photo_seconds=self.photo_seconds,
            row_vectors=len(self.cfg.modalities) - self.shared,
            classes=self.classes if self.shared else 0,
            width=self.cfg.embed_dim,
            loss_flops=0.0,
            micro_batch=self.micro_batch,
        )

    def _rows(self, count: int) -> Batch:
        """The first rows of the batch, and the captions of their classes."""
        few = {name: x[:count] for name, x in self.batch.items() if not (self.shared and name.startswith("text"))}
        if not self.shared:
            return few
        needed = torch.isin(self.batch["text_class"], few["label"])
        return {**few, **{name: self.batch[name][needed] for name in ("text", "text_class")}}

    def step(self, rows: Batch) -> None:
        """A step, as a training takes it."""
        loss = functools.partial(self.objective.loss, rows)
        gradcache.backward(self.accelerator, self.wrapped, self.objective.inputs(rows), loss, rows=0)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.cfg.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, rows: Batch) -> float:
        """Of a step, the median of some."""
        self.wrapped.train()
        seconds = []
        for _ in range(1 + STEPS):
            begun = mark()
            self.step(rows)
            seconds.append(between(begun, mark()))
        return statistics.median(seconds[1:])


class _Calls(TorchDispatchMode):
    """Counts the operators that are called under it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def slope_and_rest(sizes: Sequence[int], found: Sequence[float]) -> tuple[float, float]:
    """What every row takes, and what is taken anyway; all is the rows' where the rest would be negative.

    Args:
        sizes: rows: many, and fewer; or many alone.
        found: what they took.
    """
    slope = (found[0] - found[-1]) / max(1, sizes[0] - sizes[-1])
    if not 0 < slope <= found[0] / sizes[0]:
        slope = found[0] / sizes[0]
    return slope, found[0] - slope * sizes[0]


def kept_bytes(wrapped: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    own = {x.untyped_storage().data_ptr() for x in itertools.chain(wrapped.parameters(), wrapped.buffers())}
    kept: dict[int, Tensor] = {}  # held, so that no other takes its place in memory

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    wrapped.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = wrapped(inputs)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del outputs
    return found


def pace_of_run(run: Path, cfg: PretrainConfig, counts: Work) -> Pace:
    """The pace of a run, by its log.

    Args:
        run: its folder.
        cfg: its settings.
        counts: of its model.

    Raises:
        FileNotFoundError, ValueError: no log, or none long enough.
    """
    file = run / LOG
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    processes = next((line["processes"] for line in lines if line["event"] == "start"), 1)
    timed = [line["timing"] for line in lines if line["event"] == "train"][1:]  # the first has the start in it
    if not timed:
        raise ValueError(f"{file}: fewer than two lines of training, nothing to go by; let it run a little longer")
    seconds = statistics.median((1 - t["data_wait"]) * cfg.batch_size / t["images_per_s"] for t in timed)
    rows = cfg.batch_size / processes
    in_parts = 0 < cfg.micro_batch < rows
    return Pace(
        seconds / rows / (4 / 3 if in_parts else 1), 0.0, scaling.loss_flops(counts, processes, cfg.batch_size)
    )
