"""The geographic prior against its equations, and its rivals against scikit-learn, by hand and by integration."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import BallTree, KernelDensity

from xcon import geoprior, geotime, prior
from xcon.config import PriorConfig
from xcon.encoders import MetaEncoder, MetaSpec

NAN = math.nan


def somewhere(count: int, seed: int) -> np.ndarray:
    """Places and dates all over the world, `[N, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    return geoprior.background(torch.zeros(count, 3, dtype=torch.float64), generator).numpy()


# ---- the loss


def test_presence_loss_by_hand() -> None:
    """C = 2, O = (0, 1), f(x) = ln 3, f(r) = 0: P(.|x) = 1/2, 3/4 and P(.|r) = 1/2, 1/2. The second class is
    there: (2 x -ln 3/4 - ln 1/2) / 2 at x, (ln 2 + ln 2) / 2 at r."""
    located, elsewhere = torch.tensor([[math.log(3)]]), torch.tensor([[0.0]])
    labels, classes = torch.tensor([1]), torch.tensor([[0.0], [1.0]])
    found = geoprior.presence_loss(located, elsewhere, labels, classes)
    assert found.item() == pytest.approx((2 * math.log(4 / 3) + math.log(2)) / 2 + math.log(2))


def test_photographer_loss_by_hand() -> None:
    """As above with P = 1: P(p|x) = 3/4, P(p|r) = 1/2; P(.|p) = 1/2 and 1 / (1 + 1/e), of which the second is
    photographed. A second row, whose photographer is unknown, halves the mean and adds nothing."""
    located, elsewhere = torch.tensor([[math.log(3)], [5.0]]), torch.tensor([[0.0], [7.0]])
    labels, classes = torch.tensor([1, 0]), torch.tensor([[0.0], [1.0]])
    takers, known = torch.tensor([[1.0], [9.0]]), torch.tensor([True, False])
    found = geoprior.photographer_loss(located, elsewhere, labels, classes, takers, known)
    affinity = (2 * math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert found.item() == pytest.approx((math.log(4 / 3) + math.log(2) + affinity) / 2)


def slow_loss(network: geoprior.PresencePrior, places: torch.Tensor, background: torch.Tensor,
              labels: list[int], takers: list[int]) -> float:  # fmt: skip
    """Equations 7 to 9, term by term in plain numbers."""

    def s(a: torch.Tensor, b: torch.Tensor) -> float:
        return 1 / (1 + math.exp(-sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))))

    f, r = network.body(places).double(), network.body(background).double()
    o, p = network.classes.weight.double(), network.photographers.weight.double()
    total, count = 0.0, len(o)
    for i, (y, taker) in enumerate(zip(labels, takers, strict=True)):
        for c in range(count):
            own = c == y
            total -= (count * math.log(s(f[i], o[c])) if own else math.log(1 - s(f[i], o[c]))) / count
            total -= math.log(1 - s(r[i], o[c])) / count
            if taker >= 0:
                q = s(p[taker], o[c])
                total -= (count * math.log(q) if own else math.log(1 - q)) / count
        if taker >= 0:
            total -= math.log(s(f[i], p[taker])) + math.log(1 - s(r[i], p[taker]))
    return total / len(labels)


def test_objective_against_the_equations_term_by_term() -> None:
    torch.manual_seed(0)
    network = geoprior.PresencePrior(MetaEncoder(MetaSpec(16, 2)), classes=4, photographers=3)
    places = torch.from_numpy(somewhere(7, seed=1)).float()
    places[2, 2] = NAN
    labels, takers = [0, 3, 1, 1, 2, 0, 3], [0, -1, 2, 1, -1, 0, 2]
    found = geoprior.objective(
        network, places, torch.tensor(labels), torch.tensor(takers), torch.Generator().manual_seed(5)
    )
    background = geoprior.background(places, torch.Generator().manual_seed(5))
    assert found.item() == pytest.approx(slow_loss(network, places, background, labels, takers), rel=1e-5)


def test_background_is_uniform_on_the_sphere_and_as_incomplete_as_the_records() -> None:
    """Uniform on a sphere: lon and sin lat are uniform (Archimedes), and so is the date. Kolmogorov-Smirnov."""
    places = torch.zeros(20_000, 3)
    places[:5_000, 2] = NAN
    drawn = geoprior.background(places, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.isnan(), places.isnan())
    lon, lat, date = drawn.double().numpy().T
    uniform = (lon / 360 + 0.5, np.sin(np.radians(lat)) / 2 + 0.5, date[5_000:])
    assert [stats.kstest(column, "uniform").pvalue > 0.01 for column in uniform] == [True] * 3


def test_balanced_epochs_take_at_most_so_many_of_a_class_each_once() -> None:
    labels = np.array([0] * 9 + [2] * 3 + [1] * 4)
    rng = np.random.default_rng(0)
    one, two = geoprior.balanced_epoch(labels, 4, rng), geoprior.balanced_epoch(labels, 4, rng)
    for epoch in (one, two):
        assert len(set(epoch)) == len(epoch)
        assert np.bincount(labels[epoch]).tolist() == [4, 4, 3]
    assert set(one) != set(two)  # drawn anew
    assert (geoprior.balanced_epoch(labels, 4, np.random.default_rng(0)) == one).all()


def test_every_record_of_a_class_is_drawn_equally_often() -> None:
    """2 of 5 in 2,000 epochs: 800 times each, standard deviation sqrt(2000 x 0.4 x 0.6) = 22."""
    rng = np.random.default_rng(0)
    drawn = np.concatenate([geoprior.balanced_epoch(np.zeros(5, dtype=int), 2, rng) for _ in range(2_000)])
    assert np.abs(np.bincount(drawn) - 800).max() < 80


def test_shares_by_hand() -> None:
    """6, 2 and 0 records: a class without counts as one with a single; at most 3 of each: 3, 2 and 1 of 6."""
    labels = np.array([0] * 6 + [1] * 2)
    assert geoprior.epoch_shares(labels, 3) == pytest.approx(np.array([6, 2, 1]) / 9)
    assert geoprior.epoch_shares(labels, 3, 3) == pytest.approx(np.array([3, 2, 1]) / 6)


def test_photographers_are_numbered() -> None:
    assert geoprior.number_photographers(np.array(["b", None, "a", "b"], dtype=object)).tolist() == [1, -1, 0, 1]
    assert geoprior.number_photographers(np.array([None, None], dtype=object)).tolist() == [-1, -1]


def test_dropout_is_that_of_the_reference_and_names_stay() -> None:
    """Between the two layers of a block, in training alone. The names are those of models saved without it."""
    places = torch.from_numpy(somewhere(4, seed=0)).float()
    torch.manual_seed(0)
    without, body = MetaEncoder(MetaSpec(16, 1)), MetaEncoder(MetaSpec(16, 1, dropout=0.5))
    body.load_state_dict(without.state_dict())
    names = [f"{layer}.{kind}" for layer in ("first.0", "blocks.0.layers.0", "blocks.0.layers.2")
             for kind in ("weight", "bias")]  # fmt: skip
    assert list(body.state_dict()) == names
    assert torch.equal(body.eval()(places), without(places))
    torch.manual_seed(1)
    found = body.train()(places)
    torch.manual_seed(1)
    x = without.first(geotime.encode(places, "wrap"))
    first, second = without.blocks[0].layers[0], without.blocks[0].layers[2]
    kept = torch.nn.functional.dropout(first(x).relu(), 0.5)
    assert torch.equal(found, x + second(kept).relu())


# ---- the product


def test_product_by_hand() -> None:
    """0.6 x 0.1 / 0.25 = 0.24 and 0.4 x 0.9 / 0.75 = 0.48: a third and two. Without metadata, the image's own."""
    image = np.array([[0.6, 0.4]] * 2, dtype=np.float32)
    found = geoprior.product(image, np.array([[1.0, 9.0]] * 2), np.array([0.25, 0.75]), np.array([True, False]))
    assert found[0] == pytest.approx([1 / 3, 2 / 3])
    assert (found[1] == image[1]).all()


# ---- rivals without a network


def test_neighbours_are_those_of_the_haversine_distance() -> None:
    """Without dates, votes of scikit-learn's ball tree on the great circle."""
    records, places = somewhere(300, seed=1), somewhere(50, seed=2)
    records[:, 2] = places[:, 2] = NAN
    labels = np.random.default_rng(0).integers(4, size=300)
    found = geoprior.neighbours(
        records, labels, np.full(4, 0.25), places, nearest=7, km_per_day=5.0, smoothing=2.0
    )
    tree = BallTree(np.radians(records[:, 1::-1]), metric="haversine")
    near = tree.query(np.radians(places[:, 1::-1]), k=7, return_distance=False)
    votes = np.stack([np.bincount(labels[row], minlength=4) for row in near])
    assert found == pytest.approx((votes + 2.0 * 0.25) / 9.0)


def test_neighbours_in_time_and_with_parts_unknown() -> None:
    """One place, records on 2 January and 2 July; a third of another place and no date. Over New Year the first is
    near to 31 December; without a date the place decides, without a place the date, with neither the shares."""
    records = np.array([[0, 50, 1 / 364], [0.1, 50, 182 / 364], [90, 0, NAN]])
    places = np.array([[0.1, 50, 1.0], [89, 1, NAN], [NAN, NAN, 0.5], [NAN] * 3])
    shares = np.array([0.5, 0.3, 0.2])
    found = geoprior.neighbours(records, np.arange(3), shares, places, nearest=1, km_per_day=5.0, smoothing=1e-9)
    assert found[:3].argmax(axis=1).tolist() == [0, 2, 1]
    assert found[3] == pytest.approx(shares)


def test_kernel_is_that_of_scikit_learn_on_the_great_circle() -> None:
    """No dates, 200 km: within the curvature of the sphere, a normal density of the great-circle distance."""
    rng = np.random.default_rng(0)
    records = np.stack([rng.normal(10, 3, 60), rng.normal(45, 2, 60), np.full(60, NAN)], axis=1)
    labels, shares = np.arange(60) % 2, np.full(2, 0.5)
    places = np.stack([rng.normal(10, 3, 20), rng.normal(45, 2, 20), np.full(20, NAN)], axis=1)
    settings = {"bandwidth_km": 200.0, "bandwidth_days": 20.0, "smoothing": 1e-9}
    found = geoprior.normalised(geoprior.kernel(records, labels, shares, places, **settings))
    logs = [
        KernelDensity(bandwidth=200 / 6371, metric="haversine")
        .fit(np.radians(records[labels == c, 1::-1]))
        .score_samples(np.radians(places[:, 1::-1]))
        for c in (0, 1)
    ]
    assert found == pytest.approx(geoprior.normalised(np.exp(np.stack(logs, axis=1))), abs=2e-3)


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        (geoprior.kernel, {"bandwidth_km": 1500.0, "bandwidth_days": 30.0}),
        (geoprior.grid, {"bands": 6, "seasons": 4}),
    ],
)
def test_densities_integrate_to_one_and_an_unknown_part_is_their_mean(function, settings) -> None:
    """Relative to the uniform density a density has mean 1; over the dates alone its mean is that of no date."""
    record, one = np.array([[-70.0, 42.0, 0.97]]), np.ones(1)

    def relative(places: np.ndarray) -> np.ndarray:
        return function(record, np.array([0]), one, places, **settings, smoothing=1e-12)[:, 0]

    everywhere = somewhere(40_000, seed=0)
    assert relative(everywhere).mean() == pytest.approx(1, abs=0.15)  # few fall near
    there = np.tile(record, (1_000, 1))
    there[:, 2] = (np.arange(1_000) + 0.5) / 1_000
    undated = np.array([[-70.0, 42.0, NAN], [NAN, NAN, NAN]])
    assert relative(there).mean() == pytest.approx(relative(undated)[0], rel=1e-3)
    assert relative(undated)[1] == 1


def test_kernel_closes_at_the_date_line_and_over_new_year() -> None:
    record, shares = np.array([[179.9, 10.0, 0.999], [0.0, 0.0, 0.5]]), np.full(2, 0.5)
    near = np.array([[-179.9, 10.0, 0.001], [179.7, 10.0, 0.997]])  # as far on either side
    found = geoprior.kernel(
        record, np.arange(2), shares, near, bandwidth_km=50.0, bandwidth_days=5.0, smoothing=1e-9
    )
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_grid_by_hand() -> None:
    """Two bands of four cells, two seasons: 8 x 2 parts. Class 0 has both its records with the place, class 1 one
    of its two. Densities 16 and 8; of all four records 12, with an even one (4 x 12 + 1) / 5 = 9.8. Smoothed by
    one record: (32 + 9.8) / 3 and (16 + 9.8) / 3, times shares of a half."""
    records = np.array([[10, 10, 0.1], [80, 80, 0.4], [50, 50, 0.49], [50, 50, 0.5]])
    place = np.array([[20.0, 5.0, 0.0]])
    found = geoprior.grid(
        records, np.array([0, 0, 1, 1]), np.full(2, 0.5), place, bands=2, seasons=2, smoothing=1.0
    )
    assert found == pytest.approx(np.array([[41.8, 25.8]]) / 6)


def test_grid_has_its_edges_within() -> None:
    """The pole, the date line and 31 December belong to the last band, cell and season."""
    record = np.array([[179.0, 89.0, 0.99]])
    edge = np.array([[180.0, 90.0, 1.0], [-180.0, 90.0, 1.0]])
    found = geoprior.grid(record, np.zeros(1, int), np.ones(1), edge, bands=4, seasons=4, smoothing=1e-9)
    assert found[0, 0] == pytest.approx(2 * 4 * 4 * 4)
    assert found[1, 0] < 1e-6


# ---- ranges with a known optimum

CENTRES = np.array([[-120.0, 45.0], [-100.0, 35.0], [-80.0, 45.0], [-100.0, 55.0]])
KAPPA = 60.0  # a standard deviation of 820 km


def ranges(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`[4 count, 3]` places of four von Mises-Fisher ranges with a date of no meaning, `[4 count]` labels."""
    rng = np.random.default_rng(seed)
    points = np.concatenate(
        [stats.vonmises_fisher(p, KAPPA).rvs(count, random_state=rng) for p in on_sphere(CENTRES)]
    )
    degrees = np.degrees(np.stack([np.arctan2(points[:, 1], points[:, 0]), np.arcsin(points[:, 2])], axis=1))
    return np.column_stack([degrees, rng.random(4 * count)]), np.repeat(np.arange(4), count)


def on_sphere(degrees: np.ndarray) -> np.ndarray:
    lon, lat = np.radians(degrees[:, 0]), np.radians(degrees[:, 1])
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def densities(places: np.ndarray) -> np.ndarray:
    """`[N, 4]` p(x|y) of the ranges, relative to the uniform density, by scipy."""
    points = on_sphere(places)
    return 4 * np.pi * np.stack([stats.vonmises_fisher(p, KAPPA).pdf(points) for p in on_sphere(CENTRES)], axis=1)


def measured(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 and cross-entropy."""
    p = geoprior.normalised(scores)
    return float((p.argmax(axis=1) == labels).mean()), float(-np.log(p[np.arange(len(labels)), labels]).mean())


@pytest.mark.slow
def test_priors_come_near_the_bayes_optimum(tmp_path: Path) -> None:
    """2,000 records of four overlapping ranges, 4,000 to test on. The optimal posterior is p(x|y) / sum, the
    optimal presence follows from the loss: with p_y relative to the background, lambda p_y / 4 speaks for
    class y, the other p / 4 and 1 against it, so P* = p_y / (p_y + sum of the other p / 4 + 1), lambda being 4."""
    places, labels = ranges(500, seed=0)
    tested, truth = ranges(1_000, seed=1)
    nobody = np.full(len(labels), None)
    p = densities(tested)
    best_top1, best_loss = measured(p, truth)
    optimum = p / (p + (p.sum(axis=1, keepdims=True) - p) / 4 + 1)
    small = {"seed": 0, "per_class": 500, "batch_size": 128, "epochs": 30, "dropout": 0.0}
    small |= {"meta_width": 64, "meta_depth": 2, "learning_rate": 3e-3, "decay": 0.9}
    found = {}
    for kind in ("geoprior", "softmax", "kernel", "neighbours", "grid"):
        (tmp_path / kind).mkdir()
        settings = {"geoprior": small, "softmax": small, "neighbours": {"nearest": 60}, "grid": {"bands": 18}}
        settings |= {"kernel": {"bandwidth_km": 350.0}}
        cfg = PriorConfig(**{"out": tmp_path / kind, "kind": kind, "meta_encoding": "xyz", **settings[kind]})
        scores_at, shares = prior.fit(cfg, places, labels, nobody, 4)
        scores = scores_at(tested)
        found[kind] = measured(scores, truth)
        if kind == "geoprior":
            print(f"presence: {np.abs(scores - optimum).mean():.3f} from the optimum")  # noqa: T201
            assert np.abs(scores - optimum).mean() < 0.04
            assert (shares == 1).all()
    print(f"optimum: {best_top1:.3f}, {best_loss:.3f}; {found}")  # noqa: T201
    for kind, margin in {"geoprior": 0.02, "softmax": 0.02, "kernel": 0.02, "neighbours": 0.03}.items():
        assert found[kind][0] > best_top1 - margin, kind
    for kind, margin in {"softmax": 0.05, "kernel": 0.08, "neighbours": 0.10}.items():
        assert best_loss - 0.02 < found[kind][1] < best_loss + margin, kind
    assert found["grid"][0] > best_top1 - 0.12  # 12 seasons of a date without meaning: cells of few records
