"""`xcon-shards`: builds, verifies, describes and exports shard sets.

    xcon-shards build nabirds --root nabirds.tar.gz --meta nabirds_with_loc_2019.json --out data/nabirds
    xcon-shards build synthetic --out shards/synthetic
    xcon-shards index tars
    xcon-shards verify data/nabirds
    xcon-shards audit data/nabirds
    xcon-shards info data/nabirds --map places.png
    xcon-shards export data/nabirds --to datasets --out nabirds-parquet

Exit status: 0 all was done; 2 wrong usage or input, with one line that says what and where; 130 interrupted.
"""

import dataclasses
import functools
import operator
import shlex
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from shards import audit, build, foreign, info, repair, verify
from shards.hub import Hub
from shards.imagefolder import ImageFolder
from shards.inaturalist import INaturalist
from shards.nabirds import NABirds
from shards.source import Room, Source
from shards.synthetic import Synthetic
from shards.trouble import REPORT_NAME
from shards.workspace import Share, workspace
from xcon.commandline import complain, guarded, one_line_errors
from xcon.records import CARD_NAME, Card
from xcon.shardset import ShardSet
from xcon.tarindex import Keys

PROG = "xcon-shards"

SOURCES: tuple[type[Source], ...] = (NABirds, ImageFolder, INaturalist, Hub, Synthetic)

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
    repair: bool = False
    """Rebuild indexes from their tars, and remove the hidden files of a killed build; writes nothing else."""
    workers: int | None = None
    """Processes; without it one for each core, fewer for a small set."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Show what a shard set holds."""

    folder: tyro.conf.Positional[Path]
    """The shard set."""
    classes: bool = False
    """List the classes: records by split, share with a place and with a date."""
    picture: Annotated[Path | None, tyro.conf.arg(name="map", metavar="FILE.png")] = None
    """Draw where and when the records of the commonest classes are."""
    species: tuple[str, ...] = ()
    """Draw these on one map instead; a name without its plumage in parentheses takes all plumages."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a shard set as plain WebDataset, or as a folder for datasets.load_dataset."""

    folder: tyro.conf.Positional[Path]
    """The shard set."""
    to: Literal["webdataset", "datasets"]
    """The form."""
    out: Path
    """New folder."""
    licence: Annotated[str | None, tyro.conf.arg(name="license")] = None
    """Of the photographs, as the hub writes it (cc-by-4.0, other); goes into the README."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """Show what test records share with train, and what their places and dates alone give."""

    folder: tyro.conf.Positional[Path]
    """The shard set."""
    out: Path | None = None
    """A new .json file for the numbers."""
    seed: int = 0
    """Of what is drawn."""


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
    | Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Export, tyro.conf.subcommand("export")]
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
        _verify(command, console)
    elif isinstance(command, Index):
        _index(command, console)
    elif isinstance(command, Audit):
        audit.audit(ShardSet(command.folder), console, out=command.out, seed=command.seed)
    elif isinstance(command, Info):
        _info(command, console)
    else:
        _export(command, console)


def _build(source: Source, console: Console) -> None:
    source.check()
    if source.dry_run:
        with tempfile.TemporaryDirectory() as name:
            _show(build.describe(source.plan(Room(Path(name), console))), console)
        console.print("dry run: nothing was written")
        return
    if source.out is None:
        raise ValueError("--out DIR is needed, the folder of the new shard set; or --dry-run")
    settings = build.Settings(
        template=source.caption,
        samples_per_shard=source.samples_per_shard,
        seed=source.seed,
        drop=frozenset(source.drop),
        tiny=source.tiny,
        workers=source.workers,
        made_by=source.made_by,
    )
    if source.repair:
        with repair.workspace(source.out) as work:
            card = repair.check(source.out, settings.made_by)
            plan = source.plan(Room(work, console, source.workers))
            repair.mend(plan, card, source.out, work, console, settings)
        return
    if source.tasks > 1 and repair.is_made(source.out, settings.made_by):
        console.print(f"{source.out}: whole already")
        return
    start = time.monotonic()
    with workspace(source.out, Share(source.task, source.tasks)) as space:
        plan = source.plan(Room(space.work, console, source.workers))
        _show(build.describe(plan), console)
        built = build.pack(plan, space, console, settings)
    if built is not None:
        _tell(built, source.out, time.monotonic() - start, console)


def _index(command: Index, console: Console) -> None:
    out = command.out or command.folder
    card, left_out, placed = foreign.index(
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
    known = ", ".join(f"{n:,} with a {what}" for what, n in placed.items())
    console.print(f"{out}: {counts} records of {len(card.classes):,} classes; {known}", markup=False)


def _tell(card: Card, out: Path, seconds: float, console: Console) -> None:
    """What was built, and what is wrong with it."""
    shards = [shard for split in card.splits.values() for shard in split]
    counts = ", ".join(f"{split} {card.samples(split):,}" for split in card.splits)
    if counted := card.made_by["trouble"]:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in counted.items())
        console.print(f"trouble: {kinds}; dropped: {card.made_by['dropped']:,}; see {out / REPORT_NAME}")
    console.print(f"shared with train: {audit.in_short(ShardSet(out))}; xcon-shards audit {out} tells more")
    console.print(
        f"{out}: {sum(s.samples for s in shards):,} photographs ({counts}) in {len(shards):,} shards, "
        f"{sum(s.size for s in shards) / 1e6:,.1f} MB, {seconds:,.1f} s"
    )


def _show(facts: Mapping[str, str], console: Console) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        console.print(f"{name:<{width}}  {value}", markup=False)


def _verify(command: Verify, console: Console) -> None:
    """Raises ValueError with the only problem or, after a line for each, with their number."""
    folder = command.folder
    if command.workers is not None and command.workers < 1:
        raise ValueError(f"--workers {command.workers}: at least 1 is needed")
    card = Card.load(folder)
    outcome = verify.check(card, folder, console, repair=command.repair, workers=command.workers)
    for line in outcome.repaired:
        console.print(line, markup=False)
    problems = outcome.problems
    if outcome.lost and command.repair:
        problems = [*problems, f"{folder}: {_rebuild(card, folder)}"]
    if len(problems) == 1:
        raise ValueError(problems[0])
    for problem in problems:
        complain(PROG, problem)
    if problems:
        raise ValueError(f"{folder}: {len(outcome.problems):,} problems")
    console.print(f"{folder}: whole, every byte as the card says", markup=False)


def _rebuild(card: Card, folder: Path) -> str:
    """What brings tars back: the command that built them, with the settings of the card that are not the defaults.

    The card knows files by their names only.
    """
    name = str(card.made_by.get("source", "SOURCE"))
    if name == "index":
        return f"bring its tars back from where they came, or remove {CARD_NAME} and index those that are there"
    settings = [f for source in SOURCES if name == source.NAME for f in dataclasses.fields(source)]
    words = [word for setting in settings for word in _option(setting, card.made_by.get(setting.name))]
    command = shlex.join(["xcon-shards", "build", name, *words, "--out", str(folder), "--repair"])
    return f"with this machine's paths, run: {command}"


def _option(setting: dataclasses.Field, value: Any) -> list[str]:
    """A setting as it stands on the command line; nothing where the card has it not, or its default."""
    if value is None or value in ([], setting.default):
        return []
    flag = f"--{setting.name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def _info(command: Info, console: Console) -> None:
    if command.species and command.picture is None:
        raise ValueError("--species: is drawn, so --map FILE.png is needed")
    if command.picture is not None and command.picture.suffix != ".png":
        raise ValueError(f"--map {command.picture}: a name ending in .png is needed")
    card = Card.load(command.folder)
    info.show(card, command.folder, console)
    if command.classes:
        info.show_classes(card, command.folder, console)
    if command.picture is not None:
        from shards import atlas  # noqa: PLC0415 - matplotlib alone takes a second to import

        atlas.draw(card, command.folder, command.species, command.picture)


def _export(command: Export, console: Console) -> None:
    from shards import export  # noqa: PLC0415 - datasets alone takes a second to import

    card = Card.load(command.folder)
    counts = export.export(card, command.folder, command.out, console, to=command.to, licence=command.licence)
    shown = ", ".join(f"{number:,} {split}" for split, number in counts.items())
    console.print(f"{command.out}: {sum(counts.values()):,} photographs ({shown})", markup=False)


if __name__ == "__main__":
    main()
