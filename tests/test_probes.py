"""Probes and retrieval: by hand, against scikit-learn, against rankings drawn at random."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from xcon import probes
from xcon.probes import Vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_retrieval_by_hand() -> None:
    """Gallery at 0, 30, 60 and 90 degrees, classes a b a c. Queries at 0 (a) and 90 (b) degrees, one of class d.

    The first finds a b a c: precision (1 + 2/3) / 2. The second finds c a b a: 1/3. d is not in the gallery.
    """
    angles = np.radians([0, 30, 60, 90])
    gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = probes.retrieval(queries, np.array([0, 1, 3]), gallery, np.array([0, 1, 0, 2]))
    assert (found["n"], found["recall@1"], found["recall@5"]) == (2, 0.5, 1.0)
    assert found["map"] == pytest.approx((5 / 6 + 1 / 3) / 2)
    # At random: a is first with 2/4, b with 1/4. Precision of b: (1 + 1/2 + 1/3 + 1/4) / 4 = 25/48.
    assert found["chance"]["recall@1"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    # a, at ranks (1,2) (1,3) (1,4) (2,3) (2,4) (3,4): (1 + 5/6 + 3/4 + 7/12 + 1/2 + 5/12) / 6 = 49/72.
    assert found["chance"]["map"] == pytest.approx((49 / 72 + 25 / 48) / 2)


def test_average_precision_agrees_with_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng.normal(size=(40, 5))), unit(rng.normal(size=(70, 5)))
    asked, labels = rng.integers(0, 6, 40), np.concatenate([np.arange(6), rng.integers(0, 6, 64)])
    monkeypatch.setattr(probes, "_QUERIES_AT_ONCE", 7)
    found = probes.retrieval(queries, asked, gallery, labels)
    scores = queries @ gallery.T
    each = [average_precision_score(labels == label, row) for label, row in zip(asked, scores, strict=True)]
    assert found["map"] == pytest.approx(np.mean(each))
    for k in (1, 5, 10):
        first = np.argsort(-scores, axis=1)[:, :k]
        assert found[f"recall@{k}"] == (labels[first] == asked[:, None]).any(axis=1).mean()


def test_chance_agrees_with_rankings_at_random() -> None:
    rng = np.random.default_rng(1)
    labels = np.array([0] * 9 + [1] * 4 + [2])
    asked = np.array([0, 1, 1, 2])
    drawn: dict[str, list[float]] = {}
    for _ in range(3000):
        scores = rng.random((len(asked), len(labels)))
        order = labels[np.argsort(scores, axis=1)] == asked[:, None]
        drawn.setdefault("recall@1", []).append(order[:, 0].mean())
        drawn.setdefault("recall@5", []).append(order[:, :5].any(axis=1).mean())
        precise = order.cumsum(axis=1) / np.arange(1, len(labels) + 1)
        drawn.setdefault("map", []).append(((precise * order).sum(axis=1) / order.sum(axis=1)).mean())
    found = probes.chance(asked, labels)
    assert found["recall@10"] == pytest.approx(1 - (0 + 2 / 1001 + 4 / 14) / 4)  # 1001 = C(14, 10)
    for name, values in drawn.items():
        assert found[name] == pytest.approx(np.mean(values), abs=0.02), name


def test_a_gallery_without_the_class_is_refused() -> None:
    with pytest.raises(ValueError, match="no query has its class"):
        probes.retrieval(np.eye(2), np.array([0, 1]), np.eye(2), np.array([2, 3]))


def test_nearest_neighbours_by_hand() -> None:
    """Two records of class 1 at cosine 0.6 against one of class 0 at 0.8.

    exp(0.8 / 0.07) is 17 times exp(0.6 / 0.07): one near record outvotes two. At cosines 0.8 and 0.79 the two win.
    """
    train = np.array([[0.8, 0.6], [0.6, 0.8], [0.6, -0.8]])
    found = probes.nearest_neighbours((train, np.array([0, 1, 1])), (np.array([[2.0, 0.0]]), np.array([0])))
    assert found == {"n": 1, "top1": 1.0, "mean_per_class": 1.0, "k": 3}
    near = np.array([[0.8, 0.6], [0.79, 0.613], [0.79, -0.613]])
    found = probes.nearest_neighbours((near, np.array([0, 1, 1])), (np.array([[1.0, 0.0]]), np.array([1])))
    assert found["top1"] == 1.0


def clouds(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes around three points, one feature a thousand times larger than the others and without sense."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % 3
    sense = np.eye(3)[labels] * 1.5 + rng.normal(size=(rows, 3))
    return np.concatenate([sense, 1000 * rng.normal(size=(rows, 1))], axis=1), labels


def test_the_linear_probe_is_scikit_learns_on_standardised_features() -> None:
    """By hand: C of the best validation result, the smallest of equals; features scaled by those of train."""
    train, val, test = clouds(90, 0), clouds(60, 1), clouds(300, 2)
    mean, deviation = train[0].mean(axis=0), train[0].std(axis=0)
    fits = {c: LogisticRegression(C=c, max_iter=2000) for c in probes.C_VALUES}
    scores = [fit.fit((train[0] - mean) / deviation, train[1]).score((val[0] - mean) / deviation, val[1])
              for fit in fits.values()]  # fmt: skip
    c = probes.C_VALUES[int(np.argmax(scores))]
    found = probes.linear_probe(train, val, test)
    assert found["C"] == c
    assert found["top1"] == fits[c].score((test[0] - mean) / deviation, test[1])
    assert found["top1"] > 0.6
    assert probes.linear_probe(train, None, test)["C"] == probes.C_UNTUNED


def vectors(seed: int, meta: np.ndarray) -> Vectors:
    """Image says whether the class is 0, metadata whether it is 1: together they tell three classes apart."""
    labels = np.arange(60) % 3
    noise = np.random.default_rng(seed).normal(size=(60, 4)) * 0.05
    image = np.stack([labels == 0, labels != 0], axis=1) + noise[:, :2]
    place = np.stack([labels == 1, labels != 1], axis=1) + noise[:, 2:]
    features = {"image": image, "meta": place}
    present = {"image": np.ones(60, dtype=bool), "meta": meta}
    return Vectors(features, {m: unit(f) for m, f in features.items()}, present, labels)


def test_modalities_alone_and_together() -> None:
    """Alone each confuses two of three classes; records without metadata count where metadata is not needed."""
    some = np.arange(60) < 30
    found = probes.probe(vectors(0, some), None, vectors(1, some))
    assert list(found["linear_probe"]) == ["image", "meta", "image + meta"]
    for part in found.values():
        assert (part["image"]["n"], part["meta"]["n"], part["image + meta"]["n"]) == (60, 30, 30)
        assert part["image + meta"]["top1"] == 1.0
        assert 1 / 3 <= part["image"]["top1"] < 0.9
        assert 1 / 3 <= part["meta"]["top1"] < 0.9


def test_retrieval_goes_both_ways_between_what_there_is() -> None:
    """Every ordered pair; captions of classes without a record are in the gallery and ask nothing."""
    test = vectors(2, np.ones(60, dtype=bool))
    found = probes.retrieve(test, None)
    assert list(found) == ["image->meta", "meta->image"]
    assert found["image->meta"]["chance"]["recall@1"] == pytest.approx(1 / 3)
    captions = unit(np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 1.0]]))  # class 3 has no record
    found = probes.retrieve(test, captions)
    assert set(found) == {"image->meta", "meta->image", "image->text", "text->image", "meta->text", "text->meta"}
    assert (found["text->image"]["n"], found["image->text"]["n"]) == (3, 60)
    assert found["image->text"]["chance"]["recall@1"] == 0.25
    assert (
        probes.retrieve(Vectors({}, {"image": np.eye(2)}, {"image": np.ones(2, bool)}, np.arange(2)), None) == {}
    )
