"""A release in one .tar or .tar.gz, read once from its first byte to its last and never unpacked.

A compressed tar cannot be read out of order, and shards are written shuffled: so the photographs are made
small as they pass and put into one spool file, whose offsets are remembered.
"""

import contextlib
import dataclasses
import gzip
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path, PurePosixPath

from rich.console import Console

from shards.photographs import SUFFIXES, Fit
from shards.plan import BrokenPhotographError, Photograph
from shards.pool import Pool, result_of
from shards.progress import progress

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_GZIP = b"\x1f\x8b"
_AT_ONCE = 1 << 20  # bytes
_LARGEST = 1 << 28  # bytes of a photograph
_LARGEST_TEXT = 64_000_000  # bytes; the longest table of NABirds has 20 MB (parts/part_locs.txt)


@dataclasses.dataclass(frozen=True)
class Spooled:
    """Photographs by name, one after another in one file, and why the broken ones are broken.

    Attributes:
        path: of the file.
        places: name -> where its JPEG begins in the file, its size, and the photograph without it.
        broken: name -> message.
    """

    path: Path
    places: Mapping[str, tuple[int, int, Photograph]]
    broken: Mapping[str, str]

    def __call__(self, name: str) -> Photograph:
        """One photograph, in any order and any process.

        Raises:
            BrokenPhotographError: as when it passed.
        """
        if name in self.broken:
            raise BrokenPhotographError(self.broken[name])
        offset, size, photograph = self.places[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            return dataclasses.replace(photograph, jpg=file.read(size))


class Spool(contextlib.AbstractContextManager):
    """Writes the file of `Spooled`: processes make photographs small, this one writes them in the order they came.

    Args:
        path: of the file; it is written over.
        fit: makes a photograph small.
        workers: processes.
    """

    def __init__(self, path: Path, fit: Fit, workers: int) -> None:
        self._pool = Pool(_Fitted(fit), workers)
        self._waiting: deque[tuple[str, Future[Photograph]]] = deque()  # so few that memory is bounded
        self._file = path.open("wb")
        self._places: dict[str, tuple[int, int, Photograph]] = {}
        self._broken: dict[str, str] = {}
        self.path = path

    def add(self, name: str, data: bytes, shown: str) -> None:
        """Keeps one photograph, or why it is none.

        Args:
            name: to ask for it by.
            data: of its file.
            shown: its name in messages.
        """
        self._waiting.append((name, self._pool.submit((data, shown))))
        while len(self._waiting) >= self._pool.at_once:
            self._write_first()

    def spooled(self) -> Spooled:
        """All that was added."""
        while self._waiting:
            self._write_first()
        self._file.flush()
        return Spooled(self.path, self._places, self._broken)

    def _write_first(self) -> None:
        name, future = self._waiting.popleft()
        try:
            photograph = result_of(future)
        except BrokenPhotographError as error:
            self._broken[name] = str(error)
            return
        place = self._file.tell()
        size = self._file.write(photograph.jpg)
        self._places[name] = (place, size, dataclasses.replace(photograph, jpg=b""))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Ends the processes."""
        self._pool.__exit__(kind, error, trace)
        if error is None:
            self._file.close()
        else:
            with contextlib.suppress(OSError):  # a full disk, and said so already
                self._file.close()


@dataclasses.dataclass(frozen=True)
class _Fitted:
    fit: Fit

    def __call__(self, job: tuple[bytes, str]) -> Photograph:
        return self.fit(*job)


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of an archive."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def scan(
    path: Path, console: Console, keep: Callable[[str, bytes], None] | None
) -> tuple[dict[str, bytes], set[str]]:
    """Reads an archive in one pass.

    Args:
        path: .tar, .tar.gz or .tgz.
        console: for the progress.
        keep: is given the name and the bytes of every photograph; None passes them over.

    Returns:
        The text files (name in the archive -> bytes) and the names of the photographs.

    Raises:
        ValueError: no archive, or one that ends too early.
    """
    texts: dict[str, bytes] = {}
    names: set[str] = set()
    try:
        for member, archive in _members(path, console):
            name = str(PurePosixPath(member.name))
            if name.lower().endswith(SUFFIXES):
                names.add(name)
                if keep is not None:
                    keep(name, _content(archive, member))
            elif name.endswith(".txt") and member.size <= _LARGEST_TEXT:
                texts[name] = _content(archive, member)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, RecursionError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole archive ({error}); download it again") from None
    return texts, names


def _members(path: Path, console: Console) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    size = path.stat().st_size / 1e6
    with path.open("rb") as file, progress(console, f"read {path.name}", size, "MB") as advance:
        passed = 0
        # tarfile's own reading of gzip passes the checksum over, which stands at the very end.
        stream = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == _GZIP else file
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=_AT_ONCE) as archive:
            for member in archive:
                advance((file.tell() - passed) / 1e6)
                passed = file.tell()
                if member.isfile():
                    yield member, archive
            while stream.read(_AT_ONCE):
                pass
        advance(size - passed / 1e6)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.issparse() or member.size > _LARGEST:
        raise tarfile.ReadError(f"{member.name!r} claims {member.size:,} bytes")
    file = archive.extractfile(member)
    assert file is not None  # a regular file: see _members
    return file.read()
