"""Evaluated runs side by side: which belong to one row, what the rows measure, how surely they differ.

Runs that differ only in their seed make one row, or those that are given one label. Rows are compared with the
first one, or the last one with each other, and each row that uses metadata with itself without, by a paired
bootstrap over images, correctness averaged over seeds.

N: images, S: seeds. Every rate is a fraction in [0, 1].
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xcon import config, metrics, runfiles

Baseline = Literal["first", "last"]

MEASURES = ("top1", "top5", "mean_per_class", "ece")
SAME_TEST = ("shards_sha256", "split", "label_space")
# The runs of one row may differ in these: the seed, and what leaves every number as it is. The shards of a test
# are told apart by their hash, and a run that a prior multiplies by its settings, as one that it starts from.
NOT_SETTINGS = {"seed", "init", "image_run", "test_shards", "recipe", *config.TrainConfig.MAY_CHANGE}
UPPER_BOUND = (
    "Where places and dates were drawn given the true species, as those of NABirds were from eBird, results with "
    "metadata are an upper bound."
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

    @property
    def controls(self) -> tuple[str, ...]:
        """What it was compared with itself under."""
        every = (*metrics.CONTROLS, metrics.META_ONLY)
        return tuple(name for name in every if name in self.metrics) if self.metrics["with_meta"] else ()

    @property
    def label_spaces(self) -> Mapping[str, Mapping[str, float]]:
        """The measures in coarser label spaces; none where it was evaluated without them."""
        found: Mapping[str, Mapping[str, float]] = self.metrics.get("label_spaces", {})
        return found


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed, in order of the seed."""

    label: str
    runs: tuple[Run, ...]


def compare(
    folders: Sequence[Path],
    *,
    resamples: int,
    names: Sequence[str | None] | None = None,
    labels: Sequence[str] | None = None,
    baseline: Baseline = "first",
) -> dict[str, Any]:
    """The whole comparison as plain values, ready for JSON.

    Args:
        folders: of the runs; one may come twice, with two evaluations.
        resamples: of the paired bootstrap.
        names: of the evaluation in each folder, as `xcon predict --name` has it; None: that of the test split.
        labels: of each folder; those of one label make one row. None: runs that differ only in their seed do.
        baseline: first: each row is compared with the first. last: the last row is compared with each other one.

    Raises:
        FileNotFoundError: a folder is missing or not evaluated.
        ValueError: damaged files, runs tested on different images, or the same run twice.
    """
    runs = [load(folder, name) for folder, name in zip(folders, names or [None] * len(folders), strict=True)]
    check_same_test(runs)
    table = group(runs) if labels is None else group_by_label(runs, labels)
    first, summaries = runs[0].metrics, [summary(row) for row in table]
    notes = [
        f"Every run evaluated each of the {first['n']:,} images of the {first['split']} split exactly once.",
        f"+- is the standard deviation over seeds. Differences: {resamples:,} resamples of the images, "
        "correctness averaged over seeds.",
    ]
    notes += [UPPER_BOUND] if any(s["with_meta"] for s in summaries) else []
    same = {name: first[name] for name in (*SAME_TEST, "n")}
    return {**same, "rows": summaries, "differences": differences(table, resamples, baseline), "notes": notes}


def load(folder: Path, name: str | None = None) -> Run:
    """Reads what training and `xcon predict` left in a run folder.

    Args:
        folder: of the run.
        name: of the evaluation; None: that of the test split.

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
    measured, predicted = runfiles.measures(folder, name), runfiles.predictions(folder, name)
    for file in (measured, predicted):
        if not file.is_file():
            again = f" with --name {name}" if name else ""
            raise FileNotFoundError(f"{folder}: no {file.name} here, run xcon predict{again} first")
    found = config.read_json(measured)
    _check_names(measured, found, (*MEASURES, *SAME_TEST, "n", "with_meta"))
    if found["with_meta"]:
        _check_names(measured, found, metrics.CONTROLS)
    if "label_spaces" in found:
        _check_names(measured, found, ("n_labels",))
    columns = ("predicted", "predicted_without_meta")[: 2 if found["with_meta"] else 1]
    table = _read_columns(predicted, ("image_id", "class_id", *columns))
    order = np.argsort(table["image_id"])
    ids, labels = table["image_id"][order], table["class_id"][order]
    right = {name: (table[name][order] == labels).astype(np.float64) for name in columns}
    if not len(ids) or len(np.unique(ids)) != len(ids):
        raise ValueError(f"{folder}: an image stands twice in {predicted.name}, or none does")
    if found["n"] != len(ids) or abs(float(right["predicted"].mean()) - found["top1"]) > 1e-6:
        raise ValueError(f"{folder}: {measured.name} and {predicted.name} disagree, run xcon predict again")
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


def group_by_label(runs: Sequence[Run], labels: Sequence[str]) -> list[Row]:
    """Makes rows of the runs of one label, in the order given.

    Raises:
        ValueError: two runs of one row have the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run, label in zip(runs, labels, strict=True):
        groups.setdefault(label, []).append(run)
    _check_seeds(groups.values())
    return [Row(label, tuple(members)) for label, members in groups.items()]


def _check_seeds(groups: Iterable[Sequence[Run]]) -> None:
    for members in groups:
        seen: dict[int, Run] = {}
        for run in members:
            twin = seen.setdefault(run.seed, run)
            if twin is not run:
                raise ValueError(
                    f"{run.folder}: same settings and seed {run.seed} as {twin.folder}, give one of them"
                )


def group(runs: Sequence[Run]) -> list[Row]:
    """Makes rows of the runs that differ only in their seed, in the order given.

    Raises:
        ValueError: two runs of one row have the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.method, run.settings]), []).append(run)
    _check_seeds(groups.values())
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
    """The numbers of a row: mean and, from two seeds on, sample standard deviation; and those of each run."""
    found: dict[str, Any] = {
        "label": row.label,
        "runs": [str(run.folder) for run in row.runs],
        "n": len(row.runs[0].image_ids),
        "seeds": [run.seed for run in row.runs],
        "with_meta": bool(row.runs[0].metrics["with_meta"]),
        **_measures([run.metrics for run in row.runs]),
        "each": [{"label": row.label, **_flat(run)} for run in row.runs],
    }
    for part in row.runs[0].controls:
        if all(part in run.controls for run in row.runs):
            found[part] = _measures([run.metrics[part] for run in row.runs])
    if all(run.label_spaces for run in row.runs):
        found["n_labels"] = row.runs[0].metrics["n_labels"]
        found["label_spaces"] = {
            space: {"n_labels": measured["n_labels"], **_measures([run.label_spaces[space] for run in row.runs])}
            for space, measured in row.runs[0].label_spaces.items()
        }
    return found


def _measures(of_runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    return {name: _mean_and_spread([measured[name] for measured in of_runs]) for name in MEASURES}


def _flat(run: Run) -> dict[str, Any]:
    """One run as the values of one row of a table: `top1`, `without_meta_top1`, `species_top1` and so on."""
    parts = {"": run.metrics, **{f"{c}_": run.metrics[c] for c in run.controls}}
    parts |= {f"{space}_": measured for space, measured in run.label_spaces.items()}
    numbers = {f"{part}{name}": measured[name] for part, measured in parts.items() for name in MEASURES}
    return {"run": str(run.folder), "seed": run.seed, "n": len(run.image_ids), **numbers}


def _mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "spread": spread}


def differences(table: Sequence[Row], resamples: int, baseline: Baseline = "first") -> list[dict[str, Any]]:
    """Each row against the first or the last against each other, and each with metadata against itself without."""
    first, *others = table
    *before, last = table
    compared = [(row, first) for row in others] if baseline == "first" else [(last, row) for row in before]
    pairs = [(ours.label, theirs.label, _over_seeds(ours), _over_seeds(theirs)) for ours, theirs in compared]
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
