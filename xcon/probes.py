"""What a pre-trained model knows before any fine-tuning: probes on its frozen vectors, and retrieval between them.

Pure functions of arrays. A record that lacks a modality takes no part where that modality is used; `n` says how
many are left. Every rate is a fraction in [0, 1].

N: records, F: width of an encoder, D: width of the shared space, Q: queries, G: gallery, K: neighbours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

C_VALUES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of the linear probe's regularisation
C_UNTUNED = 1e-2  # without a validation split
NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07  # Caron et al. 2021 and Wu et al. 2018, section 3.4
RECALL_AT = (1, 5, 10)
_QUERIES_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Records by modality.

    Attributes:
        features: modality -> `[N, F]` what its encoder gives.
        shared: modality -> `[N, D]` unit vectors in the shared space.
        present: modality -> `[N]` the records that have it.
        labels: `[N]` class ids.
    """

    features: Mapping[str, Floats]
    shared: Mapping[str, Floats]
    present: Mapping[str, Bools]
    labels: Ints

    def of(self, modalities: tuple[str, ...]) -> tuple[Floats, Ints]:
        """Encoder features side by side and labels, of the records that have these modalities."""
        rows = np.logical_and.reduce([self.present[m] for m in modalities])
        return np.concatenate([self.features[m][rows] for m in modalities], axis=1), self.labels[rows]


def probe(train: Vectors, val: Vectors | None, test: Vectors) -> dict[str, dict[str, Any]]:
    """Linear probe and nearest neighbours of each modality, and of image and metadata together.

    Args:
        train: what they learn from.
        val: the regularisation is chosen on it; without one it is `C_UNTUNED`.
        test: what they are judged by.

    Returns:
        `linear_probe` and `knn`: modalities, as in "image + meta" -> `n`, `top1`, `mean_per_class`, and the `C` or
        `k` that was used.
    """
    single = [(m,) for m in train.features]
    chosen = [*single, tuple(train.features)] if len(single) > 1 else single
    found: dict[str, dict[str, Any]] = {"linear_probe": {}, "knn": {}}
    for modalities in chosen:
        name = " + ".join(modalities)
        learnt, asked = train.of(modalities), test.of(modalities)
        if not len(learnt[1]) or not len(asked[1]):
            continue  # no record has this modality
        held_out = val.of(modalities) if val else None
        found["linear_probe"][name] = linear_probe(learnt, held_out, asked)
        found["knn"][name] = nearest_neighbours(learnt, asked)
    return found


def linear_probe(
    train: tuple[Floats, Ints], val: tuple[Floats, Ints] | None, test: tuple[Floats, Ints]
) -> dict[str, Any]:
    """Multinomial logistic regression on standardised features (scikit-learn's, L2-regularised).

    Args:
        train: `[N, F]` and `[N]`, what it learns from.
        val: of `C_VALUES` the one with the highest top-1 on it is taken, of equals the smallest.
        test: what it is judged by.

    Returns:
        `n`, `top1`, `mean_per_class`, `C`.
    """
    values = C_VALUES if val and len(val[1]) else (C_UNTUNED,)
    fitted = {c: _logistic(c).fit(*train) for c in values}
    best = max(values, key=lambda c: fitted[c].score(*val)) if val and len(values) > 1 else values[0]
    return {**_judged(fitted[best].predict(test[0]), test[1]), "C": best}


def _logistic(c: float) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))


def nearest_neighbours(train: tuple[Floats, Ints], test: tuple[Floats, Ints]) -> dict[str, Any]:
    """The class with the largest weight among the nearest records, exp(cosine / 0.07) each (Wu et al. 2018).

    Args:
        train: `[N, F]` and `[N]`, the neighbours.
        test: `[N, F]` and `[N]`, what is judged.

    Returns:
        `n`, `top1`, `mean_per_class`, `k`.
    """
    k = min(NEIGHBOURS, len(train[1]))
    voters = KNeighborsClassifier(k, metric="cosine", weights=_votes)
    return {**_judged(voters.fit(*train).predict(test[0]), test[1]), "k": k}


def _votes(distance: Floats) -> Floats:
    return np.exp(-distance / KNN_TEMPERATURE)  # distance = 1 - cosine: the same but for a factor


def _judged(predicted: Ints, labels: Ints) -> dict[str, Any]:
    right = predicted == labels
    by_class = [right[labels == label].mean() for label in np.unique(labels)]
    return {"n": len(labels), "top1": float(right.mean()), "mean_per_class": float(np.mean(by_class))}


# --------------------------------------------------------------------------------------------------------
# Retrieval


def retrieve(test: Vectors, captions: Floats | None) -> dict[str, dict[str, Any]]:
    """Retrieval between all modalities in both directions: a hit is a vector of the same class.

    Args:
        test: the records.
        captions: `[C, D]` unit vectors of the classes' captions, in order of class id; None without text.

    Returns:
        `"image->meta"` and so on -> what `retrieval` returns.
    """
    rows = {m: (z[test.present[m]], test.labels[test.present[m]]) for m, z in test.shared.items()}
    if captions is not None:
        seen = np.unique(test.labels)  # captions of classes that no record has can only be wrong
        rows["text"] = (captions, np.arange(len(captions)))
    found = {}
    for query, gallery in ((a, b) for a in rows for b in rows if a != b):
        asked, labels = rows[query]
        if query == "text":
            asked, labels = asked[seen], labels[seen]
        if len(labels) and len(rows[gallery][1]):
            found[f"{query}->{gallery}"] = retrieval(asked, labels, *rows[gallery])
    return found


def retrieval(queries: Floats, query_labels: Ints, gallery: Floats, gallery_labels: Ints) -> dict[str, Any]:
    """How well queries find vectors of their class, nearest first; of equals the earlier one comes first.

    Queries whose class is not in the gallery are left out.

    Args:
        queries: `[Q, D]` unit vectors.
        query_labels: `[Q]`.
        gallery: `[G, D]` unit vectors.
        gallery_labels: `[G]`.

    Returns:
        `n` queries; `recall@1`, `@5`, `@10`, the share of them with a hit among the first k; `map`, the mean over
        queries of the average precision of the whole ranking; `chance`, the same four of a ranking at random.

    Raises:
        ValueError: no query has its class in the gallery.
    """
    answerable = np.isin(query_labels, gallery_labels)
    queries, query_labels = queries[answerable], query_labels[answerable]
    if not len(queries):
        raise ValueError("retrieval: no query has its class in the gallery")
    ranks = np.arange(1, len(gallery) + 1)
    first, precision = [], []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        nearest = np.argsort(-(queries[part] @ gallery.T), axis=1, kind="stable")  # [q, G]
        hit = gallery_labels[nearest] == query_labels[part, None]  # [q, G]
        first.append(hit.argmax(axis=1))
        precision.append((hit.cumsum(axis=1) / ranks * hit).sum(axis=1) / hit.sum(axis=1))
    found = {f"recall@{k}": float((np.concatenate(first) < k).mean()) for k in RECALL_AT}
    found["map"] = float(np.concatenate(precision).mean())
    return {"n": len(queries), **found, "chance": chance(query_labels, gallery_labels)}


def chance(query_labels: Ints, gallery_labels: Ints) -> dict[str, float]:
    """What `retrieval` would return in the mean over all rankings at random.

    With m hits among G, recall@k is 1 - C(G - m, k) / C(G, k). A hit at rank r has precision
    (1 + (r - 1)(m - 1)/(G - 1)) / r in the mean, so average precision is (H + (m - 1)/(G - 1) (G - H)) / G with
    H = 1 + 1/2 + ... + 1/G.

    Args:
        query_labels: `[Q]`, each among the gallery's.
        gallery_labels: `[G]`.
    """
    size = len(gallery_labels)
    names, counts = np.unique(gallery_labels, return_counts=True)
    hits = counts[np.searchsorted(names, query_labels)]  # [Q] m
    found = {f"recall@{k}": float((1 - _all_miss(size, hits, min(k, size))).mean()) for k in RECALL_AT}
    harmonic = float((1 / np.arange(1, size + 1)).sum())
    found["map"] = float((harmonic + (hits - 1) / max(size - 1, 1) * (size - harmonic)).mean() / size)
    return found


def _all_miss(size: int, hits: Ints, k: int) -> Floats:
    """The probability that k drawn of `size` without replacement leave out all of `hits` `[Q]`."""
    draws = np.arange(
        k
    )  # the product over draws of (size - hits - i) / (size - i), which no factorial can overflow
    return np.clip((size - hits[:, None] - draws) / (size - draws), 0, None).prod(axis=1)


def summary(found: Mapping[str, Any]) -> str:
    """The figures of a pre-trained run in one line, of all modalities together and between image and metadata."""
    named = {"zero-shot top-1": found["zero_shot"]["top1"]} if "zero_shot" in found else {}
    for part, title in (("linear_probe", "linear probe"), ("knn", "k-NN")):
        modalities, values = list(found[part].items())[-1]
        named[f"{title} of {modalities}"] = values["top1"]
    pairs = {pair: values for pair, values in found["retrieval"].items() if "text" not in pair}
    named |= {f"recall@1 of {pair}": values["recall@1"] for pair, values in pairs.items()}
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in named.items())
