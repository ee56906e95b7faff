"""The recipes: named settings, each beside the sentence it follows, with its command and its expected result.

`paper` and its siblings keep the paper's numbers; where it is silent, the authors' notebook or the text says what
was taken. `best` is what we would train, `laptop` the same at a size for two cores.
"""

from typing import Any

from xcon.config import FinetuneConfig, PretrainConfig, PriorConfig

_DEMO: dict[str, Any] = dict(
    image_backbone="resnet10t", image_weights="none", image_size=64, batch_size=64, warmup_epochs=1.0,
    image_lr=2e-3, meta_lr=2e-3, head_lr=2e-3, weight_decay=1e-3, log_every=5,
)  # fmt: skip
_INCEPTION: dict[str, Any] = dict(
    image_backbone="inception_v3", image_size=299, patience=20, checkpoint_every=1000,
)  # fmt: skip
_LAPTOP: dict[str, Any] = dict(
    image_backbone="mobilenetv2_100", image_size=128, batch_size=64, image_lr=3e-4, meta_lr=3e-3,
    weight_decay=1e-3, color_jitter=0.2, log_every=5,
)  # fmt: skip
# Learned on birds37: a place is where a bird was seen, give or take; unmoved, places are learned by heart.
_MOVED: dict[str, Any] = dict(meta_jitter_km=100.0, meta_jitter_days=10.0)
_CLASSIFIER: dict[str, Any] = dict(dropout=0.2, label_smoothing=0.1, keep="last")
# Pre-training keeps its rates up, and this goes on from there: one schedule.
_PRODUCT: dict[str, Any] = dict(_CLASSIFIER, fusion="product", meta_dropout=0.0, doubt=0.05, warmup_epochs=0.0)
_BEST: dict[str, Any] = dict(batch_size=64, image_lr=3e-4, meta_lr=3e-3, weight_decay=1e-3, color_jitter=0.2)

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
    "supcon": (
        """Table 1, "Inception V3 + Contrastive Learning [10]": Khosla et al. 2020 on photographs alone, two crops
        of each, every crop of the same class a positive, temperature 0.1 and fixed as theirs; batch, epochs and
        learning rate as in recipe paper. Ours: the projection is linear, theirs has a hidden layer, and crops and
        flips are all the augmentation. Training ends by the share of val whose nearest neighbour is of its class.
        Fine-tune the image encoder by recipe image with --image-size 299.
        Command: accelerate launch xcon/pretrain.py supcon --shards nabirds --out runs/supcon
        Expected: after fine-tuning, 79.84 % in the paper; not run by us.""",
        PretrainConfig(
            modalities=("image",), views=2, temperature=0.1, learn_temperature=False,
            image_backbone="inception_v3", image_size=299, weight_decay=1e-3, patience=20, checkpoint_every=1000,
        ),
    ),
    "best": (
        """What we would train on NABirds, after measuring each part on birds37: section 3.1 with places on the
        sphere and moved by 100 km, a temperature that starts at 0.07, larger batches, colours, and 6 epochs in
        place of 200, at a rate that stays up for the fine-tuning that goes on from it.
        Command: accelerate launch xcon/pretrain.py best --shards nabirds --out runs/best-pretrain
        Expected: not run by us at this size, it needs NABirds and a GPU; recipe laptop is the same, smaller.""",
        PretrainConfig(
            **_BEST, **_MOVED, epochs=6, decay="none", temperature=0.07, meta_encoding="xyz",
            checkpoint_every=1000,
        ),
    ),
    "laptop": (
        """Recipe best at a size for two cores: MobileNetV2 at 128 px. Its small text model is untrained, which
        costs three points; --text-model FOLDER --text-frozen takes a trained one.
        Command: xcon pretrain laptop --shards DIR --image-weights FILE --out runs/laptop
        Expected: the README's table of real photographs.""",
        PretrainConfig(
            **_LAPTOP, **_MOVED, text_model="small-distilbert", epochs=3, decay="none", text_lr=1e-3,
            temperature=0.07, meta_encoding="xyz",
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
    "inception": (
        """Section 4.2: "First, as a baseline, we trained the InceptionV3[18] model only using an image as an
        input", batch 32, 200 epochs, at the network's own 299 px. Ours: ImageNet's weights, and the classifier of
        recipe paper.
        Command: accelerate launch xcon/finetune.py inception --shards nabirds --out runs/inception
        Expected: 76.61 % in the paper; not run by us, it needs NABirds and a GPU.""",
        FinetuneConfig(**_INCEPTION, modalities=("image",)),
    ),
    "inception-meta": (
        """Section 4.2: "Then, we appended meta information as an extra channel on input", each of the six numbers
        of the wrap encoding a channel of its own, constant over the photograph; all else as in inception. Ours:
        the weights of those channels start at zero, and metadata is hidden from one record in ten.
        Command: accelerate launch xcon/finetune.py inception-meta --shards nabirds --out runs/inception-meta
        Expected: 77.56 % in the paper; not run by us, it needs NABirds and a GPU.""",
        FinetuneConfig(**_INCEPTION, fusion="channels"),
    ),
    "laptop": (
        """Recipe best at a size for two cores.
        Command: xcon finetune laptop --shards DIR --init runs/laptop --out runs/laptop-classifier
        Expected: the README's table of real photographs.""",
        FinetuneConfig(**_LAPTOP, **_MOVED, **_PRODUCT, epochs=9),
    ),
    "laptop-image": (
        """The image alone at a size for two cores, from ImageNet's weights or a pre-trained run.
        Command: xcon finetune laptop-image --shards DIR --init runs/laptop --out runs/laptop-image
        Expected: the README's table of real photographs.""",
        FinetuneConfig(**_LAPTOP, **_CLASSIFIER, modalities=("image",), epochs=12),
    ),
    "best": (
        """What we would train on NABirds, after measuring each part on birds37 (docs/paper.md): an expert for each
        modality that starts as its captions, Bayes' rule between them, places moved by 100 km, and the larger size
        at the end. 19 epochs here and 6 of pre-training at batch 64, where the paper has 200 and 200 at 32: a
        sixteenth of its passes.
        Command: accelerate launch xcon/finetune.py best --shards nabirds --init runs/best-pretrain --out runs/best
        Expected: not run by us at this size, it needs NABirds and a GPU; recipe laptop is the same, smaller.""",
        FinetuneConfig(
            **_BEST,
            **_MOVED,
            **_PRODUCT,
            epochs=19,
            late_size=288,
            late_epochs=3,
            checkpoint_every=1000,
        ),
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
