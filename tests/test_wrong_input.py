"""Wrong usage and wrong input of all entry points but the builder: exit status 2 and one line, no traceback."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards import cli
from tests import commands, training
from xcon import finetune, maps, predict, pretrain, records, report
from xcon.shardset import ShardSet

PROGRAMS = {
    "pretrain": pretrain.main,
    "finetune": finetune.main,
    "predict": predict.main,
    "report": report.main,
    "map": maps.main,
}
SHORT = (*training.RESNET, "--batch-size", "48", "--epochs", "1")

Argv = list[str | Path]


@dataclasses.dataclass
class World:
    """What the cases work on: `place` is a test's own folder, all else belongs to all and is never changed.

    Attributes:
        place: empty; `out` in it is the run folder of a case.
        shards: six species.
        runs: `pretrained` (image and text), `finetuned` (image and meta), `image` (image alone), `other` (the
            same as `finetuned` on other species), `pretrained-other`, and `unfinished`.
    """

    place: Path
    shards: Path
    runs: Path

    @property
    def out(self) -> Path:
        return self.place / "out"

    def pretrain(self, *more: str | Path, shards: Path | None = None, recipe: str = "demo") -> Argv:
        return [recipe, "--shards", shards or self.shards, "--out", self.out, *SHORT, *more]

    def finetune(self, *more: str | Path, init: str = "") -> Argv:
        begun = ["--init", self.runs / init] if init else []
        return ["demo", "--shards", self.shards, "--out", self.out, *SHORT, *begun, *more]

    def photo(self, *more: str | Path, run: str = "finetuned") -> Argv:
        """A good photograph, then `more`: another file, or settings."""
        file = self.place / "bird.jpg"
        file.write_bytes(ShardSet(self.shards).split("test").photo(0))
        return [self.runs / run, file, *more, "--precision", "fp32"]

    def spoilt(self, change: Callable[[Path], None]) -> Path:
        """A copy of the shard set, changed."""
        copy = shutil.copytree(self.shards, self.place / "spoilt")
        change(copy)
        return copy

    def write(self, name: str, data: bytes) -> Path:
        file = self.place / name
        file.write_bytes(data)
        return file


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    other = folder / "other-shards"
    size = ["--classes", "3", "--per-class", "8", "--val-per-class", "1"]
    assert commands.run(cli.main, ["build", "synthetic", "--out", str(other), *size]) == 0

    def made(main: Callable[[], None], name: str, *more: str, shards: Path = tiny_shards) -> None:
        argv = ["demo", "--shards", shards, "--out", folder / name, *training.RESNET, "--batch-size", "24"]
        assert training.run(main, [*argv, "--epochs", "1", *more]) == 0

    made(pretrain.main, "pretrained", "--modalities", "image", "text")
    xyz = ["--modalities", "image", "meta", "--meta-encoding", "xyz"]
    made(pretrain.main, "pretrained-other", *xyz, shards=other)
    made(finetune.main, "finetuned")
    made(finetune.main, "image", "--modalities", "image")
    made(finetune.main, "other", shards=other)
    shutil.copytree(folder / "pretrained", folder / "unfinished")
    (folder / "unfinished" / "model.json").unlink()
    return folder


@pytest.fixture
def world(tiny_shards: Path, runs: Path, tmp_path: Path) -> World:
    return World(tmp_path, tiny_shards, runs)


# --------------------------------------------------------------------------------------------------------
# What is done to a shard set


def edit_card(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card = folder / records.CARD_NAME
        card.write_text(json.dumps({**json.loads(card.read_text()), **changes}))

    return change


def empty_split(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        splits = json.loads((folder / records.CARD_NAME).read_text())["splits"]
        edit_card(splits={**splits, name: []})(folder)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_tar(folder: Path) -> None:
    with (folder / "train-000000.tar").open("r+b") as file:
        file.truncate(10_000)


def cut_index(folder: Path) -> None:
    index = folder / "train-000000.index.parquet"
    pq.write_table(pq.read_table(index).slice(1), index)


def index_without(column: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = folder / "train-000000.index.parquet"
        pq.write_table(pq.read_table(index).drop_columns([column]), index)

    return change


def cut_photo(folder: Path) -> None:
    """Zeros in place of the second half of the first photograph."""
    split = ShardSet(folder).split("train")
    half = int(split.size[0]) // 2
    with split.tars.paths[0].open("r+b") as file:
        file.seek(int(split.offset[0]) + half)
        file.write(bytes(int(split.size[0]) - half))


# --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """`argv` prepares the world and gives the arguments; `begins` where training had begun before it failed."""

    name: str
    program: str
    argv: Callable[[World], Argv]
    message: str
    begins: bool = False


def jpeg(width: int = 64) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, width), 80).save(file, "jpeg")
    return file.getvalue()


SHARDS = [
    Case("no folder", "pretrain", lambda w: w.pretrain(shards=w.place / "no"), "no: no such folder; xcon-shards"),
    Case("no card", "pretrain", lambda w: w.pretrain(shards=w.place), "no dataset.json here"),
    Case(
        "another format",
        "pretrain",
        lambda w: w.pretrain(shards=w.spoilt(edit_card(format="webdataset"))),
        "dataset.json: not a card of xcon (format is not xcon-shards/1)",
    ),
    Case(
        "card without classes",
        "finetune",
        lambda w: ["demo", "--shards", w.spoilt(edit_card(classes=[{}])), "--out", w.out, *SHORT],
        "dataset.json: not a card of xcon",
    ),
    Case(
        "shard missing",
        "pretrain",
        lambda w: w.pretrain(shards=w.spoilt(remove("train-000000.tar"))),
        "train-000000.tar: named by the card but missing",
    ),
    Case(
        "shard cut",
        "pretrain",
        lambda w: w.pretrain(shards=w.spoilt(cut_tar)),
        "train-000000.tar: 10000 bytes, the card says",
    ),
    Case(
        "index damaged",
        "pretrain",
        lambda w: w.pretrain(
            shards=w.spoilt(lambda f: (f / "train-000000.index.parquet").write_bytes(b"no") and None)
        ),
        "train-000000.index.parquet: not an index",
    ),
    Case(
        "index too short",
        "pretrain",
        lambda w: w.pretrain(shards=w.spoilt(cut_index)),
        "train-000000.index.parquet: 95 records, the card says 96",
    ),
    Case(
        "index without a column",
        "pretrain",
        lambda w: w.pretrain(shards=w.spoilt(index_without("caption"))),
        "train-000000.index.parquet: not an index",
    ),
    Case(
        "broken photograph",
        "pretrain",
        lambda w: w.pretrain(shards=w.spoilt(cut_photo)),
        "train-000000.tar: ",
        begins=True,
    ),
    Case(
        "broken photograph in a worker",
        "finetune",
        lambda w: ["demo", "--shards", w.spoilt(cut_photo), "--out", w.out, *SHORT, "--workers", "2"],
        "train-000000.tar: ",
        begins=True,
    ),
    Case(
        "nothing to train on",
        "pretrain",
        lambda w: w.pretrain(shards=w.spoilt(empty_split("train"))),
        "no records in split 'train'; it has train (0), val (12), test (36)",
    ),
    Case(
        "nothing to stop on",
        "pretrain",
        lambda w: w.pretrain("--patience", "2", shards=w.spoilt(empty_split("val"))),
        "--patience 2: ",
    ),
]

USAGE = [
    Case("no recipe of this name", "pretrain", lambda w: w.pretrain(recipe="pepar"), "no recipe 'pepar': one of"),
    Case("no config", "pretrain", lambda w: w.pretrain(recipe="no.json"), "no.json: no such file"),
    Case(
        "config of another command",
        "finetune",
        lambda w: [w.runs / "pretrained" / "config.json", "--out", w.out],
        "config.json: ",
    ),
    Case("unknown flag", "pretrain", lambda w: w.pretrain("--learning-rate", "1"), "--learning-rate"),
    Case("no number", "finetune", lambda w: w.finetune("--batch-size", "many"), "--batch-size"),
    Case("no --out", "pretrain", lambda w: ["demo", "--shards", w.shards], "--out"),
    Case("no --shards", "finetune", lambda w: ["demo", "--out", w.out], "--shards"),
    Case("batch of none", "pretrain", lambda w: w.pretrain("--batch-size", "0"), "--batch-size 0: at least 1"),
    Case(
        "parts that do not divide",
        "finetune",
        lambda w: w.finetune("--batch-size", "9", "--accumulation-steps", "2"),
        "--batch-size 9 is the global batch and does not divide among 1 processes x 2 parts",
    ),
    Case(
        "accumulation",
        "pretrain",
        lambda w: w.pretrain("--accumulation-steps", "2"),
        "--accumulation-steps 2: refused for pre-training",
    ),
    Case("negative rate", "pretrain", lambda w: w.pretrain("--image-lr", "-1"), "--image-lr -1.0: 0 or more"),
    Case("crop of more", "pretrain", lambda w: w.pretrain("--crop-scale", "2"), "--crop-scale 2.0: a share"),
    Case("too hot", "pretrain", lambda w: w.pretrain("--temperature", "0"), "--temperature 0.0: "),
    Case(
        "views of several", "pretrain", lambda w: w.pretrain("--views", "2"), "--views 2: for --modalities image"
    ),
    Case("groups", "finetune", lambda w: w.finetune("--per-class", "5"), "--per-class 5: does not divide"),
    Case(
        "no pair", "pretrain", lambda w: w.pretrain("--pair-weights", "image-sound", "2"), "image-sound: no pair"
    ),
    Case(
        "caption", "pretrain", lambda w: w.pretrain("--caption", "{order}"), "has no 'order', only name, species"
    ),
    Case("one modality", "pretrain", lambda w: w.pretrain("--modalities", "image"), "at least two"),
    Case("twice the same", "finetune", lambda w: w.finetune("--modalities", "meta", "meta"), "named twice"),
    Case("text to classify", "finetune", lambda w: w.finetune("--modalities", "image", "text"), "--modalities"),
    Case("share of all", "finetune", lambda w: w.finetune("--meta-dropout", "1"), "--meta-dropout 1.0: a share"),
]

OUT = [
    Case(
        "something else lies there",
        "pretrain",
        lambda w: (w.out.mkdir(), w.write("out/thesis.tex", b"")) and w.pretrain(),
        "neither empty nor a run folder",
        begins=True,
    ),
    Case(
        "a file lies there",
        "pretrain",
        lambda w: w.write("out", b"") and w.pretrain(),
        "neither empty nor a run folder",
        begins=True,
    ),
    Case(
        "a file on the way",
        "pretrain",
        lambda w: w.pretrain("--out", w.write("file", b"") / "run"),
        "file/run",
    ),
    Case(
        "a run with other settings",
        "pretrain",
        lambda w: shutil.copytree(w.runs / "pretrained", w.out) and w.pretrain("--seed", "5"),
        "--seed was 0, now 5",
        begins=True,
    ),
    Case(
        "a run of another command",
        "finetune",
        lambda w: shutil.copytree(w.runs / "pretrained", w.out) and w.finetune(),
        "command was pretrain, now finetune",
        begins=True,
    ),
]

INIT = [
    Case("no run", "finetune", lambda w: w.finetune(init="no"), "no: no such run folder"),
    Case("unfinished", "finetune", lambda w: w.finetune(init="unfinished"), "no finished run"),
    Case("fine-tuned", "finetune", lambda w: w.finetune(init="finetuned"), "a classifier model (xcon finetune)"),
    Case(
        "other classes",
        "finetune",
        lambda w: w.finetune(init="pretrained-other"),
        "pre-trained on another class list (3 classes",
    ),
    Case(
        "other encoding of places",
        "finetune",
        lambda w: w.finetune(
            "--shards", w.runs / "other-shards", "--meta-encoding", "fourier", init="pretrained-other"
        ),
        "--meta-encoding fourier: --init",
    ),
    Case(
        "encoding of places that nobody sees",
        "finetune",
        lambda w: w.finetune("--modalities", "image", "--meta-encoding", "xyz"),
        "--meta-encoding: unused, --modalities is image",
    ),
    Case(
        "other backbone",
        "finetune",
        lambda w: w.finetune("--image-backbone", "test_vit", "--modalities", "image", init="pretrained"),
        "was pre-trained with test_resnet",
    ),
    Case("no meta", "finetune", lambda w: w.finetune(init="pretrained"), "pre-trained without meta"),
    Case(
        "weights twice",
        "finetune",
        lambda w: w.finetune("--image-weights", "imagenet", "--modalities", "image", init="pretrained"),
        "--image-weights imagenet: unused",
    ),
    Case(
        "options of another network",
        "finetune",
        lambda w: w.finetune("--image-options", "pad_type", "same", "--modalities", "image", init="pretrained"),
        "--image-options: --init",
    ),
]

NETWORKS = [
    Case(
        "no weights",
        "pretrain",
        lambda w: w.pretrain("--image-weights", w.place / "no.safetensors"),
        "no.safetensors: no such file",
    ),
    Case(
        "weights of another network",
        "pretrain",
        lambda w: w.pretrain("--image-weights", w.runs / "finetuned" / "model.safetensors"),
        "not weights of this network",
    ),
    Case(
        "weights of no format",
        "pretrain",
        lambda w: w.pretrain("--image-weights", w.write("weights.pt", jpeg())),
        "weights.pt: not a safetensors file",
    ),
    Case(
        "imagenet offline",
        "finetune",
        lambda w: w.finetune("--image-weights", "imagenet"),
        "ImageNet weights of test_resnet are not in the local cache and the hub cannot be reached: `xcon prefetch "
        "--image-backbone test_resnet` where there is a network",
    ),
    Case("no such network", "pretrain", lambda w: w.pretrain("--image-backbone", "resnot50"), "resnot50"),
    Case(
        "no such option",
        "pretrain",
        lambda w: w.pretrain("--image-options", "wings", "2"),
        "--image-backbone test_resnet: timm refuses it",
    ),
    Case(
        "size the network does not take",
        "pretrain",
        lambda w: w.pretrain("--image-backbone", "vit_tiny_patch16_224", "--image-size", "64"),
        "--image-size 64: vit_tiny_patch16_224 refuses it (Input height (64) doesn't match model (224).)",
    ),
    Case(
        "no such text model",
        "pretrain",
        lambda w: w.pretrain("--text-model", "nobody/nothing"),
        "`xcon prefetch --text-model nobody/nothing` where there is a network",
    ),
    Case(
        "text model in an empty folder",
        "pretrain",
        lambda w: w.pretrain("--text-model", w.place),
        "no folder with a model",
    ),
    Case(
        "diverging",
        "pretrain",
        lambda w: w.pretrain("--image-lr", "1e30", "--head-lr", "1e30", "--epochs", "9", "--log-every", "1"),
        "lower the learning rates",
        begins=True,
    ),
    Case(
        "diverging before the first line of the log",
        "pretrain",
        lambda w: w.pretrain("--image-lr", "1e30", "--head-lr", "1e30", "--log-every", "100"),
        "the loss is nan at step 2: lower the learning rates",
        begins=True,
    ),
    Case(
        "diverging classifier",
        "finetune",
        lambda w: w.finetune("--image-lr", "1e30", "--head-lr", "1e30", "--epochs", "9", "--log-every", "1"),
        "lower the learning rates",
        begins=True,
    ),
]

FINETUNING = [
    Case(
        "late size the network does not take",
        "finetune",
        lambda w: w.finetune(
            *("--image-backbone", "vit_tiny_patch16_224", "--image-size", "224"),
            *("--epochs", "2", "--late-size", "448", "--late-epochs", "1"),
        ),
        "--late-size 448: vit_tiny_patch16_224 refuses it (Input height (448) doesn't match model (224).)",
    ),
    Case(
        "an odd row to mix",
        "finetune",
        lambda w: w.finetune("--mixup", "0.2", "--batch-size", "23"),
        "each process mixes its 23 rows in pairs",
    ),
    Case(
        "captions without text",
        "finetune",
        lambda w: w.finetune(
            *("--fusion", "product", "--meta-dropout", "0", "--head", "captions", "--meta-encoding", "xyz"),
            init="pretrained-other",
        ),
        "was pre-trained without text",
    ),
    Case(
        "channels of a pre-trained network",
        "finetune",
        lambda w: w.finetune("--fusion", "channels", init="pretrained"),
        "pre-trained networks take three channels; --fusion channels starts anew",
    ),
]

LATER = [
    Case(
        "other species",
        "predict",
        lambda w: [w.runs / "other", "--shards", w.shards, "--precision", "fp32"],
        "fine-tuned on another class list (3 classes) than",
    ),
    Case(
        "pre-trained only", "predict", lambda w: w.photo(run="pretrained"), "a contrastive model (xcon pretrain)"
    ),
    Case(
        "probes of what they learnt",
        "predict",
        lambda w: [w.runs / "pretrained", "--shards", w.shards, "--split", "train"],
        "its probes learn from that split",
    ),
    Case(
        "classes of a pre-trained run",
        "predict",
        lambda w: [w.runs / "pretrained", "--shards", w.shards, "--out", w.place / "a.parquet"],
        "is pre-trained only and predicts no classes",
    ),
    Case(
        "pre-trained on other species",
        "predict",
        lambda w: [w.runs / "pretrained-other", "--shards", w.shards],
        "pre-trained on another class list (3 classes) than",
    ),
    Case(
        "a name with a slash",
        "predict",
        lambda w: [w.runs / "finetuned", "--shards", w.shards, "--name", "a/b"],
        "--name 'a/b': letters and digits are needed",
    ),
    Case(
        "named as a split",
        "predict",
        lambda w: [w.runs / "finetuned", "--shards", w.shards, "--name", "val"],
        "--name val: results of that split are called so",
    ),
    Case(
        "another doubt under the run's own name",
        "predict",
        lambda w: [w.runs / "finetuned", "--shards", w.shards, "--doubt", "0"],
        "--doubt 0.0: give a --name too",
    ),
    Case(
        "a doubt and no product",
        "predict",
        lambda w: [w.runs / "finetuned", "--shards", w.shards, "--doubt", "0", "--name", "a"],
        "--doubt 0.0: unused",
    ),
    Case(
        "a doubt of a pre-trained run",
        "predict",
        lambda w: [w.runs / "pretrained", "--shards", w.shards, "--doubt", "0"],
        "--doubt 0.0: unused",
    ),
    Case("a name for photographs", "predict", lambda w: w.photo("--name", "a"), "--name are for a shard set"),
    Case("no run", "predict", lambda w: w.photo(run="no"), "no such run folder"),
    Case("unfinished run", "predict", lambda w: w.photo(run="unfinished"), "no finished run"),
    Case("neither", "predict", lambda w: [w.runs / "finetuned"], "give either --shards DIR or photographs"),
    Case("both", "predict", lambda w: w.photo("--shards", w.shards), "give either --shards DIR or photographs"),
    Case("no photograph", "predict", lambda w: w.photo(w.place / "no.jpg"), "no.jpg: no such file"),
    Case(
        "no image", "predict", lambda w: w.photo(w.write("a.txt", b"a bird")), "a.txt: not an image that decodes"
    ),
    Case(
        "random bytes",
        "predict",
        lambda w: w.photo(w.write("noise.jpg", b"\xff\xd8\xff" + bytes(range(256)) * 9)),
        "noise.jpg: ",
    ),
    Case("half a photograph", "predict", lambda w: w.photo(w.write("half.jpg", jpeg()[:900])), "half.jpg: "),
    Case("a folder", "predict", lambda w: w.photo(w.place), "a folder; give its files"),
    Case(
        "lat 95",
        "predict",
        lambda w: w.photo("--lon", "10", "--lat", "95"),
        "lat 95.0 is outside [-90, 90] degrees: are lon and lat exchanged?",
    ),
    Case(
        "lon 200", "predict", lambda w: w.photo("--lon", "200", "--lat", "5"), "lon 200.0 is outside [-180, 180]"
    ),
    Case("half a place", "predict", lambda w: w.photo("--lon", "10"), "both or neither"),
    Case("no date", "predict", lambda w: w.photo("--date", "1 May"), "date '1 May' is no ISO date"),
    Case(
        "place of a set",
        "predict",
        lambda w: [w.runs / "finetuned", "--shards", w.shards, "--date", "2026-05-01"],
        "a shard set has its own",
    ),
    Case(
        "place for images alone",
        "predict",
        lambda w: w.photo("--lon", "10", "--lat", "50", run="image"),
        "was fine-tuned without metadata, they are unused",
    ),
    Case(
        "format", "predict", lambda w: w.photo("--out", "a.xlsx"), "--out a.xlsx: a name ending in .csv or .json"
    ),
    Case(
        "nowhere to write",
        "predict",
        lambda w: w.photo("--out", w.place / "no" / "a.csv"),
        "a.csv: no such folder as ",
    ),
    Case(
        "no such split",
        "predict",
        lambda w: [w.runs / "finetuned", "--split", "val", "--shards", w.spoilt(empty_split("val"))],
        "no records in split 'val'; it has train (96), val (0), test (36)",
    ),
    Case("report of nothing", "report", lambda w: [], "RUN..."),
    Case("report of no run", "report", lambda w: [w.place / "no"], "no"),
    Case("report too early", "report", lambda w: [w.runs / "finetuned"], "xcon predict"),
    Case(
        "map of no species",
        "map",
        lambda w: ["species", w.runs / "finetuned", "--species", "Dodo", "--out", w.place / "a.png"],
        "--species 'Dodo': no such class here",
    ),
    Case(
        "map without metadata",
        "map",
        lambda w: [
            *("species", w.runs / "image", "--out", w.place / "a.png"),
            *("--species", ShardSet(w.shards).card.classes[0].name),
        ],
        "one with meta is needed",
    ),
    Case(
        "map of nothing known",
        "map",
        lambda w: ["rivers", w.runs / "finetuned", "--species", "Dodo", "--out", w.place / "a.png"],
        "rivers",
    ),
]
CASES = [*SHARDS, *USAGE, *OUT, *INIT, *NETWORKS, *FINETUNING, *LATER]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.program}: {case.name}")
def test_one_line(case: Case, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    argv = case.argv(world)
    capsys.readouterr()
    assert training.run(PROGRAMS[case.program], argv) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"xcon {case.program}: ")
    assert case.message in told[-1]
    assert len(told[-1]) < 600
    assert not any("Traceback" in line for line in told)
    if not case.begins:  # nothing was said before, and nothing begun: the right command may use the folder
        assert len(told) == 1
        assert not world.out.exists()


def test_a_photograph_is_named_alike_with_and_without_workers(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = world.spoilt(cut_photo)
    name = ShardSet(broken).split("train").image_id[0]
    told = []
    for workers in ("0", "2"):
        world.out.exists() and shutil.rmtree(world.out)
        argv = ["demo", "--shards", broken, "--out", world.out, *SHORT, "--workers", workers]
        assert training.run(finetune.main, argv) == 2
        told.append(capsys.readouterr().err.splitlines()[-1])
    assert told[0] == told[1]
    assert f"train-000000.tar: {name}.jpg: not an image that decodes" in told[0]
    assert told[0].endswith("xcon-shards verify lists all")


def test_damaged_runs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data, message in (
        ("model.json", b"{", "model.json: not JSON"),
        ("model.json", b'{"kind": "classifier"}', "model.json: not a model of this version of xcon"),
        ("model.json", b"[]", "model.json: a JSON object is needed"),
        ("model.safetensors", b"12345678", "model.safetensors: damaged"),
        ("config.json", b"", "config.json: not JSON"),
    ):
        copy = shutil.copytree(world.runs / "finetuned", world.place / "run", dirs_exist_ok=True)
        (copy / name).write_bytes(data)
        argv = [copy, "--shards", world.shards, "--precision", "fp32", "--workers", "0"]
        assert training.run(predict.main, argv) == 2
        told = capsys.readouterr().err.splitlines()
        assert told[-1].startswith("xcon predict: ")
        assert message in told[-1]


def test_fp16_needs_a_gpu(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert training.run(pretrain.main, world.pretrain("--precision", "fp16")) == 2
    assert "--precision fp16 needs a CUDA device: choose bf16" in capsys.readouterr().err


def test_accumulation_by_the_launcher_is_refused(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gradient_accumulation_steps: 2` in an accelerate config reaches the script as this variable."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    for main, argv in ((pretrain.main, world.pretrain()), (finetune.main, world.finetune())):
        assert training.run(main, argv) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "the launcher's configuration accumulates 2 gradients, the settings 1" in told
        assert not world.out.exists()


def test_the_wrong_command_by_its_name() -> None:
    """As a process: what the shell sees."""
    for argv in (["pretrian"], ["pretrain", "pepar"], ["report", "/no/such/run"]):
        done = subprocess.run(
            [training.BIN / "xcon", *argv],
            env=training.environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_without_a_validation_split_the_last_weights_are_the_result(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = world.spoilt(empty_split("val"))
    argv = ["demo", "--shards", shards, "--out", world.out, *SHORT]
    assert training.run(finetune.main, argv) == 0
    assert training.lines(world.out, "val") == []
    assert training.lines(world.out)[-1] == {"event": "end", "step": 2, "best": None}
    assert (world.out / "model.safetensors").is_file()
    assert capsys.readouterr().err.splitlines()[-1] == "end 2/2 best None"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_no_space_left(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Room for one and a half checkpoints: the first stays whole, and with more room the run goes on from it."""
    disk = world.place / "disk"
    disk.mkdir()
    argv = ["demo", "--shards", world.shards, "--out", disk / "run", *SHORT, "--checkpoint-every", "1"]
    ample = [*argv[:4], world.out, *argv[5:]]
    assert training.run(finetune.main, ample) == 0
    best = (world.out / "checkpoints" / "weights-2.safetensors").stat().st_size
    checkpoint = sum(file.stat().st_size for file in (world.out / "checkpoints" / "step-1").iterdir())
    mount(disk, best + int(1.5 * checkpoint))
    try:
        capsys.readouterr()
        assert training.run(finetune.main, argv) == 2
        told = capsys.readouterr().err
        assert "the checkpoint of step 2 could not be written" in told.splitlines()[-1]
        assert "Traceback" not in told
        left = [path.name for path in (disk / "run" / "checkpoints").iterdir()]
        assert sorted(left) == ["step-1", "weights-2.safetensors"]

        mount(disk, 2 * best + 3 * checkpoint, "remount")
        assert training.run(finetune.main, argv) == 0
        assert training.lines(disk / "run") == training.lines(world.out)
        weights = [folder / "model.safetensors" for folder in (disk / "run", world.out)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # this process still has its lock there


def mount(folder: Path, size: int, *options: str) -> None:
    chosen = ",".join([*options, f"size={size + 1_000_000}"])  # a million for the logs
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", folder], check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
