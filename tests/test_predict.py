"""Fine-tuning's result and its evaluation: every record once, the figures recomputed by hand."""

import csv
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests import training
from xcon import classifier, finetune, images, predict, records
from xcon.classifier import Product
from xcon.shardset import ShardSet

pytestmark = pytest.mark.slow

FLAT = ("--workers", "0", "--precision", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def tuned(shards: Path, run: Path, *more: str | Path) -> Path:
    argv = ["demo", "--shards", shards, "--out", run, *training.EVERY_STEP, *training.RESNET, *more]
    assert training.run(finetune.main, argv) == 0
    return run


@pytest.fixture(scope="module")
def run(tiny_shards: Path, folder: Path) -> Path:
    """Image and metadata, long enough that both matter; evaluated on the test split."""
    made = tuned(tiny_shards, folder / "run", "--batch-size", "32", "--epochs", "10", "--seed", "7")
    assert training.run(predict.main, [made, "--shards", tiny_shards, *FLAT]) == 0
    return made


def columns(table: Path) -> dict[str, np.ndarray]:
    """The columns of `predictions.parquet`, `scores` as `[N, C]`."""
    found = pq.read_table(table).to_pydict()
    return {name: np.array(values) for name, values in found.items()}


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values under one name each, as `without_meta.top1`."""
    parts = values.items() if isinstance(values, dict) else enumerate(values)
    found: dict[str, Any] = {}
    for key, value in parts:
        nested = isinstance(value, (dict, list))
        found |= flat(value, f"{name}{key}.") if nested else {f"{name}{key}": value}
    return found


def members(shards: Path) -> dict[str, dict[str, bytes]]:
    """Image id -> ending -> bytes, from the tars themselves: no index, no loader."""
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted(shards.glob("test-*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                key, _, ending = member.name.partition(".")
                content = archive.extractfile(member)
                assert content is not None
                found.setdefault(key, {})[ending] = content.read()
    return found


def place_of(record: dict[str, Any]) -> list[float]:
    """lon, lat, fraction of the year; NaN for null."""
    degrees = [math.nan if record[name] is None else record[name] for name in ("lon", "lat")]
    return [*degrees, records.year_fraction(record["date"])]


def probabilities(run: Path, photos: list[bytes], places: list[list[float]]) -> np.ndarray:
    """`[N, C]` by the saved model, one photograph at a time."""
    network, spec = classifier.load(run)
    assert spec.image is not None
    view = images.eval_transform(spec.image)
    with torch.inference_mode():
        rows = [
            network.score({"image": view(images.decode(photo))[None], "meta": torch.tensor([place])})
            for photo, place in zip(photos, places, strict=True)
        ]
    return torch.cat(rows).softmax(dim=1).numpy()


def test_every_test_record_once(run: Path, tiny_shards: Path) -> None:
    found = columns(run / "predictions.parquet")
    assert sorted(found["image_id"]) == sorted(members(tiny_shards))
    assert len(found["image_id"]) == 36


def test_two_processes_predict_the_same(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """36 records in batches of 10 on two processes: the last batch is filled up, the rows of the filling go."""
    expected = columns(run / "predictions.parquet")  # before it is written again
    figures = json.loads((run / "metrics.json").read_text())
    two = tmp_path / "two.parquet"
    argv = [run, "--shards", tiny_shards, *FLAT, "--batch-size", "10", "--out", two]
    told = training.torchrun("predict", *argv)
    assert "36 of 36 test records, each evaluated once, by 2 process(es)" in told
    found = columns(two)
    deviation = np.abs(found["scores"] - expected["scores"]).max()
    print(f"two processes: probabilities within {deviation:.1e}")  # noqa: T201
    assert deviation < 1e-5
    for name in ("image_id", "class_id", "predicted", "top5", "predicted_without_meta", "predicted_shuffled_meta"):
        assert (found[name] == expected[name]).all(), name
    assert found["probability"] == pytest.approx(expected["probability"], abs=1e-5)
    again = json.loads((run / "metrics.json").read_text())
    assert flat(again) == pytest.approx(flat(figures), abs=1e-5)


def test_metrics_by_hand(run: Path, tiny_shards: Path) -> None:
    """From `predictions.parquet` alone, in plain loops."""
    found = columns(run / "predictions.parquet")
    figures = json.loads((run / "metrics.json").read_text())
    right: dict[int, list[bool]] = {}
    top5 = 0
    for truth, row, best, probability, first in zip(
        *(found[name] for name in ("class_id", "scores", "predicted", "probability", "top5")), strict=True
    ):
        order = sorted(range(6), key=lambda c: -row[c])
        right.setdefault(int(truth), []).append(order[0] == truth)
        top5 += int(truth in order[:5])
        assert (order[0], order[:5]) == (best, list(first))
        assert row[best] == probability
        assert sum(row) == pytest.approx(1, abs=1e-5)
    every = [hit for hits in right.values() for hit in hits]
    assert figures["top1"] == pytest.approx(sum(every) / 36)
    assert figures["top5"] == pytest.approx(top5 / 36)
    assert figures["mean_per_class"] == pytest.approx(sum(sum(h) / len(h) for h in right.values()) / 6)
    for control in ("without_meta", "shuffled_meta"):
        share = sum(found[f"predicted_{control}"] == found["class_id"]) / 36
        assert figures[control]["top1"] == pytest.approx(share)
    card = json.loads((tiny_shards / "dataset.json").read_text())
    groups = np.array([info["hierarchy"][0] for info in card["classes"]])
    likeliest = [max(sorted(set(groups)), key=lambda group: row[groups == group].sum()) for row in found["scores"]]
    in_groups = figures["label_spaces"]["groups"]
    assert in_groups["top1"] == pytest.approx(np.mean(likeliest == groups[found["class_id"]]))
    assert (figures["n_labels"], in_groups["n_labels"]) == (6, len(set(groups)))
    assert sum(figures["reliability"]["count"]) == 36
    assert "meta_only" not in figures  # two layers on both have no expert for metadata
    assert (figures["split"], figures["n"], figures["seed"]) == ("test", 36, 7)
    assert figures["with_meta"] is True
    assert figures["label_space"].startswith(f"{len(card['classes'])} classes")
    assert figures["shards_sha256"] == ShardSet(tiny_shards).card.sha256


def test_scores_belong_to_their_records(run: Path, tiny_shards: Path) -> None:
    """Photographs and places straight from the tars, one at a time, through the saved model."""
    found = columns(run / "predictions.parquet")
    stored = members(tiny_shards)
    mine = [stored[image_id] for image_id in found["image_id"]]
    facts = [json.loads(member["json"]) for member in mine]
    photos, places = [member["jpg"] for member in mine], [place_of(record) for record in facts]
    assert [record["class_id"] for record in facts] == list(found["class_id"])
    own = probabilities(run, photos, places)
    assert np.abs(own - found["scores"]).max() < 1e-5
    without = probabilities(run, photos, [[math.nan] * 3] * len(photos))
    assert (without.argmax(axis=1) == found["predicted_without_meta"]).all()
    others = np.random.default_rng(0).permutation(len(photos))
    shuffled = probabilities(run, photos, [places[n] for n in others])
    assert (shuffled.argmax(axis=1) == found["predicted_shuffled_meta"]).all()
    assert np.abs(own - without).max() > 0.2  # metadata is really used


def test_metadata_is_used(run: Path) -> None:
    """Place and date tell the look-alikes apart: taking them away, or exchanging them, costs."""
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["top1"] > figures["without_meta"]["top1"] + 0.1
    assert figures["top1"] > figures["shuffled_meta"]["top1"] + 0.1


def test_a_product_is_trained_and_evaluated(tiny_shards: Path, folder: Path) -> None:
    """Two experts in one run; what a wrong place costs falls with the doubt, which is saved."""
    found = {}
    for doubt in ("0.0", "0.5"):
        fusion = ["--fusion", "product", "--doubt", doubt, "--meta-dropout", "0"]
        run = tuned(tiny_shards, folder / f"product-{doubt}", "--batch-size", "32", "--epochs", "4", *fusion)
        assert training.run(predict.main, [run, "--shards", tiny_shards, *FLAT]) == 0
        network, spec = classifier.load(run)
        assert isinstance(network, Product)
        assert spec.image is not None
        assert network.doubt.item() == float(doubt)
        logged = training.lines(run, "val")[-1]
        assert {"top1", "loss", "sharpness"} <= logged.keys()
        found[doubt] = json.loads((run / "metrics.json").read_text())
        # Metadata alone: the expert's own best class, of places straight from the tars.
        table, stored = columns(run / "predictions.parquet"), members(tiny_shards)
        facts = [json.loads(stored[image_id]["json"]) for image_id in table["image_id"]]
        with torch.inference_mode():
            best = network.embed("meta", torch.tensor([place_of(record) for record in facts])).argmax(dim=1)
        assert (table["predicted_meta_only"] == best.numpy()).all()
        assert found[doubt]["meta_only"]["top1"] == (table["predicted_meta_only"] == table["class_id"]).mean()
    # Evaluated with another doubt, under another name: as if it had been trained with that, but for calibration.
    argv = [run, "--shards", tiny_shards, *FLAT, "--doubt", "0.0", "--name", "trusting"]
    assert training.run(predict.main, argv) == 0
    trusting = json.loads((run / "metrics-trusting.json").read_text())
    assert json.loads((run / "metrics.json").read_text()) == found["0.5"]
    assert trusting["without_meta"] == found["0.5"]["without_meta"]
    network, _ = classifier.load(run, doubt=0.0)
    photos = [stored[image_id]["jpg"] for image_id in table["image_id"]]
    view = images.eval_transform(spec.image)
    batch = torch.stack([view(images.decode(photo)) for photo in photos])
    with torch.inference_mode():
        best = network.score({"image": batch, "meta": torch.tensor([place_of(r) for r in facts])}).argmax(dim=1)
    assert trusting["top1"] == (best.numpy() == table["class_id"]).mean()
    # The experts do not know of the doubt: the same image expert, with calibration of its own.
    assert found["0.0"]["without_meta"]["top1"] == found["0.5"]["without_meta"]["top1"]
    assert found["0.5"]["shuffled_meta"]["top1"] >= found["0.0"]["shuffled_meta"]["top1"]
    assert found["0.0"]["top1"] != found["0.0"]["without_meta"]["top1"]


def test_files(run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same ranking on the terminal and in three formats, that of the saved model."""
    chosen = sorted(members(tiny_shards).items())[:2]
    photos = [member["jpg"] for _, member in chosen]
    names = [f"{key}.jpg" for key, _ in chosen]
    for name, photo in zip(names, photos, strict=True):
        (tmp_path / name).write_bytes(photo)
    here = ["--lon", "-73.9", "--lat", "40.7", "--date", "2026-05-01"]
    argv = [run, *(tmp_path / name for name in names), *here, *FLAT, "--top", "3"]
    # 1 May is the 121st day: 120 days after the first of 364.
    expected = probabilities(run, photos, [[-73.9, 40.7, 120 / 364]] * 2)

    for ending in ("csv", "json", "parquet"):
        assert training.run(predict.main, [*argv, "--out", tmp_path / f"ranking.{ending}"]) == 0
    rows = json.loads((tmp_path / "ranking.json").read_text())
    assert pq.read_table(tmp_path / "ranking.parquet").to_pylist() == rows
    written = list(csv.DictReader(io.StringIO((tmp_path / "ranking.csv").read_text())))
    assert [
        {name: type(row[name])(text) for name, text in line.items()}
        for row, line in zip(rows, written, strict=True)
    ] == rows

    classes = ShardSet(tiny_shards).card.classes
    assert [(row["file"], row["rank"]) for row in rows] == [
        (str(tmp_path / name), rank) for name in names for rank in (1, 2, 3)
    ]
    for number, row in enumerate(rows):
        best = np.argsort(-expected[number // 3])[row["rank"] - 1]
        info = classes[best]
        assert (row["class_id"], row["raw_class_id"], row["name"]) == (best, info.raw_class_id, info.name)
        assert row["probability"] == pytest.approx(expected[number // 3, best], abs=1e-5)

    capsys.readouterr()
    assert training.run(predict.main, argv) == 0
    told = " ".join(capsys.readouterr().out.split())
    for row in rows:
        assert f"{row['probability']:.3f}" in told

    assert training.run(predict.main, [*argv[:3], *FLAT, "--out", tmp_path / "nowhere.json"]) == 0
    nowhere = json.loads((tmp_path / "nowhere.json").read_text())
    assert [row["probability"] for row in nowhere[::5]] != [row["probability"] for row in rows[::3]]


def test_results_can_have_a_name(run: Path, tiny_shards: Path) -> None:
    """As of other shards: the same evaluation under another name, the files of the test split left as they are."""
    kept = [(run / name).read_bytes() for name in ("metrics.json", "predictions.parquet")]
    assert training.run(predict.main, [run, "--shards", tiny_shards, *FLAT, "--name", "new-sites"]) == 0
    named = [run / name for name in ("metrics-new-sites.json", "predictions-new-sites.parquet")]
    assert flat(json.loads(named[0].read_text())) == pytest.approx(flat(json.loads(kept[0])), abs=1e-5)
    assert pq.read_table(named[1])["image_id"] == pq.read_table(io.BytesIO(kept[1]))["image_id"]
    assert [(run / name).read_bytes() for name in ("metrics.json", "predictions.parquet")] == kept


def test_images_alone(tiny_shards: Path, folder: Path) -> None:
    run = tuned(tiny_shards, folder / "image", "--batch-size", "48", "--epochs", "1", "--modalities", "image")
    assert training.run(predict.main, [run, "--shards", tiny_shards, *FLAT]) == 0
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["with_meta"] is False
    assert "without_meta" not in figures
    assert "predicted_without_meta" not in pq.read_table(run / "predictions.parquet").column_names


def test_early_stopping_keeps_the_best_weights(tiny_shards: Path, folder: Path) -> None:
    """Stops `patience` epochs after the best one, whose loss and accuracy are those of the saved weights."""
    patience = 2
    run = tuned(
        *(tiny_shards, folder / "early", "--batch-size", "32", "--epochs", "30", "--patience", str(patience)),
        *("--image-lr", "0.02", "--head-lr", "0.02", "--meta-lr", "0.02"),
    )
    held_out = training.lines(run, "val")
    ranking = [(line["top1"], -line["loss"]) for line in held_out]
    best = ranking.index(max(ranking))
    assert len(held_out) < 30
    assert best == len(held_out) - 1 - patience
    assert training.lines(run)[-1]["best"] == list(ranking[best])

    assert training.run(predict.main, [run, "--shards", tiny_shards, *FLAT, "--split", "val"]) == 0
    figures = json.loads((run / "metrics-val.json").read_text())
    found = columns(run / "predictions-val.parquet")
    loss = -np.log(found["scores"][np.arange(12), found["class_id"]]).mean()
    assert figures["top1"] == pytest.approx(held_out[best]["top1"])
    assert loss == pytest.approx(held_out[best]["loss"], rel=1e-4)
    others = [line["loss"] for n, line in enumerate(held_out) if n != best]
    assert all(loss != pytest.approx(other, rel=1e-3) for other in others)


def test_accumulation_gives_the_same_trajectory(tiny_shards: Path, folder: Path) -> None:
    """Batches of 20: the last of an epoch has 16 real rows, 10 in the first part and 6 in the second."""
    settings = (
        *training.VIT,
        "--batch-size",
        "20",
        "--epochs",
        "3",
        "--image-lr",
        "1e-4",
        "--meta-dropout",
        "0.2",
    )
    whole = tuned(tiny_shards, folder / "whole", *settings)
    parts = tuned(tiny_shards, folder / "parts", *settings, "--accumulation-steps", "2")
    one, two = (training.lines(run, "train") for run in (whole, parts))
    assert len(one) == 15
    deviation = training.largest_deviation(two, one)
    print(f"accumulation: {', '.join(f'{n} {d:.1e}' for n, d in deviation.items())}")  # noqa: T201
    assert deviation["loss"] < 1e-4
    assert deviation["grad_norm"] < 1e-3
    assert one[0]["loss"] - one[-1]["loss"] > 0.01  # it moves
