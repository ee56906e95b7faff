"""Reports on run folders made by hand, whose every number is known.

Ten test images of two classes, a000 .. a009, label = number modulo 2. A run is told which images it gets
right, with metadata and without; top-5, mean per class and ECE are free numbers to be passed through.
"""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from xcon import chart, commandline, comparison, report, results

ROOT = Path(__file__).parents[1]
IDS = [f"a{n:03}" for n in range(10)]
ALL = range(10)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder: `right` and `bare` are the images it gets right with and without metadata."""

    def write(
        name: str,
        right: Collection[int],
        bare: Collection[int] | None = None,
        shuffle_rows: int = 0,
        found: dict[str, Any] | None = None,
        called: str | None = None,
        **settings: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        ending = f"-{called}" if called else ""
        labels = np.arange(10, dtype=np.int32) % 2
        answers = {"predicted": right}
        if bare is not None:
            answers |= {"predicted_without_meta": bare, "predicted_shuffled_meta": []}
        columns: dict[str, Any] = {"image_id": IDS, "class_id": labels, "probability": [0.5] * 10}
        for column, images in answers.items():
            columns[column] = np.where(np.isin(np.arange(10), list(images)), labels, 1 - labels).astype(np.int32)
        order = np.random.default_rng(shuffle_rows).permutation(10)
        pq.write_table(pa.table(columns).take(order), folder / f"predictions{ending}.parquet")
        numbers = {"top1": len(right) / 10, "top5": 1.0, "mean_per_class": len(right) / 10, "ece": 0.125}
        values = {"split": "test", "n": 10, "label_space": "classes", "shards_sha256": "ab", **numbers}
        values |= {"with_meta": bare is not None, "seed": settings.get("seed", 0)}
        if bare is not None:
            values["without_meta"] = numbers | {"top1": len(bare) / 10}
            values["shuffled_meta"] = numbers | {"top1": 0.0}
        (folder / f"metrics{ending}.json").write_text(json.dumps(values | (found or {})))
        made = {"command": "finetune", "recipe": "laptop", "init": None, "init_method": None, "seed": 0}
        made |= {
            "modalities": ["image"] if bare is None else ["image", "meta"],
            "image_lr": 1e-4,
            "workers": 2,
        }
        (folder / "config.json").write_text(json.dumps({**made, "out": str(folder), **settings}))
        return folder

    return write


def test_seeds_make_one_row_with_mean_and_spread(make: Callable[..., Path]) -> None:
    """Top-1 0.6 and 0.8: mean 0.7, sample standard deviation sqrt(2 x 0.1^2) = 0.141421. Seeds sorted or
    not, workers and the folder aside, the settings are the same."""
    runs = [make("b", range(8), seed=1, workers=4), make("a", range(6), seed=0)]
    (row,) = comparison.compare(runs, resamples=10)["rows"]
    assert (row["label"], row["n"], row["seeds"]) == ("image", 10, [1, 0])
    assert row["top1"] == {"mean": pytest.approx(0.7), "spread": pytest.approx(0.1414213562)}
    assert row["ece"] == {"mean": 0.125, "spread": 0.0}


def test_first_row_is_the_baseline_and_meta_is_compared_with_itself(make: Callable[..., Path]) -> None:
    """Baseline right on 0-4 (0.5); the other on 0-8 (0.9), on 0-6 (0.7) without metadata: +0.4, +0.2."""
    image = make("image", range(5))
    meta = make("meta", range(9), range(7), init="runs/pre", init_method="paper", shuffle_rows=1)
    found = comparison.compare([image, meta], resamples=2000)
    assert [row["label"] for row in found["rows"]] == ["image", "paper -> image + meta"]
    assert found["rows"][1]["without_meta"]["top1"] == {"mean": 0.7, "spread": None}
    assert found["rows"][1]["shuffled_meta"]["top1"] == {"mean": 0.0, "spread": None}
    against, itself = found["differences"]
    assert (against["against"], itself["against"]) == ("image", "itself without metadata")
    assert against["difference"] == pytest.approx(0.4)
    assert itself["difference"] == pytest.approx(0.2)
    assert against["p"] < 0.05 < itself["p"]  # four images of ten alone right; two of ten


def test_correctness_is_averaged_over_seeds_per_image(make: Callable[..., Path]) -> None:
    """Seeds right on {0, 1} and {1, 2}; the other row on {0, 1, 2}. Per image 0.5, 1, 0.5 against 1, 1, 1:
    a difference of 1.0 / 10, in halves, so that every resampled mean is a multiple of 0.05."""
    base = [make("s0", [0, 1], seed=0), make("s1", [1, 2], seed=1)]
    other = make("other", [0, 1, 2], image_lr=1e-3)
    (found,) = comparison.compare([*base, other], resamples=999)["differences"]
    assert found["difference"] == pytest.approx(0.1)
    assert found["low"] == 0
    assert found["high"] in (pytest.approx(0.2), pytest.approx(0.25))


def test_equal_predictions_in_another_order_differ_by_nothing(make: Callable[..., Path]) -> None:
    runs = [make("a", [0, 3, 7], shuffle_rows=2), make("b", [0, 3, 7], shuffle_rows=3, image_lr=1.0)]
    (found,) = comparison.compare(runs, resamples=500)["differences"]
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)


def test_rows_of_one_method_are_told_apart_by_what_differs(make: Callable[..., Path]) -> None:
    runs = [make("a", ALL), make("b", ALL, image_lr=1e-3)]
    labels = [row["label"] for row in comparison.compare(runs, resamples=9)["rows"]]
    assert labels == ["image (image_lr 0.0001)", "image (image_lr 0.001)"]
    runs[0] = make("c", ALL, recipe="inception", image_lr=5)
    labels = [row["label"] for row in comparison.compare(runs, resamples=9)["rows"]]
    assert labels == ["image (inception)", "image (laptop)"]


def test_pretraining_with_other_settings_is_another_row(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = []
    for n, (seed, temperature) in enumerate([(0, 0.07), (1, 0.07), (0, 0.01)]):
        start = tmp_path / f"pre{n}"
        start.mkdir()
        (start / "config.json").write_text(json.dumps({"seed": seed, "temperature": temperature}))
        runs.append(make(f"r{n}", ALL, seed=seed, init=str(start), init_method="clip"))
    found = [(r["label"], r["seeds"]) for r in comparison.compare(runs, resamples=9)["rows"]]
    names = ["clip -> image (init.temperature 0.07)", "clip -> image (init.temperature 0.01)"]
    assert found == [(names[0], [0, 1]), (names[1], [0])]


def test_upper_bound_is_stated_where_metadata_is_used(make: Callable[..., Path]) -> None:
    image, meta = make("image", ALL), make("meta", ALL, ALL)
    assert comparison.UPPER_BOUND not in comparison.compare([image], resamples=9)["notes"]
    notes = comparison.compare([image, meta], resamples=9)["notes"]
    assert comparison.UPPER_BOUND in notes
    assert notes[0] == "Every run evaluated each of the 10 images of the test split exactly once."


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shards_sha256": "cd"}, "shards_sha256 is cd, not ab as in"),
        ({"split": "val"}, "split is val, not test"),
        ({"label_space": "species"}, "label_space is species"),
    ],
)
def test_other_tests_are_refused(make: Callable[..., Path], changed: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comparison.compare([make("a", ALL), make("b", ALL, found=changed, seed=1)], resamples=9)


def rewrite(folder: Path, column: str, values: list[Any]) -> None:
    file = folder / "predictions.parquet"
    table = pq.read_table(file).sort_by("image_id")
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, [values]), file)


def test_other_images_or_labels_are_refused(make: Callable[..., Path]) -> None:
    first, images, labels = make("a", ALL), make("b", ALL, seed=1), make("c", [], seed=2)
    rewrite(images, "image_id", [f"z{n}" for n in ALL])
    with pytest.raises(ValueError, match=r"b: other test images or labels than in .*a$"):
        comparison.compare([first, images], resamples=9)
    rewrite(labels, "class_id", [2] * 10)
    with pytest.raises(ValueError, match="c: other test images or labels"):
        comparison.compare([first, labels], resamples=9)


def test_an_image_evaluated_twice_is_refused(make: Callable[..., Path]) -> None:
    run = make("a", ALL)
    rewrite(run, "image_id", ["a000"] * 10)
    with pytest.raises(ValueError, match="an image stands twice"):
        comparison.load(run)


def test_stale_metrics_are_refused(make: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="disagree, run xcon predict again"):
        comparison.load(make("a", ALL, found={"top1": 0.9}))
    with pytest.raises(ValueError, match="disagree, run xcon predict again"):
        comparison.load(make("b", ALL, found={"n": 11}))


def test_the_same_run_twice_is_refused(make: Callable[..., Path]) -> None:
    run = make("a", ALL)
    with pytest.raises(ValueError, match="same settings and seed 0"):
        comparison.compare([run, run], resamples=9)


def test_damaged_and_missing_files_are_named(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
        comparison.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        comparison.load(tmp_path)
    cases = {
        "config.json": ("{}", "seed is missing"),
        "metrics.json": ('{"top1": ', r"metrics.json: not JSON"),
        "predictions.parquet": ("PAR1", "not the predictions of this run"),
    }
    for n, (name, (text, message)) in enumerate(cases.items()):
        run = make(f"r{n}", ALL, ALL)
        (run / name).write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            comparison.load(run)
        assert len(str(error.value).splitlines()) == 1
    run = make("bare", ALL, None, found={"with_meta": True, "without_meta": {}, "shuffled_meta": {}})
    with pytest.raises(ValueError, match="not the predictions of this run"):
        comparison.load(run)
    for name in ("metrics.json", "predictions.parquet"):
        (run / name).unlink()
        with pytest.raises(FileNotFoundError, match="run xcon predict first"):
            comparison.load(run)


def test_markdown_shows_per_cent_and_points(make: Callable[..., Path]) -> None:
    runs = [make("a", range(6), seed=0), make("b", range(8), seed=1)]
    meta = make("m", range(10), range(9), init_method="a|b")
    text = results.markdown(comparison.compare([*runs, meta], resamples=4000))
    assert "| image | 10 | 0, 1 | 70.00 +-14.14 | 100.00 +-0.00 | 70.00 +-14.14 | 12.50 +-0.00 |  |  |" in text
    assert "| a\\|b -> image + meta | 10 | 0 | 100.00 | 100.00 | 100.00 | 12.50 | 90.00 | 0.00 |" in text
    assert "| a\\|b -> image + meta | image | +30.00 | +" in text
    assert text.endswith(comparison.UPPER_BOUND + "\n")
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {10, 6}


def test_terminal_takes_brackets_for_text(make: Callable[..., Path]) -> None:
    runs = [make("a", ALL, layers=["[red]", 1]), make("b", ALL, layers=[2])]
    console = Console(width=200, file=io.StringIO(), record=True)
    results.show(comparison.compare(runs, resamples=9), console)
    assert 'image (layers ["[red]", 1])' in console.export_text()


def test_a_narrow_terminal_loses_no_number(make: Callable[..., Path]) -> None:
    """Three seeds, long labels, 80 columns: every number whole, on one line or on two."""
    meta = [make(f"m{n}", range(9 - n), range(8), seed=n, init_method="pre" * 9) for n in range(3)]
    found = comparison.compare([make("a", ALL), *meta], resamples=99)
    console = Console(width=80, file=io.StringIO(), record=True)
    results.show(found, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text
    for _, lines in results.tables(found):
        numbers = {word for line in lines for cell in line[1:] for word in cell.split()}
        assert numbers <= set(text.split())


SPACES = {  # two classes, ten images; a space as large as the classes says nothing new
    "n_labels": 2,
    "label_spaces": {
        "species": {"n_labels": 2, "top1": 0.5, "top5": 1.0, "mean_per_class": 0.5, "ece": 0.0},
        "groups": {"n_labels": 1, "top1": 0.9, "top5": 1.0, "mean_per_class": 0.9, "ece": 0.0},
    },
}


def test_the_last_row_can_be_compared_with_each_other_one(make: Callable[..., Path]) -> None:
    """Right on 5, 7 and 9 of ten: the last is ahead by 0.4 and 0.2, the second of the first by 0.2."""
    runs = [make(f"r{n}", range(n), image_lr=n) for n in (5, 7, 9)]
    labels = ["five", "seven", "nine"]
    found = comparison.compare(runs, resamples=9, labels=labels, baseline="last")["differences"]
    told = [(d["row"], d["against"], round(d["difference"], 9)) for d in found]
    assert told == [("nine", "five", 0.4), ("nine", "seven", 0.2)]
    first = comparison.compare(runs, resamples=9, labels=labels)["differences"]
    told = [(d["row"], d["against"], round(d["difference"], 9)) for d in first]
    assert told == [("seven", "five", 0.2), ("nine", "five", 0.4)]


def test_labels_make_rows_whatever_the_settings(make: Callable[..., Path]) -> None:
    """Two runs that differ in a setting and a seed, one row as they are labelled; the same seed is refused."""
    runs = [make("a", range(6), seed=0, image_lr=1.0), make("b", range(8), seed=1, image_lr=2.0)]
    (row,) = comparison.compare(runs, resamples=9, labels=["Ours"] * len(runs))["rows"]
    assert (row["label"], row["seeds"], row["top1"]["mean"]) == ("Ours", [0, 1], pytest.approx(0.7))
    twin = make("c", range(8), seed=1, image_lr=3.0)
    with pytest.raises(ValueError, match=r"c: same settings and seed 1 as .*b"):
        comparison.compare([*runs, twin], resamples=9, labels=["Ours"] * len([*runs, twin]))


def test_another_evaluation_is_read_by_its_name(make: Callable[..., Path]) -> None:
    run = make("a", range(5))
    make("a", range(3), called="new-sites")
    assert comparison.compare([run], resamples=9)["rows"][0]["top1"]["mean"] == 0.5
    assert comparison.compare([run], resamples=9, names=["new-sites"])["rows"][0]["top1"]["mean"] == 0.3
    with pytest.raises(FileNotFoundError, match=r"no metrics-later.json here, run xcon predict with --name later"):
        comparison.load(run, "later")


def test_metadata_alone_is_a_column_where_a_run_has_it(make: Callable[..., Path]) -> None:
    """One of two rows has an expert for metadata: 25 %, the other one's cell is empty."""
    alone = {"meta_only": {"top1": 0.25, "top5": 0.5, "mean_per_class": 0.25, "ece": 0.0}}
    runs = [make("a", ALL, ALL), make("b", ALL, ALL, found=alone, image_lr=1.0)]
    found = comparison.compare(runs, resamples=9)
    headings, lines = results.tables(found)[0]
    assert headings[-1] == "meta only"
    assert [line[-1] for line in lines] == ["", "25.00"]
    assert results.tables(comparison.compare(runs[:1], resamples=9))[0][0][-1] == "shuffled meta"


def test_label_spaces_are_shown_where_they_are_coarser(make: Callable[..., Path]) -> None:
    """Groups, one for both classes: 0.9 in one run. Species are as many as classes and are left out."""
    runs = [make("a", range(6), found=SPACES), make("b", range(8), found=SPACES, seed=1)]
    found = comparison.compare(runs, resamples=9)
    assert found["rows"][0]["label_spaces"]["species"]["top1"] == {"mean": 0.5, "spread": 0.0}
    (headings, (line,)) = results.tables(found)[1]
    assert headings == ("top-1 (%)", "2 classes", "1 groups")
    assert line == ("image", "70.00 +-14.14", "90.00 +-0.00")
    older = make("c", range(6), image_lr=1.0)  # evaluated before there were label spaces
    assert results.tables(comparison.compare([*runs, older], resamples=9))[1][0] == results.DIFFERENCE_HEADINGS


def test_parquet_has_a_row_per_run(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make("a", range(6), found=SPACES), make("b", range(8), seed=1), make("m", ALL, range(9))]
    out = tmp_path / "runs.parquet"
    results.write(comparison.compare(runs, resamples=9), out)
    found = pq.read_table(out).to_pydict()
    assert found["label"] == ["image", "image", "image + meta"]
    assert found["run"] == [str(run) for run in runs]
    assert found["seed"] == [0, 1, 0]
    assert found["n"] == [10, 10, 10]
    assert found["top1"] == [0.6, 0.8, 1.0]
    assert found["without_meta_top1"] == [None, None, 0.9]
    assert found["groups_top1"] == [0.9, None, None]
    assert {f"{part}{m}" for part in ("", "shuffled_meta_", "species_") for m in comparison.MEASURES} <= set(found)


def test_the_figure_has_every_seed_and_mean(make: Callable[..., Path], tmp_path: Path) -> None:
    """Two seeds of images alone (60, 80: mean 70), one run with metadata (100, 90 without, 0 with another's)."""
    runs = [make("a", range(6)), make("b", range(8), seed=1), make("m", ALL, range(9))]
    report = comparison.compare(runs, resamples=9)
    axes = chart.figure(report).axes[0]
    points = [line.get_xdata().tolist() for line in axes.get_lines() if line.get_marker() != "None"]
    assert [pytest.approx(found) for found in ([60, 80], [70], [100], [90], [0])] == points
    (bar,) = [line for line in axes.get_lines() if line.get_marker() == "None" and len(line.get_xdata()) == 2][:1]
    assert bar.get_xdata().tolist() == pytest.approx([70 - 200**0.5, 70 + 200**0.5])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["image", "image + meta"]
    assert axes.get_title(loc="left") == "Top-1 on the same 10 test images"
    results.write(report, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5  # not one colour


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xcon.report", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_writes_json(make: Callable[..., Path], tmp_path: Path) -> None:
    """The whole way once, in a process of its own, all formats at once."""
    out = tmp_path / "report.json"
    outs = [str(out), *(str(out.with_suffix(s)) for s in (".md", ".parquet", ".png"))]
    done = command(str(make("a", range(5))), str(make("b", ALL, range(4))), "--out", *outs)
    assert (done.returncode, done.stderr) == (0, "")
    assert "50.00" in done.stdout
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert "| image + meta | image | +50.00 |" in out.with_suffix(".md").read_text()
    assert pq.read_table(out.with_suffix(".parquet")).num_rows == 2
    found = json.loads(out.read_text())
    assert found["rows"][1]["without_meta"]["top1"]["mean"] == 0.4
    assert found["differences"][1]["difference"] == pytest.approx(0.6)


def test_command_says_what_is_wrong_in_one_line(make: Callable[..., Path]) -> None:
    run = make("a", ALL)
    (run / "metrics.json").unlink()
    done = command(str(run))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"xcon report: {run}: no metrics.json here, run xcon predict first\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one run folder"),
        (["run", "--out", "table.txt"], "a name ending in .md, .json, .parquet, .png"),
        (["run", "--out", "a.md", "b"], "--out b: a name ending in"),
        (["run", "--resamples", "0"], "at least 1"),
        (["run", "--name", "new sites"], "--name 'new sites': letters and digits are needed"),
        (["run", "--baseline", "best"], "--baseline"),
        (["run", "--sorted"], "--sorted"),
    ],
)
def test_wrong_usage(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    with pytest.raises(ValueError, match=message):
        commandline.parse(report.Settings, report.PROGRAM)


def test_the_folder_of_out_must_exist(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(make("a", ALL)), "--out", str(tmp_path / "no" / "t.md")])
    with pytest.raises(ValueError, match=r"t\.md: no such folder as"):
        report.run()
