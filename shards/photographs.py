"""One photograph: decoded, turned upright, made sRGB and small, encoded; or its bytes kept where they fit already.

The same file gives the same bytes, whatever process does it, with the same version of Pillow.
"""

import functools
import hashlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from shards.plan import BrokenPhotographError, Photograph
from xcon.records import UNREADABLE

Fit = Callable[[bytes, str], Photograph]  # a file and its name for messages -> the photograph

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
MOST_PIXELS = 150_000_000  # read from the header, before anything is decoded: 450 MB in RGB
LONGEST_SIDE = 65_500  # pixels; of a JPEG, by libjpeg
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
DAMAGE = (*UNREADABLE, Image.DecompressionBombError)
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_SAME_COLOUR = 2  # levels of 256 by which a profile may differ from sRGB and be called so


def fit(data: bytes, name: str, *, size: int, quality: int) -> bytes:
    """The JPEG of `take` alone."""
    return take(data, name, size=size, quality=quality).jpg


def of_file(file: Path, name: str, fit: Fit) -> Photograph:
    """A photograph that lies in a file of its own; `name` is for messages of what does not decode.

    Raises:
        BrokenPhotographError: it does not decode.
        OSError: it cannot be read.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise OSError(f"{file}: cannot be read ({error.strerror})") from None
    return fit(data, name)


def take(data: bytes, name: str, *, size: int, quality: int) -> Photograph:
    """An upright sRGB JPEG whose shorter side is at most `size`.

    A photograph is never enlarged, and an upright sRGB JPEG that is small enough keeps its bytes. Colours are
    converted by the embedded profile; transparent parts become white; 16 bits are cut to 8.

    Args:
        data: the file, in any format Pillow reads.
        name: the file's name, for the message.
        size: pixels.
        quality: of the JPEG, 1 .. 95.

    Raises:
        BrokenPhotographError: the file does not decode to its last row, or is too large.
    """
    try:
        with opened(io.BytesIO(data)) as image:
            shorter, (jpg, remark) = min(image.size), _jpeg(image, data, size, quality)
    except UnidentifiedImageError:
        raise BrokenPhotographError(f"{name}: does not decode (no image format that Pillow knows)") from None
    except DAMAGE as error:
        raise BrokenPhotographError(f"{name}: does not decode ({error})") from None
    return Photograph(jpg, hashlib.sha256(data).digest(), shorter, remark)


def _jpeg(image: Image.Image, data: bytes, size: int, quality: int) -> tuple[bytes, str]:
    """The JPEG of a file whose header is read, and a remark."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width:,} x {image.height:,} pixels, at most {MOST_PIXELS:,} are taken")
    scale = min(1.0, size / min(image.size))
    if max(image.size) * scale > LONGEST_SIDE:
        raise ValueError(f"{image.width:,} x {image.height:,} pixels, a JPEG ends at {LONGEST_SIDE:,}")
    profile = image.info.get("icc_profile")
    image.load()
    to_srgb, remark = _to_srgb(profile, _kind(image)) if profile else (None, "")
    if to_srgb is None and _fits(image, size) and _is_clean(data):
        return data, remark
    upright = _rgb(ImageOps.exif_transpose(image), to_srgb)
    smaller = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
    buffer = io.BytesIO()
    upright.resize(smaller, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), remark


def is_stored(data: bytes) -> bool:
    """Whether a photograph is what `fit` gives: an upright RGB JPEG that decodes without a warning."""
    try:
        with opened(io.BytesIO(data)) as image:
            return _fits(image, sys.maxsize) and _is_clean(data)
    except DAMAGE:
        return False


def decodes(data: bytes) -> bool:
    """Whether a photograph of any format decodes to its last row, as `xcon.images` wants it."""
    try:
        with opened(io.BytesIO(data)) as image:
            image.load()
            return (image.format, image.mode) != ("JPEG", "RGB") or _is_clean(data)
    except DAMAGE:
        return False


@contextmanager
def opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """A photograph whose header is read, without Pillow's warnings."""
    # Pillow warns of damaged EXIF data, and above 89 million pixels, which cameras have; it refuses twice that.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
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


def _kind(image: Image.Image) -> str:
    """The mode whose colours the profile of a file describes."""
    if image.mode in ("CMYK", "L"):
        return image.mode
    return "L" if image.mode in ("LA", "La", "1", *_SIXTEEN_BITS) else "RGB"


def _rgb(image: Image.Image, to_srgb: ImageCms.ImageCmsTransform | None) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("32-bit floats, whose white is not known")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        if to_srgb is not None and to_srgb.input_mode == "L":
            image = image.convert("L")
    if to_srgb is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image.convert(to_srgb.input_mode), to_srgb)
    assert converted is not None  # not in place
    return converted


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which `convert` would clip at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit integers, whose white is not known")
    return Image.fromarray((values >> 8).astype(np.uint8))


@functools.lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """From the colours of a profile; None where it is sRGB but for its name, or cannot be used, with a remark."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
    except (ImageCms.PyCMSError, *UNREADABLE) as error:
        return None, f"its colour profile cannot be used ({error}), taken as sRGB"
    if mode == "CMYK":
        return transform, ""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    if mode == "L":
        probe, plain = Image.fromarray(levels[None]), np.repeat(levels[None, :, None], 3, axis=2)
    else:
        plain = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(plain)
    shown = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return (None if np.abs(shown - plain).max() <= _SAME_COLOUR else transform), ""
