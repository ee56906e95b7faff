"""`xcon prior`: an evaluated run, its numbers recomputed by another route; wrong input is one line."""

import json
import math
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from shards import cli
from tests import commands
from xcon import comparison, evaluation, geoprior, metrics, prior
from xcon.encoders import MetaEncoder, MetaSpec
from xcon.shardset import ShardSet

pytestmark = pytest.mark.slow

FAST = ("--epochs", "8", "--batch-size", "32", "--meta-width", "32", "--meta-depth", "1")


@pytest.fixture(scope="module")
def image_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `xcon predict` leaves it, of a made-up network that is right more often than not; rows in any order."""
    split = ShardSet(tiny_shards).split("test")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(split), 6)) + 1.5 * np.eye(6)[split.class_id]
    scores = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    run = tmp_path_factory.mktemp("runs") / "image"
    run.mkdir()
    table = evaluation.prediction_table(split, {"scores": scores})
    evaluation.write_table(table.take(rng.permutation(len(split))), run / "predictions.parquet")
    facts = {"n": len(split), "split": "test", **metrics.summarise(scores, split.class_id), "with_meta": False}
    facts |= {"label_space": "6 classes of the source", "shards_sha256": ShardSet(tiny_shards).card.sha256}
    (run / "metrics.json").write_text(json.dumps({**facts, "seed": 4}))
    made = {"command": "finetune", "recipe": "demo", "init": None, "init_method": "", "modalities": ["image"]}
    (run / "config.json").write_text(json.dumps({**made, "seed": 4}))
    return run


def make(kind: str, shards: Path, image_run: Path, out: Path, *more: str | Path) -> int:
    argv = [kind, "--shards", shards, "--image-run", image_run, "--out", out, *more]
    return commands.run(prior.main, [str(word) for word in argv])


def scores_of(run: Path) -> dict[str, np.ndarray]:
    """Image id -> scores."""
    table = pq.read_table(run / "predictions.parquet")
    return dict(zip(table["image_id"].to_pylist(), map(np.array, table["scores"].to_pylist()), strict=True))


def places_of(shards: Path, name: str) -> dict[str, tuple[int, list[float], str | None]]:
    """Image id -> class, place and photographer, from the tars themselves."""
    found = {}
    for path in sorted(shards.glob(f"{name}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.loads(tar.extractfile(member).read())
                    place = [math.nan if record[n] is None else record[n] for n in ("lon", "lat", "date")]
                    found[record["image_id"]] = (record["class_id"], place, record["user_id"])
    return found


def test_kernel_run_by_hand(tiny_shards: Path, image_run: Path, tmp_path: Path) -> None:
    """Bayes' rule record by record, from the tars; metadata of another record and none; figures and report."""
    out = tmp_path / "kernel"
    assert make("kernel", tiny_shards, image_run, out) == 0
    train, test, image, found = places_of(tiny_shards, "train"), places_of(tiny_shards, "test"), {}, scores_of(out)
    image = scores_of(image_run)
    known = [(c, p) for c, p, _ in train.values() if not np.isnan(p).all()]
    labels, places = np.array([c for c, _ in known]), np.array([p for _, p in known])
    shares = np.bincount(labels, minlength=6) / len(labels)
    settings = {"bandwidth_km": 200.0, "bandwidth_days": 20.0, "smoothing": 1.0}
    order = ShardSet(tiny_shards).split("test").image_id
    right, shuffled_right, alone_right = [], [], []
    others = np.random.default_rng(0).permutation(len(order))

    def joined(image_id: str, place: list[float]) -> tuple[np.ndarray, np.ndarray]:
        likely = geoprior.kernel(places, labels, shares, np.array([place]), **settings)[0] / shares
        joint = image[image_id] * likely
        own = shares if np.isnan(place).all() else shares * likely
        return (image[image_id] if np.isnan(place).all() else joint / joint.sum()), own

    for image_id, other in zip(order, others, strict=True):
        label, place, _ = test[image_id]
        product, alone = joined(image_id, place)
        assert found[image_id] == pytest.approx(product, abs=1e-6)
        right.append(product.argmax() == label)
        alone_right.append(alone.argmax() == label)
        shuffled_right.append(joined(image_id, test[order[other]][1])[0].argmax() == label)
    figures = json.loads((out / "metrics.json").read_text())
    bare = json.loads((image_run / "metrics.json").read_text())
    assert figures["top1"] == pytest.approx(np.mean(right))
    assert figures["shuffled_meta"]["top1"] == pytest.approx(np.mean(shuffled_right))
    assert figures["meta_only"]["top1"] == pytest.approx(np.mean(alone_right))
    assert figures["without_meta"]["top1"] == bare["top1"] < figures["top1"]
    assert figures["seed"] == 4  # the image run's
    report = comparison.compare([image_run, out], resamples=50)
    assert [row["label"] for row in report["rows"]] == ["image", "kernel -> image + meta"]


@pytest.mark.parametrize("kind", ["geoprior", "softmax"])
def test_a_network_is_saved_and_a_seed_gives_its_numbers_again(
    kind: str, tiny_shards: Path, image_run: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / name for name in "abc"]
    for out, seed in zip(runs, ("1", "1", "2"), strict=True):
        assert make(kind, tiny_shards, image_run, out, *FAST, "--seed", seed) == 0
    a, b, c = (pq.read_table(out / "predictions.parquet") for out in runs)
    assert a.equals(b)
    assert not a.equals(c)
    assert json.loads((runs[0] / "metrics.json").read_text())["seed"] == 1
    settings = json.loads((runs[0] / "config.json").read_text())
    state = load_file(runs[0] / "model.safetensors")
    spec = MetaSpec(settings["meta_width"], settings["meta_depth"], settings["meta_encoding"], settings["dropout"])
    photographers = len(state["photographers.weight"]) - 1
    network = geoprior.PresencePrior(MetaEncoder(spec), classes=6, photographers=photographers).eval()
    network.load_state_dict(state)
    train, split = places_of(tiny_shards, "train"), ShardSet(tiny_shards).split("test")
    at = getattr(geoprior, {"geoprior": "presence", "softmax": "posterior"}[kind])(network, split.place)
    shares = np.bincount([c for c, p, _ in train.values() if not np.isnan(p).all()], minlength=6)
    users = {u for _, p, u in train.values() if u is not None and not np.isnan(p).all()}
    assert photographers == (len(users) if kind == "geoprior" else 0)
    for image_id, row, place in zip(split.image_id, at, split.place, strict=True):
        joint = scores_of(image_run)[image_id] * (1 if np.isnan(place).all() else row)
        if kind == "softmax" and not np.isnan(place).all():
            joint = joint / shares
        assert scores_of(runs[0])[image_id] == pytest.approx(joint / joint.sum(), abs=1e-6)


def test_every_kind_runs_and_seeds_make_one_row(tiny_shards: Path, image_run: Path, tmp_path: Path) -> None:
    """Also from a config that was saved, and twice into one folder, with the same numbers."""
    second = tmp_path / "image-5"
    shutil.copytree(image_run, second)
    for name in ("metrics.json", "config.json"):
        (second / name).write_text(json.dumps(json.loads((second / name).read_text()) | {"seed": 5}))
    for kind in ("frequency", "neighbours", "grid"):
        for seed, images in (("4", image_run), ("5", second)):
            assert make(kind, tiny_shards, images, tmp_path / f"{kind}-{seed}") == 0
        runs = [tmp_path / f"{kind}-{seed}" for seed in "45"]
        (row,) = comparison.compare(runs, resamples=9)["rows"]
        assert row["seeds"] == [4, 5]
    first = tmp_path / "grid-4"
    before = (first / "metrics.json").read_text()
    assert make("grid", tiny_shards, image_run, first) == 0
    assert commands.run(prior.main, [str(first / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert (first / "metrics.json").read_text() == before == (tmp_path / "again/metrics.json").read_text()


@pytest.fixture
def moved(tiny_shards: Path, tmp_path: Path) -> Path:
    """The same photographs, those of the test at the other end of the world; indices of an earlier version."""
    folder = tmp_path / "moved"
    shutil.copytree(tiny_shards, folder)
    for path in folder.glob("*.index.parquet"):
        table = pq.read_table(path).drop_columns("user_id")
        if path.name.startswith("test"):
            lon = table["lon"].to_numpy()
            moved = np.where(lon > 0, lon - 180, lon + 180)
            table = table.set_column(table.schema.get_field_index("lon"), "lon", [moved])
        pq.write_table(table, path)
    return folder


def test_a_test_at_other_places(tiny_shards: Path, moved: Path, image_run: Path, tmp_path: Path) -> None:
    """Fitted as before, only the test's places differ: as the kernel at these, by hand."""
    assert make("kernel", tiny_shards, image_run, tmp_path / "run", "--test-shards", moved) == 0
    train, test = ShardSet(tiny_shards).split("train"), ShardSet(moved).split("test")
    rows = ~np.isnan(train.place).all(axis=1)
    shares = geoprior.epoch_shares(train.class_id[rows], 6)
    settings = {"bandwidth_km": 200.0, "bandwidth_days": 20.0, "smoothing": 1.0}
    scores = geoprior.kernel(train.place[rows], train.class_id[rows], shares, test.place, **settings) / shares
    for image_id, row, place in zip(test.image_id, scores, test.place, strict=True):
        joint = scores_of(image_run)[image_id] * (1 if np.isnan(place).all() else row)
        assert scores_of(tmp_path / "run")[image_id] == pytest.approx(joint / joint.sum(), abs=1e-6)


# ---- photographers in the index


def test_the_index_knows_the_photographer(tiny_shards: Path) -> None:
    split = ShardSet(tiny_shards).split("train")
    records = places_of(tiny_shards, "train")
    expected = [None if (user := records[i][2]) is None else str(user) for i in split.image_id]
    assert split.user_id.tolist() == expected
    assert None in expected
    assert len(set(expected)) > 2


def test_an_index_of_an_earlier_version_knows_no_photographer(
    moved: Path, image_run: Path, tmp_path: Path
) -> None:
    assert ShardSet(moved).split("train").user_id.tolist() == [None] * 96
    assert make("geoprior", moved, image_run, tmp_path / "run", *FAST) == 0
    assert len(load_file(tmp_path / "run/model.safetensors")["photographers.weight"]) == 1  # nobody


def test_verify_takes_an_index_of_an_earlier_version(tiny_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "earlier"
    shutil.copytree(tiny_shards, folder)
    for path in folder.glob("*.index.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("user_id"), path)
    assert commands.run(cli.main, ["verify", str(folder)]) == 0


# ---- wrong input


def refused(capsys: pytest.CaptureFixture, status: int, message: str) -> None:
    told = capsys.readouterr().err
    assert status == 2
    assert told.count("\n") == 1
    assert told.startswith("xcon prior: ")
    assert message in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["krenel"], "no recipe 'krenel': one of geoprior, "),
        (["kernel", "--seasons", "3"], "--seasons: unused, the prior is kernel"),
        (["frequency", "--seed", "3"], "--seed: unused, the prior is frequency"),
        (["softmax", "--no-photographers"], "--photographers: unused, the prior is softmax"),
        (["kernel", "--kind", "grid"], "--kind"),
        (["kernel", "--bandwith-km", "3"], "--bandwith-km"),
        (["kernel", "--bandwidth-km", "0"], "--bandwidth-km 0.0: a positive number"),
        (["geoprior", "--epochs", "0"], "--epochs 0: at least 1"),
        (["geoprior", "--seed", "-1"], "--seed -1: 0 or more"),
        (["geoprior", "--decay", "1.5"], "--decay 1.5: a factor in (0, 1]"),
        (["geoprior", "--dropout", "1"], "--dropout 1.0: a share in [0, 1)"),
        (["neighbours", "--km-per-day", "-1"], "--km-per-day -1.0: 0 or more"),
        (["geoprior", "--meta-encoding", "harmonics"], "--dropout 0.5: unused, harmonics"),
    ],
)
def test_wrong_settings(
    arguments: list[str], message: str, tiny_shards: Path, image_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    kind, *more = arguments
    refused(capsys, make(kind, tiny_shards, image_run, tmp_path / "run", *more), message)
    assert not (tmp_path / "run").exists()


def damaged(image_run: Path, folder: Path, column: str, values: list) -> Path:
    shutil.copytree(image_run, folder)
    table = pq.read_table(folder / "predictions.parquet")
    changed = table.set_column(table.schema.get_field_index(column), column, [values])
    pq.write_table(changed, folder / "predictions.parquet")
    return folder


def test_wrong_image_runs(
    tiny_shards: Path, image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def told(run: Path, message: str) -> None:
        refused(capsys, make("grid", tiny_shards, run, tmp_path / "out"), message)

    told(tmp_path / "none", "no such run folder")
    bare = tmp_path / "bare"
    bare.mkdir()
    told(bare, "no metrics.json here, run xcon predict")
    told(damaged(image_run, tmp_path / "ids", "image_id", [f"x{n}" for n in range(36)]), "of other photographs")
    told(damaged(image_run, tmp_path / "labels", "class_id", [0] * 36), "with other classes")
    told(damaged(image_run, tmp_path / "scores", "scores", [[1.0]] * 36), "with other classes")
    broken = damaged(image_run, tmp_path / "broken", "class_id", [0] * 36)
    (broken / "predictions.parquet").write_bytes(b"PAR1")
    told(broken, "not predictions of xcon predict")
    both = tmp_path / "both"
    shutil.copytree(image_run, both)
    facts = json.loads((both / "metrics.json").read_text())
    (both / "metrics.json").write_text(json.dumps(facts | {"with_meta": True}))
    told(both, "a run with metadata")


def test_wrong_folders(tiny_shards: Path, image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert make("grid", tiny_shards, image_run, out) == 0
    capsys.readouterr()
    refused(
        capsys,
        make("grid", tiny_shards, image_run, out, "--bands", "9"),
        "a run with other settings (--bands was 36, now 9)",
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").touch()
    refused(capsys, make("grid", tiny_shards, image_run, tmp_path / "other"), "neither empty nor a run folder")
    refused(capsys, make("grid", tmp_path, image_run, tmp_path / "new"), "no dataset.json here")


def test_several_processes_are_refused(
    tiny_shards: Path, image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, make("grid", tiny_shards, image_run, tmp_path / "run"), "one process is all it takes")


def test_wrong_shard_sets(
    tiny_shards: Path, moved: Path, image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    card = json.loads((moved / "dataset.json").read_text())
    card["classes"][0]["raw_class_id"] = 1
    (moved / "dataset.json").write_text(json.dumps(card))
    status = make("grid", tiny_shards, image_run, tmp_path / "run", "--test-shards", moved)
    refused(capsys, status, f"--test-shards {moved}: another class list")
    for path in moved.glob("*.index.parquet"):
        table = pq.read_table(path)
        for name in ("lon", "lat", "date"):
            unknown = [[math.nan] * len(table)]
            table = table.set_column(table.schema.get_field_index(name), name, unknown)
        pq.write_table(table, path)
    status = make("grid", moved, image_run, tmp_path / "run")
    refused(capsys, status, f"{moved}: no training record has a place or a date")
