"""A source: settings of its own beside those that every source has, and a plan made from them.

A new kind of source is a module with one such class, named in `shards.cli.SOURCES`.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from shards import photographs
from shards.plan import Plan
from xcon.records import PAPER_CAPTION, ClassInfo, caption

SPOOL_NAME = ".spool"  # for a source that must be read in its own order
DRAWN_NAME = ".source"  # for a source that is made before it is packed


@dataclasses.dataclass(frozen=True)
class Room:
    """Where a source works.

    Attributes:
        folder: takes `SPOOL_NAME` and `DRAWN_NAME`, which are removed at the end.
        console: for the progress.
    """

    folder: Path
    console: Console


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What every source is told."""

    NAME: ClassVar[str]  # on the command line

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
    drop_broken: bool = False
    """Leave out photographs that do not decode, instead of failing."""
    dry_run: bool = False
    """Print the counts and write nothing."""

    def check(self) -> None:
        """Raises ValueError for a setting that could only fail later."""
        self._check_numbers(size=(1, 65_500), quality=(1, 95), samples_per_shard=(1, 1_000_000), seed=(0, 2**63))
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
        return partial(photographs.fit, size=self.size, quality=self.quality)

    def _check_numbers(self, **ranges: tuple[int, int]) -> None:
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: a number from {low} to {high:,} is needed")
