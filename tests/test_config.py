"""Recipes against the paper's sentence; settings given back; values that are refused."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from xcon import commandline, config
from xcon.config import FinetuneConfig, PretrainConfig
from xcon.recipes import FINETUNE, PRETRAIN, PRIOR

# Section 4.2, word for word.
SENTENCE = (
    "Batch size = 32 and tau = log(0.007) and trained the networks for 200 epochs. We pre-trained meta, text, and "
    "image encoder models through AdamW with learning rates 5e-5, 1e-5, and 1e-4."
)


def parse(monkeypatch: pytest.MonkeyPatch, recipes: dict, *arguments: object) -> tuple[str, config.TrainConfig]:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    return config.parse_recipe(recipes, "xcon test")


def pretrain(**changes: object) -> PretrainConfig:
    return PretrainConfig(**{"shards": Path("shards"), "out": Path("run"), **changes})


# ---- recipes


def test_the_paper_recipe_has_the_numbers_of_the_sentence_it_quotes() -> None:
    text, recipe = PRETRAIN["paper"]
    assert SENTENCE in " ".join(text.split())
    numbers = [float(number) for number in re.findall(r"\d[\d.]*(?:e-\d)?", SENTENCE.replace("1e-4.", "1e-4"))]
    assert numbers == [
        recipe.batch_size, recipe.temperature, recipe.epochs, recipe.meta_lr, recipe.text_lr, recipe.image_lr,
    ]  # fmt: skip


def test_the_paper_recipe_is_the_papers_model() -> None:
    """Section 3.1: ResNet-50, DistilBERT, vectors of 256; three modalities matched by label."""
    recipe = PRETRAIN["paper"][1]
    assert recipe.modalities == ("image", "text", "meta")
    assert recipe.matching == "label"
    assert (recipe.image_backbone or "resnet50", recipe.text_model) == ("resnet50", "distilbert-base-uncased")
    assert recipe.embed_dim == 256


def test_the_paper_classifier_is_two_layers_on_512_numbers() -> None:
    recipe = FINETUNE["paper"][1]
    assert (recipe.batch_size, recipe.epochs, recipe.modalities) == (32, 200, ("image", "meta"))
    assert recipe.weight_decay == 0  # "Adam[11] Optimizer is used for fine-tuning"
    assert len(recipe.modalities) * PRETRAIN["paper"][1].embed_dim == 512


def test_clip_is_image_and_text_row_by_row() -> None:
    """ "only trained on text and image information using two losses": all else as in the paper's recipe."""
    paper, clip = PRETRAIN["paper"][1], PRETRAIN["clip"][1]
    assert clip == dataclasses.replace(paper, modalities=("image", "text"), matching="diagonal")
    assert clip.method == "clip"


def test_supcon_is_two_views_of_photographs_at_a_fixed_temperature() -> None:
    """Table 1 names the network; Khosla et al. 2020 loss and temperature; the rest is the paper's recipe."""
    paper, supcon = PRETRAIN["paper"][1], PRETRAIN["supcon"][1]
    changes = dict(temperature=0.1, learn_temperature=False, image_backbone="inception_v3", image_size=299)
    assert supcon == dataclasses.replace(paper, modalities=("image",), views=2, **changes)
    assert supcon.method == "supcon"
    assert dataclasses.replace(supcon, matching="diagonal").method == "simclr"


@pytest.mark.parametrize("recipes", [PRETRAIN, FINETUNE])
def test_every_recipe_says_its_command_and_what_comes_of_it(recipes: dict) -> None:
    for name, (text, _) in recipes.items():
        command = re.search(r"Command: .*(pretrain|finetune)(?:\.py)? ([\w-]+) --shards \S+ .*--out", text)
        assert command, name
        assert command[2] == name
        assert "Expected: " in text


def test_every_prior_says_what_is_multiplied_and_its_command() -> None:
    for name, (text, _) in PRIOR.items():
        command = re.search(r"Command: xcon prior (\w+) --shards \S+ --image-run \S+ --out", text)
        assert command, name
        assert command[1] == name
        assert "Multiplied: p(y|image) " in text
        assert "Expected: " in text


def test_the_geographic_prior_has_the_numbers_of_its_source() -> None:
    """Mac Aodha et al. 2019, section 4, and the width, depth, dropout and epoch of their code."""
    recipe = PRIOR["geoprior"][1]
    assert (recipe.batch_size, recipe.epochs, recipe.per_class) == (1024, 30, 100)
    assert (recipe.learning_rate, recipe.decay, recipe.dropout) == (5e-4, 0.98, 0.5)
    assert (recipe.meta_width, recipe.meta_depth, recipe.meta_encoding) == (256, 4, "wrap")


# ---- the command line


def test_settings_are_read_over_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    name, found = parse(
        monkeypatch, PRETRAIN, "clip", "--shards", "s", "--out", "o", "--epochs", 3, "--image-lr", 0.1
    )
    expected = PRETRAIN["clip"][1]
    assert name == "clip"
    assert found == dataclasses.replace(expected, shards=Path("s"), out=Path("o"), epochs=3, image_lr=0.1)


def test_lists_and_options_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["demo", "--shards", "s", "--out", "o", "--modalities", "meta", "image"]
    _, found = parse(monkeypatch, PRETRAIN, *arguments, "--image-options", "img_size", "32", "pad_type", "same")
    assert found.modalities == ("meta", "image")
    assert found.image_options == {"img_size": "32", "pad_type": "same"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["papre", "--shards", "s", "--out", "o"], "no recipe 'papre': one of paper, clip"),
        (["paper", "--shards", "s", "--out", "o", "--bath-size", "3"], "--bath-size"),
        (["paper", "--shards", "s"], "--out"),
        (["paper", "--shards", "s", "--out", "o", "--epochs", "many"], "--epochs"),
        (["paper", "--shards", "s", "--out", "o", "--modalities", "sound"], "--modalities"),
        (["paper", "--shards", "s", "--out", "o", "--crop-scale", "1.5"], "--crop-scale 1.5"),
        (["paper", "--shards", "s", "--out", "o", "--accumulation-steps", "2"], "--accumulation-steps 2: refused"),
        ([], "usage|required|one of"),
        (["missing.json", "--out", "o"], "missing.json: no such file"),
    ],
)
def test_a_wrong_command_line_is_one_error(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        parse(monkeypatch, PRETRAIN, *arguments)
    assert "\n" not in str(caught.value)


def test_an_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("wrong\n   in two  lines")

    with pytest.raises(SystemExit) as stop:
        commandline.guarded(fail, "xcon test")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "xcon test: wrong in two lines\n"
    monkeypatch.setenv("XCON_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        commandline.guarded(fail, "xcon test")


def test_an_error_of_ours_is_not_hidden() -> None:
    def fail() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        commandline.guarded(fail, "xcon test")


# ---- config.json


@pytest.mark.parametrize("folder", ["run", "my_run", "a b-c/My_Run.2"])
@pytest.mark.parametrize("recipes", [PRETRAIN, FINETUNE])
def test_a_saved_config_given_back_is_the_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, recipes: dict
) -> None:
    changes = {
        "modalities": ("image", "meta"),
        "image_options": {"img_size": "32"},
        "image_weights": "w.safetensors",
    }
    saved = dataclasses.replace(recipes["demo"][1], shards=Path("s"), out=Path("o"), seed=7, **changes)
    file = tmp_path / folder / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text(saved.to_json(command="test", recipe="demo"))
    name, found = parse(monkeypatch, recipes, file)
    assert (name, found) == (str(file), saved)
    _, changed = parse(monkeypatch, recipes, file, "--out", "p", "--epochs", "2")
    assert changed == dataclasses.replace(saved, out=Path("p"), epochs=2)


def test_a_config_of_another_command_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(pretrain().to_json(command="pretrain"))
    with pytest.raises(
        ValueError, match=r"config.json: a config of xcon pretrain, here one of xcon test is needed"
    ):
        parse(monkeypatch, FINETUNE, tmp_path / "config.json", "--out", "o")


def test_a_config_of_an_earlier_version_has_the_defaults_of_what_is_new(tmp_path: Path) -> None:
    """Neither is it another run: it did what the default does."""
    younger = ("views", "per_class", "pair_weights", "learn_temperature", "caption")
    kept = {name: value for name, value in json.loads(pretrain(epochs=3).to_json()).items() if name not in younger}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert config.read_config(tmp_path / "config.json", PretrainConfig) == pretrain(epochs=3)
    assert pretrain(epochs=3).differences(kept) == []
    assert pretrain(epochs=3, per_class=4).differences(kept) == ["--per-class was 0, now 4"]


def test_init_is_given_back_as_a_path(tmp_path: Path) -> None:
    saved = FinetuneConfig(shards=Path("s"), out=Path("o"), init=Path("runs/pretrain"))
    (tmp_path / "config.json").write_text(saved.to_json())
    assert config.read_config(tmp_path / "config.json", FinetuneConfig) == saved


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "config.json: a JSON object is needed"),
        ({"shards": None}, "not a config of this command, --shards is missing"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"batch_size": "many"}, "config.json: a value of the wrong kind"),
        ({"modalities": 3}, "config.json: a value of the wrong kind"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, values: object, message: str) -> None:
    file = tmp_path / "config.json"
    if isinstance(values, dict):
        kept = {**json.loads(pretrain().to_json()), **values}
        values = json.dumps({name: value for name, value in kept.items() if (name, value) != ("shards", None)})
    file.write_text(str(values))
    with pytest.raises(ValueError, match=message):
        config.read_config(file, PretrainConfig)


def test_differences_name_what_a_resumed_run_may_not_change() -> None:
    saved = json.loads(pretrain().to_json())
    assert pretrain().differences(saved) == []
    assert pretrain(out=Path("elsewhere"), shards=Path("moved"), workers=9).differences(saved) == []
    assert pretrain(epochs=3, image_lr=0.5).differences(saved) == [
        "--epochs was 200, now 3",
        "--image-lr was 0.0001, now 0.5",
    ]


# ---- ranges


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[(name, 0) for name in ("image_size", "batch_size", "epochs", "log_every", "checkpoint_every")],
        *[
            (name, -1)
            for name in ("warmup_epochs", "patience", "image_lr", "weight_decay", "workers", "text_lr", "seed")
        ],
        *[("image_lr", float("nan")), ("crop_scale", 0.0), ("crop_scale", 1.01), ("crop_scale", float("nan"))],
        *[("clip_norm", 0.0), ("temperature", 0.0), ("temperature", -0.07), ("temperature", 0.004)],
        *[("embed_dim", 0), ("meta_width", 0), ("meta_depth", 0), ("accumulation_steps", 2), ("max_scale", 0.0)],
        *[("modalities", ("image",)), ("modalities", ("image", "image", "text"))],
        *[("views", 0), ("views", 2), ("per_class", -1), ("per_class", 5), ("pair_weights", {"image": 1.0})],
    ],
)
def test_values_out_of_range_are_refused_by_name(setting: str, value: object) -> None:
    flag = "temperature" if setting == "max_scale" else setting
    with pytest.raises(ValueError, match="--" + flag.replace("_", "-")):
        pretrain(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("dropout", 1.0), ("label_smoothing", -0.1), ("meta_dropout", 1.0), ("hidden", 0), ("modalities", ())],
)
def test_values_of_the_classifier_out_of_range_are_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match="--" + setting.replace("_", "-")):
        FinetuneConfig(**{"shards": Path("s"), "out": Path("o"), setting: value})


def test_bounds_themselves_are_allowed() -> None:
    assert pretrain(crop_scale=1.0, temperature=1 / 200, patience=0, workers=0, image_lr=0.0).max_scale == 200


def test_accumulation_is_for_fine_tuning_alone() -> None:
    with pytest.raises(ValueError, match="refused for pre-training"):
        pretrain(accumulation_steps=4)
    assert FinetuneConfig(shards=Path("s"), out=Path("o"), accumulation_steps=4).accumulation_steps == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(fusion="product", modalities=("image",), meta_dropout=0.0), "of two modalities"),
        (dict(fusion="product"), "--meta-dropout 0.1: unused"),
        (dict(doubt=0.2), "--doubt 0.2: unused, --fusion is concatenation"),
        (dict(fusion="product", meta_dropout=0.0, doubt=1.0), "--doubt 1.0: a share in"),
    ],
)
def test_a_product_is_of_two_experts_that_learn_alone(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(shards=Path("s"), out=Path("o"), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(modalities=("meta",), views=2), "--modalities meta: a loss needs at least two, or image alone with"),
        (
            dict(modalities=("image",)),
            "--modalities image: a loss needs at least two, or image alone with --views 2",
        ),
        (dict(views=3), "--views 3: for --modalities image alone, here --modalities image text meta"),
        (dict(per_class=6), "--per-class 6: does not divide --batch-size 32"),
        (dict(pair_weights={"image->text": 1.0}), "--pair-weights image->text: no pair"),
        (dict(pair_weights={"image-image": 1.0}), "--pair-weights image-image: no pair"),
        (dict(pair_weights={"image-text": 1.0, "text-image": 2.0}), "--pair-weights image-text: named twice"),
        (dict(pair_weights={"image-text": -1.0}), "--pair-weights image-text -1.0: a number from 0"),
        (dict(pair_weights={"image-text": float("nan")}), "--pair-weights image-text nan: a number from 0"),
        (
            dict(pair_weights={"image-meta": 1.0}, modalities=("image", "text")),
            "--pair-weights image-meta: no pair",
        ),
        (
            dict(pair_weights={"image-text": 1.0}, modalities=("image",), views=2),
            "--pair-weights image-text: no pair",
        ),
        (dict(pair_weights={"image-text": 0.0}, modalities=("image", "text")), "all are 0"),
    ],
)
def test_what_makes_no_loss_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain(**settings)


def test_weights_of_pairs_are_those_of_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["demo", "--shards", "s", "--out", "o", "--pair-weights", "image-text", 2, "meta-image", 0.5]
    _, found = parse(monkeypatch, PRETRAIN, *arguments)
    assert found.term_weights == {"image->text": 2, "text->image": 2, "meta->image": 0.5, "image->meta": 0.5}


@pytest.mark.parametrize("setting", ["--caption", "--text-lr"])
def test_settings_of_text_are_unused_without_it(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    arguments = ["demo", "--shards", "s", "--out", "o", "--modalities", "image", "meta"]
    with pytest.raises(ValueError, match=f"{setting}: unused, --modalities is image meta"):
        parse(monkeypatch, PRETRAIN, *arguments, setting, "0.5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(color_jitter=1.1), "--color-jitter 1.1: a strength in"),
        (dict(meta_jitter_km=-1.0), "--meta-jitter-km -1.0: 0 or more"),
        (dict(mixup=-0.1), "--mixup -0.1: 0 or more"),
        (dict(mix_share=0.0), "--mix-share 0.0: a number in"),
        (dict(layer_decay=1.2), "--layer-decay 1.2: a number in"),
        (dict(ema=1.0), "--ema 1.0: a share in"),
        (dict(late_size=448), "--late-size 448 --late-epochs 0: both are needed, or none"),
        (dict(late_epochs=3), "--late-size 0 --late-epochs 3: both are needed, or none"),
        (dict(late_size=448, late_epochs=5, epochs=5), "--late-epochs 5: fewer than --epochs 5"),
        (dict(late_size=448, late_epochs=5, patience=2), "--patience 2: it would stop before --late-epochs"),
        (dict(keep="last", patience=2), "--patience 2: it waits for the best, --keep is last"),
        (dict(mixup=0.2, modalities=("meta",)), "--mixup 0.2: unused, --modalities is meta; give 0.0"),
        (dict(layer_decay=0.8, modalities=("meta",)), "--layer-decay 0.8: unused, --modalities is meta; give 1.0"),
        (dict(fusion="channels", modalities=("image",)), "--fusion channels: of two modalities"),
        (dict(fusion="channels", init=Path("run")), "--init run: pre-trained networks take three channels"),
        (dict(fusion="channels", joint=True), "--joint True: unused, --fusion is channels"),
        (dict(head="captions"), "--head captions: unused, --fusion is concatenation"),
        (dict(head="captions", fusion="product", meta_dropout=0.0), "--head captions: of a pre-trained run"),
        (dict(joint=True, fusion="product", meta_dropout=0.0, cutmix=1.0), "--joint: a mixed photograph"),
    ],
)
def test_what_fine_tuning_cannot_do_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FinetuneConfig(shards=Path("s"), out=Path("o"), **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mix-share", "0.3"), "--mix-share: unused, neither --mixup nor --cutmix is given"),
        (("--modalities", "image", "--meta-jitter-km", "9"), "--meta-jitter-km: unused, --modalities is image"),
        (("--modalities", "meta", "--color-jitter", "0.2"), "--color-jitter: unused, --modalities is meta"),
        (
            ("--fusion", "channels", "--meta-lr", "0.1"),
            "--meta-lr: unused, --fusion channels has no metadata encoder",
        ),
    ],
)
def test_what_changes_nothing_is_refused(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(monkeypatch, FINETUNE, "demo", "--shards", "s", "--out", "o", *arguments)


def test_what_a_recipe_has_for_the_image_can_be_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe best on metadata alone: its late size is refused until it is put off, and then taken."""
    alone = [
        "best",
        "--shards",
        "s",
        "--out",
        "o",
        "--modalities",
        "meta",
        "--fusion",
        "concatenation",
        "--doubt",
        "0",
    ]
    with pytest.raises(ValueError, match=re.escape("--late-size 288: unused, --modalities is meta; give 0")):
        parse(monkeypatch, FINETUNE, *alone)
    _, found = parse(monkeypatch, FINETUNE, *alone, "--late-size", "0", "--late-epochs", "0")
    assert (found.modalities, found.late_size, found.late_epochs) == (("meta",), 0, 0)


def test_inception_is_the_papers_baseline_with_and_without_metadata() -> None:
    (text, image), (_, meta) = FINETUNE["inception"], FINETUNE["inception-meta"]
    assert "76.61" in text
    assert (image.image_backbone, image.image_size, image.batch_size, image.epochs) == (
        "inception_v3",
        299,
        32,
        200,
    )
    assert (image.modalities, image.fusion, image.init) == (("image",), "concatenation", None)
    assert meta == dataclasses.replace(image, modalities=("image", "meta"), fusion="channels")
