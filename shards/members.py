"""The records of a finished tar, one after another: for each a photograph, a caption and a JSON, nothing else."""

import dataclasses
import itertools
import mmap
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shards.build import index_row
from xcon.records import Record

MEMBERS = ("jpg", "txt", "json")
_LARGEST = 1 << 28  # bytes of a member; a photograph in a shard has well under one million


@dataclasses.dataclass(frozen=True)
class Stored:
    """The bytes of a record's three members, and where its photograph lies in the tar."""

    key: str
    offset: int
    members: Mapping[str, bytes]


def stored(path: Path) -> Iterator[Stored]:
    """Reads a tar, one record in memory at a time, whatever its headers claim.

    Raises:
        ValueError: not a tar of three plain files per record; the message says where it stops to be one.
        OSError: cannot be read.
    """
    try:
        # Mapped, a read for more than there is gives what there is, and takes no more memory than that.
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            tarfile.open(fileobj=data, mode="r:") as tar,
        ):
            members = _plain_files(tar, len(data))
            while group := list(itertools.islice(members, len(MEMBERS))):
                yield _record(group)
    except (tarfile.TarError, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"{path}: not a tar of three members per record ({error})") from None


def _plain_files(tar: tarfile.TarFile, size: int) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for member in tar:
        if member.type != tarfile.REGTYPE or member.issparse():
            raise ValueError(f"{member.name!r} is no plain file")
        if not 0 <= member.size <= min(_LARGEST, size - member.offset_data):
            raise ValueError(f"{member.name!r} claims {member.size:,} bytes")
        content = tar.extractfile(member)
        assert content is not None  # a plain file
        yield member, content.read()


def _record(group: list[tuple[tarfile.TarInfo, bytes]]) -> Stored:
    first = group[0][0]
    key = first.name.partition(".")[0]
    if [member.name for member, _ in group] != [f"{key}.{kind}" for kind in MEMBERS]:
        raise ValueError(f"at {first.name!r}")
    return Stored(key, first.offset_data, dict(zip(MEMBERS, (data for _, data in group), strict=True)))


def row_of(record: Record, found: Stored) -> dict[str, Any]:
    """The row of the index that a record has, as it was read from its tar."""
    text, photograph = found.members["txt"].decode(), found.members["jpg"]
    return index_row(record, text, offset=found.offset, size=len(photograph))
