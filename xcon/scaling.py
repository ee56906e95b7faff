"""What a training step takes on n GPUs, from what it takes on one: time, memory, and what holds it up.

Made for choosing before queueing: right within a factor of two, not to a per cent. `benchmarks/scale.py` holds it
against real processes. All that xcon keeps and sends is float32: autocast changes what is computed in, not what is
kept. P are the numbers of all weights, T of those trained.

Time of a step = computing + the exchange that computing does not hide, or the loader's where that is longer.

- Computing: seconds per step + seconds per row x rows of the GPU, as measured, and no less than its operators take
  to be launched, 5 us each, forward and twice backward: a GPU is not filled by few rows. Two thirds of it are the
  backward pass. Encoding in parts (GradCache) takes one more forward pass, 4/3.
- An all-gather of S bytes on g GPUs of each of m nodes: (g-1)/g S / B_node + (m-1)/m S / B_network; an all-reduce
  twice that. It is the ring, 2 (n-1)/n S / B (Patarasuk and Yuan 2009), by node: each node's network cards carry
  every byte once. Each takes ceil(log2 g) + ceil(log2 m) times the latency, as NCCL's trees do (NCCL 2.4), where
  rings take n - 1. Bandwidths are bus bandwidths as nccl-tests prints them, the network's for a whole node.
- What strategies exchange (Rajbhandari et al. 2020, section 7, where not otherwise said):
    DDP      all-reduce of 4T bytes in buckets of 25 MiB while the backward pass goes on
    ZeRO-1   the same, but after the backward pass (DeepSpeed's overlap_comm is off below stage 3), and an
             all-gather of the weights; where the paper reduce-scatters, DeepSpeed 0.19 all-reduces
    ZeRO-2   as ZeRO-1, once for each part of a batch
    ZeRO-3   all-gathers of the weights forward and backward and a reduce-scatter, layer by layer, for each part
    FSDP2    the same by towers, the reduce-scatter once
  Of DDP's, ZeRO-3's and FSDP2's exchange a share `overlap` of the time that it goes on beside is hidden: assumed.
- The exact loss of the global batch: an all-gather of 4 D bytes for every vector and 16 for every row and pair
  (log-sum-exps), nothing backward (`xcon/gather.py`); its products grow with the batch squared over n, at the
  encoders' rate (`loss_flops`).
- BatchNorm on GPUs takes its statistics over all: an all-gather forward and an all-reduce backward for every
  layer, of so few numbers that it is the latency that counts.

Memory of a GPU = weights, gradients, moments and the strategy's buffers (`held`) + what the encoders keep for the
backward pass, measured by row + the vectors of all + what CUDA, cuDNN and NCCL take for themselves, a flat GB.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from xcon.launch import ZERO_BUCKET
from xcon.losses import TABLE_ROWS

# Legend: n GPUs, N rows of the global batch, D width, P and T numbers of weights: all, trained.

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")  # the simplest first

FLOAT = 4
DDP_BUCKET = 25 * 2**20
ZERO_LIVE = 1_000_000_000  # numbers: DeepSpeed's stage3_max_live_parameters, of which it lets go of none before
CONTEXT = 1e9  # bytes
LAUNCH = 5e-6  # seconds


@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to do, as counted and measured.

    Attributes:
        weights, trained: numbers of all weights, and of those with a gradient.
        towers: how many there are.
        largest: numbers of the largest one's weights.
        layers: modules with 100,000 numbers or more, which ZeRO-3 gathers one by one.
        norms: layers of BatchNorm whose statistics are exchanged; on processors none are.
        row_seconds, step_seconds: of computing, for every row of a GPU and for every step, without parts.
        operators: that a forward pass calls.
        row_flops: of the encoders for a row, forward and backward.
        row_bytes, step_bytes: that the encoders keep for the backward pass, of every row and of every part; the
            latter are copies of weights, as autocast makes them.
        photo_seconds: of a loader's worker for a row.
        row_vectors: modalities with a vector for every row.
        classes: of which each has one vector, its caption's, for all rows of it; 0: no modality is shared so.
        width: D.
        loss_flops: that are part of the time measured.
        micro_batch: rows that a GPU encodes at a time; 0: all.
    """

    weights: int
    trained: int
    towers: int
    largest: int
    layers: int
    norms: int
    row_seconds: float
    step_seconds: float
    operators: int
    row_flops: float
    row_bytes: float
    step_bytes: float
    photo_seconds: float
    row_vectors: int
    classes: int
    width: int
    loss_flops: float
    micro_batch: int = 0

    def parts(self, rows: float) -> int:
        """Parts that a GPU's rows are encoded in."""
        return math.ceil(rows / self.micro_batch) if self.micro_batch else 1

    def captions(self, batch: int) -> float:
        """Distinct classes among the rows of a batch, where all are as frequent: C (1 - (1 - 1/C)^N)."""
        return self.classes * (1 - (1 - 1 / self.classes) ** batch) if self.classes else 0.0

    @property
    def pairs(self) -> int:
        """Of modalities that are contrasted."""
        return math.comb(self.row_vectors + bool(self.classes), 2)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where it is done.

    Attributes:
        gpus_per_node: GPUs of a node.
        gpu_bytes: memory of each.
        node_bandwidth: bytes/s between the GPUs of a node, bus bandwidth.
        network_bandwidth: bytes/s between nodes, of a whole node.
        latency: seconds of a message.
        cpus_per_gpu: workers that decode at a time.
        overlap: share of the computing beside which an exchange goes on unnoticed.
    """

    gpus_per_node: int
    gpu_bytes: float
    node_bandwidth: float
    network_bandwidth: float
    latency: float
    cpus_per_gpu: int
    overlap: float

    def all_gather(self, size: float, gpus: int, *, messages: int = 1) -> float:
        """Seconds until all have `size` bytes that lie spread over them, sent in some messages."""
        near, nodes = min(gpus, self.gpus_per_node), math.ceil(gpus / self.gpus_per_node)
        hops = math.ceil(math.log2(near)) + math.ceil(math.log2(nodes))
        inside = (near - 1) / near * size / self.node_bandwidth
        between = (nodes - 1) / nodes * size / self.network_bandwidth
        return messages * hops * self.latency + inside + between

    def all_reduce(self, size: float, gpus: int, *, messages: int = 1) -> float:
        """Seconds until all have the sum of `size` bytes of each: a reduce-scatter and an all-gather."""
        return 2 * self.all_gather(size, gpus, messages=messages)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step on some GPUs.

    Attributes:
        gpus, nodes, strategy: of it.
        batch: rows of the global batch.
        seconds: name -> what each part adds to the step: computing, loss, weights (gradients and weights that are
            exchanged), embeddings, BatchNorm, loading.
        memory: name -> bytes on each GPU.
        efficiency: images per second and GPU, as a share of what one GPU does with as many rows; where the global
            batch is fixed, with all of it.
        workers: of a GPU's loader that keep up with all but themselves.
        fits: whether the memory is enough.
    """

    gpus: int
    nodes: int
    strategy: str
    batch: int
    seconds: dict[str, float]
    memory: dict[str, float]
    efficiency: float
    workers: int
    fits: bool

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def images_per_s(self) -> float:
        """Rows per second on all GPUs."""
        return self.batch / self.step

    @property
    def bound(self) -> str:
        """What bounds it: memory where it does not fit, else the largest part of the time."""
        return max(self.seconds, key=lambda part: self.seconds[part]) if self.fits else "memory"


def predict(
    work: Work, cluster: Cluster, strategy: Strategy, gpus: int, batch: int, *, reference: int
) -> Prediction:
    """A step on some GPUs.

    Args:
        work: what there is to do.
        cluster: where.
        strategy: how the weights are held.
        gpus: n.
        batch: N; n divides it.
        reference: rows on one GPU that the efficiency is a share of.
    """
    seconds = step_seconds(work, cluster, strategy, gpus, batch)
    alone = step_seconds(work, cluster, strategy, 1, reference)
    memory = step_bytes(work, strategy, gpus, batch)
    return Prediction(
        gpus=gpus,
        nodes=math.ceil(gpus / cluster.gpus_per_node),
        strategy=strategy,
        batch=batch,
        seconds=seconds,
        memory=memory,
        efficiency=batch / gpus / sum(seconds.values()) / (reference / sum(alone.values())),
        workers=math.ceil(batch / gpus * work.photo_seconds / (sum(seconds.values()) - seconds["loading"])),
        fits=sum(memory.values()) <= cluster.gpu_bytes,
    )


# --------------------------------------------------------------------------------------------------------
# Time


def step_seconds(work: Work, cluster: Cluster, strategy: Strategy, gpus: int, batch: int) -> dict[str, float]:
    """Name -> seconds that each part adds to a step, `Prediction.seconds`."""
    rows, parts = batch / gpus, work.parts(batch / gpus)
    passes = 4 / 3 if parts > 1 else 1
    launches = 3 * work.operators * parts * LAUNCH
    computing = passes * max(launches, work.step_seconds + work.row_seconds * rows)
    rate = work.row_flops / work.row_seconds
    # An all-gather forward and an all-reduce backward; in parts, twice forward.
    exchanges_of_norms = work.norms * (4 * parts if parts > 1 else 3)
    seconds = {
        "computing": computing,
        "loss": max(0.0, loss_flops(work, gpus, batch) - work.loss_flops) / rate,
        "weights": exposed(work, cluster, strategy, gpus, parts=parts, computing=computing),
        "embeddings": embeddings_seconds(work, cluster, gpus, batch),
        "BatchNorm": cluster.all_gather(0, gpus, messages=exchanges_of_norms),
    }
    loading = rows * work.photo_seconds / cluster.cpus_per_gpu
    return {**seconds, "loading": max(0.0, loading - sum(seconds.values()))}


def exposed(work: Work, cluster: Cluster, strategy: Strategy, gpus: int, *, parts: int, computing: float) -> float:
    """Seconds of exchanging gradients and weights that nothing hides.

    Args:
        work: what there is to do.
        cluster: where.
        strategy: how the weights are held.
        gpus: n.
        parts: that a GPU encodes its rows in.
        computing: seconds of it in a step.
    """
    weights, gradients = FLOAT * work.weights, FLOAT * work.trained
    if strategy == "ddp":
        reduced = cluster.all_reduce(gradients, gpus, messages=math.ceil(gradients / DDP_BUCKET))
        backward = 2 / 3 * computing / parts  # of the last part: the others keep their gradients local
        return max(0.0, reduced - cluster.overlap * backward)
    if strategy in ("zero1", "zero2"):
        times = parts if strategy == "zero2" else 1
        buckets = math.ceil(work.trained / ZERO_BUCKET)
        return times * cluster.all_reduce(gradients, gpus, messages=buckets) + cluster.all_gather(gradients, gpus)
    messages, times = (work.layers, parts) if strategy == "zero3" else (work.towers, 1)
    gathered = cluster.all_gather(weights, gpus, messages=messages) * (3 * parts if parts > 1 else 2)
    scattered = cluster.all_gather(gradients, gpus, messages=messages) * times
    return max(0.0, gathered + scattered - cluster.overlap * computing)


def embeddings_seconds(work: Work, cluster: Cluster, gpus: int, batch: int) -> float:
    """Seconds of the exchange that makes the loss that of the global batch."""
    vectors = work.row_vectors * batch + work.captions(batch)
    gathered = cluster.all_gather(FLOAT * work.width * vectors, gpus)
    if batch <= TABLE_ROWS:
        return gathered
    return gathered + cluster.all_gather(16 * work.pairs * batch, gpus)


def loss_flops(work: Work, gpus: int, batch: int) -> float:
    """Floating-point operations of the loss and its gradient on one GPU.

    Up to `TABLE_ROWS` rows every GPU takes the whole table of similarities, three products of 2 N^2 D for a pair.
    Beyond, one GPU alone takes four, the table twice; of several each takes six of its own rows against all.
    """
    if batch <= TABLE_ROWS:
        return 6 * work.pairs * work.width * batch**2
    captions = work.captions(batch)
    sizes = [batch] * work.row_vectors + ([captions] if captions else [])
    products = sum(a * b for a, b in itertools.combinations(sizes, 2)) * work.width
    return products * (8 if gpus == 1 else 12 / gpus)


# --------------------------------------------------------------------------------------------------------
# Memory


def step_bytes(work: Work, strategy: Strategy, gpus: int, batch: int) -> dict[str, float]:
    """Name -> bytes of a GPU in the course of a step."""
    rows, parts = batch / gpus, work.parts(batch / gpus)
    vectors = work.row_vectors * batch + work.captions(batch)
    return {
        "weights": held(work, strategy, gpus),
        "activations": work.step_bytes + work.row_bytes * math.ceil(rows / parts),
        "embeddings": 2 * FLOAT * work.width * vectors,  # and their gradients
        "CUDA": CONTEXT,
    }


def held(work: Work, strategy: Strategy, gpus: int) -> float:
    """Bytes of weights, gradients, moments and the strategy's own buffers, at the most that there are in a step.

    One GPU alone: 4P + 12T, with 16 bytes for every weight that is trained, as of mixed precision (Rajbhandari et
    al. 2020, section 3.1), though here all of it is float32. Of several, as two processes hold it:

    - DDP has its buckets beside the gradients: 4P + 16T.
    - DeepSpeed keeps a second copy of the weights, shared out, and takes a bucket of 200 MB, whatever the model.
      ZeRO-2 lets go of gradients when a bucket is full: below 50 million numbers it is as ZeRO-1.
    - ZeRO-3 lets go of gathered weights beyond a thousand million numbers, and of gradients as ZeRO-2 does.
    - FSDP2 has two towers gathered at a time, the one in work and the next, and the gradients of one. That is
      assumed; what it holds besides is seen.
    """
    weights, trained = FLOAT * work.weights, FLOAT * work.trained
    whole_gradients = FLOAT * min(work.trained, ZERO_BUCKET)
    if gpus == 1:
        return weights + 3 * trained
    match strategy:
        case "ddp":
            return weights + 4 * trained
        case "zero1":
            return weights + trained + 3 * trained / gpus + FLOAT * ZERO_BUCKET
        case "zero2":
            return weights + whole_gradients + 3 * trained / gpus + FLOAT * ZERO_BUCKET
        case "zero3":
            gathered = FLOAT * min(work.weights, ZERO_LIVE) + whole_gradients
            return (weights + 4 * trained) / gpus + gathered + FLOAT * ZERO_BUCKET
        case "fsdp2":
            return (weights + 3 * trained) / gpus + 3 * FLOAT * work.largest


# --------------------------------------------------------------------------------------------------------
# Choosing


def recommend(predictions: Sequence[Prediction], *, least_efficiency: float) -> str:
    """What to take, in a sentence: the most GPUs that are still put to use, by the simplest strategy that does it.

    Args:
        predictions: of all that may be taken.
        least_efficiency: below which GPUs are better left to others.
    """
    fitting = [p for p in predictions if p.fits]
    if not fitting:
        least = min(predictions, key=lambda p: sum(p.memory.values()))
        needed = sum(least.memory.values()) / 1e9
        return f"Nothing fits: {least.strategy} on {least.gpus} GPUs needs {needed:.1f} GB; take a --micro-batch."
    used = [p for p in fitting if p.efficiency >= least_efficiency] or [min(fitting, key=lambda p: p.gpus)]
    gpus = max(p.gpus for p in used)
    fastest = min(p.step for p in used if p.gpus == gpus)
    best = min(
        (p for p in used if p.gpus == gpus and p.step <= 1.05 * fastest),
        key=lambda p: STRATEGIES.index(p.strategy),
    )
    return (
        f"Take {best.gpus} GPU{'s' * (best.gpus > 1)} on {best.nodes} node{'s' * (best.nodes > 1)} with "
        f"{best.strategy}: {best.images_per_s:,.0f} images/s at {best.efficiency:.0%} efficiency, "
        f"{sum(best.memory.values()) / 1e9:.1f} GB each, bound by {best.bound}."
    )
