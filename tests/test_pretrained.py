"""A pre-trained run evaluated as it is, against training's own validation and against plain loops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import training
from xcon import config, images, model, predict, pretrain, pretrained
from xcon.model import ContrastiveModel
from xcon.shardset import ShardSet

pytestmark = pytest.mark.slow

FLAT = ("--workers", "0", "--precision", "fp32")


def made(shards: Path, run: Path, *more: str) -> Path:
    argv = ["demo", "--shards", shards, "--out", run, *training.EVERY_STEP, *training.RESNET, *more]
    assert training.run(pretrain.main, [*argv, "--batch-size", "32"]) == 0
    return run


def judged(run: Path, shards: Path, *more: str) -> dict[str, Any]:
    assert training.run(predict.main, [run, "--shards", shards, *FLAT, *more]) == 0
    ending = f"-{more[-1]}" if more else ""
    return json.loads((run / f"metrics{ending}.json").read_text())


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image, text and metadata."""
    return made(tiny_shards, tmp_path_factory.mktemp("runs") / "all", "--epochs", "4", "--seed", "3")


def test_zero_shot_is_that_of_training(run: Path, tiny_shards: Path) -> None:
    """On val, what training logged for the weights it kept; and the probe learns there without a choice of C."""
    found = judged(run, tiny_shards, "--split", "val")
    logged = training.lines(run, "val")
    best = max(logged, key=lambda line: (line["top1"], -line["loss"]))
    for name in ("top1", "image_top1", "meta_top1"):
        assert found["zero_shot"][name] == pytest.approx(best[name])
    assert (found["split"], found["n"], found["with_meta"], found["seed"]) == ("val", 12, True, 3)
    assert {values["C"] for values in found["linear_probe"].values()} == {0.01}


def test_retrieval_by_plain_loops(run: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photographs and places one at a time through the saved model, as pre-training had it."""
    found = judged(run, tiny_shards)
    told = " ".join(capsys.readouterr().out.split())
    assert f"zero-shot top-1 {100 * found['zero_shot']['top1']:.2f} %" in told
    spec = model.load_spec(run, kind="contrastive")
    network = ContrastiveModel(model.build_towers(spec), temperature=0.1, max_scale=200)
    model.load_weights(run, network)
    network.eval()
    split = ShardSet(tiny_shards).split("test")
    assert spec.image is not None
    view = images.eval_transform(spec.image)
    with torch.inference_mode():
        photos = [network({"image": view(images.decode(split.photo(n)))[None]})[0]["image"][0] for n in range(36)]
        places = [network({"meta": torch.tensor(split.place[n]).float()[None]})[0]["meta"][0] for n in range(36)]
    placed = [n for n in range(36) if not np.isnan(split.place[n]).all()]
    assert len(placed) == found["linear_probe"]["meta"]["n"] < 36
    hits = []
    for n, photo in enumerate(photos):
        best = max(placed, key=lambda other: float(photo @ places[other]))
        hits.append(split.class_id[best] == split.class_id[n])
    assert found["retrieval"]["image->meta"]["recall@1"] == pytest.approx(np.mean(hits))
    meta_right = found["retrieval"]["meta->text"]["recall@1"] * len(placed)
    assert meta_right == pytest.approx(found["zero_shot"]["meta_top1"] * 36)  # one without metadata is wrong
    assert found["retrieval"]["image->text"]["recall@1"] == pytest.approx(found["zero_shot"]["image_top1"])
    assert found["retrieval"]["text->image"]["n"] == 6
    assert found["linear_probe"]["image + meta"]["top1"] > 1 / 6
    assert set(found["knn"]) == {"image", "meta", "image + meta"}


def test_two_processes_find_the_same(run: Path, tiny_shards: Path) -> None:
    alone = judged(run, tiny_shards)
    told = training.torchrun("predict", run, "--shards", tiny_shards, *FLAT, "--batch-size", "10")
    assert "36 of 36 test records, each evaluated once, by 2 process(es)" in told
    both = json.loads((run / "metrics.json").read_text())
    for part in ("zero_shot", "retrieval"):
        assert json.dumps(both[part], sort_keys=True) == json.dumps(alone[part], sort_keys=True)
    for modality, values in alone["linear_probe"].items():
        assert both["linear_probe"][modality]["top1"] == pytest.approx(values["top1"], abs=1 / 36 + 1e-9)


def test_without_text_there_is_no_zero_shot(tiny_shards: Path, tmp_path: Path) -> None:
    run = made(tiny_shards, tmp_path / "two", "--epochs", "1", "--modalities", "image", "meta")
    found = judged(run, tiny_shards)
    assert "zero_shot" not in found
    assert set(found["retrieval"]) == {"image->meta", "meta->image"}


def test_captions_of_the_template_it_was_trained_with(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """A template in the run's config counts; without one, the captions of the shard set, in order of class."""
    shards = ShardSet(tiny_shards)
    names = [" ".join(info.name.split()) for info in shards.card.classes]
    assert pretrained.class_texts(run, shards) == [f"This is a photograph of a bird called {n}" for n in names]
    settings = config.read_json(run / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**settings, "caption": "Behold {name}"}))
    assert pretrained.class_texts(tmp_path, shards) == [f"Behold {n}" for n in names]
    towers, _ = pretrained.load(run, torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="the run's tokenizer is missing"):
        pretrained.caption_vectors(tmp_path, towers["text"], names)
