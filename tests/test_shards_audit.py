"""The audit, on sets whose counts are known by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from shards import build, cli
from tests import commands
from xcon.records import Card, ClassInfo, Record

HERE, NEAR, FAR = (-100.0, 40.0), (-100.0, 40.005), (-100.0, 41.0)  # 0.556 km and 111 km north
DAY = "2026-05-01"


def write_set(out: Path, records: list[Record], source: str = "imagefolder") -> Path:
    """A shard set of records; the audit does not look at photographs."""
    out.mkdir()
    splits = {}
    for split in dict.fromkeys(r.split for r in records):
        samples = [build.Sample(r, b"jpg", "a bird") for r in records if r.split == split]
        shard, _ = build.write_shard(out / f"{split}-000000.tar", samples)
        splits[split] = (shard,)
    classes = tuple(ClassInfo(c, c, f"bird {c}", None, (), {}) for c in sorted({r.class_id for r in records}))
    Card(classes, splits, {"source": source}).save(out)
    return out


def record(number: int, split: str, user: int | None, place, date, class_id: int = 0) -> Record:
    lon, lat = place or (None, None)
    return Record(f"r{number}", class_id, class_id, f"bird {class_id}", lon, lat, date, split, {"user_id": user})


def audit(folder: Path, *more: str) -> dict:
    out = folder.with_suffix(".json")
    assert commands.run(cli.main, ["audit", str(folder), "--out", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_what_test_shares_with_train_by_hand(tmp_path, capsys):
    train = [record(0, "train", 1, HERE, DAY), record(1, "train", 2, FAR, "2026-07-01")]
    test = [
        record(10, "test", 1, HERE, DAY),  # everything
        record(11, "test", 1, NEAR, DAY),  # photographer, day, near
        record(12, "test", 2, NEAR, "2026-08-08"),  # photographer, near
        record(13, "test", 3, FAR, "2026-05-02"),  # the place alone
        record(14, "test", 4, (10.0, 50.0), DAY),  # nothing
        record(15, "test", None, None, None),  # nothing is known
    ]
    found = audit(write_set(tmp_path / "set", train + test))
    shown = capsys.readouterr().out
    assert found["shared"] == {
        "test with train": {
            "photographer": {"records": 3, "of": 5},
            "photographer and day": {"records": 2, "of": 5},
            "place": {"records": 2, "of": 5},
            "place and day": {"records": 1, "of": 5},
            "within 1 km": {"records": 4, "of": 5},
            "within 1 km and day": {"records": 2, "of": 5},
        }
    }
    assert "may be ecology" in shown
    assert "drawn from eBird" not in shown


def test_metadata_that_tells_the_class_and_metadata_that_does_not(tmp_path, capsys):
    """Three classes a continent apart: neighbours are always right, with another's place in a third of cases."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(360):
        kind, split = number % 3, "test" if number >= 180 else "train"
        place = (-120.0 + 40 * kind + rng.normal(), 40.0 + rng.normal())
        records.append(record(number, split, None, place, float(rng.random()), kind))
    alone = audit(write_set(tmp_path / "set", records, "nabirds"))["metadata_alone"]
    assert (alone["tested"], alone["trained"], alone["true"]) == (180, 180, 1.0)
    assert alone["shuffled"] == pytest.approx(1 / 3, abs=0.1)
    assert alone["commonest"] == pytest.approx(1 / 3)
    assert "drawn from eBird given the true species" in capsys.readouterr().out


def test_without_metadata_or_test_it_says_so(tmp_path, capsys):
    bare = [record(0, "train", None, None, None), record(1, "test", None, None, None)]
    assert audit(write_set(tmp_path / "bare", bare))["metadata_alone"] == {"not_measured": "no places and dates"}
    assert "photographers, places and dates are unknown" in capsys.readouterr().out
    alone = audit(write_set(tmp_path / "alone", bare[:1]))
    assert alone["metadata_alone"] == {"not_measured": "there are not both test and train"}
    assert "one split: it can share nothing" in capsys.readouterr().out
