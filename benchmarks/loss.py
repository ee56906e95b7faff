"""The loss beside its peers over batch sizes: time, peak memory and error, on one thread.

    python benchmarks/loss.py --out loss.json
    python benchmarks/loss.py --scale 143 --cosine 0.99
    python benchmarks/loss.py --rows 32768 --memory-only

Times are CPU time of forward and backward, to the three embeddings and to the scale where the loss has one: the
smallest of several rounds in which every loss has its turn. The peers, open_clip_torch and
pytorch-metric-learning, come by these names from PyPI; xcon itself does not need them.
"""

import dataclasses
import itertools
import json
import math
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import tyro
from live_bytes import peak_live_bytes
from open_clip.loss import ClipLoss
from pytorch_metric_learning.losses import SupConLoss
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from xcon import losses

# Legend: B rows, K classes among them, D width.

WIDTH, CLASSES = 256, 555
MIB = 2**20
ERRORS_UP_TO = 4096  # rows; the float64 reference of more takes gigabytes


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    rows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    """Batch sizes."""
    scale: float = 14.3
    """1 / temperature; the paper starts at 143."""
    cosine: float = 0.5
    """Similarity of two vectors of one class: 0 before training, towards 1 late in it."""
    seconds: float = 20.0
    """About how long to go on at each size; 3 rounds at least, 30 at most."""
    memory_only: bool = False
    """Only ours at the largest size, in a process that does nothing else."""
    out: Path | None = None
    """JSON file for all numbers."""


class Batch:
    """Embeddings `[B, D]` of rows with uniformly drawn classes; those of text also once per class, `[K, D]`."""

    def __init__(self, settings: Settings, rows: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(rows)
        centre = normalize(torch.randn(CLASSES, WIDTH, generator=generator), dim=1)

        def near(labels: Tensor) -> Tensor:
            noise = normalize(torch.randn(len(labels), WIDTH, generator=generator), dim=1)
            mixed = math.sqrt(settings.cosine) * centre[labels] + math.sqrt(1 - settings.cosine) * noise
            return normalize(mixed, dim=1).to(dtype).requires_grad_()

        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        self.classes, row_class = self.labels.unique(return_inverse=True)
        self.image, self.meta, self.class_text = near(self.labels), near(self.labels), near(self.classes)
        self.text = self.class_text.detach()[row_class].requires_grad_()
        self.scale = torch.tensor(settings.scale, dtype=dtype, requires_grad=True)

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """A vector per row."""
        return {"image": self.image, "text": self.text, "meta": self.meta}

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The unordered pairs of modalities."""
        return list(itertools.combinations(self.embeddings.values(), 2))

    def backward(self, loss: Callable[["Batch"], Tensor]) -> Tensor:
        """A loss; its gradients take the place of those of the loss before."""
        for leaf in (*self.embeddings.values(), self.class_text, self.scale):
            leaf.grad = None
        found = loss(self)
        found.backward()
        return found.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Those of the last loss; text's by class, whichever of its forms the loss took."""
        text = self.class_text.grad
        if text is None:
            row_class = torch.searchsorted(self.classes, self.labels)
            text = torch.zeros_like(self.class_text).index_add_(0, row_class, self.text.grad)
        return {"image": self.image.grad, "text": text, "meta": self.meta.grad, "scale": self.scale.grad}


def ours_class_text(batch: Batch) -> Tensor:
    """Captions once per class."""
    vectors = {**batch.embeddings, "text": batch.class_text}
    found = losses.cross_contrastive(vectors, batch.labels, batch.scale, classes={"text": batch.classes})
    return found["total"]


def ours_row_text(batch: Batch) -> Tensor:
    """A vector per row in all modalities."""
    return losses.cross_contrastive(batch.embeddings, batch.labels, batch.scale)["total"]


def naive(batch: Batch) -> Tensor:
    """The same by whole matrices, one per pair for both directions, one of targets for all: 18 B^2 D operations.

    PyTorch's `cross_entropy` of soft targets computes the same, slower at all sizes.
    """
    targets = (batch.labels[:, None] == batch.labels).to(batch.image.dtype)  # [B, B], symmetric
    targets /= targets.sum(dim=1, keepdim=True)
    total = torch.zeros(())
    for a, b in batch.pairs:
        logits = (batch.scale * a) @ b.T
        total = total - ((log_softmax(logits, 1) + log_softmax(logits, 0)) * targets).sum() / len(logits)
    return total


def six_matrices(batch: Batch) -> Tensor:
    """The same as the paper writes it, a matrix per direction."""
    return losses.by_definition(batch.embeddings, batch.labels, batch.scale)["total"]


def open_clip(batch: Batch) -> Tensor:
    """Another loss: each row is its own only positive. A matrix per direction."""
    clip = ClipLoss(local_loss=True, gather_with_grad=True)
    return torch.stack([clip(a, b, batch.scale) for a, b in batch.pairs]).sum()


def metric_learning(batch: Batch) -> Tensor:
    """The same, direction by direction; with one tensor for both labels it would drop each row's own pair."""
    supcon, others = SupConLoss(temperature=1 / batch.scale), batch.labels.clone()
    directions = itertools.permutations(batch.embeddings.values(), 2)
    return torch.stack([supcon(a, batch.labels, ref_emb=b, ref_labels=others) for a, b in directions]).sum()


def notebook(batch: Batch) -> Tensor:
    """Another loss, that of the authors' notebooks: targets made from the embeddings, temperature 1."""
    total = torch.zeros(())
    for a, b in batch.pairs:
        logits = a @ b.T
        targets = ((a @ a.T + b @ b.T) / 2).softmax(dim=-1)
        forth = (-targets * logits.log_softmax(dim=-1)).sum(dim=1)
        back = (-targets.T * logits.T.log_softmax(dim=-1)).sum(dim=1)
        total = total + ((forth + back) / 2).mean()
    return total


OURS, NAIVE = "ours, class text", "naive"
LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    OURS: ours_class_text,
    "ours, row text": ours_row_text,
    NAIVE: naive,
    "six matrices": six_matrices,
    "open_clip*": open_clip,
    "metric-learning": metric_learning,
    "notebook*": notebook,
}
# Rows above which a loss takes over 12 GiB or many minutes.
LIMIT = {NAIVE: 16384, "six matrices": 8192, "open_clip*": 8192, "metric-learning": 4096, "notebook*": 8192}


def main() -> None:
    """Measures all losses at all sizes, prints the tables."""
    settings = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    if settings.memory_only:
        print(memory_of_ours(settings))
        return
    found, errors = {}, {}
    for rows in settings.rows:
        batch = Batch(settings, rows)
        names = [name for name in LOSSES if rows <= LIMIT.get(name, rows)]
        found[rows] = measure(batch, names, settings.seconds)
        if rows <= ERRORS_UP_TO:
            errors[rows] = errors_of(batch, Batch(settings, rows, torch.float64))
        print(f"{rows} rows: {found[rows][OURS]['runs']} runs each", flush=True)
    show(settings, found, errors)
    if settings.out:
        given = {"torch": torch.__version__, "scale": settings.scale, "cosine": settings.cosine}
        settings.out.write_text(json.dumps({**given, "losses": found, "errors": errors}, indent=1))


def measure(batch: Batch, names: list[str], seconds: float) -> dict[str, dict[str, float]]:
    """Peak live bytes of each loss, which warms it up, and its CPU milliseconds.

    Small batches run several times in a turn: their times depend on whose code and data the caches hold.
    """
    runs = max(1, 1024 // len(batch.labels))

    def milliseconds(name: str) -> float:
        begun = time.process_time()
        batch.backward(LOSSES[name])
        return (time.process_time() - begun) * 1e3

    begun = time.process_time()
    live = [peak_live_bytes(lambda name=name: batch.backward(LOSSES[name])) for name in names]
    rounds = min(max(3, int(seconds / runs / (time.process_time() - begun))), 30)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name] += [milliseconds(name) for _ in range(runs)]
    return {
        name: {"ms": min(ms), "median_ms": statistics.median(ms), "runs": len(ms), "live_bytes": peak}
        for (name, ms), peak in zip(times.items(), live, strict=True)
    }


def errors_of(batch: Batch, double: Batch) -> dict[str, dict[str, float]]:
    """Norm of the difference to the definition in float64, relative to the norm or, if that is less, to 1e-6."""
    expected = {"loss": double.backward(six_matrices), **double.gradients()}
    errors = {}
    for which in (OURS, NAIVE):
        found = {"loss": batch.backward(LOSSES[which]), **batch.gradients()}
        errors[which] = {n: float((found[n] - e).norm() / e.norm().clamp(min=1e-6)) for n, e in expected.items()}
    return errors


def memory_of_ours(settings: Settings) -> str:
    """Peak live bytes, and how far the process grows at most beyond what a small batch made it."""
    rows = max(settings.rows)
    Batch(settings, 1024).backward(ours_class_text)  # what libraries take on first use
    batch = Batch(settings, rows)
    before = psutil.Process().memory_info().rss
    batch.backward(ours_class_text)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    live = peak_live_bytes(lambda: batch.backward(ours_class_text))
    return (
        f"{OURS}, {rows} rows: {live / MIB:.0f} MiB of live tensors at the peak; "
        f"the process grew by {(after - before) / MIB:.0f} MiB at most, to {after / MIB:.0f} MiB"
    )


def show(settings: Settings, found: dict[int, dict], errors: dict[int, dict]) -> None:
    """Times, peak live bytes and errors."""
    console = Console(width=150)
    given = f"D = {WIDTH}, {CLASSES} classes, scale {settings.scale:g}, cosine within a class {settings.cosine:g}"
    limits = ", ".join(f"{name} {rows}" for name, rows in LIMIT.items())
    note = f"* another loss   -: over 12 GiB or many minutes, above these numbers of rows: {limits}"
    for key, unit, title in (
        ("ms", 1, "CPU milliseconds, forward and backward (times ours with class text)"),
        ("live_bytes", MIB, "Peak MiB of live tensors (times ours with class text)"),
    ):
        table = Table("rows", *LOSSES, title=f"{title}\n{given}", caption=note)
        for rows, each in found.items():
            ours = each[OURS][key] / unit
            cells = [cell(each[name][key] / unit, ours) if name in each else "-" for name in LOSSES]
            table.add_row(str(rows), *cells)
        console.print(table)
    for rows, more in itertools.pairwise(found):
        growth = found[more][OURS]["live_bytes"] / found[rows][OURS]["live_bytes"]
        console.print(f"{OURS}: live bytes as B^{math.log(growth, more / rows):.2f} from {rows} to {more} rows")
    table = Table("rows", "", "loss", "image", "text", "meta", "scale", title="Relative error in float32")
    for rows, each in errors.items():
        for name, error in each.items():
            table.add_row(str(rows), name, *(f"{value:.1e}" for value in error.values()))
    console.print(table)


def cell(value: float, ours: float) -> str:
    """A number and its ratio to ours."""
    return f"{value:.{0 if value > 100 else 2}f} ({value / ours:.2f}x)"


if __name__ == "__main__":
    main()
