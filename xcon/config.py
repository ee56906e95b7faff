"""Settings and recipes. A recipe is a value: it names the sentence it follows, its command, its result.

Every setting can be given on the command line; an unknown one is an error. The resolved settings are saved
as `config.json` in the run and can be given back in place of the recipe's name.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro

from xcon.commandline import one_line_errors

# What an image tower is where nothing else is said (paper, section 3.1, "Image Embedding").
BACKBONE, WEIGHTS = "resnet50", "imagenet"
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Fusion = Literal["concatenation", "product"]
MetaEncoding = Literal["wrap", "xyz", "fourier", "sphere2vec", "harmonics"]
PriorKind = Literal["geoprior", "softmax", "frequency", "neighbours", "kernel", "grid"]
MODALITIES: tuple[Literal["image", "text", "meta"], ...] = ("image", "text", "meta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What pre-training and fine-tuning have in common."""

    shards: Path = tyro.MISSING
    """Shard set to train on (a folder that xcon-shards build made)."""
    out: Path = tyro.MISSING
    """Run folder; the same command given again resumes there."""
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
    batch_size: int = 32
    """Records in one optimiser step, over all processes."""
    accumulation_steps: int = 1
    """Parts that each process computes its share of the batch in (fine-tuning only)."""
    epochs: int = 200
    """Passes over the training split."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rates rise from zero; then they fall to zero along a cosine."""
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

    # Settings that a resumed run may change: they leave every number of the run as it is.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("shards", "out", "workers", "checkpoint_every")

    def __post_init__(self) -> None:
        """Refuses values out of range.

        Raises:
            ValueError: names the setting.
        """
        at_least_one = (
            "image_size",
            "batch_size",
            "accumulation_steps",
            "epochs",
            "log_every",
            "checkpoint_every",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: at least 1 is needed")
        for name in (
            "warmup_epochs",
            "patience",
            "image_lr",
            "meta_lr",
            "head_lr",
            "weight_decay",
            "workers",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: no negative number is meant here")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"--crop-scale {self.crop_scale}: a share of the area in (0, 1] is needed")
        if not self.clip_norm > 0:
            raise ValueError(f"--clip-norm {self.clip_norm}: a positive norm is needed")
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"--modalities {' '.join(self.modalities)}: one is named twice")

    def to_json(self, **facts: Any) -> str:
        """The resolved settings, and before them `facts` about the run that later steps read."""
        return json.dumps({**facts, **dataclasses.asdict(self)}, indent=1, default=str) + "\n"

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What differs from a saved config, setting by setting, but for those that may change."""
        mine = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        names = [name for name in mine if name not in self.MAY_CHANGE]
        return [f"{flag(n)} was {saved.get(n)}, now {mine[n]}" for n in names if saved.get(n) != mine[n]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Cross-contrastive pre-training (paper, section 3.1)."""

    text_model: str = "distilbert-base-uncased"
    """Hugging Face model by name or folder, or small-distilbert: untrained, with its own vocabulary."""
    text_lr: float = 1e-5
    """Learning rate of the text encoder."""
    text_frozen: bool = False
    """Keep the text encoder as it is: each caption is encoded once, and only its projection learns."""
    micro_batch: int = 0
    """Rows that a process encodes at a time, for large batches on small cards; 0: all. The loss is still that of
    the whole batch, at the price of encoding twice; BatchNorm sees the rows of a part."""
    matching: Literal["label", "diagonal"] = "label"
    """What counts as a positive: every record of the same class, or only the record itself (CLIP)."""
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
    max_scale: float = 200.0
    """Bound on 1 / temperature."""

    def __post_init__(self) -> None:
        """Refuses what would change the loss or has no meaning."""
        super().__post_init__()
        if len(self.modalities) < 2:
            raise ValueError("--modalities: a cross-modal loss needs at least two")
        if self.accumulation_steps != 1:
            raise ValueError(
                f"--accumulation-steps {self.accumulation_steps}: refused for pre-training: each part of the "
                "batch would be contrasted with itself alone, another loss; take --micro-batch"
            )
        if not self.temperature > 0 or 1 / self.temperature > self.max_scale:
            raise ValueError(f"--temperature {self.temperature}: 1/temperature lies in (0, {self.max_scale}]")
        for name in ("text_lr", "micro_batch"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: no negative number is meant here")
        if self.text_frozen and self.text_model == "small-distilbert":
            raise ValueError("--text-frozen: small-distilbert is untrained and would stay so; give --text-model")
        if self.micro_batch >= self.batch_size:
            raise ValueError(
                f"--micro-batch {self.micro_batch}: unused, --batch-size is {self.batch_size} over all processes"
            )
        for name in ("embed_dim", "meta_width", "meta_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: at least 1 is needed")

    @property
    def method(self) -> str:
        """A short name for tables: the loss and, where they are not its usual ones, the modalities."""
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
    """concatenation: two layers on both embeddings (the paper). product: an expert for each, and Bayes' rule."""
    doubt: float = 0.0
    """Of a product: the probability that metadata is wrong; the higher, the less a wrong place can ruin."""

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        super().__post_init__()
        if not self.modalities:
            raise ValueError("--modalities: at least one is needed")
        for name in ("dropout", "label_smoothing", "meta_dropout", "doubt"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: a share in [0, 1) is needed")
        if self.hidden < 1:
            raise ValueError(f"--hidden {self.hidden}: at least 1 is needed")
        if self.fusion == "product" and len(self.modalities) < 2:
            raise ValueError(f"--fusion product: of two modalities, --modalities is {' '.join(self.modalities)}")
        if self.fusion == "product" and self.meta_dropout:
            raise ValueError(
                f"--meta-dropout {self.meta_dropout}: unused, each expert of --fusion product learns alone; give 0"
            )
        if self.fusion != "product" and self.doubt:
            raise ValueError(f"--doubt {self.doubt}: unused, --fusion is {self.fusion}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """A prior over the classes from place and date, times the scores of a run on images alone."""

    shards: Path = tyro.MISSING
    """Shard set whose training records the prior is fitted to."""
    image_run: Path = tyro.MISSING
    """Run on images alone, evaluated by xcon predict on the test split; its scores are what is multiplied."""
    out: Path = tyro.MISSING
    """Run folder; the same command given again makes the same run again."""
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
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: at least 1 is needed")
        for name in ("learning_rate", "bandwidth_km", "bandwidth_days", "smoothing"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: a positive number is needed")
        if not self.km_per_day >= 0:
            raise ValueError(f"--km-per-day {self.km_per_day}: no negative number is meant here")
        if not 0 < self.decay <= 1:
            raise ValueError(f"--decay {self.decay}: a factor in (0, 1] is needed")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: a share in [0, 1) is needed")
        if self.meta_encoding == "harmonics" and self.dropout:
            raise ValueError(f"--dropout {self.dropout}: unused, harmonics feed a network of sines; give 0")

    def check_used(self, recipe: "PriorConfig") -> None:
        """Raises ValueError where a setting was given that this kind of prior does not use."""
        of_some = {name for names in self.USES.values() for name in names}
        for name in sorted(of_some - set(self.USES[self.kind])):
            if getattr(self, name) != getattr(recipe, name):
                raise ValueError(f"{flag(name)}: unused, the prior is {self.kind}")

    def to_json(self, **facts: Any) -> str:
        """The resolved settings, and before them `facts` about the run that later steps read."""
        return json.dumps({**facts, **dataclasses.asdict(self)}, indent=1, default=str) + "\n"


def check_patience(settings: TrainConfig, *, validation: bool) -> None:
    """Raises ValueError where early stopping is asked for and there is nothing to stop on."""
    if settings.patience and not validation:
        raise ValueError(f"--patience {settings.patience}: {settings.shards} has no validation split to stop on")


def check_used(settings: TrainConfig, recipe: TrainConfig) -> None:
    """Raises ValueError where a setting of a modality was given that does not take part."""
    for field in dataclasses.fields(settings):
        modality = "image" if field.name == "crop_scale" else field.name.split("_")[0]
        given = getattr(settings, field.name) != getattr(recipe, field.name)
        if given and modality in MODALITIES and modality not in settings.modalities:
            raise ValueError(f"{flag(field.name)}: unused, --modalities is {' '.join(settings.modalities)}")
        if field.name == "text_lr" and given and isinstance(settings, PretrainConfig) and settings.text_frozen:
            raise ValueError("--text-lr: unused, --text-frozen keeps the text encoder as it is")


Train = TypeVar("Train", TrainConfig, PretrainConfig, FinetuneConfig, PriorConfig)


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------------------------
# Recipes. "paper" keeps the paper's numbers; where it is silent, the authors' notebook or the comment says.

_DEMO: dict[str, Any] = dict(
    image_backbone="resnet10t", image_weights="none", image_size=64, batch_size=64, warmup_epochs=1.0,
    image_lr=2e-3, meta_lr=2e-3, head_lr=2e-3, weight_decay=1e-3, log_every=5,
)  # fmt: skip
_LAPTOP: dict[str, Any] = dict(
    image_backbone="mobilenetv2_100", image_size=128, batch_size=64, weight_decay=1e-3, log_every=5,
)  # fmt: skip

PRETRAIN: dict[str, tuple[str, PretrainConfig]] = {
    "paper": (
        """Section 4.2: "Batch size = 32 and tau = log(0.007) and trained the networks for 200 epochs. We
        pre-trained meta, text, and image encoder models through AdamW with learning rates 5e-5, 1e-5, and
        1e-4." Projections at 1e-3 with weight decay 1e-3 are the authors' notebook's. Ours, where both are silent:
        a warm-up epoch and a cosine, crops of at least 0.35 of the area and flips, gradients clipped to 1, and an
        end after 20 epochs without a better result on val (their own run was best at epoch 6 of 80). With the
        location file 22,819 photographs are trained on: its val is taken from the 23,929.
        Command: accelerate launch xcon/pretrain.py paper --shards nabirds --out runs/pretrain
        Expected: after fine-tuning, 84.44 % in the paper; not run by us, it needs NABirds and a GPU.""",
        PretrainConfig(weight_decay=1e-3, patience=20, checkpoint_every=1000),
    ),
    "clip": (
        """Table 1, "CLIP (ResNet50)": "only trained on text and image information using two losses".
        Command: accelerate launch xcon/pretrain.py clip --shards nabirds --out runs/clip
        Expected: after fine-tuning of the image encoder, 81.66 % in the paper; not run by us.""",
        PretrainConfig(
            modalities=("image", "text"), matching="diagonal", weight_decay=1e-3, patience=20,
            checkpoint_every=1000,
        ),
    ),
    "laptop": (
        """The paper's method at a size for two cores: MobileNetV2 at 128 px, a small untrained text model.
        Command: xcon pretrain laptop --shards DIR --image-weights FILE --out runs/laptop
        Expected: benchmarks/real_photographs.py and the README's table, which it makes.""",
        PretrainConfig(
            **_LAPTOP, text_model="small-distilbert", epochs=10, text_lr=3e-4, meta_lr=1e-3, image_lr=3e-4,
            temperature=0.07,
        ),
    ),
    "demo": (
        """The paper's method on the synthetic set of `make demo`: a minute on two cores.
        Command: accelerate launch xcon/pretrain.py demo --shards demo/shards --out demo/pretrain
        Expected: the held-out captions are found for most of the photographs.""",
        PretrainConfig(**_DEMO, text_model="small-distilbert", epochs=10, text_lr=5e-4, temperature=0.07),
    ),
}  # fmt: skip

FINETUNE: dict[str, tuple[str, FinetuneConfig]] = {
    "paper": (
        """Section 3.2: "we take the output of the meta encoder model and Resnet50 model and concatenate the
        embeddings. We use concatenated 512 size embedding vectors as an input of 2 layers shallow
        classification network"; Adam, 200 epochs, batch 32 (4.2). Learning rates as in pre-training. Ours:
        metadata is hidden from one record in ten, so that the model can do without, and what pre-training adds.
        Command: xcon finetune paper --shards nabirds --init runs/pretrain --out runs/paper
        Expected: 84.44 % in the paper; not run by us, it needs NABirds and a GPU.""",
        FinetuneConfig(patience=20, checkpoint_every=1000),
    ),
    "image": (
        """Image alone: the classifier of CLIP (with --init) and of an image-only baseline (without).
        Command: accelerate launch xcon/finetune.py image --shards nabirds --init runs/clip --out runs/image
        Expected: 81.66 % in the paper's table for CLIP; not run by us.""",
        FinetuneConfig(modalities=("image",), patience=20, checkpoint_every=1000),
    ),
    "laptop": (
        """Classification at a size for two cores; --modalities image for the image alone.
        Command: xcon finetune laptop --shards DIR --init runs/laptop --out runs/laptop-classifier
        Expected: benchmarks/real_photographs.py and the README's table, which it makes.""",
        FinetuneConfig(**_LAPTOP, epochs=6, meta_lr=1e-3, image_lr=3e-4, dropout=0.2, label_smoothing=0.1),
    ),
    "demo": (
        """Classification of the synthetic set; --modalities image for the image alone.
        Command: xcon finetune demo --shards demo/shards --init demo/pretrain --out demo/finetune
        Expected: image alone about one look-alike in three right, image and meta most of them.""",
        FinetuneConfig(**_DEMO, epochs=6),
    ),
}

PRIOR: dict[str, tuple[str, PriorConfig]] = {
    "geoprior": (
        """Table 1, "GeoPrior": 81.50 %; Mac Aodha et al. 2019, section 4: "trained with Adam", learning rate
        5e-4 that falls by 0.98 an epoch, batches of 1,024, 30 epochs of at most 100 records of a class, 4 residual
        blocks of width 256, wrap encoding, lambda = the number of classes; dropout 0.5 is their code's.
        Multiplied: p(y|image) P(y|x), the presence, divided by nothing.
        Command: xcon prior geoprior --shards nabirds --image-run runs/inception --out runs/geoprior
        Expected: 81.50 % in the paper, 5 points above Inception V3; not run by us, it needs NABirds and a GPU
        for the image run. It takes 660 steps there; a small set needs smaller batches, as in laptop.""",
        PriorConfig(),
    ),
    "laptop": (
        """The geographic prior for a set of a thousand records: as geoprior, with as many steps by small batches.
        Multiplied: p(y|image) P(y|x).
        Command: xcon prior laptop --shards DIR --image-run RUN --out runs/laptop-prior
        Expected: birds37 (1,036 records, 37 species): metadata alone 24.8 % top-1, cross-entropy 2.5; geoprior,
        with its 60 steps there, 4.1 %.""",
        PriorConfig(epochs=60, batch_size=32, learning_rate=1e-3),
    ),
    "softmax": (
        """The simplest strong rival: the same network as a classifier of places and dates, by cross-entropy.
        Multiplied: p(y|image) p(y|x) / p(y), p(y) being the shares of the classes in its epochs (Bayes' rule).
        Command: xcon prior softmax --shards DIR --image-run RUN --out runs/softmax
        Expected: birds37: metadata alone 26.6 %, cross-entropy 2.4.""",
        PriorConfig(kind="softmax", epochs=60, batch_size=64, learning_rate=1e-3),
    ),
    "frequency": (
        """The share of each class among the training records, whatever the place.
        Multiplied: p(y|image) p(y).
        Command: xcon prior frequency --shards DIR --image-run RUN --out runs/frequency
        Expected: the image's own result where classes are of equal size.""",
        PriorConfig(kind="frequency"),
    ),
    "neighbours": (
        """The classes of the nearest training records in place and date.
        Multiplied: p(y|image) p(y|x) / p(y).
        Command: xcon prior neighbours --shards DIR --image-run RUN --out runs/neighbours
        Expected: birds37: metadata alone 25.8 %. Settings by cross-validation on its training records.""",
        PriorConfig(kind="neighbours", smoothing=5.0),
    ),
    "kernel": (
        """A kernel density of each class's training records over the sphere and the year.
        Multiplied: p(y|image) p(x|y).
        Command: xcon prior kernel --shards DIR --image-run RUN --out runs/kernel
        Expected: birds37: metadata alone 28.6 %, cross-entropy 2.3. Settings by cross-validation there.""",
        PriorConfig(kind="kernel"),
    ),
    "grid": (
        """A histogram of each class's training records over cells of equal area and parts of the year.
        Multiplied: p(y|image) p(x|y).
        Command: xcon prior grid --shards DIR --image-run RUN --out runs/grid
        Expected: birds37: metadata alone 23.3 %, cross-entropy 2.5. Settings by cross-validation there.""",
        PriorConfig(kind="grid", smoothing=3.0),
    ),
}


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


def read_config(file: Path, kind: type[Train]) -> Train:
    """Reads a run's `config.json` back into the settings it was made from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a config of this kind.
    """
    values = read_json(file)
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    if missing := [n for n in fields if n not in values]:
        raise ValueError(f"{file}: not a config of this command, {flag(missing[0])} is missing")
    try:
        read: dict[str, Any] = {n: values[n] for n in fields}
        for name in {"shards", "out", "init", "image_run", "test_shards"} & read.keys():
            read[name] = None if read[name] is None else Path(read[name])
        if "modalities" in read:
            read["modalities"] = tuple(read["modalities"])
        return kind(**read)
    except TypeError as error:
        raise ValueError(f"{file}: a value of the wrong kind ({error})") from None


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
