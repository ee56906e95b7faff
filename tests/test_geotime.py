"""Features of place and date against values by hand."""

import math
import typing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import sph_harm_y

from xcon import geotime
from xcon.config import MetaEncoding

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


# ---- other encodings

ENCODINGS = typing.get_args(MetaEncoding)
AT_THE_POLES = {"xyz", "fourier", "harmonics"}  # continuous there


def encode(encoding: MetaEncoding, *place: float) -> list[float]:
    return geotime.encode(torch.tensor([place], dtype=torch.float64), encoding)[0].tolist()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("lat", [-89.0, -30.0, 0.0, 47.5])
def test_no_encoding_has_a_border_at_the_date_line(encoding: MetaEncoding, lat: float) -> None:
    assert encode(encoding, 180, lat, 0.3) == pytest.approx(encode(encoding, -180, lat, 0.3), abs=1e-9)
    assert math.dist(encode(encoding, 179.9999, lat, 0.3), encode(encoding, -179.9999, lat, 0.3)) < 1e-3


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_encoding_has_a_border_at_new_year(encoding: MetaEncoding) -> None:
    assert encode(encoding, 1, 2, 0.0) == pytest.approx(encode(encoding, 1, 2, 1.0), abs=1e-12)
    assert 0 < math.dist(encode(encoding, 1, 2, 0.99999), encode(encoding, 1, 2, 0.00001)) < 1e-3


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("pole", [90.0, -90.0])
def test_at_the_poles_all_longitudes_meet_or_are_known_not_to(encoding: MetaEncoding, pole: float) -> None:
    apart = max(
        math.dist(encode(encoding, 0, pole, 0.5), encode(encoding, lon, pole, 0.5)) for lon in (45, 90, 180)
    )
    assert apart < 1e-9 if encoding in AT_THE_POLES else apart > 1


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(st.floats(-180, 180), st.floats(-90, 90), st.floats(-1e-7, 1e-7), st.floats(-1e-7, 1e-7))
def test_near_places_have_near_features(
    encoding: MetaEncoding, lon: float, lat: float, east: float, north: float
) -> None:
    near = (lon + east, max(-90.0, min(90.0, lat + north)), 0.5)
    assert math.dist(encode(encoding, lon, lat, 0.5), encode(encoding, *near)) < 1e-5


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e != "wrap"])
def test_places_far_apart_have_other_features(encoding: MetaEncoding) -> None:
    """Opposite ends of an axis, the poles, the quarters of the equator: no two share a code."""
    places = [(0, 90), (0, -90), (0, 0), (90, 0), (180, 0), (-90, 0), (45, 45), (45, -45)]
    codes = [encode(encoding, *place, 0.5) for place in places]
    assert min(math.dist(a, b) for i, a in enumerate(codes) for b in codes[:i]) > 0.5


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_unknown_is_zero_in_every_encoding(encoding: MetaEncoding) -> None:
    assert not any(encode(encoding, NAN, NAN, NAN))
    no_place, no_date = encode(encoding, NAN, NAN, 0.3), encode(encoding, 10, 20, NAN)
    assert not any(no_place[:-2])
    assert no_place[-2:] == pytest.approx(encode(encoding, 10, 20, 0.3)[-2:])
    assert not any(no_date[-2:])
    assert len(no_date) == geotime.width(encoding)


def test_xyz_by_hand() -> None:
    assert encode("xyz", 0, 0, 0.5)[:3] == pytest.approx((1, 0, 0))
    assert encode("xyz", 90, 0, 0.5)[:3] == pytest.approx((0, 1, 0), abs=1e-12)
    assert encode("xyz", 30, 60, 0.5)[:3] == pytest.approx((math.sqrt(3) / 4, 1 / 4, math.sqrt(3) / 2))


def test_fourier_by_hand() -> None:
    """At the origin of the map x is 1: sine of pi / 2, pi, ..., cosine likewise; y and z are 0."""
    found = encode("fourier", 0, 0, 0.5)[:36]
    assert found[:6] == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-12)
    assert found[18:24] == pytest.approx([0, 1, 1, -1, 1, 1], abs=1e-12)


def test_sphere2vec_by_hand() -> None:
    """Frequency 1 and 2 at 30 degrees east, 60 north."""
    half, root = 1 / 2, math.sqrt(3) / 2
    found = encode("sphere2vec", 30, 60, 0.5)
    assert found[:6] == pytest.approx([root, half, half, root, half * root, half * half])
    assert found[6:12] == pytest.approx([root, -half, root, half, -half * half, -half * root])


@pytest.mark.parametrize("place", [(0.0, 0.0), (12.0, 47.0), (-170.0, -88.0), (101.0, 30.0), (-60.0, 89.99)])
def test_harmonics_are_those_of_scipy(place: tuple[float, float]) -> None:
    """scipy has them complex and with the phase (-1)^m."""
    lon, lat = np.deg2rad(place)
    expected = []
    for m in range(geotime.DEGREES):
        for degree in range(m, geotime.DEGREES):
            value = complex(sph_harm_y(degree, m, np.pi / 2 - lat, lon)) * (-1) ** m
            expected += [value.real] if m == 0 else [math.sqrt(2) * value.real, math.sqrt(2) * value.imag]
    assert encode("harmonics", *place, 0.5)[:100] == pytest.approx(expected, abs=1e-10)


def test_harmonics_in_single_precision() -> None:
    places = torch.tensor([[12.0, 47.0, 0.5], [-170.0, -88.0, 0.1], [0.0, 90.0, 0.9]])
    torch.testing.assert_close(
        geotime.encode(places, "harmonics").double(),
        geotime.encode(places.double(), "harmonics"),
        atol=2e-5,
        rtol=0,
    )


# ---- places moved at random


def kilometres(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """`[N]` along great circles, by the haversine, for `[N, 2]` lon, lat each."""
    (lon, lat), (lon_2, lat_2) = one.deg2rad().T, two.deg2rad().T
    half = ((lat_2 - lat) / 2).sin() ** 2 + lat.cos() * lat_2.cos() * ((lon_2 - lon) / 2).sin() ** 2
    return 2 * 6371 * half.sqrt().asin()


@pytest.mark.parametrize("place", [(10.0, 50.0), (179.99, -16.5), (0.0, 90.0), (-70.0, -89.9)])
def test_places_are_moved_by_a_normal_of_two_directions(place: tuple[float, float]) -> None:
    """Squared distances have the mean 2 km^2 and its square for a variance; half of the places come north."""
    torch.manual_seed(0)
    here = torch.tensor([[*place, 0.5]]).expand(4000, 3)
    there = geotime.moved(here, km=100.0, days=0.0)
    squared = kilometres(here[:, :2].double(), there[:, :2]) ** 2
    assert abs(squared.mean() - 20_000) < 4 * 20_000 / math.sqrt(4000)
    assert abs((squared < 20_000 * math.log(2)).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)  # the median
    if abs(place[1]) < 80:
        east = (there[:, 0] - place[0] + 180) % 360 - 180
        for found in (east, there[:, 1] - place[1]):
            assert abs((found > 0).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    torch.testing.assert_close(there[:, 2], here[:, 2].double())


def test_dates_are_moved_over_new_year() -> None:
    torch.manual_seed(0)
    here = torch.tensor([[10.0, 50.0, 0.99]]).expand(4000, 3)
    there = geotime.moved(here, km=0.0, days=20.0)
    days = ((there[:, 2] - 0.99 + 0.5) % 1 - 0.5) * 365.25
    assert abs(days.mean()) < 4 * 20 / math.sqrt(4000)
    assert days.std().item() == pytest.approx(20, rel=0.05)
    assert (there[:, 2] < 0.5).any()
    torch.testing.assert_close(there[:, :2], here[:, :2].double())


@given(
    st.floats(-180, 180), st.floats(-90, 90), st.floats(0, 1), st.floats(0, 30_000), st.floats(0, 1000),
    st.sets(st.integers(0, 2)),
)  # fmt: skip
def test_moved_places_stay_in_range_and_unknown_ones_unknown(
    lon: float, lat: float, date: float, km: float, days: float, unknown: set[int]
) -> None:
    here = torch.tensor([[lon, lat, date]], dtype=torch.float64)
    here[:, list(unknown)] = NAN
    there = geotime.moved(here, km=km, days=days)
    assert torch.equal(there.isnan(), here.isnan())
    low, high = torch.tensor([-180.0, -90.0, 0.0]), torch.tensor([180.0, 90.0, 1.0])
    assert ((there >= low) & (there <= high) | there.isnan()).all()
