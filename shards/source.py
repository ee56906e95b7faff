"""A source: settings of its own beside those that every source has, and a plan made from them.

A new kind of source is a module with one such class, named in `shards.cli.SOURCES`.
"""

import dataclasses
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from shards import photographs
from shards.plan import Plan
from xcon.records import PAPER_CAPTION, SPLITS, ClassInfo, caption

SPOOL_NAME = ".spool"  # for a source that must be read in its own order
DRAWN_NAME = ".source"  # for a source that is made before it is packed


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a source works.

    Attributes:
        folder: takes `SPOOL_NAME` and `DRAWN_NAME`, which are removed at the end.
        console: for the progress.
        workers: processes that it may start.
    """

    folder: Path
    console: Console
    workers: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What every source is told."""

    NAME: ClassVar[str]  # on the command line
    # Of this run and this machine: whatever they are, the set is the same.
    ELSEWHERE: ClassVar[frozenset[str]] = frozenset(
        {"out", "dry_run", "keep_source", "workers", "task", "tasks", "repair"}
    )

    out: Path | None = None
    """Folder of the new shard set; needed but for a dry run."""
    size: int = 384
    """Shorter side of a photograph in the shards, pixels; smaller ones keep their bytes."""
    quality: int = 90
    """Of the JPEGs that are made smaller, 1 to 95."""
    samples_per_shard: int = 256
    """Photographs per tar."""
    seed: int = 0
    """Of the order of the photographs, and of whatever else is drawn."""
    caption: str = PAPER_CAPTION
    """Pseudo-caption; may name {name}, {species}, {plumage}, {scientific_name}, {family}."""
    drop: tuple[Literal["broken", "tiny", "duplicates"], ...] = ()
    """Photographs to leave out. report.csv lists all trouble; a broken one that is not dropped is an error. Of
    files that are the same, the test split's is kept, so that none of what is tested on is trained on."""
    tiny: int = 32
    """Photographs whose shorter side has fewer pixels are tiny."""
    workers: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that decode and write. The set is the same with any number of them."""
    task: int = 0
    """Build only each --tasks-th shard, from this one on: a task of an array job. The last to end writes the card.
    Every task reads --root itself, an archive from its first byte to its last."""
    tasks: int = 1
    """Tasks that share the work."""
    repair: bool = False
    """Build shards and indices of a finished set anew that are missing or damaged, and nothing else."""
    dry_run: bool = False
    """Print the counts and write nothing."""

    def check(self) -> None:
        """Raises ValueError for a setting that could only fail later."""
        self._check_numbers(size=(1, 65_500), quality=(1, 95), samples_per_shard=(1, 1_000_000), seed=(0, 2**63))
        self._check_numbers(tiny=(0, 65_500), workers=(1, 1024), tasks=(1, 1_000_000), task=(0, self.tasks - 1))
        if self.repair and (self.dry_run or self.tasks > 1):
            raise ValueError(f"--repair: not together with {'--dry-run' if self.dry_run else '--tasks'}")
        # The classes are known late, the fields that a class can have at once.
        caption(self.caption, ClassInfo(0, 0, "any class", "any", ("any",), {}))

    def plan(self, room: Room) -> Plan:
        """What is to be packed.

        Raises:
            ValueError: the source cannot be read, or is not what it should be.
        """
        raise NotImplementedError

    @property
    def fit(self) -> photographs.Fit:
        """Makes a photograph small as the settings say; given its bytes and its name for messages."""
        return partial(photographs.take, size=self.size, quality=self.quality)

    @property
    def made_by(self) -> dict[str, Any]:
        """How the set is made, without what differs between two machines that make the same set."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in self.ELSEWHERE]
        settings = {name: getattr(self, name) for name in names}
        named = {name: _without_folder(value) for name, value in settings.items()}
        named["drop"] = sorted(self.drop)
        return {
            "source": self.NAME,
            **named,
            "versions": {name: version(name) for name in ("xcon", "pillow", "numpy")},
        }

    def _check_numbers(self, **ranges: tuple[int, int]) -> None:
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: a number from {low} to {high:,} is needed")


def _without_folder(setting: Any) -> Any:
    if isinstance(setting, tuple):
        return [_without_folder(value) for value in setting]
    if not isinstance(setting, Path):
        return setting
    split, equals, file = str(setting).partition("=")  # test=FILE
    return f"{split}={Path(file).name}" if equals and split in SPLITS else setting.name
