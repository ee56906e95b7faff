"""A geographic prior times an image classifier: the row GeoPrior of the paper's table, and its rivals.

    xcon prior RECIPE --shards DIR --image-run RUN --out RUN [--test-shards DIR] [--field value ...]

The prior is fitted to the places and dates of the training records; it multiplies the scores that `xcon predict`
saved for the test photographs of a run on images alone. The result is an evaluated run as any other, ready for
`xcon report`; of a network the weights are kept in `model.safetensors`, and `config.json` says how it is built.
With --test-shards the same photographs are given other places. One process, no GPU, seconds to minutes.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy

from xcon import commandline, config, evaluation, geoprior, geotime, model, recipes, runfiles
from xcon.config import PriorConfig
from xcon.encoders import MetaEncoder, MetaSpec
from xcon.geoprior import Floats, Ints, PresencePrior, number_photographers
from xcon.records import atomic_write
from xcon.shardset import ShardSet, Split
from xcon.tracking import Tracker

# Legend: b rows of a batch, C classes; N test records, M training records that have a place or a date.

PROGRAM = "xcon prior"


def main() -> None:
    """Runs the command line."""
    commandline.guarded(run, PROGRAM)


def run() -> None:
    """Parse, data, prior, product, results."""
    recipe, cfg = config.parse_recipe(recipes.PRIOR, PROGRAM)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("one process is all it takes: give the command without accelerate launch or torchrun")

    # Data
    image_facts = read_image_run(cfg.image_run)
    cfg = dataclasses.replace(cfg, seed=image_facts["seed"] if cfg.seed is None else cfg.seed)
    shards, tested = ShardSet(cfg.shards), ShardSet(cfg.test_shards or cfg.shards)
    check_same_classes(shards, tested)
    train, test = shards.split("train"), tested.split("test")
    rows = has_metadata(train.place)  # the records that the prior learns from
    if not rows.any():
        raise ValueError(f"{cfg.shards}: no training record has a place or a date")
    classes = len(shards.card.classes)
    image = image_scores(cfg.image_run, tested.folder, test, classes)  # [N, C]
    facts = {"command": "prior", "recipe": recipe, "init": str(cfg.image_run), "init_method": cfg.kind}
    facts |= {"modalities": ["image", "meta"], "shards_sha256": shards.card.sha256}
    cfg.begun(facts)  # if it was, all of it is made again
    cfg.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(cfg.out / "config.json") as file:
        file.write(cfg.to_json(**facts).encode())

    # Prior
    scores_at, shares = fit(cfg, train.place[rows], train.class_id[rows], train.user_id[rows], classes)

    # Product
    prior, shuffled = scores_at(test.place), evaluation.others_of(test)  # [N, C], [N, 3]
    found = {
        "scores": geoprior.product(image, prior, shares, has_metadata(test.place)),
        "without_meta": image,
        "shuffled_meta": geoprior.product(image, scores_at(shuffled), shares, has_metadata(shuffled)),
        "meta_only": np.where(
            has_metadata(test.place)[:, None], geoprior.normalised(prior), shares / shares.sum()
        ),
    }

    # Results, as those of xcon predict
    rounded = {name: rows.astype(np.float32) for name, rows in found.items()}
    out = runfiles.predictions(cfg.out, None)
    evaluation.write_table(evaluation.prediction_table(test, rounded), out)
    judged = evaluation.judge(rounded, test.class_id, tested.card.classes)
    evaluation.write_measures(
        runfiles.measures(cfg.out, None), judged, run=cfg.out, split=test, shards=tested, with_meta=True
    )
    commandline.say(f"{len(test)} test records: {evaluation.summary(judged)}\n{out}")


# --------------------------------------------------------------------------------------------------------
# Data


def check_same_classes(shards: ShardSet, tested: ShardSet) -> None:
    """Raises ValueError unless the shards of the test number the classes as those of training do."""
    ours, theirs = ([c.raw_class_id for c in s.card.classes] for s in (shards, tested))
    if ours != theirs:
        raise ValueError(
            f"--test-shards {tested.folder}: another class list ({len(theirs)} classes) than {shards.folder} has "
            f"({len(ours)})"
        )


def read_image_run(folder: Path) -> dict[str, Any]:
    """The figures of an evaluated run on images alone.

    Raises:
        FileNotFoundError: no such run, or not evaluated.
        ValueError: its model has seen metadata already.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--image-run {folder}: no such run folder")
    measured, predicted = runfiles.measures(folder, None), runfiles.predictions(folder, None)
    for file in (measured, predicted):
        if not file.is_file():
            raise FileNotFoundError(
                f"--image-run {folder}: no {file.name} here, run xcon predict on the test split first"
            )
    facts = config.read_json(measured)
    if facts.get("with_meta") is not False or "seed" not in facts:
        raise ValueError(f"--image-run {folder}: a run with metadata; the prior multiplies one on images alone")
    return facts


def image_scores(folder: Path, shards: Path, test: Split, classes: int) -> Floats:
    """The probabilities `[N, C]` that a run gives the photographs of a test split, in its order.

    Raises:
        ValueError: damaged, or predictions of other photographs, labels or classes.
    """
    file = runfiles.predictions(folder, None)
    try:
        table = pq.read_table(file, columns=["image_id", "class_id", "scores"]).sort_by("image_id")
        scores = table["scores"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{file}: not predictions of xcon predict ({str(error).splitlines()[0]})") from None
    order = np.argsort(test.image_id)
    if not np.array_equal(table["image_id"].to_numpy(), test.image_id[order]):
        raise ValueError(
            f"{file}: of other photographs ({table.num_rows}) than the test split of {shards} ({len(test)}); give "
            "the shard set that the run was evaluated on"
        )
    if scores.shape[1] != classes or not np.array_equal(table["class_id"].to_numpy(), test.class_id[order]):
        raise ValueError(f"{file}: the same photographs as in {shards}, with other classes")
    return scores[order.argsort()]


def has_metadata(places: Floats) -> np.ndarray:
    """`geotime.known` for numpy."""
    return geotime.known(torch.from_numpy(places)).numpy()


# --------------------------------------------------------------------------------------------------------
# Prior


def fit(
    cfg: PriorConfig, places: Floats, labels: Ints, users: np.ndarray, classes: int
) -> tuple[Callable[[Floats], Floats], Floats]:
    """Fits the prior of these settings.

    Args:
        cfg: the settings.
        places: `[M, 3]`.
        labels: `[M]`.
        users: `[M]` who made the record, None where unknown.
        classes: C.

    Returns:
        A function from places `[N, 3]` to scores `[N, C]`; the shares `[C]` that the product divides by.
    """
    shares = geoprior.epoch_shares(labels, classes)  # [C]
    if cfg.kind == "frequency":
        return partial(geoprior.frequency, shares), np.ones(classes)
    if cfg.kind == "geoprior":
        return partial(geoprior.presence, fit_network(cfg, places, labels, users, classes)), np.ones(classes)
    if cfg.kind == "softmax":
        network = fit_network(cfg, places, labels, users, classes)
        return partial(geoprior.posterior, network), geoprior.epoch_shares(labels, classes, cfg.per_class)
    rival: Callable[..., Floats] = getattr(geoprior, cfg.kind)  # neighbours, kernel or grid
    settings = {name: getattr(cfg, name) for name in cfg.USES[cfg.kind]}
    return partial(rival, places, labels, shares, **settings), shares


def fit_network(cfg: PriorConfig, places: Floats, labels: Ints, users: np.ndarray, classes: int) -> PresencePrior:
    """Trains a network on what `fit` takes and saves its weights: those of the last epoch, as the authors do."""
    assert cfg.seed is not None
    torch.manual_seed(cfg.seed)
    rng, generator = np.random.default_rng(cfg.seed), torch.Generator().manual_seed(cfg.seed)
    seen = users if cfg.kind == "geoprior" and cfg.photographers else np.full(len(users), None)
    x, y = torch.from_numpy(places).float(), torch.from_numpy(labels)
    by = torch.from_numpy(number_photographers(seen))
    spec = MetaSpec(cfg.meta_width, cfg.meta_depth, cfg.meta_encoding, cfg.dropout)
    network = PresencePrior(MetaEncoder(spec), classes=classes, photographers=int(by.max()) + 1).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=cfg.learning_rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, cfg.decay)
    with Tracker(cfg.out, step=0, total=cfg.epochs) as tracker:
        for epoch in range(1, cfg.epochs + 1):
            drawn = torch.from_numpy(geoprior.balanced_epoch(labels, cfg.per_class, rng))
            losses = []
            for rows in drawn.split(cfg.batch_size):
                if cfg.kind == "softmax":
                    loss = cross_entropy(network(x[rows]), y[rows])
                else:
                    loss = geoprior.objective(network, x[rows], y[rows], by[rows], generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            schedule.step()
            if not np.isfinite(losses).all():
                raise ValueError(f"the loss is {losses[-1]} in epoch {epoch}: lower --learning-rate")
            tracker.write("train", epoch, {"loss": float(np.mean(losses)), "records": len(drawn)})
            tracker.advance(epoch)
        tracker.write("end", cfg.epochs, {})
    with atomic_write(cfg.out / "model.safetensors") as file:
        file.write(model.weights_to_bytes(network.state_dict()))
    return network.eval()


if __name__ == "__main__":
    main()
