"""`xcon-shards`: builds, verifies and describes shard sets.

    xcon-shards build nabirds --root nabirds.tar.gz --meta nabirds_with_loc_2019.json --out data/nabirds
    xcon-shards build synthetic --out shards/synthetic
    xcon-shards verify data/nabirds
    xcon-shards info data/nabirds

Exit status: 0 all was done; 2 wrong usage or input, with one line that says what and where; 130 interrupted.
"""

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import tyro
from rich.console import Console

from shards import archive, build, nabirds, photographs, synthetic, verify
from shards.locations import LOCATION_FILE, read_locations
from shards.plan import Plan
from xcon.commandline import complain, guarded, one_line_errors
from xcon.records import PAPER_CAPTION, Card, ClassInfo, caption

PROG = "xcon-shards"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """What every source is told."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class NABirds(Packing):
    """Shards of the NABirds release."""

    root: Path
    """The release: its folder, or its .tar.gz as downloaded."""
    meta: Path | None = None
    """nabirds_with_loc_2019.json of geo_prior: places, dates, val. Without it there are none."""
    val_per_class: int = 0
    """Without --meta: photographs of each class drawn from train for val."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(Packing):
    """Shards of drawn birds: look-alike species that only place and season tell apart."""

    classes: int = 12
    """Species."""
    look_alikes: int = 3
    """Species in a group that look the same."""
    per_class: int = 80
    """Photographs of each species, a quarter of them test."""
    val_per_class: int = 4
    """Photographs of each species drawn from train for val."""
    missing: float = 0.03
    """Share of photographs without place and date."""
    keep_source: Path | None = None
    """New folder that keeps the drawn release in the layout of NABirds."""


@dataclasses.dataclass(frozen=True)
class Build:
    """Build a shard set."""

    source: (
        Annotated[NABirds, tyro.conf.subcommand("nabirds")]
        | Annotated[Synthetic, tyro.conf.subcommand("synthetic")]
    )


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


Command = (
    Annotated[Build, tyro.conf.subcommand("build")]
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
    else:
        verify.show(Card.load(command.folder), command.folder, console)


def _build(source: NABirds | Synthetic, console: Console) -> None:
    _check(source)
    if source.dry_run:
        with tempfile.TemporaryDirectory() as name, _spool(Path(name)) as spool:
            _show(build.describe(_plan(source, Path(name), spool, console)), console)
        console.print("dry run: nothing was written")
        return
    if source.out is None:
        raise ValueError("--out DIR is needed, the folder of the new shard set; or --dry-run")
    start = time.monotonic()
    with build.workspace(source.out) as folder, _spool(folder) as spool:
        plan = _plan(source, folder, spool, console)
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


def _spool(folder: Path) -> BinaryIO:
    return (folder / build.SPOOL_NAME).open("w+b")


def _check(source: NABirds | Synthetic) -> None:
    """Raises ValueError for a setting that no source can use."""
    for name, low, high in (
        ("size", 1, 65_500),
        ("quality", 1, 95),
        ("samples_per_shard", 1, 1_000_000),
        ("seed", 0, 2**63),
        ("val_per_class", 0, 1_000_000),
    ):
        if not low <= getattr(source, name) <= high:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(source, name)}: a number from {low} to {high:,} is needed")
    # The classes are known late, the fields that a class can have at once.
    caption(source.caption, ClassInfo(0, 0, "any class", "any", ("any",), {}))
    if isinstance(source, Synthetic) and source.keep_source and source.dry_run:
        raise ValueError("--keep-source: unused in a dry run, which writes nothing")
    if isinstance(source, NABirds) and source.meta is not None and source.val_per_class:
        raise ValueError(f"--val-per-class {source.val_per_class}: --meta says what is val; give one of them")


def _plan(source: NABirds | Synthetic, folder: Path, spool: BinaryIO, console: Console) -> Plan:
    if isinstance(source, NABirds):
        return _nabirds_plan(source, spool, console)
    return _synthetic_plan(source, folder, console)


def _nabirds_plan(source: NABirds, spool: BinaryIO, console: Console) -> Plan:
    fit = partial(photographs.fit, size=source.size, quality=source.quality)
    locations = None if source.meta is None else read_locations(source.meta)
    if archive.is_archive(source.root):
        keep = None if source.dry_run else fit
        release = nabirds.read_archive(source.root, console, keep, archive.Spool(spool))
    else:
        release = nabirds.read_folder(source.root, fit)
    if not source.dry_run:
        nabirds.check_photographs(release)
    return nabirds.plan(release, locations, val_per_class=source.val_per_class, seed=source.seed)


def _synthetic_plan(source: Synthetic, folder: Path, console: Console) -> Plan:
    keep = source.keep_source is not None and not source.dry_run
    root = source.keep_source if keep and source.keep_source else folder / build.SOURCE_NAME
    synthetic.draw(
        root,
        console,
        classes=source.classes,
        look_alikes=source.look_alikes,
        per_class=source.per_class,
        val_per_class=source.val_per_class,
        missing=source.missing,
        seed=source.seed,
    )
    release = nabirds.read_folder(root, partial(photographs.fit, size=source.size, quality=source.quality))
    locations = read_locations(root / LOCATION_FILE)
    return nabirds.plan(release, locations, val_per_class=0, seed=source.seed)


def _made_by(source: NABirds | Synthetic) -> dict[str, Any]:
    """How the set was made, without what differs between two machines that make the same set."""
    settings = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    for name in ("out", "dry_run", "keep_source"):
        settings.pop(name, None)
    named = {name: value.name if isinstance(value, Path) else value for name, value in settings.items()}
    versions = {name: version(name) for name in ("xcon", "pillow", "numpy")}
    return {"source": type(source).__name__.lower(), **named, "versions": versions}


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
