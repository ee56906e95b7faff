"""Evaluated runs side by side: which belong to one row, what the rows measure, how surely they differ.

Runs that differ only in their seed make one row. Rows are compared with the first one, and each row that uses
metadata with itself without, by a paired bootstrap over images, correctness averaged over seeds.

N: images, S: seeds. Every rate is a fraction in [0, 1].
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xcon import config, metrics

MEASURES = ("top1", "top5", "mean_per_class", "ece")
SAME_TEST = ("shards_sha256", "split", "label_space")
# The runs of one row may differ in these: the seed, and what leaves every number as it is. The shards of a test
# are told apart by their hash, and a run that a prior multiplies by its settings, as one that it starts from.
NOT_SETTINGS = {"seed", "init", "image_run", "test_shards", "recipe", *config.TrainConfig.MAY_CHANGE}
UPPER_BOUND = (
    "NABirds' places and dates are drawn from eBird given the true species, so results with metadata are an "
    "upper bound there."
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluated run.

    Attributes:
        folder: the run folder.
        config: its `config.json`.
        metrics: its `metrics.json`.
        settings: all that makes two runs different systems, the pre-training's settings included.
        image_ids: [N], sorted.
        class_ids: [N], the labels.
        correct: [N], 1 where the prediction is the label, else 0.
        correct_without_meta: the same of the prediction without metadata; None for a run on images alone.
    """

    folder: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    settings: Mapping[str, str]
    image_ids: NDArray
    class_ids: NDArray
    correct: NDArray
    correct_without_meta: NDArray | None

    @property
    def seed(self) -> int:
        """Of the training."""
        return int(self.config["seed"])

    @property
    def method(self) -> str:
        """What it starts from and what it sees."""
        start = f"{self.config['init_method']} -> " if self.config["init_method"] else ""
        return start + " + ".join(self.config["modalities"])


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed, in order of the seed."""

    label: str
    runs: tuple[Run, ...]


def compare(folders: Sequence[Path], *, resamples: int) -> dict[str, Any]:
    """The whole comparison as plain values, ready for JSON.

    Raises:
        FileNotFoundError: a folder is missing or not evaluated.
        ValueError: damaged files, runs tested on different images, or the same run twice.
    """
    runs = [load(folder) for folder in folders]
    check_same_test(runs)
    table = group(runs)
    first, summaries = runs[0].metrics, [summary(row) for row in table]
    notes = [
        f"Every run evaluated each of the {first['n']:,} images of the {first['split']} split exactly once.",
        f"+- is the standard deviation over seeds. Differences: {resamples:,} resamples of the images, "
        "correctness averaged over seeds.",
    ]
    notes += [UPPER_BOUND] if any(s["with_meta"] for s in summaries) else []
    same = {name: first[name] for name in (*SAME_TEST, "n")}
    return {**same, "rows": summaries, "differences": differences(table, resamples), "notes": notes}


def load(folder: Path) -> Run:
    """Reads what training and `xcon predict` left in a run folder.

    Raises:
        FileNotFoundError: no such folder, or not evaluated yet.
        ValueError: the files are damaged or do not belong together.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json here, so not a run folder")
    made = config.read_json(folder / "config.json")
    if made.get("command") == "pretrain":
        raise ValueError(f"{folder}: a pre-trained run; fine-tune it (--init) and evaluate that with xcon predict")
    _check_names(folder / "config.json", made, ("seed", "modalities", "recipe", "init", "init_method"))
    for name in ("metrics.json", "predictions.parquet"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name} here, run xcon predict first")
    found = config.read_json(folder / "metrics.json")
    _check_names(folder / "metrics.json", found, (*MEASURES, *SAME_TEST, "n", "with_meta"))
    if found["with_meta"]:
        _check_names(folder / "metrics.json", found, metrics.CONTROLS)
    columns = ("predicted", "predicted_without_meta")[: 2 if found["with_meta"] else 1]
    table = _read_columns(folder / "predictions.parquet", ("image_id", "class_id", *columns))
    order = np.argsort(table["image_id"])
    ids, labels = table["image_id"][order], table["class_id"][order]
    right = {name: (table[name][order] == labels).astype(np.float64) for name in columns}
    if not len(ids) or len(np.unique(ids)) != len(ids):
        raise ValueError(f"{folder}: an image stands twice in predictions.parquet, or none does")
    if found["n"] != len(ids) or abs(float(right["predicted"].mean()) - found["top1"]) > 1e-6:
        raise ValueError(f"{folder}: metrics.json and predictions.parquet disagree, run xcon predict again")
    bare = right.get("predicted_without_meta")
    return Run(folder, made, found, _settings(made, found), ids, labels, right["predicted"], bare)


def _check_names(file: Path, values: Mapping[str, Any], names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{file}: {missing[0]} is missing, so not written by this version of xcon")


def _read_columns(file: Path, columns: Sequence[str]) -> dict[str, NDArray]:
    try:
        table = pq.read_table(file, columns=list(columns))
        return {name: table[name].to_numpy() for name in columns}
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{file}: not the predictions of this run ({str(error).splitlines()[0]})") from None


def _settings(made: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    values = {name: value for name, value in made.items() if name not in NOT_SETTINGS}
    # A pre-trained run may have been moved since; then its recipe's name is all that tells it from others.
    if made["init"] and (file := Path(made["init"]) / "config.json").is_file():
        start = config.read_json(file).items()
        values |= {f"init.{name}": value for name, value in start if name not in NOT_SETTINGS}
    values["with_meta"] = found["with_meta"]
    return {name: json.dumps(value) for name, value in sorted(values.items())}


def check_same_test(runs: Sequence[Run]) -> None:
    """Raises ValueError unless all runs were evaluated on the very same images and labels."""
    first = runs[0]
    for run in runs[1:]:
        for name in SAME_TEST:
            ours, theirs = run.metrics[name], first.metrics[name]
            if ours != theirs:
                raise ValueError(
                    f"{run.folder}: another test, {name} is {ours}, not {theirs} as in {first.folder}"
                )
        same = np.array_equal(run.image_ids, first.image_ids)
        if not same or not np.array_equal(run.class_ids, first.class_ids):
            raise ValueError(f"{run.folder}: other test images or labels than in {first.folder}")


def group(runs: Sequence[Run]) -> list[Row]:
    """Makes rows of the runs that differ only in their seed, in the order given.

    Raises:
        ValueError: two runs of one row have the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        members = groups.setdefault(json.dumps([run.method, run.settings]), [])
        if twin := next((other for other in members if other.seed == run.seed), None):
            raise ValueError(f"{run.folder}: same settings and seed {run.seed} as {twin.folder}, give one of them")
        members.append(run)
    heads = [members[0] for members in groups.values()]
    return [
        Row(_label(members[0], [head for head in heads if head.method == members[0].method]), tuple(members))
        for members in groups.values()
    ]


def _label(run: Run, alike: Sequence[Run]) -> str:
    """The method; where several rows share it, also the recipe, or else the settings that differ."""
    if len(alike) == 1:
        return run.method
    if len({other.config["recipe"] for other in alike}) == len(alike):
        return f"{run.method} ({run.config['recipe']})"
    names = [n for n in run.settings if len({other.settings.get(n) for other in alike}) > 1]
    return f"{run.method} ({', '.join(f'{n} {run.settings[n]}' for n in names)})"


def summary(row: Row) -> dict[str, Any]:
    """The numbers of a row: mean and, from two seeds on, sample standard deviation."""
    with_meta = bool(row.runs[0].metrics["with_meta"])
    found: dict[str, Any] = {
        "label": row.label,
        "runs": [str(run.folder) for run in row.runs],
        "n": len(row.runs[0].image_ids),
        "seeds": [run.seed for run in row.runs],
        "with_meta": with_meta,
        **{name: _mean_and_spread([run.metrics[name] for run in row.runs]) for name in MEASURES},
    }
    for part in metrics.CONTROLS if with_meta else ():
        found[part] = {n: _mean_and_spread([run.metrics[part][n] for run in row.runs]) for n in MEASURES}
    return found


def _mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "spread": spread}


def differences(table: Sequence[Row], resamples: int) -> list[dict[str, Any]]:
    """Each row against the first, and each row with metadata against itself without."""
    first = table[0]
    pairs = [(row.label, first.label, _over_seeds(row), _over_seeds(first)) for row in table[1:]]
    for row in table:
        bare = [run.correct_without_meta for run in row.runs if run.correct_without_meta is not None]
        if bare:
            pairs.append((row.label, "itself without metadata", _over_seeds(row), np.mean(bare, axis=0)))
    return [
        {"row": ours, "against": theirs}
        | dataclasses.asdict(metrics.paired_bootstrap(a, b, resamples=resamples, seed=0))
        for ours, theirs, a, b in pairs
    ]


def _over_seeds(row: Row) -> NDArray:
    return np.mean([run.correct for run in row.runs], axis=0)  # [S, N] -> [N]
