"""Command lines: read with tyro; a user's mistake is one line and exit status 2, never a traceback.

Imports nothing heavy, so that wrong usage is answered at once by whatever imports nothing heavy either.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import tyro

Settings = TypeVar("Settings")

_FRAME = "\u2502\u256d\u256e\u2570\u256f "
_RULES = ({"\u2500"}, {"-"})


def guarded(body: Callable[[], None], program: str) -> None:
    """Runs an entry point; a user's mistake (ValueError, OSError) becomes one line and exit status 2.

    With `XCON_TRACEBACK=1` in the environment the whole traceback is shown instead. The line also goes to the
    end of the file that `XCON_FAILED` names: a batch script shows it again below what launchers say of a failure.
    """
    rank = os.environ.get("RANK", "0")
    program += f" [rank {rank}]" if rank != "0" else ""
    try:
        body()
    except (ValueError, OSError) as error:
        if os.environ.get("XCON_TRACEBACK"):
            raise
        complain(program, _words(error))
        if told := os.environ.get("XCON_FAILED"):
            with contextlib.suppress(OSError), Path(told).open("a", encoding="utf-8") as file:
                file.write(f"{program}: {' '.join(_words(error).split())}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        complain(program, "interrupted; give the same command again")
        raise SystemExit(130) from None


def _words(error: Exception) -> str:
    """What an error says; of one from the system file and reason, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def complain(program: str, message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"{program}: {' '.join(message.split())}\n")


def say(result: str) -> None:
    """What came of a command, on stdout: as it is, lines of any length."""
    sys.stdout.write(f"{result}\n")


def parse(settings: type[Settings], program: str) -> Settings:
    """Reads the command line into a dataclass of settings.

    Raises:
        ValueError: an unknown setting, a missing one, a value of the wrong kind.
    """
    with one_line_errors(program):
        return tyro.cli(settings, prog=program)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turns the box that tyro draws for a wrong command line into one ValueError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ValueError(f"{one_line(printed.getvalue())} (see {program} --help)") from None


def one_line(box: str) -> str:
    """The message of tyro's box, and the subcommands there are, without the help that follows.

    The box is drawn in lines or, where stdout is not UTF-8, in dashes: a title, then sections between rules.
    """
    sections: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip(_FRAME)
        if any(set(text) <= rule for rule in _RULES):
            sections.append([])
        else:
            sections[-1].append(text)
    message, *others = [" ".join(words) for words in sections if words]
    known = [text for text in others if text.startswith("Available subcommands")]
    return ". ".join([re.sub(r"^Error parsing [A-Z]\w*: ", "", message), *known])
