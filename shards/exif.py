"""Place and date as a camera notes them in a photograph (EXIF)."""

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags

from shards.photographs import DAMAGE, opened
from xcon.records import check_place


@dataclasses.dataclass(frozen=True)
class Note:
    """Degrees and an ISO date; None where the camera noted none, or none that can be."""

    lon: float | None
    lat: float | None
    date: str | None


NOTHING = Note(None, None, None)


def read(file: Path) -> Note:
    """What the camera noted; nothing where the file does not open: a build finds that out."""
    try:
        with opened(file) as image:
            tags = image.getexif()
            lon, lat = _place(tags.get_ifd(ExifTags.IFD.GPSInfo))
            return Note(lon, lat, _date(tags.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)))
    except DAMAGE:
        return NOTHING


def _place(gps: Mapping[int, Any]) -> tuple[float | None, float | None]:
    try:
        lon = _degrees(gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef], "W")
        lat = _degrees(gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef], "S")
        check_place(lon=lon, lat=lat)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None, None
    if lon == lat == 0:  # what a receiver without a fix writes
        return None, None
    return lon, lat


def _degrees(parts: tuple[Any, Any, Any], reference: str, negative: str) -> float:
    degrees, minutes, seconds = map(float, parts)
    size = degrees + minutes / 60 + seconds / 3600
    return -size if reference.upper().startswith(negative) else size


def _date(text: Any) -> str | None:
    try:
        return datetime.datetime.strptime(str(text)[:10], "%Y:%m:%d").date().isoformat()
    except ValueError:
        return None
