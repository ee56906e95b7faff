"""Evaluation over all processes: every record of a split exactly once, in the order of the split."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from xcon import gather
from xcon.loader import Batch, to_device


@torch.inference_mode()
def collect(
    batches: Iterable[Batch],
    compute: Callable[[Batch], Mapping[str, Tensor]],
    *,
    samples: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Runs a function over the batches of all processes and puts its rows in order.

    Args:
        batches: of this process, by an unshuffled `sampler.Order`.
        compute: batch on the device -> name -> rows, `[b, ...]` each.
        samples: records in the split.
        device: where to compute.

    Returns:
        Name -> `[samples, ...]` on the CPU, equal on all processes; also `label`.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        on_device = to_device(batch, device)
        beside = {name: on_device[name] for name in ("index", "weight", "label")}
        for name, rows in {**beside, **compute(on_device)}.items():
            parts[name].append(gather.rows(rows).cpu())
    whole = {name: torch.cat(rows) for name, rows in parts.items()}
    real = whole.pop("weight") > 0
    index = whole.pop("index")[real]
    order = index.argsort()
    assert torch.equal(index[order], torch.arange(samples)), "a record was missed or came twice"
    return {name: rows[real][order] for name, rows in whole.items()}
