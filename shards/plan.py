"""What every source hands over: classes, records, and a way to the photographs. `shards.build` packs it."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xcon.records import SPLITS, ClassInfo, Record


class BrokenPhotographError(ValueError):
    """A photograph that does not decode; the message names its file."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A set of photographs before it is packed.

    Attributes:
        classes: in order of `class_id`, with the counts of `records`.
        records: every photograph once, in any order.
        photograph: image id -> the JPEG as it goes into the tar, in any order; raises
            `BrokenPhotographError` where the file does not decode.
        facts: what the source noticed, for people: shown by a dry run, kept in the card.
    """

    classes: tuple[ClassInfo, ...]
    records: tuple[Record, ...]
    photograph: Callable[[str], bytes]
    facts: Mapping[str, Any]


def count(classes: Iterable[ClassInfo], records: Iterable[Record]) -> tuple[ClassInfo, ...]:
    """The classes, their counts taken from the records."""
    seen = Counter((record.class_id, record.split) for record in records)
    return tuple(
        dataclasses.replace(info, counts={split: seen[info.class_id, split] for split in SPLITS})
        for info in classes
    )
