"""Geographic priors: how likely each class is at a place and date, before a photograph is looked at.

`PresencePrior` and its loss are those of Mac Aodha, Cole and Perona 2019, "Presence-Only Geographical Priors for
Fine-Grained Image Classification" (ICCV; equations as numbered there). Beside it stand its rivals without a
network: `frequency`, `neighbours`, `kernel` and `grid`. Each gives, for places, scores proportional to the
probability p(y|x) of a class given place and date; `product` joins them with an image's scores.

A place is a row of lon, lat in degrees and the fraction of the year, NaN where unknown, as in `geotime`.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import i0e
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional

from xcon.encoders import MetaEncoder
from xcon.geotime import DAYS, EARTH_KM

# Legend: b rows of a batch, F width of the body, C classes, U photographers; N places asked for, M records fitted.

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]
Kernel = Callable[[Floats, Floats], Floats]  # [n, 3], [M, 3] -> [n, M]

_ROWS_AT_ONCE = 256  # of [n, M] kernels: with M = 24,000 that is 50 MB


# --------------------------------------------------------------------------------------------------------
# The presence prior


class PresencePrior(nn.Module):
    """f(x), the class embedding O and the photographer embedding P of section 3.2 and 3.3.

    P(y|x) = sigmoid(f(x) O_y), without bias. Trained by cross-entropy instead of `presence_loss`, the same
    layers are a discriminative classifier of places.

    Args:
        body: f, from places to vectors.
        classes: C.
        photographers: U; row U of P, beyond them, stands for whoever is unknown, and learns nothing.
    """

    def __init__(self, body: MetaEncoder, *, classes: int, photographers: int) -> None:
        super().__init__()
        self.body = body
        self.classes = nn.Linear(body.width, classes, bias=False)
        self.photographers = nn.Linear(body.width, photographers + 1, bias=False)

    def forward(self, places: Tensor) -> Tensor:
        """`[b, 3]` places -> `[b, C]` logits of the presence of each class, each on its own."""
        return self.classes(self.body(places))


def background(places: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a place and date for each row: uniform on the sphere, so that cos(lat) is its density in lat.

    What a row does not know, its background does not either: else a missing date would be evidence of presence.
    (The code of the ICCV paper drew too often near the poles; its authors have mended that since.)

    Args:
        places: `[b, 3]`, of which only what is NaN matters.
        generator: of the random numbers.

    Returns:
        `[b, 3]`.
    """
    u = torch.rand(places.shape, generator=generator, dtype=torch.float64)
    drawn = torch.stack([360 * u[:, 0] - 180, (2 * u[:, 1] - 1).asin().rad2deg(), u[:, 2]], dim=1)
    return drawn.to(places.dtype).masked_fill(places.isnan(), math.nan)


def objective(
    network: PresencePrior, places: Tensor, labels: Tensor, photographers: Tensor, generator: torch.Generator
) -> Tensor:
    """The loss of a batch (section 3.3): places and classes, and photographers where they are known.

    Args:
        network: f, O and P.
        places: `[b, 3]`.
        labels: `[b]`.
        photographers: `[b]` 0 .. U-1, or -1 where unknown.
        generator: of the background.

    Returns:
        A scalar.
    """
    located, elsewhere = network.body(places), network.body(background(places, generator))  # [b, F]
    classes, takers = network.classes.weight, network.photographers.weight[photographers]  # [C, F], [b, F]
    theirs = photographer_loss(located, elsewhere, labels, classes, takers, photographers >= 0)
    return presence_loss(located, elsewhere, labels, classes) + theirs


def presence_loss(located: Tensor, elsewhere: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """The loss of places and classes (equation 7), with lambda = C as the authors set it.

    Per row: lambda times -log P(y|x) of its own class, -log(1 - P(.|x)) of all others, and -log(1 - P(.|r)) of
    all at a background place r. Means over rows and classes, as in the authors' code (the paper writes sums, in
    which the photographers would weigh C times less); -log sigmoid is exact, where they add 1e-5 to it.

    Args:
        located: `[b, F]` f(x), x where the records were made.
        elsewhere: `[b, F]` f(r).
        labels: `[b]` y.
        classes: `[C, F]` O.

    Returns:
        A scalar.
    """
    return _own_and_others(located, labels, classes).mean() + _absent(elsewhere @ classes.T).mean()


def photographer_loss(
    located: Tensor, elsewhere: Tensor, labels: Tensor, classes: Tensor, photographers: Tensor, known: Tensor
) -> Tensor:
    """The loss of photographers: where they are (equation 8) and what they photograph (equation 9).

    Args:
        located: `[b, F]` f(x).
        elsewhere: `[b, F]` f(r).
        labels: `[b]` y.
        classes: `[C, F]` O.
        photographers: `[b, F]` P_p of each row's photographer p.
        known: `[b]` bool; a row whose photographer is unknown adds nothing.

    Returns:
        A scalar; means over all rows, as in `presence_loss`.
    """
    there, not_elsewhere = (photographers * located).sum(dim=1), (photographers * elsewhere).sum(dim=1)  # [b]
    affinity = _own_and_others(photographers, labels, classes).mean(dim=1)  # [b]
    return ((_present(there) + _absent(not_elsewhere) + affinity) * known).mean()


def _own_and_others(vectors: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """`[b, C]` C times -log sigmoid of the row's own class, -log(1 - sigmoid) of the others."""
    logits = vectors @ classes.T  # [b, C]
    own = functional.one_hot(labels, len(classes)).bool()  # [b, C]
    return torch.where(own, len(classes) * _present(logits), _absent(logits))


def _present(logits: Tensor) -> Tensor:
    return -functional.logsigmoid(logits)


def _absent(logits: Tensor) -> Tensor:
    return -functional.logsigmoid(-logits)  # 1 - sigmoid(z) = sigmoid(-z)


def balanced_epoch(labels: Ints, per_class: int, rng: np.random.Generator) -> Ints:
    """The records of one epoch in random order: of each class at most `per_class`, drawn anew (section 4)."""
    mixed = rng.permutation(len(labels))
    mixed = mixed[np.argsort(labels[mixed], kind="stable")]  # class by class, each in random order
    first = np.searchsorted(labels[mixed], labels[mixed])  # where its class begins
    return rng.permutation(mixed[np.arange(len(mixed)) - first < per_class])


def epoch_shares(labels: Ints, classes: int, per_class: float = math.inf) -> Floats:
    """Shares `[C]` of the classes among the records, or in epochs of at most `per_class` of each.

    A class without a record counts as one with a single one: nothing is divided by zero.
    """
    counts = np.clip(np.bincount(labels, minlength=classes), 1, per_class)
    return counts / counts.sum()


def number_photographers(user_ids: NDArray) -> Ints:
    """Ids `[M]`, None where unknown -> `[M]` 0 .. U-1 in order of the ids, -1 where unknown."""
    number = {user: n for n, user in enumerate(sorted({u for u in user_ids if u is not None}))}
    return np.array([number.get(user, -1) for user in user_ids], dtype=np.int64)


@torch.inference_mode()
def presence(network: PresencePrior, places: Floats) -> Floats:
    """P(y|x), each class on its own: `[N, 3]` -> `[N, C]`."""
    return network(torch.from_numpy(places).float()).double().sigmoid().numpy()


@torch.inference_mode()
def posterior(network: PresencePrior, places: Floats) -> Floats:
    """p(y|x) of a network trained by cross-entropy: `[N, 3]` -> `[N, C]`."""
    return network(torch.from_numpy(places).float()).double().softmax(dim=1).numpy()


# --------------------------------------------------------------------------------------------------------
# Image and prior


def product(image: Floats, prior: Floats, shares: Floats, known: Bools) -> Floats:
    """p(y|image) prior(y|x) / share(y), each row scaled to sum one (section 3.1, equation 2).

    With p(y|x) and the shares of what it was fitted to this is Bayes' rule, since image and place are independent
    given the class. A presence is no probability of classes, and is divided by nothing: equal shares.

    Args:
        image: `[N, C]` probabilities.
        prior: `[N, C]` positive, of any scale per row.
        shares: `[C]` positive.
        known: `[N]`; where it is false there is no metadata, and the image's own scores stay.

    Returns:
        `[N, C]`.
    """
    joint = normalised(image.astype(np.float64) * normalised(prior) / shares)
    return np.where(known[:, None], joint, image)


def normalised(scores: Floats) -> Floats:
    """Scores `[N, C]` with each row scaled to sum one."""
    return scores / scores.sum(axis=1, keepdims=True)


# --------------------------------------------------------------------------------------------------------
# Priors without a network. `fitted` [M, 3] and `labels` [M] are the training records, `shares` [C] their classes'.


def frequency(shares: Floats, places: Floats) -> Floats:
    """p(y|x) = p(y): the share of each class among the training records, wherever. `[N, C]`."""
    return np.tile(shares, (len(places), 1))


def neighbours(
    fitted: Floats,
    labels: Ints,
    shares: Floats,
    places: Floats,
    *,
    nearest: int,
    km_per_day: float,
    smoothing: float,
) -> Floats:
    """p(y|x) as the share of each class among the nearest training records.

    Near is along a straight line through space, which orders places as the great circle does, and a day within
    the year is as far as `km_per_day`. What a place lacks is left out of the distance, and the records that lack
    what it has are no neighbours of it.

    Args:
        fitted: `[M, 3]`.
        labels: `[M]`.
        shares: `[C]`.
        places: `[N, 3]`.
        nearest: how many neighbours.
        km_per_day: kilometres that are as far as a day.
        smoothing: neighbours, shared out by `shares`, that each place has beside the real ones.

    Returns:
        `[N, C]`.
    """
    ours, theirs = _coordinates(fitted, km_per_day), _coordinates(places, km_per_day)  # [M, 5], [N, 5]
    found = np.tile(shares, (len(places), 1))  # where nothing is known, or nobody near
    lacking = np.isnan(theirs[:, [0, 3]])  # [N, 2] the place, the date
    for pattern in ((False, False), (False, True), (True, False)):
        rows = (lacking == pattern).all(axis=1)
        columns = np.repeat(~np.array(pattern), (3, 2))  # [5]
        usable = ~np.isnan(ours[:, columns]).any(axis=1)  # [M]
        if not (rows.any() and usable.any()):
            continue
        tree = NearestNeighbors(n_neighbors=min(nearest, int(usable.sum()))).fit(ours[usable][:, columns])
        near = labels[usable][tree.kneighbors(theirs[rows][:, columns], return_distance=False)]  # [n, k]
        votes = np.stack([np.bincount(row, minlength=len(shares)) for row in near])  # [n, C]
        found[rows] = (votes + smoothing * shares) / (near.shape[1] + smoothing)
    return found


def _coordinates(places: Floats, km_per_day: float) -> Floats:
    """`[N, 3]` -> `[N, 5]` km: the place in space, the date on a circle of the year's length."""
    year = km_per_day * DAYS / (2 * math.pi)
    return np.concatenate([EARTH_KM * _on_sphere(places), year * _on_circle(places)], axis=1)


def kernel(
    fitted: Floats, labels: Ints, shares: Floats, places: Floats, *,
    bandwidth_km: float, bandwidth_days: float, smoothing: float,
) -> Floats:  # fmt: skip
    """p(y|x) by Bayes' rule from a kernel density p(x|y) of each class.

    A record spreads as a von Mises-Fisher distribution over the sphere times a von Mises distribution over the
    year, the normal distributions of curved spaces. Rows and columns as in `neighbours`; scores are relative to
    the uniform density, so that what is unknown, of a place or a record, is a factor 1.

    Args:
        fitted: `[M, 3]`.
        labels: `[M]`.
        shares: `[C]`.
        places: `[N, 3]`.
        bandwidth_km: standard deviation of a record in each direction, in kilometres.
        bandwidth_days: standard deviation in days.
        smoothing: records, spread as those of all classes are, that each class has beside the real ones; these
            have one more, spread evenly over world and year.

    Returns:
        `[N, C]`, proportional to p(y|x) per row.
    """
    k_place, k_date = (EARTH_KM / bandwidth_km) ** 2, (DAYS / (2 * math.pi * bandwidth_days)) ** 2
    peak_place, peak_date = 2 * k_place / -math.expm1(-2 * k_place), 1 / i0e(k_date)

    def spread(x: Floats, records: Floats) -> Floats:
        near = peak_place * np.exp(k_place * (_on_sphere(x) @ _on_sphere(records).T - 1))  # [n, M]
        soon = peak_date * np.exp(k_date * (_on_circle(x) @ _on_circle(records).T - 1))
        return np.nan_to_num(near, nan=1.0) * np.nan_to_num(soon, nan=1.0)

    return _by_class(spread, fitted, labels, shares, places, smoothing)


def grid(
    fitted: Floats, labels: Ints, shares: Floats, places: Floats, *, bands: int, seasons: int, smoothing: float
) -> Floats:
    """p(y|x) by Bayes' rule from a histogram p(x|y) of each class: cells of equal area times equal seasons.

    As `kernel`, whose arguments and result it has, but that a record spreads over its cell and season.

    Args:
        fitted: `[M, 3]`.
        labels: `[M]`.
        shares: `[C]`.
        places: `[N, 3]`.
        bands: from pole to pole, of equal area; each is cut into twice as many cells.
        seasons: parts of the year.
        smoothing: as in `kernel`.

    Returns:
        `[N, C]`, proportional to p(y|x) per row.
    """

    def cells(x: Floats) -> Floats:
        """[n, 3] -> [n, 2] the numbers of cell and season, NaN where unknown."""
        column = np.minimum((x[:, 0] + 180) / 360 * 2 * bands // 1, 2 * bands - 1)
        band = np.minimum((np.sin(np.radians(x[:, 1])) + 1) / 2 * bands // 1, bands - 1)
        return np.stack([band * 2 * bands + column, np.minimum(x[:, 2] * seasons // 1, seasons - 1)], axis=1)

    def spread(x: Floats, records: Floats) -> Floats:
        found = np.ones((len(x), len(records)))
        for ours, theirs, parts in zip(cells(x).T, cells(records).T, (2 * bands**2, seasons), strict=True):
            same = parts * (ours[:, None] == theirs)  # [n, M]
            found *= np.where(np.isnan(ours)[:, None] | np.isnan(theirs), 1.0, same)
        return found

    return _by_class(spread, fitted, labels, shares, places, smoothing)


def _by_class(
    spread: Kernel, fitted: Floats, labels: Ints, shares: Floats, places: Floats, smoothing: float
) -> Floats:
    """p(y) times the density of each class's records, smoothed by that of all; some rows at a time."""
    records, classes = len(labels), len(shares)
    owner = sparse.csr_array((np.ones(records), (labels, np.arange(records))), shape=(classes, records))  # [C, M]
    parts = np.split(places, range(_ROWS_AT_ONCE, len(places), _ROWS_AT_ONCE))
    sums = np.concatenate([(owner @ spread(part, fitted).T).T for part in parts])  # [N, C]
    counts = np.bincount(labels, minlength=classes)  # [C]
    # [N, 1] the density of all records and of one more, spread evenly.
    anywhere = (sums.sum(axis=1, keepdims=True) + 1) / (records + 1)
    return shares * (sums + smoothing * anywhere) / (counts + smoothing)


def _on_sphere(places: Floats) -> Floats:
    """`[N, 3]` -> `[N, 3]` the point of the unit sphere."""
    lon, lat = np.radians(places[:, 0]), np.radians(places[:, 1])
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def _on_circle(places: Floats) -> Floats:
    """`[N, 3]` -> `[N, 2]` the date on the unit circle, which closes at New Year."""
    angle = 2 * math.pi * places[:, 2]
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)
