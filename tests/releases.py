"""Small releases in the layout of NABirds, from photographs given as bytes."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_release(root: Path, photographs: Iterable[tuple[str, int, str, bytes]]) -> Path:
    """Writes (image id, raw class id 2 or 3, train or test, file) as a release; returns its folder."""
    rows = list(photographs)
    tables = {
        "images.txt": [f"{i} {raw}/{i}.jpg" for i, raw, _, _ in rows],
        "image_class_labels.txt": [f"{i} {raw}" for i, raw, _, _ in rows],
        "train_test_split.txt": [f"{i} {int(split == 'train')}" for i, _, split, _ in rows],
        "bounding_boxes.txt": [f"{i} 0 0 9 9" for i, *_ in rows],
        "sizes.txt": [f"{i} 40 40" for i, *_ in rows],
        "classes.txt": ["0 Birds", "1 Larks", "2 Marsh Lark", "3 Bog Lark"],
        "hierarchy.txt": ["1 0", "2 1", "3 1"],
    }
    for image_id, raw, _, data in rows:
        (root / f"images/{raw}").mkdir(parents=True, exist_ok=True)
        (root / f"images/{raw}/{image_id}.jpg").write_bytes(data)
    for name, lines in tables.items():
        (root / name).write_text("".join(f"{line}\n" for line in lines))
    return root


def noise(seed: int, side: int = 40) -> bytes:
    """A JPEG like no other."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()
