"""Small photographs for the tests of sources, and a source's plan."""

import io
from pathlib import Path

from PIL import Image
from rich.console import Console

from shards.plan import Plan
from shards.source import Room, Source


def photograph(path: Path, shade: int = 0, exif: Image.Exif | None = None) -> bytes:
    """Writes a grey JPEG of 8 x 6 pixels, folders included; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {} if exif is None else {"exif": exif}
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(path, "JPEG", **more)
    return path.read_bytes()


def plan(source: Source) -> Plan:
    """What a source hands over, checked as the command line does."""
    source.check()
    return source.plan(Room(Path("unused"), Console(file=io.StringIO())))
