"""Runs an entry point in this process, as the command line would."""

import sys
from collections.abc import Callable, Sequence
from unittest import mock


def run(main: Callable[[], None], argv: Sequence[str]) -> int:
    """The exit status of `main` with these arguments."""
    with mock.patch.object(sys, "argv", ["program", *map(str, argv)]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0
