"""Photographs outside a shard set: read, scored, their most probable classes listed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xcon import images
from xcon.images import Transform

# Legend: b photographs at once, S side of a photograph, C classes.


def rank(
    files: Sequence[Path],
    transform: Transform,
    score: Callable[[Tensor], Tensor],
    *,
    classes: Sequence[Mapping[str, Any]],
    top: int,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """The most probable classes of each photograph, best first.

    Args:
        files: of the photographs.
        transform: photograph -> what the model sees of it.
        score: `[b, 3, S, S]` -> `[b, C]` class scores before the softmax.
        classes: C, with their `raw_class_id` and `name`.
        top: classes to list for each.
        batch_size: photographs at once.

    Yields:
        `file`, `rank` (1 is best), `class_id`, `raw_class_id`, `name`, `probability`.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    for start in range(0, len(files), batch_size):
        some = files[start : start + batch_size]
        logits = score(torch.stack([transform(read(file)) for file in some]))
        best = logits.float().softmax(dim=1).cpu().topk(min(top, len(classes)))
        for file, values, ids in zip(some, best.values.tolist(), best.indices.tolist(), strict=True):
            for n, (c, p) in enumerate(zip(ids, values, strict=True), start=1):
                info = {name: classes[c][name] for name in ("raw_class_id", "name")}
                yield {"file": str(file), "rank": n, "class_id": c, **info, "probability": p}


def read(file: Path) -> Tensor:
    """The pixels of a photograph, `[3, H, W]` uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not decode; the message names it.
    """
    if file.is_dir():
        raise ValueError(f"{file}: a folder; give its files, as {file}/*.jpg")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return images.decode(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what `rank` gave."""
    table = Table("file", "rank", "class", "probability")
    for row in rows:
        table.add_row(Path(row["file"]).name, str(row["rank"]), row["name"], f"{row['probability']:.3f}")
    Console().print(table)
