"""Settings: what a command can be told, what of it makes sense, how it is read and saved.

Every setting can be given on the command line; an unknown one is an error. The resolved settings are saved
as `config.json` in the run and can be given back in place of the recipe's name.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro

from xcon import runlock
from xcon.commandline import one_line_errors

# What an image tower is where nothing else is said (paper, section 3.1, "Image Embedding").
BACKBONE, WEIGHTS = "resnet50", "imagenet"
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Fusion = Literal["concatenation", "product", "channels"]
MetaEncoding = Literal["wrap", "xyz", "fourier", "sphere2vec", "harmonics"]
PriorKind = Literal["geoprior", "softmax", "frequency", "neighbours", "kernel", "grid"]
MODALITIES: tuple[Literal["image", "text", "meta"], ...] = ("image", "text", "meta")
# Settings of the image that are not named after it; of some the value that they must have without an image.
OF_THE_IMAGE = ("crop_scale", "color_jitter", "mix_share")
OFF_WITHOUT_IMAGE = {"mixup": 0.0, "cutmix": 0.0, "layer_decay": 1.0, "late_size": 0, "late_epochs": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the settings of every run have in common: they are saved with it, and it has a folder."""

    shards: Path = tyro.MISSING
    """Shard set to train on (a folder that xcon-shards build made)."""
    out: Path = tyro.MISSING
    """Run folder; the same command given again goes on there, or makes the same run again."""

    # Settings that a run taken up again may change: they leave every number of it as it is.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("shards", "out")

    def to_json(self, **facts: Any) -> str:
        """The resolved settings, and before them `facts` about the run that later steps read."""
        return json.dumps({**facts, **dataclasses.asdict(self)}, indent=1, default=str) + "\n"

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What differs from a saved config, setting by setting, but for those that may change.

        A setting that the saved config has not is younger than it, and was what it is by default.
        """
        mine = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        was = json.loads(json.dumps(defaults(type(self)), default=str)) | saved
        names = [name for name in mine if name not in self.MAY_CHANGE]
        return [f"{flag(n)} was {was[n]}, now {mine[n]}" for n in names if was[n] != mine[n]]

    def begun(self, facts: Mapping[str, Any]) -> bool:
        """Whether this very run was begun in its folder.

        Args:
            facts: as of `to_json`; all but the recipe's name must be those of the run begun.

        Raises:
            ValueError: the folder holds something else, or a run with other settings.
        """
        saved = self.out / "config.json"
        if not saved.is_file():
            if self.out.exists() and not (self.out.is_dir() and all(map(_of_a_beginning, self.out.iterdir()))):
                raise ValueError(f"{self.out}: neither empty nor a run folder: choose another --out")
            return False
        was = read_json(saved)
        changes = [f"{n} was {was.get(n)}, now {v}" for n, v in facts.items() if n != "recipe" and was.get(n) != v]
        if changes := [*changes, *self.differences(was)]:
            raise ValueError(
                f"{self.out}: holds a run with other settings ({'; '.join(changes)}): choose another --out"
            )
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What pre-training and fine-tuning have in common."""

    modalities: tuple[Literal["image", "text", "meta"], ...] = MODALITIES
    """Modalities that take part."""
    image_backbone: str | None = None
    """Any timm network; none: that of --init, or resnet50."""
    image_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Keyword arguments of timm.create_model, as in: --image-options pad_type same."""
    image_weights: str | None = None
    """imagenet (timm's own), none, or a .safetensors file; none given: that of --init, or imagenet."""
    image_size: int = 224
    """Side of the square the network sees, in pixels."""
    crop_scale: float = 0.35
    """Smallest share of the photograph's area that a random crop keeps; 1.0 crops nothing."""
    color_jitter: float = 0.0
    """Strength in [0, 1] of random changes of brightness, contrast and saturation; 0: none."""
    meta_jitter_km: float = 0.0
    """Training places are moved at random, by a normal of so many km each to the east and north; 0: not at all."""
    meta_jitter_days: float = 0.0
    """Training dates are moved at random, by a normal of so many days; 0: not at all."""
    batch_size: int = 32
    """Records in one optimiser step, over all processes."""
    per_class: int = 0
    """Records of one class in a batch: batches of batch-size / K classes with K each, as far as classes have as
    many; 0: as a plain shuffle has it. Every record still comes once per epoch."""
    accumulation_steps: int = 1
    """Parts that each process computes its share of the batch in (fine-tuning only)."""
    epochs: int = 200
    """Passes over the training split."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rates rise from zero."""
    decay: Literal["cosine", "none"] = "cosine"
    """After the rise the learning rates fall to zero along half a cosine, or stay. A pre-training that keeps them
    up and a fine-tuning with --warmup-epochs 0 are one schedule."""
    patience: int = 0
    """Epochs without a better held-out result after which training stops; 0: never."""
    image_lr: float = 1e-4
    """Learning rate of the image encoder."""
    meta_lr: float = 5e-5
    """Learning rate of the metadata encoder."""
    head_lr: float = 1e-3
    """Learning rate of projections, temperature and classifier."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the weight matrices; 0: AdamW is Adam."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "auto"
    """auto takes bf16 where the device computes it natively, else fp16 on a GPU, else fp32."""
    workers: int = 2
    """Processes that decode photographs, per training process."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    seed: int = 0
    """Of the initial weights, the order, the crops and the dropout."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("shards", "out", "workers", "checkpoint_every")

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            ValueError: names the setting.
        """
        check_at_least_one(self, "image_size", "batch_size", "accumulation_steps", "epochs")
        check_at_least_one(self, "log_every", "checkpoint_every")
        check_not_negative(self, "image_lr", "meta_lr", "head_lr", "weight_decay", "warmup_epochs", "patience")
        check_not_negative(self, "per_class", "meta_jitter_km", "meta_jitter_days", "workers", "seed")
        check_range(self, "crop_scale", fits=lambda x: 0 < x <= 1, needed="a share of the area in (0, 1]")
        check_range(self, "color_jitter", fits=lambda x: 0 <= x <= 1, needed="a strength in [0, 1]")
        check_range(self, "clip_norm", fits=lambda x: x > 0, needed="a positive norm")
        if self.per_class and self.batch_size % self.per_class:
            raise ValueError(f"--per-class {self.per_class}: does not divide --batch-size {self.batch_size}")
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"--modalities {' '.join(self.modalities)}: one is named twice")

    def unused(self) -> dict[str, str]:
        """Settings that change nothing beside the others, and why; here none."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Cross-contrastive pre-training (paper, section 3.1)."""

    text_model: str = "distilbert-base-uncased"
    """Hugging Face model by name or folder, or small-distilbert: untrained, with its own vocabulary."""
    text_lr: float = 1e-5
    """Learning rate of the text encoder."""
    text_frozen: bool = False
    """Keep the text encoder as it is: each caption is encoded once, and only its projection learns."""
    caption: str | None = None
    """Template of the captions, one for each class; may name {name}, {species}, {plumage} (words of sex, age and
    morph), {scientific_name}, {family}. None: the captions of the shard set."""
    micro_batch: int = 0
    """Rows that a process encodes at a time, for large batches on small cards; 0: all. The loss is still that of
    the whole batch, at the price of encoding twice; BatchNorm sees the rows of a part."""
    matching: Literal["label", "diagonal"] = "label"
    """What counts as a positive: every record of the same class, or only the record itself (CLIP)."""
    views: int = 1
    """Random crops of each photograph in a batch. Two or more are for --modalities image alone, and are contrasted
    with one another: supervised contrastive learning, or SimCLR where --matching is diagonal."""
    pair_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Factors of the pairs' losses in the total, 1 where not named, as in: --pair-weights image-meta 2."""
    embed_dim: int = 256
    """Width of the shared space."""
    meta_width: int = 256
    """Width of the metadata encoder's residual MLP."""
    meta_depth: int = 4
    """Hidden blocks of the metadata encoder."""
    meta_encoding: MetaEncoding = "wrap"
    """What the metadata encoder sees of a place: wrap (the paper), xyz, fourier, sphere2vec, or harmonics with a
    network of sines; see xcon/geotime.py."""
    temperature: float = 0.007
    """Initial temperature; it is learned in log space."""
    learn_temperature: bool = True
    """Else the temperature stays as it is."""
    max_scale: float = 200.0
    """Bound on 1 / temperature."""

    def __post_init__(self) -> None:
        """Refuses what would change the loss or has no meaning."""
        super().__post_init__()
        self._check_loss()
        if self.accumulation_steps != 1:
            raise ValueError(
                f"--accumulation-steps {self.accumulation_steps}: refused for pre-training: each part of the "
                "batch would be contrasted with itself alone, another loss; take --micro-batch"
            )
        if not self.temperature > 0 or 1 / self.temperature > self.max_scale:
            raise ValueError(f"--temperature {self.temperature}: 1/temperature lies in (0, {self.max_scale}]")
        check_not_negative(self, "text_lr", "micro_batch")
        check_at_least_one(self, "embed_dim", "meta_width", "meta_depth")
        if self.text_frozen and self.text_model == "small-distilbert":
            raise ValueError("--text-frozen: small-distilbert is untrained and would stay so; give --text-model")
        if self.micro_batch >= self.batch_size:
            raise ValueError(
                f"--micro-batch {self.micro_batch}: unused, --batch-size is {self.batch_size} over all processes"
            )

    def _check_loss(self) -> None:
        """Refuses modalities, views and weights that make no loss together."""
        named = f"--modalities {' '.join(self.modalities)}"
        if len(self.modalities) < 2 and (self.modalities != ("image",) or self.views < 2):
            raise ValueError(f"{named}: a loss needs at least two, or image alone with --views 2")
        if self.views < 1:
            raise ValueError(f"--views {self.views}: at least 1 is needed")
        if self.views > 1 and len(self.modalities) > 1:
            raise ValueError(f"--views {self.views}: for --modalities image alone, here {named}")
        pairs = [frozenset(pair.split("-")) for pair in self.pair_weights]
        for (pair, weight), members in zip(self.pair_weights.items(), pairs, strict=True):
            if pair.count("-") != 1 or len(members) != 2 or not members <= set(self.modalities):
                raise ValueError(f"--pair-weights {pair}: no pair of modalities that take part, as image-text is")
            if pairs.count(members) > 1:
                raise ValueError(f"--pair-weights {pair}: named twice")
            if not 0 <= weight < math.inf:
                raise ValueError(f"--pair-weights {pair} {weight}: a number from 0 is needed")
        all_pairs = len(self.modalities) * (len(self.modalities) - 1) // 2
        if all_pairs and list(self.pair_weights.values()).count(0) == all_pairs:
            raise ValueError("--pair-weights: all are 0, nothing would be learned")

    def unused(self) -> dict[str, str]:
        """Settings that change nothing beside the others, and why."""
        return {"text_lr": "--text-frozen keeps the text encoder as it is"} if self.text_frozen else {}

    @property
    def term_weights(self) -> dict[str, float]:
        """`pair_weights` for both directions: `"a->b"` -> factor, where one is given."""
        terms: dict[str, float] = {}
        for pair, weight in self.pair_weights.items():
            a, b = pair.split("-")
            terms |= {f"{a}->{b}": weight, f"{b}->{a}": weight}
        return terms

    @property
    def method(self) -> str:
        """A short name for tables: the loss and, where they are not its usual ones, the modalities."""
        if self.views > 1:
            return "supcon" if self.matching == "label" else "simclr"
        name, usual = ("clip", ("image", "text")) if self.matching == "diagonal" else ("xcon", MODALITIES)
        return name if set(self.modalities) == set(usual) else f"{name} ({' + '.join(self.modalities)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Classification by image and metadata (paper, section 3.2)."""

    modalities: tuple[Literal["image", "meta"], ...] = ("image", "meta")
    """What the classifier sees."""
    init: Path | None = None
    """Pre-trained run whose encoders are the start."""
    hidden: int = 512
    """Width of the classifier's hidden layer."""
    dropout: float = 0.0
    """Dropout before each of the classifier's two layers."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    meta_dropout: float = 0.1
    """Share of training records whose metadata is hidden, so that the model can do without."""
    meta_encoding: MetaEncoding | None = None
    """What the metadata encoder sees of a place, as in pre-training; none: that of --init, or wrap."""
    fusion: Fusion = "concatenation"
    """concatenation: two layers on both embeddings (the paper). product: an expert for each, and Bayes' rule.
    channels: each feature of the metadata is a constant channel of the photograph (the paper's Inception)."""
    doubt: float = 0.0
    """Of a product: the probability that metadata is wrong; the higher, the less a wrong place can ruin."""
    joint: bool = False
    """Of a product: train its scores too, beside those of each expert."""
    head: Literal["random", "captions"] | None = None
    """Of a product: what each expert's scores start as. captions: the similarities to the captions of the classes
    in --init, times its scale, so that nothing that pre-training learned is lost; none: captions where --init has
    them, else random."""
    mixup: float = 0.0
    """Two photographs blended into one, in shares drawn from a beta distribution of this alpha; 0: none."""
    cutmix: float = 0.0
    """A patch of another photograph, its area drawn from a beta distribution of this alpha; 0: none."""
    mix_share: float = 0.5
    """Share of the photographs that mixup and cutmix change; metadata of those is hidden, but from an expert of
    its own."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer of the image encoder to the one below it; 1: all alike."""
    ema: float = 0.0
    """Decay of the running average of the weights, which is what is evaluated and kept; 0: none. It rises to this
    from 0, so that short runs profit too."""
    late_size: int = 0
    """Side of the square in pixels for the last --late-epochs, and of the model from then on."""
    late_epochs: int = 0
    """Last epochs at --late-size."""
    keep: Literal["best", "last"] = "best"
    """Which weights are the result: those of the best held-out result, or the last."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        super().__post_init__()
        if not self.modalities:
            raise ValueError("--modalities: at least one is needed")
        shares = ("dropout", "label_smoothing", "meta_dropout", "doubt", "ema")
        check_range(self, *shares, fits=lambda x: 0 <= x < 1, needed="a share in [0, 1)")
        check_range(self, "mix_share", "layer_decay", fits=lambda x: 0 < x <= 1, needed="a number in (0, 1]")
        check_not_negative(self, "mixup", "cutmix", "late_size", "late_epochs")
        check_at_least_one(self, "hidden")
        self._check_fusion()
        self._check_end()

    def _check_fusion(self) -> None:
        """Refuses what has no meaning for the way that image and metadata are joined."""
        if self.fusion != "concatenation" and len(self.modalities) < 2:
            raise ValueError(
                f"--fusion {self.fusion}: of two modalities, --modalities is {' '.join(self.modalities)}"
            )
        if self.fusion == "product" and self.meta_dropout:
            raise ValueError(
                f"--meta-dropout {self.meta_dropout}: unused, each expert of --fusion product learns alone; give 0"
            )
        if self.fusion == "channels" and self.init:
            raise ValueError(
                f"--init {self.init}: pre-trained networks take three channels; --fusion channels starts anew"
            )
        if self.fusion != "product":
            for name, off in (("doubt", 0.0), ("joint", False), ("head", None)):
                if getattr(self, name) != off:
                    raise ValueError(f"{flag(name)} {getattr(self, name)}: unused, --fusion is {self.fusion}")
        if self.head == "captions" and not self.init:
            raise ValueError("--head captions: of a pre-trained run, give --init")
        if self.joint and self.mixes:
            raise ValueError("--joint: a mixed photograph has no metadata to join; drop --mixup, --cutmix")

    def _check_end(self) -> None:
        """Refuses a late size, or a choice of weights, that contradicts other settings."""
        for name, off in OFF_WITHOUT_IMAGE.items():
            if "image" not in self.modalities and getattr(self, name) != off:
                raise ValueError(
                    f"{flag(name)} {getattr(self, name)}: unused, --modalities is {' '.join(self.modalities)}; "
                    f"give {off}"
                )
        if (self.late_size > 0) != (self.late_epochs > 0):
            raise ValueError(
                f"--late-size {self.late_size} --late-epochs {self.late_epochs}: both are needed, or none"
            )
        if self.late_epochs >= self.epochs:
            raise ValueError(f"--late-epochs {self.late_epochs}: fewer than --epochs {self.epochs} are needed")
        if self.late_epochs and self.patience:
            raise ValueError(f"--patience {self.patience}: it would stop before --late-epochs; give 0")
        if self.keep == "last" and self.patience:
            raise ValueError(f"--patience {self.patience}: it waits for the best, --keep is last; give 0")

    @property
    def mixes(self) -> bool:
        """Whether photographs are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def unused(self) -> dict[str, str]:
        """Settings that change nothing beside the others, and why."""
        found = {}
        if self.fusion == "channels":
            found["meta_lr"] = "--fusion channels has no metadata encoder, its channels learn with --image-lr"
        if not self.mixes:
            found["mix_share"] = "neither --mixup nor --cutmix is given"
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig(RunConfig):
    """A prior over the classes from place and date, times the scores of a run on images alone."""

    image_run: Path = tyro.MISSING
    """Run on images alone, evaluated by xcon predict on the test split; its scores are what is multiplied."""
    test_shards: Path | None = None
    """Shard set whose places and dates the test photographs are given; none: --shards."""
    kind: tyro.conf.Suppress[PriorKind] = "geoprior"
    """Which prior; the recipe says it."""
    seed: int | None = None
    """Of the initial weights, the order, the dropout and the background; none: that of the image run."""
    meta_encoding: MetaEncoding = "wrap"
    """What the network sees of a place, as in pre-training."""
    meta_width: int = 256
    """Width of the network."""
    meta_depth: int = 4
    """Residual blocks of the network."""
    dropout: float = 0.5
    """Dropout within each block."""
    epochs: int = 30
    """Passes over the training records."""
    per_class: int = 100
    """Most records of a class in one epoch."""
    batch_size: int = 1024
    """Records in one optimiser step."""
    learning_rate: float = 5e-4
    """Adam's, in the first epoch."""
    decay: float = 0.98
    """Factor of the learning rate from one epoch to the next."""
    photographers: bool = True
    """Learn where photographers are and what they photograph, of records that say whose they are."""
    nearest: int = 20
    """Nearest training records."""
    km_per_day: float = 5.0
    """Kilometres that are as far as a day; 0: the date is not looked at."""
    bandwidth_km: float = 200.0
    """Standard deviation of a record in space."""
    bandwidth_days: float = 20.0
    """Standard deviation of a record in time."""
    bands: int = 36
    """Bands of cells from pole to pole, all of equal area; twice as many cells around."""
    seasons: int = 12
    """Parts of the year."""
    smoothing: float = 1.0
    """Records, spread as those of all classes are, that each class (of neighbours: each place) has too."""

    # Of each kind the settings that it uses; the paths, all do.
    _NETWORK: ClassVar[tuple[str, ...]] = (
        "seed", "meta_encoding", "meta_width", "meta_depth", "dropout", "epochs", "per_class", "batch_size",
        "learning_rate", "decay",
    )  # fmt: skip
    USES: ClassVar[Mapping[PriorKind, tuple[str, ...]]] = {
        "geoprior": (*_NETWORK, "photographers"),
        "softmax": _NETWORK,
        "frequency": (),
        "neighbours": ("nearest", "km_per_day", "smoothing"),
        "kernel": ("bandwidth_km", "bandwidth_days", "smoothing"),
        "grid": ("bands", "seasons", "smoothing"),
    }

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            ValueError: names the setting.
        """
        whole = ("meta_width", "meta_depth", "epochs", "per_class", "batch_size", "nearest", "bands", "seasons")
        check_at_least_one(self, *whole)
        above_zero = ("learning_rate", "bandwidth_km", "bandwidth_days", "smoothing")
        check_range(self, *above_zero, fits=lambda x: x > 0, needed="a positive number")
        check_not_negative(self, "km_per_day", *(() if self.seed is None else ("seed",)))
        check_range(self, "decay", fits=lambda x: 0 < x <= 1, needed="a factor in (0, 1]")
        check_range(self, "dropout", fits=lambda x: 0 <= x < 1, needed="a share in [0, 1)")
        if self.meta_encoding == "harmonics" and self.dropout:
            raise ValueError(f"--dropout {self.dropout}: unused, harmonics feed a network of sines; give 0")

    def check_used(self, recipe: "PriorConfig") -> None:
        """Raises ValueError where a setting was given that this kind of prior does not use."""
        of_some = {name for names in self.USES.values() for name in names}
        for name in sorted(of_some - set(self.USES[self.kind])):
            if getattr(self, name) != getattr(recipe, name):
                raise ValueError(f"{flag(name)}: unused, the prior is {self.kind}")


def check_range(settings: object, *names: str, fits: Callable[[float], bool], needed: str) -> None:
    """Raises ValueError where one of the settings of these names does not fit; NaN fits nowhere."""
    for name in names:
        value = getattr(settings, name)
        if not fits(value):
            raise ValueError(f"{flag(name)} {value}: {needed} is needed")


def check_at_least_one(settings: object, *names: str) -> None:
    """`check_range` of numbers from 1 on."""
    check_range(settings, *names, fits=lambda x: x >= 1, needed="at least 1")


def check_not_negative(settings: object, *names: str) -> None:
    """`check_range` of numbers from 0 on."""
    check_range(settings, *names, fits=lambda x: x >= 0, needed="0 or more")


def check_patience(settings: TrainConfig, *, validation: bool) -> None:
    """Raises ValueError where early stopping is asked for and there is nothing to stop on."""
    if settings.patience and not validation:
        raise ValueError(f"--patience {settings.patience}: {settings.shards} has no validation split to stop on")


def check_used(settings: TrainConfig, recipe: TrainConfig) -> None:
    """Raises ValueError where a setting was given that changes nothing, as of a modality that takes no part."""
    unused = settings.unused()
    for name in (field.name for field in dataclasses.fields(settings)):
        if getattr(settings, name) == getattr(recipe, name):
            continue  # not given
        modality = {"caption": "text", **dict.fromkeys(OF_THE_IMAGE, "image")}.get(name, name.split("_")[0])
        if modality in MODALITIES and modality not in settings.modalities:
            raise ValueError(f"{flag(name)}: unused, --modalities is {' '.join(settings.modalities)}")
        if name in unused:
            raise ValueError(f"{flag(name)}: unused, {unused[name]}")


Train = TypeVar("Train", TrainConfig, PretrainConfig, FinetuneConfig, PriorConfig)


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------------------------
# Command lines


def parse_recipe(recipes: Mapping[str, tuple[str, Any]], program: str) -> tuple[str, Any]:
    """Reads `RECIPE --field value ...`; for RECIPE also the `config.json` of a run.

    Returns:
        The recipe's name and the resolved config.

    Raises:
        ValueError: no such recipe, an unknown setting, a value of the wrong kind.
    """
    choices = {name: (" ".join(text.split()), config) for name, (text, config) in recipes.items()}
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else ""
    if name.endswith(".json"):
        kind = type(next(iter(recipes.values()))[1])
        check_command(Path(name), program)
        choices = {name: (f"as saved in {name}", read_config(Path(name), kind))}
    elif name and not name.startswith("-") and name not in recipes:
        raise ValueError(f"no recipe {name!r}: one of {', '.join(recipes)}, or the config.json of a run")
    with one_line_errors(program):
        settings = tyro.extras.overridable_config_cli(choices, prog=program, args=arguments)
    recipe = choices[name][1]
    if isinstance(settings, PriorConfig):
        settings.check_used(recipe)
        return name, settings
    check_used(settings, recipe)
    if isinstance(settings, FinetuneConfig) and settings.init and settings.image_backbone == recipe.image_backbone:
        settings = dataclasses.replace(settings, image_backbone=None)  # the recipe's gives way to that of --init
    return name, settings


def check_command(file: Path, program: str) -> None:
    """Raises ValueError where a `config.json` was made by another command than `program`, as `xcon pretrain`."""
    made_by = f"xcon {read_json(file).get('command', '')}"
    if made_by not in ("xcon ", program):
        raise ValueError(f"{file}: a config of {made_by}, here one of {program} is needed")


def defaults(kind: type[RunConfig]) -> dict[str, Any]:
    """The default of each setting; tyro.MISSING where it must be given."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(kind)
    }


def read_config(file: Path, kind: type[Train]) -> Train:
    """Reads a run's `config.json` back into the settings it was made from.

    A setting that the file has not is younger than it, and takes its default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a config of this kind.
    """
    saved, usual = read_json(file), defaults(kind)
    if missing := [n for n, value in usual.items() if value is tyro.MISSING and n not in saved]:
        raise ValueError(f"{file}: not a config of this command, {flag(missing[0])} is missing")
    values = {name: saved.get(name, value) for name, value in usual.items()}
    try:
        read: dict[str, Any] = dict(values)
        for name in {"shards", "out", "init", "image_run", "test_shards"} & read.keys():
            read[name] = None if read[name] is None else Path(read[name])
        if "modalities" in read:
            read["modalities"] = tuple(read["modalities"])
        return kind(**read)
    except TypeError as error:
        raise ValueError(f"{file}: a value of the wrong kind ({error})") from None


def _of_a_beginning(file: Path) -> bool:
    """Whether a process that was killed as it began a run leaves this: the lock, half of the settings."""
    return file.name == runlock.NAME or file.name.startswith(".config.json.")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a JSON object is needed")
    return values
