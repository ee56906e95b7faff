"""One photograph: decoded, turned upright, made small, encoded; or its bytes kept where they fit already."""

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.plan import BrokenPhotographError
from xcon.records import UNREADABLE

Fit = Callable[[bytes, str], bytes]  # a file and its name for messages -> the JPEG as it goes into a tar

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_DAMAGE = (*UNREADABLE, Image.DecompressionBombError)


def fit(data: bytes, name: str, *, size: int, quality: int) -> bytes:
    """An upright RGB JPEG whose shorter side is at most `size`.

    A photograph is never enlarged, and an upright RGB JPEG that is small enough keeps its bytes.

    Args:
        data: the file, in any format Pillow reads.
        name: the file's name, for the message.
        size: pixels.
        quality: of the JPEG, 1 .. 95.

    Raises:
        BrokenPhotographError: the file does not decode to its last row.
    """
    try:
        with _open(data) as image:
            image.load()
            if _fits(image, size) and _is_clean(data):
                return data
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise BrokenPhotographError(f"{name}: does not decode (no image format that Pillow knows)") from None
    except _DAMAGE as error:
        raise BrokenPhotographError(f"{name}: does not decode ({error})") from None
    scale = min(1.0, size / min(upright.size))
    smaller = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
    buffer = io.BytesIO()
    upright.resize(smaller, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def is_stored(data: bytes) -> bool:
    """Whether a photograph is what `fit` gives: an upright RGB JPEG that decodes without a warning."""
    try:
        with _open(data) as image:
            return _fits(image, sys.maxsize) and _is_clean(data)
    except _DAMAGE:
        return False


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    # Pillow warns of damaged EXIF data, and above 89 million pixels, which cameras have; it refuses twice that.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            yield image


def _is_clean(data: bytes) -> bool:
    """Whether a JPEG decodes without a warning: `xcon.images` wants that, while Pillow guesses what is damaged."""
    try:
        simplejpeg.decode_jpeg(data)
    except ValueError:
        return False
    return True


def _fits(image: Image.Image, size: int) -> bool:
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    return image.format == "JPEG" and image.mode == "RGB" and upright and min(image.size) <= size
