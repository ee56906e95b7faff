"""The record: ranges, the year, captions, the card, and files written whole or not at all."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xcon import records
from xcon.records import Card, ClassInfo, Record, Shard

OSPREY = ClassInfo(3, 295, "Osprey", "Pandion haliaetus", ("Hawks, Kites and Eagles", "Hawks"), {"train": 2})


def record(**changes: object) -> Record:
    values = {
        "image_id": "0a-b_c", "class_id": 3, "raw_class_id": 295, "class_name": "Osprey",
        "lon": -73.9, "lat": 40.7, "date": "2026-05-01", "split": "train",
        "extra": {"user_id": "u1", "bbox": [1, 2, 3, 4]},
    }  # fmt: skip
    return Record(**{**values, **changes})


# ---- the record


def test_json_of_a_record_by_hand() -> None:
    assert json.loads(record(lon=None, lat=None, date=None).to_json()) == {
        "image_id": "0a-b_c", "class_id": 3, "raw_class_id": 295, "class_name": "Osprey", "lon": None, "lat": None,
        "date": None, "split": "train", "user_id": "u1", "bbox": [1, 2, 3, 4],
    }  # fmt: skip


@pytest.mark.parametrize("date", [None, 0.25, "2026-05-01"])
def test_a_record_survives_json(date: str | float | None) -> None:
    one = record(date=date, class_name="Žluva hajní")
    assert Record.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lat": 90.1}, r"record 0a-b_c: lat 90.1 is outside \[-90, 90\] degrees: are lon and lat exchanged\?"),
        ({"lat": -73.9, "lon": 180.1}, r"lon 180.1 is outside \[-180, 180\]"),
        ({"lat": math.nan}, "lat nan is outside"),
        ({"lon": math.inf}, "lon inf is outside"),
        ({"lon": None}, "both or neither"),
        ({"lat": None}, "both or neither"),
        ({"date": "01.05.2026"}, "date '01.05.2026' is no ISO date"),
        ({"date": "2026-02-29"}, "date '2026-02-29' is no ISO date"),
        ({"date": 1.01}, r"date 1.01 is no fraction of the year in \[0, 1\]"),
        ({"date": math.nan}, "date nan is no fraction"),
        ({"split": "dev"}, "split is 'dev', one of train, val, test"),
    ],
)
def test_values_out_of_range_are_refused_and_the_record_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        record(**changes)
    assert str(caught.value).startswith("record 0a-b_c: ")


@pytest.mark.parametrize(("lon", "lat"), [(-180, -90), (180, 90), (0, 0)])
def test_edges_of_the_world_are_places(lon: float, lat: float) -> None:
    assert record(lon=lon, lat=lat).lon == lon


def test_exchanged_coordinates_are_suspected_only_where_they_would_fit() -> None:
    """(40.7, -122.4) the other way round is a place; (200, 95) is none either way."""
    with pytest.raises(ValueError, match="exchanged"):
        records.check_place(lon=40.7, lat=-122.4)
    with pytest.raises(ValueError, match=r"degrees$"):
        records.check_place(lon=95, lat=200)
    with pytest.raises(ValueError, match=r"degrees$"):
        records.check_place(lon=120, lat=95)


@pytest.mark.parametrize("image_id", ["", "a.b", "a/b", "a b", "a\\b", "x" * 96, "a\nb", "a\0b"])
def test_ids_that_a_tar_would_misread_are_refused(image_id: str) -> None:
    with pytest.raises(ValueError, match="an image id has 1 to 95 characters"):
        record(image_id=image_id)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b'{"image_id": "a"}', "fields missing: class_id, raw_class_id"),
        (record().to_json().replace(b"-73.9", b'"west"'), "a value of the wrong kind .*str"),
        (record().to_json().replace(b"40.7", b"95.0"), "record 0a-b_c: lat 95.0"),
    ],
)
def test_json_that_is_no_record_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Record.from_json(data)


# ---- the year


@pytest.mark.parametrize(
    ("date", "fraction"),
    [
        ("2026-01-01", 0.0),
        ("2026-12-31", 1.0),
        ("2024-12-31", 1.0),
        ("2026-07-02", 0.5),  # day 183: 182 of 364
        ("2026-03-01", 59 / 364),
        ("2024-03-01", 60 / 365),  # 29 February was a day
        ("2024-02-29", 59 / 365),
        ("2026-05-01T23:59:59", 120 / 364),
        (0.0, 0.0),
        (1, 1.0),
        (0.37, 0.37),
    ],
)
def test_fraction_of_the_year_by_hand(date: str | float, fraction: float) -> None:
    assert records.year_fraction(date) == pytest.approx(fraction, abs=1e-15)


def test_no_date_is_no_number() -> None:
    assert math.isnan(records.year_fraction(None))


@given(st.dates())
def test_every_date_has_a_fraction_that_tells_its_day(date) -> None:
    days = 366 if date.year % 4 == 0 and (date.year % 100 != 0 or date.year % 400 == 0) else 365
    assert records.year_fraction(date.isoformat()) * (days - 1) + 1 == pytest.approx(date.timetuple().tm_yday)


# ---- captions


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (records.PAPER_CAPTION, "This is a photograph of a bird called Osprey"),
        ("{name} ({scientific_name})", "Osprey (Pandion haliaetus)"),
        ("a {name}, one of {family}", "a Osprey, one of Hawks, Kites and Eagles"),
    ],
)
def test_captions_by_hand(template: str, text: str) -> None:
    assert records.caption(template, OSPREY) == text


@pytest.mark.parametrize(
    ("name", "species", "plumage"),
    [
        ("Osprey", "Osprey", ""),
        ("Bald Eagle (Adult, subadult)", "Bald Eagle", "adult or subadult"),
        ("Snow Goose (White morph)", "Snow Goose", "white morph"),
        ("American Kestrel (Adult Male)", "American Kestrel", "adult male"),
        ("American Kestrel (Female/immature)", "American Kestrel", "female or immature"),
        ("American Kestrel (Female, immature)", "American Kestrel", "female or immature"),
        ("Blue-winged Teal  (Female/juvenile)", "Blue-winged Teal", "female or juvenile"),
        ("Swainson's Hawk (Dark morph )", "Swainson's Hawk", "dark morph"),
        ("Yellow-rumped Warbler (Breeding Audubon's)", "Yellow-rumped Warbler", "breeding audubon's"),
        ("(Unknown)", "(Unknown)", ""),
        ("Heron (Great) Blue", "Heron (Great) Blue", ""),
    ],
)
def test_species_and_plumage_of_a_name(name: str, species: str, plumage: str) -> None:
    """Spellings of NABirds, and two names whose parenthesis is not at their end or all there is."""
    info = dataclasses.replace(OSPREY, name=name)
    fields = info.caption_fields
    assert (fields["species"], fields["plumage"]) == (species, plumage)


def test_a_class_without_plumage_leaves_no_gap() -> None:
    template = "a photograph of a {plumage} {species} ({scientific_name})"
    male = dataclasses.replace(OSPREY, name="Osprey (Adult Male)")
    assert records.caption(template, OSPREY) == "a photograph of a Osprey (Pandion haliaetus)"
    assert records.caption(template, male) == "a photograph of a adult male Osprey (Pandion haliaetus)"


def test_spaces_of_a_name_are_not_the_captions() -> None:
    twice = dataclasses.replace(OSPREY, name=" European  Starling ")
    assert records.caption("{name}", twice) == "European Starling"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a bird", "names no field"),
        ("{order}", "class 'Osprey' has no 'order', only name"),
        ("{scientific_name}", "has no 'scientific_name', only name"),
        ("{name", "caption template '{name': "),
        ("{}", "has no ''"),
        ("{name.__class__}", "has no 'name.__class__'"),
    ],
)
def test_templates_that_name_nothing_known_are_refused(template: str, message: str) -> None:
    plain = ClassInfo(0, 1, "Osprey", None, (), {})
    with pytest.raises(ValueError, match=message):
        records.caption(template, plain)


def test_classes_are_numbered_by_their_sorted_ids() -> None:
    assert records.number_classes([295, 81, 1000, 81]) == {81: 0, 295: 1, 1000: 2}
    assert records.number_classes(["b", "10", "9"]) == {"10": 0, "9": 1, "b": 2}


# ---- the card


def card(**changes: object) -> Card:
    shards = {
        "train": (Shard("train-000000.tar", 2, 10240, "ab"), Shard("train-000001.tar", 1, 9, "cd")),
        "val": (),
    }
    return Card(**{"classes": (OSPREY,), "splits": shards, "made_by": {"source": "test"}, **changes})


def test_a_card_comes_back(tmp_path: Path) -> None:
    card().save(tmp_path)
    assert Card.load(tmp_path) == card()
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_what_a_card_says() -> None:
    assert (card().samples("train"), card().samples("val")) == (3, 0)
    assert [shard.index_file for shard in card().splits["train"]] == [
        "train-000000.index.parquet",
        "train-000001.index.parquet",
    ]
    assert card().class_facts()[0]["hierarchy"] == ("Hawks, Kites and Eagles", "Hawks")


def test_the_hash_of_a_set_is_that_of_its_data_and_survives_saving(tmp_path: Path) -> None:
    card().save(tmp_path)
    assert Card.load(tmp_path).sha256 == card().sha256 == card(made_by={"source": "other"}).sha256
    changed = [
        card(splits={**card().splits, "train": (Shard("train-000000.tar", 2, 10240, "ac"),)}),
        card(splits={"train": card().splits["val"], "val": card().splits["train"]}),
        card(classes=(dataclasses.replace(OSPREY, name="Sea Hawk"),)),
    ]
    assert len({c.sha256 for c in [card(), *changed]}) == 4


# ---- whole or not at all


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with records.atomic_write(tmp_path / "a") as file:
        file.write(b"new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_leaves_what_was_there(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "a"
    if before is not None:
        path.write_bytes(before)

    def write() -> None:
        with records.atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="missing/a: cannot be written"),
        records.atomic_write(tmp_path / "missing" / "a"),
    ):
        pass
