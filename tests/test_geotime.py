"""Features of place and date against values by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xcon import geotime

NAN = math.nan


def wrap(lon: float, lat: float, date: float) -> list[float]:
    """sin lon, sin lat, cos lon, cos lat, sin date, cos date."""
    return geotime.encode_wrap(torch.tensor([[lon, lat, date]], dtype=torch.float64))[0].tolist()


@pytest.mark.parametrize(
    ("place", "features"),
    [
        # The angle of lon is pi lon / 180, that of lat pi lat / 90, that of the date pi (2 date - 1).
        ((0, 0, 0.5), (0, 0, 1, 1, 0, 1)),
        ((90, 0, 0.5), (1, 0, 0, 1, 0, 1)),
        ((-90, 0, 0.5), (-1, 0, 0, 1, 0, 1)),
        ((0, 45, 0.5), (0, 1, 1, 0, 0, 1)),
        ((0, -45, 0.5), (0, -1, 1, 0, 0, 1)),
        ((0, 0, 0.25), (0, 0, 1, 1, -1, 0)),
        ((0, 0, 0.75), (0, 0, 1, 1, 1, 0)),
        ((0, 0, 0), (0, 0, 1, 1, 0, -1)),
        ((30, 15, 7 / 12), (0.5, 0.5, math.sqrt(3) / 2, math.sqrt(3) / 2, 0.5, math.sqrt(3) / 2)),
    ],
)
def test_features_by_hand(place: tuple[float, float, float], features: tuple[float, ...]) -> None:
    assert wrap(*place) == pytest.approx(features, abs=1e-12)


def test_longitude_and_latitude_are_not_interchangeable() -> None:
    assert wrap(30, 0, 0.5) != pytest.approx(wrap(0, 30, 0.5))


def test_the_date_line_is_no_border() -> None:
    assert wrap(180, 10, 0.3) == pytest.approx(wrap(-180, 10, 0.3), abs=1e-12)
    assert math.dist(wrap(179.9, 10, 0.3), wrap(-179.9, 10, 0.3)) < 0.004


def test_new_year_is_no_border() -> None:
    assert wrap(1, 2, 0.0) == pytest.approx(wrap(1, 2, 1.0), abs=1e-12)
    assert math.dist(wrap(1, 2, 0.999), wrap(1, 2, 0.001)) < 0.013


def test_both_poles_have_one_code() -> None:
    """A flaw of the encoding of Mac Aodha et al., kept on purpose."""
    assert wrap(0, 90, 0.5) == pytest.approx(wrap(0, -90, 0.5), abs=1e-12)


@pytest.mark.parametrize(
    ("place", "zeros"),
    [
        ((NAN, NAN, NAN), {0, 1, 2, 3, 4, 5}),
        ((NAN, NAN, 0.3), {0, 1, 2, 3}),
        ((30.0, 15.0, NAN), {4, 5}),
    ],
)
def test_what_is_unknown_becomes_zero_and_the_rest_stays(
    place: tuple[float, float, float], zeros: set[int]
) -> None:
    full = wrap(*(given_ if given_ == given_ else 0.1 for given_ in place))  # noqa: PLR0124 - NaN differs from itself
    found = wrap(*place)
    assert found == pytest.approx([0 if i in zeros else value for i, value in enumerate(full)])


@given(st.floats(-180, 180), st.floats(-90, 90), st.floats(0, 1))
def test_what_is_known_lies_on_its_circles(lon: float, lat: float, date: float) -> None:
    features = wrap(lon, lat, date)
    for sine, cosine in ((0, 2), (1, 3), (4, 5)):
        assert math.hypot(features[sine], features[cosine]) == pytest.approx(1)


def test_a_row_is_known_by_place_or_date() -> None:
    places = torch.tensor([[1, 2, 0.5], [NAN, NAN, 0.5], [1, 2, NAN], [NAN, NAN, NAN], [0, 0, 0]])
    assert geotime.known(places).tolist() == [True, True, True, False, True]


def test_rows_do_not_mix() -> None:
    places = torch.tensor([[10, 20, 0.1], [NAN, NAN, NAN], [-10, 70, 0.9]], dtype=torch.float64)
    found = geotime.encode_wrap(places)
    assert found.tolist() == [pytest.approx(wrap(*row)) for row in places.tolist()]
