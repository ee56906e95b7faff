"""The files that an evaluation leaves in a run, and how they are called."""

import re
from collections.abc import Sequence
from pathlib import Path


def check_name(name: str, setting: str = "--name", *, taken: Sequence[str] = ()) -> None:
    """Raises ValueError unless an evaluation may be called so.

    Args:
        name: of the evaluation.
        setting: that gave it.
        taken: names that would be those of other results.
    """
    if name in taken:
        raise ValueError(f"{setting} {name}: other results are called so, take another name")
    if not re.fullmatch(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*", name):
        raise ValueError(f"{setting} {name!r}: letters and digits are needed, with single dashes between them")


def predictions(run: Path, name: str | None) -> Path:
    """The predictions of an evaluation; None: that of the test split, which has no name."""
    return run / (f"predictions-{name}.parquet" if name else "predictions.parquet")


def measures(run: Path, name: str | None) -> Path:
    """The figures of an evaluation; None: that of the test split, which has no name."""
    return run / (f"metrics-{name}.json" if name else "metrics.json")
