"""Longitude, latitude and date as the features of a network; what "missing" means.

A place is a row of three numbers, always in this order and these units: lon and lat in degrees, the date as
a fraction of the year in [0, 1] (`records.year_fraction`). NaN stands for what is not known.
"""

import math

import torch
from torch import Tensor

# Legend: N rows; columns of a place: 0 lon, 1 lat, 2 date.
WRAP_WIDTH = 6


def known(places: Tensor) -> Tensor:
    """Which rows carry metadata at all: a place, a date, or both.

    Args:
        places: `[N, 3]` lon, lat in degrees, fraction of the year; NaN where unknown.

    Returns:
        `[N]` bool.
    """
    return ~places.isnan().all(dim=-1)  # [N]


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
