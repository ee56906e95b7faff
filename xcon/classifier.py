"""The classifier on image and metadata (paper, section 3.2)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from xcon import geotime, model
from xcon.model import ModelSpec, Tower

# Legend: b rows, D width of an embedding, M modalities, C classes.


class Classifier(nn.Module):
    """Embeddings of the towers, concatenated, then two layers (section 3.2: "512 size embedding vectors").

    A row without metadata takes a learned "absent" vector in place of its metadata embedding.

    Args:
        towers: modality -> tower, `image` or `meta` or both. Whatever their order here, the image's embedding
            comes first, so that a saved model is rebuilt as it was trained.
        embed_dim: D.
        hidden: width of the hidden layer.
        classes: C.
        dropout: before each of the two layers.
    """

    def __init__(
        self, towers: Mapping[str, Tower], *, embed_dim: int, hidden: int, classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({m: towers[m] for m in ("image", "meta") if m in towers})
        if "meta" in towers:
            self.absent = nn.Parameter(torch.zeros(embed_dim))
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(embed_dim * len(towers), hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Class scores before the softmax.

        Args:
            inputs: `image` `[b, 3, H, W]` uint8 and, where the model takes metadata, `meta` `[b, 3]`.

        Returns:
            `[b, C]`.
        """
        return self.classify({modality: self.embed(modality, inputs[modality]) for modality in self.towers})

    def embed(self, modality: str, x: Tensor) -> Tensor:
        """`[b, D]` of one modality; the absent vector where metadata is missing altogether."""
        vectors = self.towers[modality](x)  # [b, D]
        if modality != "meta":
            return vectors
        return torch.where(geotime.known(x)[:, None], vectors, self.absent.to(vectors.dtype))

    def classify(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Embeddings of all modalities, `[b, D]` each -> `[b, C]`."""
        return self.head(torch.cat([embeddings[modality] for modality in self.towers], dim=1))


def build(spec: ModelSpec, towers: Mapping[str, Tower], *, dropout: float = 0.0) -> Classifier:
    """The classifier of a spec around towers."""
    assert spec.hidden is not None
    return Classifier(
        towers, embed_dim=spec.embed_dim, hidden=spec.hidden, classes=len(spec.classes), dropout=dropout
    )


def load(run: Path) -> tuple[Classifier, ModelSpec]:
    """The fine-tuned model of a run, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: as `model.load_spec` and `model.load_weights`.
    """
    spec = model.load_spec(run, kind="classifier")
    classifier = build(spec, model.build_towers(spec))
    model.load_weights(run, classifier)
    return classifier.eval(), spec
