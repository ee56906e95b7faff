"""The folder of a shard set while it is built: what is believed of an earlier run, and what is removed.

.xcon-build                 stands while a set is built: the settings and the plan it was begun with
.work-0                     what the source needs meanwhile, and one more for each further task of an array
.train-000000.made.json     beside a finished shard: its hash, what was met in it (see `shards.build.Made`)
.finish                     the claim of the task of an array that makes the card

All are gone when the card is there. A killed build leaves them, and the same command goes on from them.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.trouble import REPORT_NAME
from xcon.records import BUILDING_NAME, CARD_NAME, SPLITS, atomic_write

_STEM = rf"({'|'.join(SPLITS)})-\d{{6}}"
_MARKER = BUILDING_NAME
_CLAIM = ".finish"
WORK = ".work-{}"
# A name with more at its end is that of a file that was being written (`atomic_write`).
_OF_SHARD = re.compile(rf"\.{{0,2}}(?P<stem>{_STEM})\.(tar|index\.parquet|made\.json)(?P<partial>\..+)?")
_OURS = re.compile(
    rf"{_OF_SHARD.pattern}|\.?{REPORT_NAME}(\..+)?|\.{CARD_NAME}\..+|\.?{_MARKER}(\..+)?|\.work-\d+|{_CLAIM}"
)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which shards are this run's: those whose number leaves `task` when divided by `tasks`."""

    task: int = 0
    tasks: int = 1

    def has(self, number: int) -> bool:
        """Whether a shard is this run's."""
        return number % self.tasks == self.task


class Workspace:
    """A folder that a set is built in.

    Args:
        out: the folder.
        share: of this run.
    """

    def __init__(self, out: Path, share: Share) -> None:
        self.out, self.share = out, share
        self.work = out / WORK.format(share.task)
        self._mine: frozenset[str] | None = None  # stems of shards; None before `begin`
        self._claimed = False

    def begin(self, made_by: Mapping[str, Any], plan: str, files: Sequence[str]) -> None:
        """Marks the folder as that of this build, or finds the mark.

        Args:
            made_by: the settings.
            plan: a hash of what is packed.
            files: names of all tars, in order.

        Raises:
            ValueError: another build was begun here.
        """
        ours = json.loads(json.dumps({"settings": dict(made_by), "plan": plan}))
        marker = self.out / _MARKER
        # No mark where another task has ended meanwhile: the card is there then.
        text = marker.read_text(encoding="utf-8") if marker.is_file() else ""
        if text:
            _check_same(self.out, json.loads(text), ours)
        else:
            with atomic_write(marker) as file:
                file.write(json.dumps(ours).encode())
        self._mine = frozenset(_stem(name) for number, name in enumerate(files) if self.share.has(number))

    def claim(self) -> bool:
        """Whether this run makes the card, which one task of an array does, alone; a run without tasks always."""
        if self.share.tasks > 1 and not self._claimed:
            try:
                (self.out / _CLAIM).mkdir()  # of two that try, one fails, on a network's disk too
            except FileExistsError:
                return False
        self._claimed = True
        return True

    @property
    def is_finished_by_another(self) -> bool:
        """Whether another task is making the card, and may be making shards again."""
        return self.share.tasks > 1 and not self._claimed and (self.out / _CLAIM).exists()

    def keep_only(self, files: set[str]) -> None:
        """Removes of this run's shards, and of what no shard is, all but these tars, their indices and notes."""
        stems = {_stem(name) for name in files}
        for path in self._ours():
            match = _OF_SHARD.fullmatch(path.name)
            if match is None or match["partial"] or match["stem"] not in stems:
                remove(path)

    def finish(self) -> None:
        """Removes what no finished set has."""
        for path in self.out.glob(".*"):
            if _OURS.fullmatch(path.name) and not path.name.startswith(".work-"):
                remove(path)

    def give_up(self) -> None:
        """Removes what this run and those before it wrote; nothing where it was another build's, or is whole."""
        if self._mine is not None and not (self.out / CARD_NAME).exists() and not self.is_finished_by_another:
            for path in self._ours():
                remove(path)

    def leave(self, *, created: bool) -> None:
        """Removes this run's work and what its workers were writing, and the mark where nothing was made yet."""
        if self.work.exists():
            shutil.rmtree(self.work)
        if self._mine is not None and not self.is_finished_by_another:
            for path in self._ours():
                if (match := _OF_SHARD.fullmatch(path.name)) and match["partial"]:
                    remove(path)
        if self._claimed:
            with contextlib.suppress(FileNotFoundError):
                (self.out / _CLAIM).rmdir()
        if [path.name for path in self.out.iterdir()] == [_MARKER]:
            (self.out / _MARKER).unlink(missing_ok=True)
        if created:
            with contextlib.suppress(OSError):  # not empty: what is made stays
                self.out.rmdir()

    def _ours(self) -> list[Path]:
        """What is there of this run's share, without the mark and the work."""
        mine = self._mine
        assert mine is not None
        found = []
        for path in self.out.iterdir():
            if path in (self.work, self.out / _MARKER) or not _OURS.fullmatch(path.name):
                continue
            match = _OF_SHARD.fullmatch(path.name)
            if self.share.tasks == 1 or (match is not None and match["stem"] in mine):
                found.append(path)
        return found


@contextmanager
def workspace(out: Path, share: Share) -> Iterator[Workspace]:
    """A folder to build in; what stays when the block fails can be gone on from.

    Wrong input and a full disk leave nothing; a build that is killed or interrupted leaves its finished shards.

    Raises:
        ValueError: `out` holds a shard set, or files that no build of ours left.
        OSError: no space left; the message says where.
    """
    _check_free(out)
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    space = Workspace(out, share)
    try:
        (out / _MARKER).touch()
        if space.work.exists():
            shutil.rmtree(space.work)
        space.work.mkdir()
        yield space
    except (ValueError, OSError) as error:
        # A worker that was killed, or a disk that did not answer for once, costs no shard that is whole.
        if isinstance(error, ValueError) or full_disk(error):
            space.give_up()
        if number := full_disk(error):
            reason = os.strerror(number).lower()
            raise OSError(f"--out {out}: {reason}; free some, or name a folder on another disk") from error
        raise
    finally:
        space.leave(created=created)


def full_disk(error: BaseException) -> int:
    """The error number of a full disk, by an error and what it was raised from; 0 for another error."""
    numbers = {e.errno for e in (error, error.__cause__) if isinstance(e, OSError) and e.errno is not None}
    full = numbers & {errno.ENOSPC, errno.EDQUOT}
    return min(full, default=0)


def note_name(tar_name: str) -> str:
    """`train-000000.tar` -> `.train-000000.made.json`."""
    return f".{_stem(tar_name)}.made.json"


def _stem(tar_name: str) -> str:
    return tar_name.removesuffix(".tar")


def _check_free(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a new folder")
    names = sorted(p.name for p in out.iterdir())
    begun = _MARKER in names
    if CARD_NAME in names and not begun:
        raise ValueError(f"--out {out}: already holds a shard set; name a new folder, or remove it first")
    if foreign := [n for n in names if not (begun and (n == CARD_NAME or _OURS.fullmatch(n)))]:
        raise ValueError(f"--out {out}: holds other files ({foreign[0]}); name a new or empty folder")


def _check_same(out: Path, begun: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if begun == ours:
        return
    differences = changes(begun["settings"], ours["settings"]) or "its photographs or tables were others"
    raise ValueError(
        f"--out {out}: holds the beginning of another build ({differences}); "
        "give its command again to go on, or remove the folder to start anew"
    )


def changes(begun: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs between two builds, as `--size was 384, now 256`; nothing where they are alike."""
    names = [name for name in {**begun, **ours} if begun.get(name) != ours.get(name)]
    return ", ".join(f"--{n.replace('_', '-')} was {begun.get(n)}, now {ours.get(n)}" for n in names)


def is_ours(name: str) -> bool:
    """Whether a build or a repair would call a file in a shard set so."""
    return _OURS.fullmatch(name) is not None


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
