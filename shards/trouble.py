"""What is wrong with photographs: each a row of `report.csv`, counted, and left out where `--drop` says so.

- broken: does not decode. Left out or an error.
- tiny: its shorter side has fewer pixels than `--tiny`.
- profile: its colours are described by a profile that cannot be used, and taken as sRGB.
- duplicate: the same file as another of its split and class.
- leakage: the same file as one of another split.
- conflict: the same file as one of another class.

Of files that are the same one is kept: of the test split before val before train, so that nothing of what is
tested on is trained on, then the first by id.
"""

import csv
import dataclasses
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from xcon.records import SPLITS, Record, atomic_write

REPORT_NAME = "report.csv"
SAME_FILE = ("duplicate", "leakage", "conflict")
KINDS = ("broken", "tiny", "profile", *SAME_FILE)
DIGEST = 32  # bytes; zeros stand for a file that does not decode


@dataclasses.dataclass(frozen=True)
class Trouble:
    """One row of the report.

    Attributes:
        image_id, split, class_name: of the photograph.
        kind: one of `KINDS`.
        detail: for people.
        dropped: whether the photograph is left out.
    """

    image_id: str
    split: str
    class_name: str
    kind: str
    detail: str
    dropped: bool


def of_record(record: Record, kind: str, detail: str, *, dropped: bool) -> Trouble:
    """The trouble of one record."""
    return Trouble(record.image_id, record.split, record.class_name, kind, detail, dropped)


def same_files(records: Sequence[Record], digests: bytes, *, drop: bool) -> Iterator[Trouble]:
    """The records whose file another one has, but for the one that is kept.

    Args:
        records: N of them.
        digests: N times `DIGEST` bytes.
        drop: whether they are left out.
    """
    hashes = np.frombuffer(digests, dtype=f"S{DIGEST}")  # [N]; zeros at the end do not count, lengths are equal
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    groups: dict[int, list[Record]] = defaultdict(list)
    for number in np.flatnonzero((counts[group] > 1) & (hashes != b"")).tolist():
        groups[int(group[number])].append(records[number])
    for same in groups.values():
        kept, *others = sorted(same, key=lambda r: (-SPLITS.index(r.split), r.image_id))
        for record in others:
            detail = f"the same file as {kept.image_id} ({kept.split}, {kept.class_name})"
            for kind in _kinds(record, kept):
                yield of_record(record, kind, detail, dropped=drop)


def _kinds(record: Record, kept: Record) -> list[str]:
    found = [kind for kind, is_it in (
        ("leakage", record.split != kept.split),
        ("conflict", record.class_id != kept.class_id),
    ) if is_it]  # fmt: skip
    return found or ["duplicate"]


def count_kinds(troubles: Iterable[Trouble]) -> dict[str, int]:
    """Kind -> rows, in order of `KINDS`; kinds that there are none of are left out."""
    counted = Counter(trouble.kind for trouble in troubles)
    return {kind: counted[kind] for kind in KINDS if counted[kind]}


def write_report(folder: Path, troubles: Sequence[Trouble]) -> None:
    """Writes `report.csv`; without trouble there is none."""
    if not troubles:
        (folder / REPORT_NAME).unlink(missing_ok=True)
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image_id", "split", "class", "kind", "detail", "dropped"])
    for t in troubles:
        dropped = "yes" if t.dropped else "no"
        table.writerow([t.image_id, t.split, t.class_name, t.kind, t.detail, dropped])
    with atomic_write(folder / REPORT_NAME) as file:
        file.write(text.getvalue().encode())


def dropped_copies(folder: Path) -> frozenset[str]:
    """The ids that a finished set left out because another record has their file."""
    if not (folder / REPORT_NAME).is_file():
        return frozenset()
    with (folder / REPORT_NAME).open(newline="", encoding="utf-8") as file:
        rows: Iterable[Mapping[str, str]] = csv.DictReader(file)
        return frozenset(r["image_id"] for r in rows if r["kind"] in SAME_FILE and r["dropped"] == "yes")
