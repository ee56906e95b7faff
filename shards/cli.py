"""`xcon-shards`: builds, verifies and describes shard sets.

    xcon-shards build nabirds --root nabirds.tar.gz --meta nabirds_with_loc_2019.json --out data/nabirds
    xcon-shards build synthetic --out shards/synthetic
    xcon-shards index tars
    xcon-shards verify data/nabirds
    xcon-shards info data/nabirds

Exit status: 0 all was done; 2 wrong usage or input, with one line that says what and where; 130 interrupted.
"""

import dataclasses
import functools
import operator
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from shards import build, foreign, verify
from shards.nabirds import NABirds
from shards.source import Room, Source
from shards.synthetic import Synthetic
from xcon.commandline import complain, guarded, one_line_errors
from xcon.records import Card
from xcon.tarindex import Keys

PROG = "xcon-shards"


SOURCES: tuple[type[Source], ...] = (NABirds, Synthetic)

# tyro reads unions; this one has a member for each source.
_Source = functools.reduce(operator.or_, (Annotated[s, tyro.conf.subcommand(s.NAME)] for s in SOURCES))


@dataclasses.dataclass(frozen=True)
class Build:
    """Build a shard set."""

    source: _Source  # type: ignore[valid-type]
    """What the shards are made of."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check every byte of a shard set: hashes, indexes, records, labels, photographs."""

    folder: tyro.conf.Positional[Path]
    """The shard set."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Show what a shard set holds."""

    folder: tyro.conf.Positional[Path]
    """The shard set."""


@dataclasses.dataclass(frozen=True)
class Index:
    """Make a shard set of anybody's WebDataset tars: an index beside each, and a card. They are not changed."""

    folder: tyro.conf.Positional[Path]
    """Folder of the tars."""
    keys: Keys
    out: Path | None = None
    """Folder for indices, card and links to the tars; by default the folder itself."""
    pattern: str = "**/*.tar"
    """Names of the tars, within the folder."""
    split: Literal["train", "val", "test"] | None = None
    """Split of all tars; by default as their names say, else train."""
    caption: str | None = None
    """Caption by class; may name {name}, {species}, {plumage}. By default each sample's txt."""


Command = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Index, tyro.conf.subcommand("index")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main() -> None:
    """Runs one command."""
    guarded(run, PROG)


def run() -> None:
    """Reads the command line and does what it says."""
    console = Console(soft_wrap=True, highlight=False)
    with one_line_errors(PROG):
        command = tyro.cli(
            Command,
            prog=PROG,
            description=__doc__,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )
    if isinstance(command, Build):
        _build(command.source, console)
    elif isinstance(command, Verify):
        _verify(command.folder, console)
    elif isinstance(command, Index):
        _index(command, console)
    else:
        verify.show(Card.load(command.folder), command.folder, console)


def _build(source: Source, console: Console) -> None:
    source.check()
    if source.dry_run:
        with tempfile.TemporaryDirectory() as name:
            _show(build.describe(source.plan(Room(Path(name), console))), console)
        console.print("dry run: nothing was written")
        return
    if source.out is None:
        raise ValueError("--out DIR is needed, the folder of the new shard set; or --dry-run")
    start = time.monotonic()
    with build.workspace(source.out) as folder:
        plan = source.plan(Room(folder, console))
        card = build.pack(
            plan,
            folder,
            console,
            template=source.caption,
            samples_per_shard=source.samples_per_shard,
            seed=source.seed,
            drop_broken=source.drop_broken,
            made_by=_made_by(source),
        )
    _show(build.describe(plan), console)
    shards = [shard for split in card.splits.values() for shard in split]
    if dropped := card.made_by["dropped"]:
        console.print(f"dropped: {dropped:,} that do not decode, see {source.out / build.DROPPED_NAME}")
    console.print(
        f"{source.out}: {sum(s.samples for s in shards):,} photographs in {len(shards):,} shards, "
        f"{sum(s.size for s in shards) / 1e6:,.1f} MB, {time.monotonic() - start:,.1f} s"
    )


def _index(command: Index, console: Console) -> None:
    out = command.out or command.folder
    card, left_out = foreign.index(
        command.folder,
        out,
        console,
        pattern=command.pattern,
        split=command.split,
        keys=command.keys,
        template=command.caption,
    )
    for reason, number in left_out.items():
        console.print(f"left out: {number:,} {reason}", markup=False)
    counts = ", ".join(f"{split} {card.samples(split):,}" for split in card.splits)
    console.print(f"{out}: {counts} records of {len(card.classes):,} classes", markup=False)


def _made_by(source: Source) -> dict[str, Any]:
    """How the set was made, without what differs between two machines that make the same set."""
    settings = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    for name in ("out", "dry_run", "keep_source"):
        settings.pop(name, None)
    named = {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}
    versions = {name: version(name) for name in ("xcon", "pillow", "numpy")}
    return {
        "source": source.NAME,
        **named,
        "versions": versions,
    }


def _show(facts: Mapping[str, str], console: Console) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        console.print(f"{name:<{width}}  {value}", markup=False)


def _verify(folder: Path, console: Console) -> None:
    """Raises ValueError with the only problem or, after a line for each, with their number."""
    problems = list(verify.problems(Card.load(folder), folder, console))
    if len(problems) == 1:
        raise ValueError(problems[0])
    for problem in problems:
        complain(PROG, problem)
    if problems:
        raise ValueError(f"{folder}: {len(problems)} problems")
    console.print(f"{folder}: whole, every byte as the card says")


if __name__ == "__main__":
    main()
