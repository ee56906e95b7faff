"""Colours, depths and sizes of photographs, against the arithmetic of the profiles by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from shards.photographs import MOST_PIXELS, take
from shards.plan import BrokenPhotographError

# XYZ of the primaries, adapted to D50 as profiles have them: columns red, green, blue (sRGB: IEC 61966-2-1).
SRGB = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
GAMMA = 2.19921875  # 563 / 256, as a profile can say it exactly


def profile(primaries: np.ndarray) -> bytes:
    """A display profile of version 2: three primaries, one gamma."""

    def number(x: float) -> bytes:
        return struct.pack(">i", round(x * 65536))

    def xyz(column: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(number(x) for x in column)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256)) + b"\0\0"
    text = b"text\0\0\0\0none\0\0\0\0"
    name = b"a wide one\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78 + 1)
    tags = {
        b"desc": described + bytes(-len(described) % 4),
        b"cprt": text,
        b"wtpt": xyz(np.array([0.9642, 1.0, 0.8249])),
        **{kind: xyz(primaries[:, i]) for i, kind in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for kind, data in tags.items():
        table += kind + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + number(0.9642) + number(1.0) + number(0.8249) + bytes(48)
    return header + table + body


def in_srgb(colour: tuple[int, int, int], primaries: np.ndarray) -> np.ndarray:
    """A colour of such a profile in sRGB: linear light, other primaries, sRGB's curve; what it has not is cut."""
    light = np.linalg.inv(SRGB) @ primaries @ (np.array(colour) / 255) ** GAMMA
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def middle(jpg: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(jpg))
    assert image.mode == "RGB"
    assert "icc_profile" not in image.info
    return np.asarray(image)[image.height // 2, image.width // 2].astype(float)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("primaries", [ADOBE, DISPLAY_P3], ids=["adobe", "p3"])
@pytest.mark.parametrize("colour", [(100, 150, 80), (180, 120, 90), (200, 200, 200), (40, 60, 120)])
def test_colours_are_those_that_the_profile_means(colour, primaries, kind):
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.new("RGB", (32, 32), colour), kind, icc_profile=profile(primaries), **options)
    jpg = take(data, "a", size=64, quality=95).jpg
    assert jpg != data
    assert middle(jpg) == pytest.approx(in_srgb(colour, primaries), abs=3)
    if colour[0] != colour[1]:  # the test could fail: unconverted, the colour is another
        assert np.abs(in_srgb(colour, primaries) - colour).max() > 5


def test_a_profile_that_is_srgb_whatever_its_name_keeps_the_bytes():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(Image.new("RGB", (32, 32), (100, 150, 80)), icc_profile=srgb)
    assert take(data, "a", size=64, quality=90).jpg == data


def test_a_profile_that_is_none_is_remarked_upon():
    data = encoded(Image.new("RGB", (32, 32), (100, 150, 80)), icc_profile=b"nonsense" * 40)
    photograph = take(data, "a", size=64, quality=90)
    assert photograph.jpg == data
    assert "taken as sRGB" in photograph.remark


def test_grey_of_sixteen_bits_is_scaled_and_not_cut():
    """0x8000 of 0xFFFF is half: 128 of 255."""
    data = encoded(Image.fromarray(np.full((32, 32), 0x8000, np.uint16)), "PNG")
    assert middle(take(data, "a", size=64, quality=95).jpg) == pytest.approx([128] * 3, abs=1)


def test_transparent_parts_are_white_whatever_colour_hides_there():
    hidden = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 51))  # a fifth of black over white: 204
    grey = Image.new("LA", (32, 32), (90, 0))
    for image, expected in ((hidden, 255), (half, 204), (grey, 255)):
        jpg = take(encoded(image, "PNG"), "a", size=64, quality=95).jpg
        assert middle(jpg) == pytest.approx([expected] * 3, abs=1)


def test_cmyk_is_that_of_pillow():
    image = Image.new("CMYK", (32, 32), (10, 120, 60, 30))
    jpg = take(encoded(image, "JPEG", quality=100), "a", size=64, quality=95).jpg
    assert middle(jpg) == pytest.approx(np.array(image.convert("RGB").getpixel((0, 0))), abs=3)


def test_the_shorter_side_and_the_hash_are_those_of_the_file():
    data = encoded(Image.new("RGB", (90, 31)))
    photograph = take(data, "a", size=16, quality=90)
    assert photograph.shorter_side == 31
    assert len(photograph.sha256) == 32


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has nothing to show for it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "why"),
    [
        (65_000, 65_000, "exceeds limit"),  # four gigapixels: Pillow's own limit
        (13_000, 12_000, f"at most {MOST_PIXELS:,} are taken"),
        (100_000, 10, "a JPEG ends at 65,500"),
    ],
)
def test_a_bomb_is_refused_by_its_header(width, height, why, monkeypatch):
    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(BrokenPhotographError, match=rf"^a\.png: does not decode \(.*{why}"):
        take(png_header(width, height), "a.png", size=384, quality=90)
