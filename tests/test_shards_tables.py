"""Tables of any bytes: rows, or one line that names the file."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.observations import Reader
from shards.tables import TABLE_SUFFIXES, read_table

BYTES = st.one_of(
    st.binary(max_size=60),
    st.text("ab,;\t\"'\n\r{}[]:0\u00e9\0", max_size=60).map(str.encode),
    st.sampled_from([b'{"a": 1}\n', b"a,b\n1,2\n", b"PAR1"]).flatmap(
        lambda head: st.binary(max_size=9).map(head.__add__)
    ),
)


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=BYTES)
def test_any_bytes_are_rows_or_one_error(suffix, tmp_path, data):
    path = tmp_path / f"any{suffix}"
    path.write_bytes(data)
    try:
        table = read_table(path)
    except ValueError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - rows are as good as an error
    else:
        assert all(tuple(sorted(row)) == tuple(sorted(table.columns)) for row in table.rows.values())


CELLS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.dates(), st.lists(st.integers())
)


@settings(deadline=None)
@given(lon=CELLS, lat=CELLS, date=CELLS)
def test_any_cells_are_a_place_and_a_date_or_counted(lon, lat, date):
    """What comes out is within the range of degrees, whole or not at all."""
    reader = Reader()
    x, y = reader.place(lon, lat, "row 1")
    assert (x is None) == (y is None)
    if x is not None:
        assert -180 <= x <= 180
        assert -90 <= y <= 90
    day = reader.date(date, "row 1")
    assert not (isinstance(day, float) and not 0 <= day <= 1)
