"""Decoding against Pillow, and crops of photographs whose pixels say where they come from."""

import io
import math
import warnings
from functools import partial

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from xcon import images
from xcon.images import ImageSpec


def photograph(height: int = 48, width: int = 64) -> Image.Image:
    """Smooth, so that a JPEG keeps it, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, 127 + 100 * np.sin((x + 2 * y) / 15)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def encoded(image: Image.Image, kind: str, *, orientation: int | None = None, **options: object) -> bytes:
    if orientation is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)


def decoded(data: bytes) -> np.ndarray:
    pixels = images.decode(data)
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy().astype(int)


def spec(size: int, *, crop_pct: float = 1.0, interpolation: str = "bilinear") -> ImageSpec:
    return ImageSpec("test_resnet", {}, size, (0.5,) * 3, (0.5,) * 3, crop_pct, interpolation)


# ---- decoding


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_as_pillow_decodes_it(subsampling: int, progressive: bool) -> None:
    data = encoded(photograph(), "JPEG", quality=92, subsampling=subsampling, progressive=progressive)
    assert np.abs(decoded(data) - by_pillow(data)).max() <= 3
    assert np.abs(decoded(data) - np.asarray(photograph())).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    assert np.array_equal(decoded(encoded(photograph(), kind)), np.asarray(photograph()))


def test_gray_becomes_three_equal_channels() -> None:
    gray = photograph().convert("L")
    assert np.array_equal(decoded(encoded(gray, "PNG")), np.asarray(gray)[:, :, None].repeat(3, axis=2))
    pixels = decoded(encoded(gray, "JPEG", quality=95))
    assert (pixels == pixels[:, :, :1]).all()
    assert np.abs(pixels[:, :, 0] - np.asarray(gray)).max() <= 8


def test_cmyk_jpeg_is_as_pillow_converts_it() -> None:
    data = encoded(photograph().convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decoded(data) - by_pillow(data)).max() <= 1
    assert np.abs(decoded(data) - np.asarray(photograph())).mean() < 5


def test_palette_and_transparency_become_colours() -> None:
    red = Image.new("RGBA", (5, 4), (200, 10, 30, 128))
    assert (decoded(encoded(red, "PNG")) == [200, 10, 30]).all()
    assert (decoded(encoded(red.convert("RGB").quantize(2), "PNG")) == [200, 10, 30]).all()


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),  # the camera was held turned left: a quarter clockwise puts it right
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photographs_are_turned_as_their_exif_data_says(kind: str, orientation: int, upright) -> None:
    data = encoded(photograph(), kind, orientation=orientation)
    expected = upright(np.asarray(photograph()).astype(int))
    assert decoded(data).shape == expected.shape
    assert np.abs(decoded(data) - expected).mean() < 4  # any other turn is 40 or more away


def test_upright_exif_takes_the_fast_way_to_the_same_pixels() -> None:
    plain, tagged = encoded(photograph(), "JPEG"), encoded(photograph(), "JPEG", orientation=1)
    assert b"Exif" in tagged
    assert np.array_equal(decoded(plain), decoded(tagged))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_file_that_breaks_off_is_refused(kind: str, kept: float) -> None:
    data = encoded(photograph(), kind)
    with pytest.raises(ValueError, match="decode"):
        images.decode(data[: int(kept * len(data))])


def test_a_jpeg_with_a_hole_is_refused() -> None:
    """Its end marker is there, a stretch of its data is not."""
    data = encoded(photograph(200, 200), "JPEG", quality=95)
    half = len(data) // 2
    with pytest.raises(ValueError, match="does not decode"):
        images.decode(data[:half] + data[-2:])


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\xff\xd8\xff\xd9", b"\xff\xd8Exif\0\0\xff\xd9", b"<html></html>"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="decode"):
        images.decode(data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_decode_or_are_refused(data: st.DataObject) -> None:
    """Anything but an array of pixels or a ValueError would end a training with a traceback."""
    start = data.draw(st.sampled_from([b"", *DAMAGED]))
    damaged = bytearray(start or data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF data and reads on
        try:
            pixels = images.decode(bytes(damaged))
        except ValueError:
            return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3


DAMAGED = [
    encoded(photograph(8, 8), "JPEG", orientation=6),
    encoded(photograph(8, 8), "JPEG"),
    encoded(photograph(8, 8), "PNG"),
]


# ---- transforms


def ramp(height: int, width: int) -> torch.Tensor:
    """Channels 0 and 1 are a pixel's column and row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8)


def test_evaluation_takes_the_middle() -> None:
    """size / crop_pct = 8 is the shorter side already: nothing is scaled, rows 2..5, columns 4..7 remain."""
    pixels = images.eval_transform(spec(4, crop_pct=0.5))(ramp(8, 12))
    assert torch.equal(pixels, ramp(8, 12)[:, 2:6, 4:8])


def test_evaluation_scales_the_shorter_side() -> None:
    """32 x 48 of 8-pixel blocks, halved to 16 x 24, the middle 16 x 16: blocks of 4 from column 4 on."""
    blocks = 8 * (ramp(32, 48) // 8)
    pixels = images.eval_transform(spec(16, interpolation="nearest"))(blocks)
    assert torch.equal(pixels, blocks[:, ::2, 8:40:2])


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.95), (224, 0.875), (160, 0.9), (64, 0.9)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_is_that_of_timm(size: int, crop_pct: float, interpolation: str) -> None:
    photo = photograph(300, 400)
    theirs = timm.data.create_transform(
        (3, size, size), crop_pct=crop_pct, interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3
    )(photo)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    ours = images.eval_transform(spec(size, crop_pct=crop_pct, interpolation=interpolation))(pixels)
    assert (ours - 255 * theirs).abs().max() <= 1.01  # Pillow and torchvision round half a step apart


@pytest.mark.parametrize("scale", [0.35, 0.8])
def test_crops_keep_at_least_their_share_of_the_area(scale: float) -> None:
    """The columns and rows that are left tell the size of the crop."""
    transform = images.train_transform(spec(40, interpolation="nearest"), crop_scale=scale)
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        pixels = transform(ramp(200, 200)).int()
        assert pixels.shape == (3, 40, 40)
        extent = [int(pixels[c].max() - pixels[c].min()) * 40 / 39 for c in (0, 1)]
        shares.append(math.prod(extent) / 200**2)
    assert scale - 0.03 < min(shares) < scale + 0.1
    assert 0.9 < max(shares) < 1.03


def test_half_of_the_photographs_are_mirrored_and_nothing_else_without_crops() -> None:
    transform = images.train_transform(spec(32), crop_scale=1.0)
    torch.manual_seed(0)
    photo = ramp(32, 32)
    results = [transform(photo) for _ in range(300)]
    mirrored = [torch.equal(r, photo.flip(2)) for r in results]
    assert all(m or torch.equal(r, photo) for m, r in zip(mirrored, results, strict=True))
    assert 110 < sum(mirrored) < 190  # 150 expected, standard deviation 9


def test_crops_follow_the_seed() -> None:
    transform = images.train_transform(spec(16), crop_scale=0.35)

    def crop(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return transform(ramp(60, 60))

    assert torch.equal(crop(1), crop(1))
    assert not torch.equal(crop(1), crop(2))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_scale", [0.35, 1.0])
def test_crops_have_the_draws_and_the_pixels_of_torchvision(crop_scale: float, interpolation: str) -> None:
    ours = images.train_transform(spec(48, interpolation=interpolation), crop_scale=crop_scale)
    crop = v2.Resize if crop_scale == 1 else partial(v2.RandomResizedCrop, scale=(crop_scale, 1.0))
    scaled = crop((48, 48), interpolation=InterpolationMode(interpolation), antialias=True)
    theirs = v2.Compose([scaled, v2.RandomHorizontalFlip()])
    for seed in range(20):
        pixels = images.decode(encoded(photograph(60 + 3 * seed, 100), "JPEG"))
        drawn = []
        for transform in (ours, theirs):
            torch.manual_seed(seed)
            drawn.append((transform(pixels), torch.rand(())))
        assert torch.equal(drawn[0][0], drawn[1][0])
        assert drawn[0][1] == drawn[1][1]


def test_colours_change_by_as_much_as_they_may() -> None:
    """Of an even grey, contrast and saturation change nothing: 100 times a factor from 0.7 to 1.3 is left."""
    transform = images.train_transform(spec(8), crop_scale=1.0, color_jitter=0.3)
    torch.manual_seed(0)
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    found = [transform(grey) for _ in range(400)]
    assert all(len(f.unique()) == 1 for f in found)
    values = [int(f[0, 0, 0]) for f in found]
    assert 67 <= min(values) < 75  # each of the three changes rounds down
    assert 125 < max(values) <= 130
    assert abs(sum(values) / 400 - 100) < 4 * 17.3 / 20 + 1


def test_colours_change_one_by_one() -> None:
    """Contrast and saturation change too: two pixels of a photograph do not keep their ratio."""
    transform = images.train_transform(spec(8), crop_scale=1.0, color_jitter=0.3)
    photo = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    photo[0, :4] = 60
    torch.manual_seed(1)
    ratios = {round(float(f[0].min()) / float(f[0].max()), 2) for f in (transform(photo) for _ in range(20))}
    assert len(ratios) > 5
