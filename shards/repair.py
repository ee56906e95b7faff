"""A finished set of which files are missing or damaged: those alone are made anew, to the bytes of the card."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from shards import trouble
from shards.build import Job, Settings, index_bytes, make
from shards.members import row_of, stored
from shards.plan import Plan
from shards.progress import progress
from shards.workspace import WORK, changes, full_disk
from xcon.records import CARD_NAME, Card, Record, Shard, atomic_write, sha256


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A folder in the set for what is made anew; it is removed at the end.

    Raises:
        FileNotFoundError, ValueError: no shard set, or one with a damaged card.
        OSError: no space left; the message says where.
    """
    Card.load(out)
    work = out / WORK.format(0)
    shutil.rmtree(work, ignore_errors=True)  # of a repair that was killed
    try:
        work.mkdir()
        yield work
    except OSError as error:
        if number := full_disk(error):
            reason = os.strerror(number).lower()
            raise OSError(f"{out}: {reason}; free some: a repair needs room for what it makes") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check(out: Path, made_by: Mapping[str, Any]) -> Card:
    """The card of a set that was made with these settings.

    Raises:
        ValueError: it was made with others; the message says which.
    """
    card = Card.load(out)
    if differences := _differences(card, made_by):
        raise ValueError(f"{out}: was made with other settings ({differences}); repair takes the same")
    return card


def is_made(out: Path, made_by: Mapping[str, Any]) -> bool:
    """Whether a whole set is there that was made with these settings."""
    return (out / CARD_NAME).is_file() and not _differences(Card.load(out), made_by)


def _differences(card: Card, made_by: Mapping[str, Any]) -> str:
    """Between settings alone: other versions may well give the same bytes, and the hashes tell."""
    settings = {name: value for name, value in made_by.items() if name in card.made_by and name != "versions"}
    return changes({name: card.made_by[name] for name in settings}, settings)


def mend(plan: Plan, card: Card, out: Path, work: Path, console: Console, settings: Settings) -> None:
    """Makes the missing and damaged files of a set again.

    Args:
        plan: what the set was made of.
        card: of the set; it is not changed.
        out: the set.
        work: an empty folder on the same file system.
        console: for the progress.
        settings: as when the set was made.

    Raises:
        ValueError: what is made now has other bytes than the card says; nothing of it is put in place.
        OSError: a file cannot be written.
    """
    shards = {shard.file: shard for listed in card.splits.values() for shard in listed}
    jobs = {job.file: job for job in settings.jobs(plan)}
    damaged = _damaged(out, shards, console)
    if unknown := [file for file in damaged if file not in jobs]:
        raise ValueError(f"{out / unknown[0]}: the source has too few photographs for it now, so it was another")
    if set(trouble.SAME_FILE) & set(card.made_by.get("trouble", {})) and not (out / trouble.REPORT_NAME).is_file():
        raise ValueError(f"{out / trouble.REPORT_NAME}: is missing, and says which copies were left out")
    dropped = trouble.dropped_copies(out)
    without = [
        Job(file, jobs[file].records, dropped & {r.image_id for r in jobs[file].records}) for file in damaged
    ]
    made = make(without, settings.maker(plan, work), console, settings.workers, "pack")
    if wrong := [file for file in damaged if made[file].shard != shards[file]]:
        raise ValueError(
            f"{out / wrong[0]}: would have other bytes than the card says: the source or the version of Pillow is "
            "another than when the set was made; nothing was put in place"
        )
    for file in damaged:
        for name in (shards[file].index_file, file):
            (work / name).replace(out / name)
    indices = [shard for shard in shards.values() if _mend_index(out, shard)]
    console.print(f"{out}: {len(damaged):,} shards and {len(indices):,} indices made again, the rest was whole")


def _damaged(out: Path, shards: Mapping[str, Shard], console: Console) -> list[str]:
    found = []
    with progress(console, "check", sum(s.size for s in shards.values()) / 1e6, "MB") as advance:
        for shard in shards.values():
            path = out / shard.file
            if not path.is_file() or path.stat().st_size != shard.size or sha256(path) != shard.sha256:
                found.append(shard.file)
            advance(shard.size / 1e6)
    return found


def _mend_index(out: Path, shard: Shard) -> bool:
    """Writes the index of a whole tar anew where it is not what the tar says; whether it did."""
    data, path = index_of(out / shard.file), out / shard.index_file
    if path.is_file() and path.read_bytes() == data:
        return False
    with atomic_write(path) as file:
        file.write(data)
    return True


def index_of(path: Path) -> bytes:
    """The index of a whole tar, from the tar alone."""
    return index_bytes([row_of(Record.from_json(found.members["json"]), found) for found in stored(path)])
