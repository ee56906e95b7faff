"""Photographs: bytes to uint8 pixels, and the transforms of training and evaluation.

Pixels stay uint8 until they are on the device: `encoders.ImageEncoder` normalises them there.
"""

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from xcon.config import MetaEncoding
from xcon.records import UNREADABLE

Transform = Callable[[Tensor], Tensor]

_LARGEST = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # where Pillow refuses too
_EXIF_WITHIN = 1 << 16  # bytes; a JPEG's EXIF segment is its first or second


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What `timm.create_model` takes, and how photographs are prepared for it.

    Attributes:
        backbone: the timm name.
        options: its keyword arguments.
        size: side of the square it sees, pixels.
        mean: of the three channels, in [0, 1].
        std: of the three channels.
        crop_pct: share of the shorter side kept at evaluation.
        interpolation: bicubic, bilinear or nearest.
        places: encoding of place and date whose features it sees as constant channels beside the three colours;
            None: it sees colours alone.
    """

    backbone: str
    options: Mapping[str, Any]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    places: MetaEncoding | None = None


def decode(data: bytes) -> Tensor:
    """Decodes a photograph.

    JPEGs go through libjpeg-turbo; other formats, JPEGs of colour spaces that it refuses and those that their EXIF
    data turns or mirrors, through Pillow.

    Args:
        data: the bytes of an image file.

    Returns:
        `[3, H, W]` uint8 RGB, upright, a view with channels last in memory.

    Raises:
        ValueError: not an image, or one that breaks off.
    """
    if simplejpeg.is_jpeg(data) and _is_upright(data):
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if height * width > _LARGEST:  # what a header claims would be taken before anything is decoded
                raise ValueError(f"{width} x {height} pixels")
            return _pixels(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        except ValueError as error:
            if "colorspace" not in str(error).lower():
                raise ValueError(f"the JPEG does not decode ({error})") from None
    with _opened(data) as image:
        return _pixels(np.array(ImageOps.exif_transpose(image).convert("RGB")))


def _is_upright(data: bytes) -> bool:
    if data.find(b"Exif\0\0", 0, _EXIF_WITHIN) < 0:
        return True
    with _opened(data) as image:  # reads the headers alone
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError:
        raise ValueError("not an image that decodes (of no format that Pillow knows)") from None
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image that decodes ({error})") from None


def _pixels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A random crop scaled to a square, flipped half of the time.

    The draws and pixels of `v2.RandomResizedCrop` and `v2.RandomHorizontalFlip` in less time: the crop is packed,
    its three colours side by side, because torch scales such pixels fastest, and stays so.

    Attributes:
        size: side of the square, pixels.
        interpolation: bicubic, bilinear or nearest.
        cut: draws the crop; None: the photograph is scaled without one.
    """

    size: int
    interpolation: InterpolationMode
    cut: v2.RandomResizedCrop | None

    def __call__(self, pixels: Tensor) -> Tensor:
        """`[3, H, W]` to `[3, S, S]`, a view with channels last in memory."""
        if self.cut:
            drawn = self.cut.make_params([pixels])
            top, left = drawn["top"], drawn["left"]
            pixels = pixels[:, top : top + drawn["height"], left : left + drawn["width"]]
        if torch.rand(1) < 0.5:  # before it is scaled: one copy less, and the same pixels
            pixels = pixels.flip(2)
        size = [self.size, self.size]
        return functional.resize(_packed(pixels), size, interpolation=self.interpolation, antialias=True)


def _packed(pixels: Tensor) -> Tensor:
    """The same `[3, H, W]`, its channels side by side in memory."""
    return pixels.movedim(0, 2).contiguous().movedim(2, 0)


def train_transform(spec: ImageSpec, *, crop_scale: float, color_jitter: float = 0.0) -> Transform:
    """A random crop of at least `crop_scale` of the area, scaled to the network's size, flipped half of the time.

    Then brightness, contrast and saturation are changed, each by a factor of its own.

    It draws from torch's default generator, which `loader` seeds for every record and epoch.

    Args:
        spec: of the network.
        crop_scale: smallest share of the area, in (0, 1]; at 1 the photograph is scaled without a crop.
        color_jitter: s in [0, 1]; factors are drawn evenly from 1 - s to 1 + s. Hues stay, species differ by them.
    """
    cut = v2.RandomResizedCrop(spec.size, scale=(crop_scale, 1.0)) if crop_scale < 1 else None
    crop = RandomCrop(spec.size, InterpolationMode(spec.interpolation), cut)
    if not color_jitter:
        return crop
    return v2.Compose([crop, v2.ColorJitter(color_jitter, color_jitter, color_jitter)])


def eval_transform(spec: ImageSpec) -> Transform:
    """The shorter side scaled to `size / crop_pct` (rounded down, as in timm), then the central square."""
    mode = InterpolationMode(spec.interpolation)
    resize = v2.Resize(math.floor(spec.size / spec.crop_pct), interpolation=mode, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(spec.size)])
