"""Longitude, latitude and date as the features of a network; what "missing" means.

A place is a row of three numbers, always in this order and these units: lon and lat in degrees, the date as
a fraction of the year in [0, 1] (`records.year_fraction`). NaN stands for what is not known.
"""

import math

import torch
from torch import Tensor

from xcon.config import MetaEncoding

# Legend: N rows; columns of a place: 0 lon, 1 lat, 2 date; W features.

OCTAVES = 6  # of fourier and sphere2vec: each frequency is twice the one before
DEGREES = 10  # of harmonics: 0 to 9
EARTH_KM, DAYS = 6371.0, 365.25  # radius; in a year


def known(places: Tensor) -> Tensor:
    """Which rows carry metadata at all: a place, a date, or both.

    Args:
        places: `[N, 3]` lon, lat in degrees, fraction of the year; NaN where unknown.

    Returns:
        `[N]` bool.
    """
    return ~places.isnan().all(dim=-1)  # [N]


def moved(places: Tensor, *, km: float, days: float) -> Tensor:
    """Places and dates moved at random: what is trained on them is smoothed by a kernel of that width.

    A place goes along a great circle, by a normal in the plane that touches the Earth there; a date past New Year
    comes back at the other end. What is unknown stays so, and half a place stays as it is. Draws come from torch's
    default generator.

    Args:
        places: `[N, 3]` lon, lat in degrees, fraction of the year; NaN where unknown.
        km: standard deviation in each of two directions.
        days: standard deviation.

    Returns:
        `[N, 3]` float64, longitudes in [-180, 180], latitudes in [-90, 90], dates in [0, 1].
    """
    places = places.double()
    lon, lat = places[:, 0].deg2rad(), places[:, 1].deg2rad()
    point = torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=1)  # [N, 3]
    drawn = torch.randn(point.shape, dtype=torch.float64)
    across = (drawn - (drawn * point).sum(dim=1, keepdim=True) * point) * km / EARTH_KM  # [N, 3] radians
    angle = across.norm(dim=1, keepdim=True)  # [N, 1]
    x, y, z = (angle.cos() * point + torch.sinc(angle / math.pi) * across).unbind(dim=1)
    there = torch.stack([torch.atan2(y, x), z.clamp(-1, 1).asin()], dim=1).rad2deg()  # [N, 2]
    placed = ~there.isnan().any(dim=1, keepdim=True)
    date = (places[:, 2:] + torch.randn(len(places), 1, dtype=torch.float64) * days / DAYS) % 1
    return torch.cat([torch.where(placed, there, places[:, :2]), date], dim=1)


def encode(places: Tensor, encoding: MetaEncoding) -> Tensor:
    """Features of place and date.

    The date is always the sine and cosine of its circle, which closes at New Year. Of the place they are

    - wrap: sines and cosines of longitude and latitude (`encode_wrap`), the paper's;
    - xyz: the point on the unit sphere;
    - fourier: sines and cosines of xyz at six frequencies (Tancik et al. 2020, "positional encoding");
    - sphere2vec: sphereC+ of Mai et al. 2023, whose frequencies are whole numbers here, so that it closes at the
      date line: six terms at each of six;
    - harmonics: the spherical harmonics of degree 0 to 9 (Russwurm et al. 2024).

    All are continuous at +-180 degrees. At the poles, where all longitudes meet, xyz, fourier and harmonics are;
    wrap and sphere2vec are not, as in their sources. What is unknown becomes 0.

    Args:
        places: `[N, 3]` lon, lat in degrees, fraction of the year; NaN where unknown.
        encoding: which.

    Returns:
        `[N, W]`, W as of `width`.
    """
    if encoding == "wrap":
        return encode_wrap(places)
    lon, lat = places[:, 0].deg2rad(), places[:, 1].deg2rad()
    if encoding == "sphere2vec":
        place = _sphere2vec(lon, lat)
    else:
        xyz = torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=1)  # [N, 3]
        place = {"xyz": lambda x: x, "fourier": _fourier, "harmonics": _harmonics}[encoding](xyz)
    season = 2 * math.pi * places[:, 2:] - math.pi  # [N, 1]
    return torch.cat([place, season.sin(), season.cos()], dim=1).nan_to_num(nan=0.0)


def width(encoding: MetaEncoding) -> int:
    """W, the number of features of an encoding."""
    return encode(torch.zeros(1, 3), encoding).shape[1]


def encode_wrap(places: Tensor) -> Tensor:
    """Sine-cosine signals of place and date (paper, section 3.1, "Meta Embedding").

    The "wrap" encoding of Mac Aodha et al. 2019, whose column order it keeps: with lon / 180, lat / 90 and
    2 date - 1 in [-1, 1], the sines of pi times lon and lat, their cosines, then sine and cosine of the date.
    It is continuous at +-180 degrees and over New Year; both poles have one code, a known flaw of the source.
    What is unknown becomes 0, 0, the centre of its circle, which no known value reaches.

    Args:
        places: `[N, 3]` lon, lat in degrees, fraction of the year; NaN where unknown.

    Returns:
        `[N, 6]` in [-1, 1].
    """
    scale = places.new_tensor([1 / 180, 1 / 90, 2.0])
    angles = math.pi * (places * scale - places.new_tensor([0.0, 0.0, 1.0]))  # [N, 3]
    sines, cosines = angles.sin(), angles.cos()
    features = torch.stack(
        [sines[:, 0], sines[:, 1], cosines[:, 0], cosines[:, 1], sines[:, 2], cosines[:, 2]], dim=1
    )  # [N, 6]
    return features.nan_to_num(nan=0.0)


def _fourier(xyz: Tensor) -> Tensor:
    """`[N, 3]` -> `[N, 36]`. The lowest frequency is pi / 2: from -1 to 1 half a turn, so no two are one."""
    angles = torch.cat([2**k * math.pi / 2 * xyz for k in range(OCTAVES)], dim=1)  # [N, 18]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _sphere2vec(lon: Tensor, lat: Tensor) -> Tensor:
    """Radians, `[N]` each -> `[N, 36]`."""
    found = []
    for k in range(OCTAVES):
        east, north = 2**k * lon, 2**k * lat
        found += [north.sin(), north.cos(), east.sin(), east.cos()]
        found += [north.cos() * east.cos(), north.cos() * east.sin()]
    return torch.stack(found, dim=1)


def _harmonics(xyz: Tensor) -> Tensor:
    """`[N, 3]` -> `[N, 100]` real spherical harmonics, orthonormal over the sphere, without the phase (-1)^m.

    P(l, m), the normalised Legendre functions without their factor cos(lat)^m, come by their recurrence in l, and
    cos(lat)^m (cos m lon, sin m lon) are the powers of x + iy: no longitude is asked for, which poles do not have.
    """
    x, y, z = xyz.unbind(dim=1)
    found: list[Tensor] = []
    real, imaginary = torch.ones_like(x), torch.zeros_like(x)  # (x + iy)^m
    first = z * 0 + math.sqrt(1 / (4 * math.pi))  # P(m, m); z * 0: what is unknown stays so
    for m in range(DEGREES):
        before, this = torch.zeros_like(z), first
        for degree in range(m, DEGREES):  # this is P(degree, m), before the one of a degree less
            found += [this] if m == 0 else [math.sqrt(2) * this * real, math.sqrt(2) * this * imaginary]
            before, this = this, _growth(degree + 1, m) * (z * this - before / _growth(degree, m))
        real, imaginary = x * real - y * imaginary, x * imaginary + y * real
        first = first * math.sqrt((2 * m + 3) / (2 * m + 2))
    return torch.stack(found, dim=1)


def _growth(degree: int, m: int) -> float:
    """The factor of z P(degree - 1, m) in P(degree, m); infinite where there is no lower degree."""
    return math.sqrt((4 * degree**2 - 1) / (degree**2 - m**2)) if degree > m else math.inf
