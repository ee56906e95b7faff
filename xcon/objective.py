"""What pre-training minimises, and how it is judged on records that were held out.

Two modalities or more are contrasted with one another; several views of photographs alone, with one another.
Either way rows of equal label are positives, and the label is the class or (CLIP, SimCLR) the record itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from xcon import gather, losses
from xcon.loader import Batch, present

# Legend: b rows of this process, N records held out, V views, D width.


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a run.

    Attributes:
        modalities: that take part.
        matching: what makes two rows positives of each other, their class or to be the same record.
        views: of each photograph; more than one where images alone are contrasted.
        weights: `"a->b"` -> factor of that loss in the total; 1 where a loss is not named.
    """

    modalities: tuple[str, ...]
    matching: Literal["label", "diagonal"] = "label"
    views: int = 1
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def inputs(self, rows: Batch) -> dict[str, Tensor]:
        """What the towers take: of several views `[b, V, 3, S, S]` each as a row, `[bV, 3, S, S]`."""
        inputs = {m: rows[m] for m in self.modalities}
        return {m: x.flatten(0, 1) for m, x in inputs.items()} if self.views > 1 else inputs

    def by_record(self, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the towers gave, by record again: of several views `[bV, D]` as `[b, V, D]`."""
        return {m: z.unflatten(0, (-1, self.views)) if self.views > 1 else z for m, z in embeddings.items()}

    def loss(self, rows: Batch, embeddings: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """The losses of the global batch, from this process's rows and what its towers gave for `inputs`."""
        labels = rows["label"] if self.matching == "label" else rows["index"]
        vectors, masks = self.by_record(embeddings), present(rows)
        if self.views > 1:
            return {"total": gather.supcon(vectors["image"], labels, scale, present=masks["image"])}
        classes = {"text": rows["text_class"]} if "text_class" in rows else {}
        terms = gather.cross_contrastive(vectors, labels, scale, present=masks, classes=classes)
        return self._weighed(terms)

    def held_out_loss(
        self, vectors: Mapping[str, Tensor], masks: Mapping[str, Tensor], labels: Tensor, scale: Tensor,
        *, batch_size: int,
    ) -> float:  # fmt: skip
        """The mean total of records in batches of a training's size.

        Args:
            vectors: modality -> unit vectors by record, `[N, D]` or `[N, V, D]`.
            masks: modality -> `[N]` bool, the records that have it.
            labels: `[N]` class ids.
            scale: 1 / temperature.
            batch_size: records to contrast with one another.
        """
        targets = labels if self.matching == "label" else torch.arange(len(labels))
        loss = 0.0
        for rows in torch.arange(len(labels)).split(batch_size):
            part = {m: z[rows] for m, z in vectors.items()}
            if self.views > 1:
                total = losses.supcon(part["image"], targets[rows], scale, present=masks["image"][rows])
            else:
                part_masks = {m: mask[rows] for m, mask in masks.items()}
                terms = losses.cross_contrastive(part, targets[rows], scale, present=part_masks)
                total = self._weighed(terms)["total"]
            loss += total.item() * len(rows) / len(labels)
        return loss

    def _weighed(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return losses.weighted(terms, self.weights) if self.weights else terms


def neighbour_top1(views: Tensor, labels: Tensor, *, at_once: int = 1024) -> float:
    """How often the most similar of all other records is of the same class (recall at 1).

    Args:
        views: `[N, V, D]` unit vectors; a record is the mean of its views, brought to unit length.
        labels: `[N]`.
        at_once: records whose similarities to all are in memory.
    """
    records = torch.nn.functional.normalize(views.mean(dim=1), dim=-1)  # [N, D]
    right = 0
    for rows in torch.arange(len(records)).split(at_once):
        similarity = records[rows] @ records.T  # [n, N]
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # itself
        right += int((labels[similarity.argmax(dim=1)] == labels[rows]).sum())
    return right / len(records)
