"""What every source hands over: classes, records, and a way to the photographs. `shards.build` packs it."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xcon.records import SPLITS, ClassInfo, Record


class BrokenPhotographError(ValueError):
    """A photograph that does not decode; the message names its file."""


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One photograph as it goes into a tar, and what its file was like.

    Attributes:
        jpg: an upright sRGB JPEG.
        sha256: of the file as the source has it, 32 bytes.
        shorter_side: of the file's photograph, pixels.
        remark: what had to be guessed about the file; empty for nothing.
    """

    jpg: bytes
    sha256: bytes
    shorter_side: int
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A set of photographs before it is packed.

    Attributes:
        classes: in order of `class_id`, with the counts of `records`.
        records: every photograph once, in any order.
        photograph: image id -> its photograph, in any order and any process, so it must be picklable: a frozen
            dataclass with `__call__`, no closure. Raises `BrokenPhotographError` where the file does not decode.
        facts: what the source noticed, for people: shown by a dry run, kept in the card.
    """

    classes: tuple[ClassInfo, ...]
    records: tuple[Record, ...]
    photograph: Callable[[str], Photograph]
    facts: Mapping[str, Any]


def count(classes: Iterable[ClassInfo], records: Iterable[Record]) -> tuple[ClassInfo, ...]:
    """The classes, their counts taken from the records."""
    seen = Counter((record.class_id, record.split) for record in records)
    return tuple(
        dataclasses.replace(info, counts={split: seen[info.class_id, split] for split in SPLITS})
        for info in classes
    )
