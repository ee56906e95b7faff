"""A release in one .tar or .tar.gz, read once from its first byte to its last and never unpacked.

A compressed tar cannot be read out of order, and shards are written shuffled: so the photographs are made
small as they pass and put into one spool file, whose offsets are remembered.
"""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from rich.console import Console

from shards.photographs import SUFFIXES
from shards.plan import BrokenPhotographError
from shards.progress import progress

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_GZIP = b"\x1f\x8b"
_AT_ONCE = 1 << 20  # bytes
_LARGEST = 1 << 28  # bytes of a photograph
_LARGEST_TEXT = 64_000_000  # bytes; the longest table of NABirds has 20 MB (parts/part_locs.txt)


class Spool:
    """Photographs by name, one after another in one file, and why the broken ones are broken.

    Args:
        path: of the file; it is written over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._broken: dict[str, str] = {}
        path.write_bytes(b"")

    def add(self, name: str, fitted: Callable[[], bytes]) -> None:
        """Keeps what `fitted` gives, or why it gives nothing."""
        try:
            data = fitted()
        except BrokenPhotographError as error:
            self._broken[name] = str(error)
            return
        with self.path.open("ab") as file:
            self._places[name] = (file.tell(), file.write(data))

    def read(self, name: str) -> bytes:
        """One photograph, in any order and any process, once all are there.

        Raises:
            BrokenPhotographError: as when it passed.
        """
        if name in self._broken:
            raise BrokenPhotographError(self._broken[name])
        offset, size = self._places[name]
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


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
