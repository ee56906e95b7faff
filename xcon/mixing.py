"""Photographs mixed with one another in training: mixup and CutMix, timm's, with draws of their own."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from timm.data import Mixup  # type: ignore[attr-defined]
from torch.nn.functional import one_hot

from xcon.loader import Batch

# Legend: b rows of this process, S pixels, C classes.


def mixed(
    batch: Batch, *, mixup: float, cutmix: float, share: float, classes: int, hide: bool, seed: Sequence[int]
) -> Batch:
    """A batch in which some photographs are mixed with another one of it (Zhang et al. 2018, Yun et al. 2019).

    Row i is mixed with row b - 1 - i, within a process: with mixup their weighted mean, with CutMix a patch of the
    other one. Where both are asked for, each has half of the rows.

    Args:
        batch: with `image` `[b, 3, S, S]` and `label` `[b]`, b even.
        mixup: alpha of its beta distribution; 0: none.
        cutmix: alpha of its beta distribution; 0: none.
        share: of the photographs, in (0, 1].
        classes: C.
        hide: whether mixed photographs lose their metadata: two places have no mean.
        seed: of the draws, non-negative; the same one mixes alike.

    Returns:
        The batch with `image` in float32, from 0 to 255, and `target` `[b, C]`, the share that each class has of
        each photograph.
    """
    rows = len(batch["label"])
    mixing = Mixup(
        mixup_alpha=mixup, cutmix_alpha=cutmix, prob=share, mode="elem", label_smoothing=0.0, num_classes=rows
    )
    with _numpy_seeded(seed):
        # The rows themselves stand in for classes: what comes back says how much each row has of which.
        photos, parts = mixing(batch["image"].float(), torch.arange(rows, device=batch["label"].device))  # [b, b]
    found = {**batch, "image": photos, "target": parts @ one_hot(batch["label"], classes).to(parts.dtype)}
    if hide and "meta" in batch:
        whole = parts.diagonal()[:, None] == 1
        found["meta"] = torch.where(whole, batch["meta"], torch.nan)
    return found


def check_pairs(rows: int) -> None:
    """Raises ValueError where the rows of a process do not go up in pairs."""
    if rows % 2:
        raise ValueError(
            f"--mixup, --cutmix: each process mixes its {rows} rows in pairs: --batch-size is no "
            "multiple of 2 x processes"
        )


@contextlib.contextmanager
def _numpy_seeded(seed: Sequence[int]) -> Iterator[None]:
    """Seeds numpy's global generator, from which timm draws, and puts it back."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(np.random.SeedSequence(seed).generate_state(1)[0])  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
