"""The classifiers on image and metadata: the paper's two (sections 3.2 and 4.2), and the one of Bayes' rule."""

import abc
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from xcon import geotime, model
from xcon.model import ModelSpec, Tower

# Legend: b rows, D width of an embedding, C classes, N held-out records.

SHARPNESS = (math.log(0.05), math.log(20))  # where it is sought
TOGETHER = 64  # photographs with channels of metadata that are evaluated at once; a map asks for thousands


class Classifier(nn.Module):
    """What all classifiers share: towers, and a sharpness that is fitted on held-out records.

    `forward` is what is trained, class scores `[b, C]` for each cross-entropy; `classify` is what is believed.

    Args:
        towers: modality -> tower, `image` or `meta` or both. Whatever their order here, the image comes first, so
            that a saved model is rebuilt as it was trained.

    Attributes:
        modalities: what it takes, the image first.
        sharpness: `[1]` factor on the trained scores, 1 over the temperature of Guo et al. 2017.
    """

    sharpness: Tensor

    def __init__(self, towers: Mapping[str, Tower]) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({m: towers[m] for m in ("image", "meta") if m in towers})
        self.modalities = tuple(self.towers)
        self.register_buffer("sharpness", torch.ones(1))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Class scores before the softmax, each to be trained by a cross-entropy of its own.

        Args:
            inputs: `image` `[b, 3, H, W]` uint8 and, where the model takes metadata, `meta` `[b, 3]`.

        Returns:
            Name -> `[b, C]`.
        """
        return self.trained({modality: self.embed(modality, inputs[modality]) for modality in self.modalities})

    def classify(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """What `embed` gave of all modalities -> `[b, C]` class scores before the softmax, calibrated."""
        return self.combine(self.trained(embeddings))

    def score(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Inputs as of `forward` -> `[b, C]` class scores before the softmax, calibrated."""
        return self.combine(self(inputs))

    def calibrate(self, trained: Mapping[str, Tensor], labels: Tensor) -> None:
        """Sets the sharpness to what makes held-out records likeliest (Guo et al. 2017, section 4.2).

        Its logarithm is expected within 1 of 0, as by a normal distribution: few records that are all right would
        ask for a sharpness without bound.

        Args:
            trained: what `forward` gave for them, `[N, C]` each.
            labels: `[N]`.
        """
        exact = {name: scores.double() for name, scores in trained.items()}  # else its minimum is lost in rounding

        def surprise(log_sharpness: float) -> float:
            self.sharpness.fill_(math.exp(log_sharpness))
            error = cross_entropy(self.combine(exact), labels, reduction="sum").item()
            return error + log_sharpness**2 / 2

        found = minimize_scalar(surprise, bounds=SHARPNESS, method="bounded", options={"xatol": 1e-8})
        self.sharpness.fill_(math.exp(found.x))

    @abc.abstractmethod
    def embed(self, modality: str, x: Tensor) -> Tensor:
        """One modality alone, `[b, ...]`, so that it can be kept while the other one changes."""

    @abc.abstractmethod
    def trained(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `embed` gave of all modalities -> what `forward` returns."""

    def experts(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Modality -> `[b, C]` log p(y | that modality alone), where there is an expert for it; here none."""
        return {}

    def combine(self, trained: Mapping[str, Tensor]) -> Tensor:
        """What `forward` gave -> `[b, C]` class scores before the softmax, calibrated: here the joint ones."""
        return self.sharpness * trained["joint"]


class Concatenation(Classifier):
    """Embeddings of the towers, concatenated, then two layers (section 3.2: "512 size embedding vectors").

    A row without metadata takes a learned "absent" vector in place of its metadata embedding.

    Args:
        towers: as of `Classifier`.
        embed_dim: D.
        hidden: width of the hidden layer.
        classes: C.
        dropout: before each of the two layers.
    """

    def __init__(
        self, towers: Mapping[str, Tower], *, embed_dim: int, hidden: int, classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__(towers)
        if "meta" in towers:
            self.absent = nn.Parameter(torch.zeros(embed_dim))
        self.head = two_layers(embed_dim * len(towers), hidden, classes, dropout)

    def embed(self, modality: str, x: Tensor) -> Tensor:
        """`[b, D]` of one modality; the absent vector where metadata is missing altogether."""
        vectors = self.towers[modality](x)  # [b, D]
        if modality != "meta":
            return vectors
        return torch.where(geotime.known(x)[:, None], vectors, self.absent.to(vectors.dtype))

    def trained(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`joint`: the scores of all modalities together."""
        return {"joint": self.head(torch.cat([embeddings[m] for m in self.towers], dim=1))}


class Channels(Classifier):
    """The image tower alone, whose network takes metadata as further channels of the photograph (section 4.2).

    There is nothing to keep of one modality while the other one changes: `embed` gives back what it is given.

    Args:
        towers: `image`, with an encoder that takes places.
        embed_dim: D.
        hidden: width of the hidden layer.
        classes: C.
        dropout: before each of the two layers.
    """

    def __init__(
        self, towers: Mapping[str, Tower], *, embed_dim: int, hidden: int, classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__(towers)
        self.modalities = ("image", "meta")
        self.head = two_layers(embed_dim, hidden, classes, dropout)

    def embed(self, modality: str, x: Tensor) -> Tensor:
        """Photographs or places, as they are."""
        return x

    def trained(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`joint`: the scores of photographs with their places."""
        tower, photos, places = self.towers["image"], embeddings["image"], embeddings["meta"]
        together = len(photos) if self.training else TOGETHER
        parts = zip(photos.split(together), places.split(together), strict=True)
        vectors = [tower(*part) for part in parts]  # [b, D] in parts
        return {"joint": self.head(torch.cat(vectors))}


class Product(Classifier):
    """An expert for the photograph and one for its metadata, each trained alone, and Bayes' rule between them.

    Given the class, a photograph does not depend on place and date. So where the metadata is the record's own, the
    posterior is the product p(y | image) p(y | meta) / p(y). Where it may be wrong, with probability `doubt`, and
    then says nothing of the class, it is

        p(y | image, meta) ~ p(y | image)^sharpness * (doubt + (1 - doubt) p(y | meta) / p(y)).

    So no place, however wrong, counts for less than `doubt`, and a clear photograph stands against it. Scores
    trained together do not find this: the image is learned by heart, and leaves nothing for metadata to explain.

    Args:
        towers: `image` and `meta`.
        embed_dim: D.
        hidden: width of the hidden layers; None: the heads are similarities, which `begin_as` gives their start.
        prior: `[C]` p(y), the share of each class in training.
        doubt: in [0, 1).
        dropout: before each of the two layers of both heads, or before the similarities.
        joint: whether the posterior is trained too, with a sharpness of 1.
    """

    log_prior: Tensor
    doubt: Tensor

    def __init__(
        self, towers: Mapping[str, Tower], *, embed_dim: int, hidden: int | None, prior: Tensor, doubt: float,
        dropout: float = 0.0, joint: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(towers)
        self.heads = nn.ModuleDict(
            {
                m: two_layers(embed_dim, hidden, len(prior), dropout)
                if hidden
                else Similarity(embed_dim, len(prior), dropout)
                for m in self.towers
            }
        )
        self.joint = joint
        self.register_buffer("log_prior", prior.float().log())
        self.register_buffer("doubt", torch.tensor([doubt]))

    def embed(self, modality: str, x: Tensor) -> Tensor:
        """`[b, C]` log p(y | one modality), float32; without metadata the prior, which no gradient reaches."""
        found = self.heads[modality](self.towers[modality](x)).float().log_softmax(dim=1)  # [b, C]
        return found if modality == "image" else torch.where(geotime.known(x)[:, None], found, self.log_prior)

    def trained(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image` and `meta`, as they are; in training `joint` too where it is asked for."""
        joint = {"joint": self._posterior(embeddings, 1.0)} if self.joint and self.training else {}
        return {**embeddings, **joint}

    def experts(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image` and `meta`, as they are: each is an expert."""
        return dict(embeddings)

    def combine(self, trained: Mapping[str, Tensor]) -> Tensor:
        """The posterior, up to a constant for each row."""
        return self._posterior(trained, self.sharpness)

    def _posterior(self, experts: Mapping[str, Tensor], sharpness: Tensor | float) -> Tensor:
        ratio = (experts["meta"] - self.log_prior).exp()  # [b, C] p(y | meta) / p(y)
        # Without doubt a ratio may be too small for float32: no class is impossible, its logarithm stays finite.
        evidence = (self.doubt + (1 - self.doubt) * ratio).clamp(min=torch.finfo(torch.float32).tiny)
        return sharpness * experts["image"] + evidence.log()

    def begin_as(self, captions: Tensor) -> None:
        """Has both heads start as similarities to `[C, D]` vectors of the captions, of whatever length."""
        with torch.no_grad():
            for head in self.heads.values():
                assert isinstance(head, Similarity)
                head.weight.copy_(captions)


class Similarity(nn.Module):
    """Scores by direction: `[b, D]` -> `[b, C]`, a unit vector times a trained vector for each class.

    With the vectors of captions times 1 / temperature they are the scores of contrastive pre-training. For CLIP,
    Wortsman et al. 2022 begin their fine-tuning so.
    """

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.zeros(classes, width))

    def forward(self, vectors: Tensor) -> Tensor:
        """In float32: bf16 keeps eight bits of an angle."""
        with torch.autocast(vectors.device.type, enabled=False):
            return normalize(self.dropout(vectors).float(), dim=1) @ self.weight.T


def two_layers(width: int, hidden: int, classes: int, dropout: float) -> nn.Sequential:
    """A "2 layers shallow classification network" (section 3.2): `[b, width]` -> `[b, classes]`."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


def build(
    spec: ModelSpec, towers: Mapping[str, Tower], *, prior: Tensor, doubt: float = 0.0, dropout: float = 0.0,
    joint: bool = False,
) -> Classifier:  # fmt: skip
    """The classifier of a spec around towers; arguments as of `Concatenation` and `Product`."""
    if spec.fusion == "product":
        return Product(
            towers, embed_dim=spec.embed_dim, hidden=spec.hidden, prior=prior, doubt=doubt, dropout=dropout,
            joint=joint,
        )  # fmt: skip
    assert spec.hidden is not None
    kind = {"concatenation": Concatenation, "channels": Channels}[spec.fusion]
    return kind(towers, embed_dim=spec.embed_dim, hidden=spec.hidden, classes=len(prior), dropout=dropout)


def class_shares(class_id: np.ndarray, classes: int) -> Tensor:
    """`[C]` the share of each class among `[N]` class ids, one more record assumed of each: none is impossible."""
    counts = torch.bincount(torch.from_numpy(class_id), minlength=classes) + 1
    return counts / counts.sum()


def load(run: Path, *, doubt: float | None = None) -> tuple[Classifier, ModelSpec]:
    """The fine-tuned model of a run, in evaluation mode.

    Args:
        run: the run folder.
        doubt: of a product, in place of its own.

    Raises:
        FileNotFoundError, ValueError: as `model.load_spec` and `model.load_weights`; a doubt and no product.
    """
    spec = model.load_spec(run, kind="classifier")
    blank = torch.ones(len(spec.classes))  # the prior comes with the weights, as the doubt does
    classifier = build(spec, model.build_towers(spec), prior=blank)
    model.load_weights(run, classifier)
    if doubt is not None:
        if not isinstance(classifier, Product):
            raise ValueError(f"--doubt {doubt}: unused, {run} has --fusion {spec.fusion}")
        classifier.doubt.fill_(doubt)
    return classifier.eval(), spec
