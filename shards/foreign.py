"""Anybody's WebDataset tars become a shard set where they lie: an index beside each, and a card.

The tars are not changed. Labels come from the `json` or the `cls` of a sample, captions from its
`txt`; samples without image or label stay in the tars, unseen, and are counted.
"""

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from shards.observations import SPLIT_NAMES
from shards.progress import progress
from xcon.records import (
    CARD_NAME,
    PLAIN_CAPTION,
    SPLITS,
    Card,
    ClassInfo,
    Shard,
    atomic_write,
    caption,
    index_name,
    number_classes,
    sha256,
)
from xcon.tarindex import Keys, Label, Row, prefix_of, read, table, to_bytes


@dataclasses.dataclass(frozen=True)
class Tar:
    """One tar that was read.

    Attributes:
        name: within its folder, with slashes.
        split: that it belongs to.
        rows: its records.
    """

    name: str
    split: str
    rows: Sequence[Row]


def index(
    root: Path, out: Path, console: Console, *, pattern: str, split: str | None, keys: Keys, template: str | None
) -> tuple[Card, Counter[str], dict[str, int]]:
    """Reads every tar, writes an index for each and, last, the card.

    Args:
        root: folder of the tars.
        out: for indices and card; where it is another folder, links to the tars lie beside them.
        console: for the progress.
        pattern: of the tars' names, within `root`.
        split: of all tars; None: as their names say, `train` where they say nothing.
        keys: what the json members call things.
        template: of captions by class; None: each sample's `txt`, and a plain sentence where it has none.

    Returns:
        The card; what was left out: why -> how often; how many records have a place, and how many a date.

    Raises:
        ValueError: no tars, one that cannot be read in any order, labels of two kinds, nothing with a label.
        OSError: something cannot be read or written.
    """
    paths = _paths(root, out, pattern)
    tars, left_out = _read(root, paths, split, keys, console)
    prefixed = _repeats(row.image_id for tar in tars for row in tar.rows)
    if prefixed:
        tars = [dataclasses.replace(tar, rows=_prefixed(tar)) for tar in tars]
        if twice := next((tar for tar in tars if _repeats(row.image_id for row in tar.rows)), None):
            raise ValueError(f"{root / twice.name}: a key stands there twice, its members apart from each other")
    labels = number_classes(_of_one_kind(root, {row.label for tar in tars for row in tar.rows}))
    classes = _classes(tars, labels)
    captions = [caption(template or PLAIN_CAPTION, info) for info in classes]
    shards: dict[str, list[Shard]] = {}
    for tar in tars:
        target = out / tar.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to((root / tar.name).resolve())
        if not target.samefile(root / tar.name):
            raise ValueError(f"{target}: is another file than {root / tar.name}; name an empty folder with --out")
        with atomic_write(target.with_name(index_name(target.name))) as file:
            file.write(to_bytes(table(tar.rows, labels, captions, own_texts=template is None)))
        shard = Shard(tar.name, len(tar.rows), target.stat().st_size, sha256(target))
        shards.setdefault(tar.split, []).append(shard)
    made_by = {
        "source": "index", "keys": dataclasses.asdict(keys), "caption": template, "prefixed": prefixed,
        "left_out": dict(left_out),
    }  # fmt: skip
    card = Card(classes, {s: tuple(shards[s]) for s in SPLITS if s in shards}, made_by)
    card.save(out)
    rows = [row for tar in tars for row in tar.rows]
    known = {"place": [row.lon for row in rows], "date": [row.date for row in rows]}
    return card, left_out, {what: sum(not math.isnan(x) for x in values) for what, values in known.items()}


def _paths(root: Path, out: Path, pattern: str) -> list[Path]:
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    paths = sorted(path for path in root.glob(pattern) if path.is_file())
    if not paths:
        raise ValueError(f"{root}: no file is called {pattern}; --pattern names the tars")
    if wrong := [path for path in paths if path.suffix != ".tar"]:
        raise ValueError(f"{wrong[0]}: its name does not end in .tar, and is not read as one")
    if (out / CARD_NAME).exists():
        raise ValueError(f"{out}: already holds a shard set; remove its {CARD_NAME} to index it anew")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out}: cannot be written; name a folder for indices and card with --out")
    return paths


def _read(
    root: Path, paths: Sequence[Path], split: str | None, keys: Keys, console: Console
) -> tuple[list[Tar], Counter[str]]:
    tars, left_out = [], Counter[str]()
    with progress(console, "index", len(paths), "tars") as advance:
        for path in paths:
            rows, reasons = read(path, keys)
            left_out += reasons
            name = path.relative_to(root).as_posix()
            if rows:
                tars.append(Tar(name, split or split_of(name), rows))
            else:
                left_out["tars without a record"] += 1
            advance(1)
    if not tars:
        why = "; ".join(f"{number:,} {reason}" for reason, number in left_out.items())
        raise ValueError(f"{root}: no record with image and label in {len(paths):,} tars ({why})")
    return tars, left_out


def split_of(name: str) -> str:
    """The split that the last word of a name speaks of: `data/imagenet-val-000.tar` is val; else train."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLIT_NAMES[word] for word in reversed(words) if word in SPLIT_NAMES), "train")


def _repeats(ids: Iterable[str]) -> bool:
    seen = Counter(ids)
    return len(seen) < seen.total()


def _prefixed(tar: Tar) -> list[Row]:
    return [dataclasses.replace(row, image_id=prefix_of(tar.name) + row.image_id) for row in tar.rows]


def _of_one_kind(root: Path, labels: set[Label]) -> set[Label]:
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        examples = ", ".join(repr(next(label for label in labels if isinstance(label, kind))) for kind in kinds)
        raise ValueError(f"{root}: labels are numbers here, words there ({examples}); name one with --label-key")
    return labels


def _classes(tars: Iterable[Tar], labels: Mapping[Label, int]) -> tuple[ClassInfo, ...]:
    """The classes with their counts; each has the name that it is first called by."""
    names: dict[Label, str] = {}
    counts: Counter[tuple[Label, str]] = Counter()
    for tar in tars:
        for row in tar.rows:
            names.setdefault(row.label, row.name)
        counts.update((row.label, tar.split) for row in tar.rows)
    return tuple(
        ClassInfo(number, label, names[label], None, (), {split: counts[label, split] for split in SPLITS})
        for label, number in labels.items()
    )
