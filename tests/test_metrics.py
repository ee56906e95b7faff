"""Metrics against answers worked out by hand and against slower, plainer routes."""

import dataclasses
import math
import time

import numpy as np
import pytest

from xcon import metrics

# Four images, three classes. Winners: 0, 1, 0, 2; labels: 0, 1, 1, 0.
PROBABILITIES = np.array([[0.70, 0.20, 0.10], [0.30, 0.60, 0.10], [0.50, 0.40, 0.10], [0.20, 0.19, 0.61]])
LABELS = np.array([0, 1, 1, 0])


def test_top_k_by_hand() -> None:
    """Right at once: images 0, 1. The label is second on images 2 (0.40) and 3 (0.20)."""
    assert metrics.top_k(PROBABILITIES, LABELS, 1) == 0.5
    assert metrics.top_k(PROBABILITIES, LABELS, 2) == 1.0
    assert metrics.hits(PROBABILITIES, LABELS, 1).tolist() == [True, True, False, False]


def test_top_k_agrees_with_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(500, 11)).astype(np.float32)  # many ties
    labels = rng.integers(0, 11, size=500)
    order = np.argsort(-scores, axis=1, kind="stable")
    for k in (1, 2, 5, 11):
        assert metrics.hits(scores, labels, k).tolist() == [y in o[:k] for y, o in zip(labels, order, strict=True)]
    assert (metrics.hits(scores, labels, 1) == (scores.argmax(axis=1) == labels)).all()


def test_mean_per_class_weighs_classes_not_images() -> None:
    """Class 0: 3 of 4 right; class 2: 0 of 1; class 1 has no image. (0.75 + 0) / 2, while top-1 is 0.6."""
    scores = np.eye(3)[[0, 0, 0, 1, 1]]
    labels = np.array([0, 0, 0, 0, 2])
    assert metrics.mean_per_class(scores, labels) == 0.375
    assert metrics.top_k(scores, labels, 1) == 0.6


def test_ece_by_hand() -> None:
    """Bins of width 1/15. 0.70 falls in (10/15, 11/15], 0.60 in (8/15, 9/15] (its upper edge, in floats
    9.0 exactly), 0.50 in (7/15, 8/15], 0.61 in (9/15, 10/15]: one image each, right, right, wrong, wrong.
    (0.30 + 0.40 + 0.50 + 0.61) / 4."""
    assert metrics.ece(PROBABILITIES, LABELS) == pytest.approx(1.81 / 4)


def test_ece_lets_images_of_one_bin_cancel() -> None:
    """With one bin: accuracy 0.5, mean probability (0.70 + 0.60 + 0.50 + 0.61) / 4 = 0.6025."""
    assert metrics.ece(PROBABILITIES, LABELS, bins=1) == pytest.approx(0.1025)


def test_ece_agrees_with_a_loop_over_bins() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3000, 7)) * 3
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    labels = rng.integers(0, 7, size=3000)
    top, right = probabilities.max(axis=1).astype(float), probabilities.argmax(axis=1) == labels
    total = 0.0
    for b in range(15):
        inside = (top > b / 15) & (top <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    assert metrics.ece(probabilities, labels) == pytest.approx(total, abs=1e-9)


def test_ece_of_certain_and_right_is_zero() -> None:
    assert metrics.ece(np.eye(4), np.arange(4)) == 0.0


def test_reliability_by_hand() -> None:
    """Of the four images above, bins 8 (0.50), 9 (0.60), 10 (0.61), 11 (0.70): wrong, right, wrong, right."""
    found = metrics.reliability(PROBABILITIES, LABELS)
    assert found.count == [0] * 7 + [1, 1, 1, 1] + [0] * 4
    assert found.confidence == [None] * 7 + [0.50, 0.60, 0.61, 0.70] + [None] * 4
    assert found.accuracy == [None] * 7 + [0.0, 1.0, 0.0, 1.0] + [None] * 4
    (count,), (confidence,), (accuracy,) = dataclasses.astuple(metrics.reliability(PROBABILITIES, LABELS, bins=1))
    assert (count, confidence, accuracy) == (4, pytest.approx(0.6025), 0.5)


def test_ece_is_the_mean_gap_of_the_curve() -> None:
    rng = np.random.default_rng(2)
    probabilities = rng.dirichlet(np.full(4, 0.3), size=400)
    labels = rng.integers(0, 4, size=400)
    curve = metrics.reliability(probabilities, labels)
    bins = zip(curve.count, curve.confidence, curve.accuracy, strict=True)
    gaps = [n * abs(p - a) for n, p, a in bins if p is not None and a is not None]
    assert sum(gaps) / 400 == pytest.approx(metrics.ece(probabilities, labels))


def test_summarise_caps_top5_at_the_number_of_classes() -> None:
    """Class 0: images 0 right, 3 wrong; class 1: image 1 right, 2 wrong."""
    found = metrics.summarise(PROBABILITIES, LABELS)
    assert found == {"top1": 0.5, "top5": 1.0, "mean_per_class": 0.5, "ece": pytest.approx(0.4525)}


@pytest.mark.parametrize(
    ("scores", "labels", "k", "message"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), 1, "labels must lie in 0 .. 2"),
        (np.zeros((2, 3)), np.array([-1, 0]), 1, "labels must lie in 0 .. 2"),
        (np.zeros((2, 3)), np.array([0]), 1, r"not \(2, 3\) and \(1,\)"),
        (np.zeros((0, 3)), np.zeros(0, dtype=int), 1, "are needed"),
        (np.zeros((2, 3)), np.array([0, 1]), 4, "k is 4"),
        (np.zeros((2, 3)), np.array([0, 1]), 0, "k is 0"),
        (np.array([[0.0, np.nan]]), np.array([1]), 1, "not finite"),
    ],
)
def test_input_that_would_give_a_wrong_number_is_refused(
    scores: np.ndarray, labels: np.ndarray, k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.top_k(scores, labels, k)


@pytest.mark.parametrize("scores", [np.array([[2.0, 1.0]]), np.array([[1.5, -0.5]])])
def test_ece_refuses_logits(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="probabilities are needed"):
        metrics.ece(scores, np.array([0]))


def test_identical_predictions_differ_by_nothing() -> None:
    correct = np.array([1.0, 0.0, 1.0, 1.0])
    assert metrics.paired_bootstrap(correct, correct, seed=0) == metrics.Difference(0.0, 0.0, 0.0, 1.0)


def test_opposite_differences_of_equal_number_are_no_difference() -> None:
    """Ten images only a has right, ten only b, and means over seeds that are thirds: p near 1."""
    a = np.array([1 / 3] * 10 + [0.0] * 10)
    found = metrics.paired_bootstrap(a, a[::-1], seed=0)
    assert found.difference == 0.0
    assert found.low == pytest.approx(-found.high, abs=0.04)
    assert found.p > 0.8


def test_a_large_difference_is_significant_and_signed() -> None:
    """a is right on 90 of 100, b on 50 of them and nowhere else: +0.40."""
    a, b = np.arange(100) < 90, np.arange(100) < 50
    found = metrics.paired_bootstrap(a.astype(float), b.astype(float), seed=0)
    assert found.difference == pytest.approx(0.4)
    assert 0.29 < found.low < 0.32
    assert 0.48 < found.high < 0.51
    assert found.p == pytest.approx(2 / 10_001)
    back = metrics.paired_bootstrap(b.astype(float), a.astype(float), seed=0)
    assert (back.difference, back.p) == (pytest.approx(-0.4), found.p)


def test_interval_and_p_agree_with_the_normal_approximation() -> None:
    """10,000 images, differences +1 (500), -1 (420), else 0: mean 0.008, variance 0.092 - 0.008^2,
    standard error 0.003032: interval 0.008 +- 1.96 x 0.003032, z = 2.638, p = erfc(z / sqrt 2) = 0.0083."""
    a = np.zeros(10_000)
    b = np.zeros(10_000)
    a[:500], b[500:920] = 1, 1
    found = metrics.paired_bootstrap(a, b, resamples=40_000, seed=3)
    error = math.sqrt((0.092 - 0.008**2) / 10_000)
    assert found.difference == pytest.approx(0.008)
    assert found.low == pytest.approx(0.008 - 1.96 * error, abs=2e-4)
    assert found.high == pytest.approx(0.008 + 1.96 * error, abs=2e-4)
    assert found.p == pytest.approx(math.erfc(0.008 / error / math.sqrt(2)), abs=0.003)


def test_multinomial_counts_agree_with_drawing_images() -> None:
    """The plain route: indices drawn with replacement, differences averaged."""
    rng = np.random.default_rng(5)
    a = rng.integers(0, 4, size=200) / 3
    b = rng.integers(0, 4, size=200) / 3
    means = (a - b)[rng.integers(0, 200, size=(40_000, 200))].mean(axis=1)
    found = metrics.paired_bootstrap(a, b, resamples=40_000, seed=6)
    assert [found.low, found.high] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), abs=0.004)


def test_coverage_of_the_interval() -> None:
    """200 pairs of equally good systems: about 95 % of the intervals hold 0, and p < 0.05 in the rest."""
    rng = np.random.default_rng(7)
    found = [
        metrics.paired_bootstrap(*rng.integers(0, 2, (2, 400)).astype(float), resamples=1000, seed=n)
        for n in range(200)
    ]
    inside = [f.low <= 0 <= f.high for f in found]
    assert 0.90 <= np.mean(inside) <= 0.99
    assert np.mean([f.p < 0.05 for f in found]) == pytest.approx(1 - np.mean(inside), abs=0.03)


def test_nabirds_size_takes_seconds_and_the_seed_decides() -> None:
    rng = np.random.default_rng(8)
    a, b = (rng.integers(0, 4, size=(2, 24_633)) / 3).astype(np.float64)
    start = time.perf_counter()
    first = metrics.paired_bootstrap(a, b, seed=0)
    assert time.perf_counter() - start < 5
    assert first == metrics.paired_bootstrap(a, b, seed=0)
    assert first != metrics.paired_bootstrap(a, b, seed=1)


def test_chunks_cover_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three differences, 10 counts at once: 34 chunks of 3 resamples, the last of 1; the same draws."""
    a, b = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    whole = metrics.paired_bootstrap(a, b, resamples=100, seed=0)
    monkeypatch.setattr(metrics, "_COUNTS_AT_ONCE", 10)
    assert metrics.paired_bootstrap(a, b, resamples=100, seed=0) == whole


@pytest.mark.parametrize(
    ("a", "b"), [([1.0], [1.0, 0.0]), ([], []), ([1.2], [0.0]), ([float("nan")], [0.0]), ([[1.0]], [[0.0]])]
)
def test_bootstrap_refuses_what_cannot_be_paired(a: list, b: list) -> None:
    with pytest.raises(ValueError, match=r"equal rows of images|\[0, 1\]"):
        metrics.paired_bootstrap(np.array(a), np.array(b), seed=0)
