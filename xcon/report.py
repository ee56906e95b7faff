"""Compares evaluated runs on the same test images: xcon report RUN... [--out FILE.md FILE.png ...]."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from xcon import commandline, comparison, results, runfiles

PROGRAM = "xcon report"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compares evaluated runs on the same test images."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Run folders that xcon predict has evaluated; those that differ only in their seed make one row."""
    out: tuple[Path, ...] = ()
    """Also write it here: .md (tables), .json (everything), .parquet (a row per run), .png (a figure); several."""
    name: str | None = None
    """The evaluation to read, as xcon predict --name called it; none: that of the test split."""
    baseline: comparison.Baseline = "first"
    """first: each row is compared with the first one. last: the last row is compared with each other one."""
    resamples: int = 10_000
    """Resamples of the paired bootstrap."""

    def __post_init__(self) -> None:
        """Refuses settings that could only fail later.

        Raises:
            ValueError: names the setting.
        """
        if not self.runs:
            raise ValueError("RUN...: name at least one run folder")
        if self.resamples < 1:
            raise ValueError(f"--resamples {self.resamples}: at least 1 is needed")
        if self.name is not None:
            runfiles.check_name(self.name)
        for out in self.out:
            if not out.parent.is_dir():
                raise ValueError(f"--out {out}: no such folder as {out.parent}")
            if out.suffix not in results.FORMATS:
                raise ValueError(f"--out {out}: a name ending in {', '.join(results.FORMATS)} is needed")


def run() -> None:
    """Reads the command line, compares, prints, writes."""
    settings = commandline.parse(Settings, PROGRAM)
    names = [settings.name] * len(settings.runs)
    found = comparison.compare(
        settings.runs, resamples=settings.resamples, names=names, baseline=settings.baseline
    )
    results.show(found, Console())
    for out in settings.out:
        results.write(found, out)


def main() -> None:
    """Entry point."""
    commandline.guarded(run, PROGRAM)


if __name__ == "__main__":
    main()
