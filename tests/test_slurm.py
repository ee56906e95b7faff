"""The job scripts: linted, and run on a real SLURM of two nodes that tests/minislurm.sh starts here."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class Cluster:
    """A running minislurm; jobs are submitted from the top of the repository, as the README says."""

    def __init__(self, folder: Path) -> None:
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.local = folder / "cluster" / "local"  # each node's own disk
        self.settings = {
            "MINISLURM_DIR": str(folder / "cluster"),
            "XCON_ENV": str(BIN / "activate"),
            "XCON_JOBS": str(folder / "jobs"),
            "SCRATCH": str(folder / "scratch"),
        }

    def run(self, *command: str, **settings: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("XCON_")}
        done = subprocess.run(
            [ROOT / "tests/minislurm.sh", *command],
            env=environment | self.settings | settings,
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: str, **settings: str) -> str:
        """Submits with what a small machine can give; returns the job's id."""
        options = ["--parsable", "--mem=1G", "--cpus-per-task=1", f"--output={self.logs}/%j.out"]
        return self.run("exec", "sbatch", *options, *arguments, **settings).strip()

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        fields = self.run("exec", "scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, seconds: float = 240) -> str:
        """Returns the state in which the job ended (`sbatch --wait` polls too seldom)."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.show(job)["JobState"]
            if state in ENDED:
                return state
            time.sleep(0.5)
        return f"still {state} after {seconds} s"

    def until(self, job: str, text: str, seconds: float = 240) -> None:
        """Waits until the log of a job has a text."""
        deadline = time.monotonic() + seconds
        while text not in self.log(job):
            assert time.monotonic() < deadline, f"no {text!r} in {self.log(job)}"
            time.sleep(0.1)

    def local_files(self, node: str) -> list[str]:
        """The files on the own disk of a node."""
        found = self.run("exec", "srun", f"--nodelist={node}", "find", str(self.local), "-type", "f")
        return [Path(file).name for file in found.splitlines()]

    def log(self, job: str) -> str:
        file = self.logs / f"{job}.out"
        return file.read_text() if file.exists() else "(no log)"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("minislurm needs root on Linux")
    if subprocess.run(["unshare", "--mount", "--net", "true"], check=False).returncode:
        pytest.skip("minislurm needs kernel namespaces (CAP_SYS_ADMIN), and this container has none")
    mini = Cluster(tmp_path_factory.mktemp("slurm"))
    mini.run("start")
    yield mini
    mini.run("stop")


def test_scripts_pass_shellcheck():
    scripts = [*ROOT.glob("slurm/*.sh"), ROOT / "tests/minislurm.sh"]
    assert len(scripts) >= 7
    done = subprocess.run(
        [BIN / "shellcheck", "--external-sources", *scripts],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("script", ["build_shards", "pretrain", "finetune", "evaluate", "reproduce"])
def test_submitted_elsewhere_a_script_says_from_where(script: str, tmp_path: Path):
    done = subprocess.run(
        ["bash", ROOT / f"slurm/{script}.sh", "demo"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert "submit from the top of the repository" in done.stderr


def task(number: int, first: int, last: int, count: int) -> dict[str, str]:
    """What SLURM tells a task of an array."""
    values = {"ID": number, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def build_shards(tmp_path: Path, array: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    """The job script; `xcon-shards` is a stand-in that shows how it was called."""
    stub = tmp_path / "xcon-shards"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    (tmp_path / "env").write_text(f"PATH={tmp_path}:$PATH\n")
    return subprocess.run(
        ["bash", "slurm/build_shards.sh", "nabirds", "--root", "a b", "--workers", "9", *more],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "XCON_ENV": str(tmp_path / "env"), "SLURM_CPUS_PER_TASK": "4", **array},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("array", "more", "part"),
    [
        ({}, (), []),
        (task(3, 0, 3, 4), (), ["--task", "3", "--tasks", "4"]),
        (task(3, 3, 3, 1), ("--tasks", "8"), ["--task", "3"]),  # one of eight, submitted again
    ],
)
def test_a_task_of_an_array_builds_its_part(
    array: dict[str, str], more: tuple[str, ...], part: list[str], tmp_path: Path
) -> None:
    done = build_shards(tmp_path, array, *more)
    assert done.returncode == 0
    arguments = ["build", "nabirds", "--workers", "4", *part, "--root", "a b", "--workers", "9", *more]
    assert done.stdout.splitlines() == arguments


@pytest.mark.parametrize("array", [task(3, 3, 3, 1), task(2, 1, 4, 4), task(4, 0, 6, 4)])
def test_a_part_of_an_array_says_of_how_many_tasks_it_is_one(array: dict[str, str], tmp_path: Path) -> None:
    """Else task 3 of 8, submitted again, would be all there is, and remove what the others are writing."""
    done = build_shards(tmp_path, array)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "xcon: not all tasks from 0 on; give --tasks N too, the number of tasks of the whole array\n"
    )


def test_site_runs_a_command_in_the_image_and_keeps_caches_off_the_home_directory(tmp_path: Path):
    """`singularity` is a stand-in that shows how it was called."""
    singularity = tmp_path / "singularity"
    singularity.write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$HF_HOME" "$HF_HUB_OFFLINE"\n')
    singularity.chmod(0o755)
    settings = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SCRATCH": "/scratch/me",
        "SLURM_CLUSTER_NAME": "greene",
        "SLURM_JOB_ID": "1",
        "XCON_IMAGE": "cuda 12.sif",
        "XCON_OVERLAY": "/scratch/me/env.ext3",
    }
    done = subprocess.run(
        ["bash", "-euc", 'source slurm/site.sh; become xcon --note "two  words"'],
        cwd=ROOT,
        env=settings,
        text=True,
        capture_output=True,
        check=True,
    )
    image = "/scratch/work/public/singularity/cuda 12.sif"
    assert done.stdout.splitlines() == [
        *("exec", "--nv", "--overlay", "/scratch/me/env.ext3:ro", image),
        *("bash", "-c", 'source "$0" && exec "$@"', "/ext3/env.sh", "xcon", "--note", "two  words"),
        *("/scratch/me/xcon-cache/huggingface", "1"),
    ]


class Layout(NamedTuple):
    """What a job is given, and what must come of it on each node."""

    nodes: int
    options: list[str]
    arguments: list[str]
    processes: int
    threads: str
    workers: list[str]
    devices: str = ""


@pytest.mark.slurm
@pytest.mark.parametrize(
    "layout",
    [
        # Four cores and two GPUs on each node: two processes of two cores, one of them for a worker.
        Layout(2, ["--gres=gpu:2", "--cpus-per-task=4"], [], 4, "1", ["--workers", "1"], "0,1"),
        # Eight cores and no GPU: one process, two workers, six threads.
        Layout(2, ["--cpus-per-task=8"], [], 2, "6", ["--workers", "2"]),
        Layout(1, [], ["--workers", "5"], 1, "1", []),
    ],
)
def test_every_node_starts_its_launcher(cluster: Cluster, tmp_path: Path, layout: Layout):
    """`accelerate` is a stand-in that writes down how it was called on which node."""
    stub = tmp_path / "accelerate"
    stub.write_text(
        f'#!/bin/bash\nprintf "%s\\0" "$OMP_NUM_THREADS" "$CUDA_VISIBLE_DEVICES" "$@" >"{tmp_path}/$(hostname)"\n'
    )
    stub.chmod(0o755)
    (tmp_path / "env").write_text(f"PATH={tmp_path}:$PATH\n")
    arguments = ["demo", "--out", "a  b '$HOME' *", *layout.arguments]
    options = [f"--nodes={layout.nodes}", *layout.options]
    job = cluster.submit(*options, "slurm/pretrain.sh", *arguments, XCON_ENV=str(tmp_path / "env"))
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)

    meet = ["--rdzv_backend", "c10d", "--main_process_ip", "node1"] if layout.nodes > 1 else []
    for rank in range(layout.nodes):
        assert (tmp_path / f"node{rank + 1}").read_text().split("\0")[:-1] == [
            *(layout.threads, layout.devices),
            *("launch", "--config_file", "accelerate_configs/ddp.yaml"),
            *("--num_machines", str(layout.nodes), "--num_processes", str(layout.processes)),
            *("--machine_rank", str(rank), "--main_process_port", str(10000 + int(job)), *meet),
            *("xcon/pretrain.py", *arguments, *layout.workers),
        ]


# --------------------------------------------------------------------------------------------------------
# Stopped jobs, with a stand-in for the trainer

# Ends well in its last run; in those before it waits for a signal, unless it stops by itself, saves and says so.
STAND_IN = """#!{python}
import os, signal, sys, time
from pathlib import Path

heard = []
for one in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(one, lambda number, frame: heard.append(signal.Signals(number).name))
(what,) = {{"waits", "stops", "fails"}} & set(sys.argv)
restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
print("running", what, flush=True)
if what == "fails":
    sys.exit(3)
while what == "waits" and restart == 0 and not heard:
    time.sleep(0.02)
if what == "waits" and restart == 0 or what == "stops":
    time.sleep(1)  # more may come while it saves
    print("heard", *heard, flush=True)
    if os.environ["SLURM_NODEID"] == "0":
        Path(os.environ["XCON_STOPPED"]).write_text("step 5\\n")
    sys.exit(75)
"""


@pytest.mark.slurm
def test_stopped_jobs_come_back_where_that_leads_somewhere(cluster: Cluster, tmp_path: Path):
    for name in ("accelerate", "xcon"):
        (tmp_path / name).write_text(STAND_IN.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "env").write_text(f"PATH={tmp_path}:$PATH\n")

    def submit(what: str, script: str = "pretrain", *options: str, **settings: str) -> str:
        settings["XCON_ENV"] = str(tmp_path / "env")
        more = ["--nodes=2"] if script == "pretrain" else []
        return cluster.submit(*more, *options, f"slurm/{script}.sh", what, **settings)

    told, cancelled, failed = submit("waits"), submit("waits"), submit("fails")
    restless = submit("stops", XCON_MAX_IDLE="2")
    bounded = submit("stops", XCON_MAX_RESTARTS="0")
    array = submit("waits", "reproduce", "--array=0-1", f"--output={cluster.logs}/%A_%a.out")
    for job, tasks in ((told, 2), (cancelled, 2), (f"{array}_0", 1), (f"{array}_1", 1)):
        deadline = time.monotonic() + 30
        while cluster.log(job).count("running") < tasks:
            assert time.monotonic() < deadline, cluster.log(job)
            time.sleep(0.1)
    cluster.run("exec", "scancel", "--signal=USR1", told)
    cluster.run("exec", "scancel", cancelled)
    # The job id of an array's last task is the number of the array: no other task may come back with it.
    cluster.run("exec", "scancel", "--signal=USR1", f"{array}_1")

    again = "xcon: stopped at step 5; back into the queue, restart 1 of at most 50"
    for job in (told, f"{array}_1"):
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)
        assert cluster.show(job)["Restarts"] == "1"
        assert cluster.log(job).count("heard SIGUSR1") == (2 if job == told else 1)
        assert again in cluster.log(job)
    assert cluster.show(f"{array}_0")["JobState"] == "RUNNING"
    cluster.run("exec", "scancel", f"{array}_0")

    assert cluster.wait(cancelled) == "CANCELLED"
    assert "heard SIGTERM" in cluster.log(cancelled)  # it saved, and said so
    assert cluster.wait(failed) == "FAILED"
    assert cluster.show(failed)["ExitCode"] == "3:0"
    assert cluster.wait(bounded) == "FAILED"
    assert "xcon: stopped at step 5; given up after 0 restarts (XCON_MAX_RESTARTS)\n" in cluster.log(bounded)
    assert cluster.wait(restless) == "FAILED"
    assert "xcon: stopped at step 5, 2 times in a row; given up (XCON_MAX_IDLE)\n" in cluster.log(restless)
    assert cluster.show(restless)["Restarts"] == "1"
    for job in (cancelled, failed, bounded, f"{array}_0"):
        assert cluster.show(job)["Restarts"] == "0"
        assert "back into the queue" not in cluster.log(job)
    assert not list(Path(cluster.settings["XCON_JOBS"]).iterdir())


# --------------------------------------------------------------------------------------------------------
# Shards on the node's own disk


def staging(code: str, *arguments: str | Path, disk: Path) -> list[str]:
    """Lines that a piece of a job script prints."""
    done = subprocess.run(
        ["bash", "-euc", f"source slurm/stage.sh; {code}", "job", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "XCON_STAGE": str(disk)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture
def shard_set(tmp_path: Path) -> Path:
    """A folder that looks like one: two megabytes, and a card."""
    folder = tmp_path / "shard set"
    folder.mkdir()
    for number in range(2):
        (folder / f"train-{number}.tar").write_bytes(bytes([number]) * 2**20)
    (folder / "dataset.json").write_text("{}")
    return folder


def test_a_copy_is_whole_and_made_once(shard_set: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    code = 'stage "$1"; echo "$copy"'
    said, copy = staging(code, shard_set, disk=disk)
    assert said.endswith(f": copied {shard_set}, 2 MB, to {copy}")
    whole = {file.name: file.read_bytes() for file in shard_set.iterdir()}
    assert {file.name: file.read_bytes() for file in Path(copy).iterdir()} == whole
    assert staging(code, shard_set, disk=disk) == [copy]

    with (Path(copy) / "train-1.tar").open("r+b") as file:  # a node that went down before all was on its disk
        file.truncate(1000)
    Path(f"{copy}.part").mkdir()
    assert staging(code, shard_set, disk=disk) == [said, copy]
    assert {file.name: file.read_bytes() for file in Path(copy).iterdir()} == whole
    assert sorted(file.name for file in Path(copy).parent.iterdir()) == [
        Path(copy).name,
        f"{Path(copy).name}.lock",
    ]

    (shard_set / "dataset.json").write_text("{ }")  # another set in its place
    assert staging(code, shard_set, disk=disk)[-1] != copy


def test_jobs_of_a_node_share_a_copy_and_the_last_removes_it(shard_set: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    job = ["bash", "-euc", 'source slurm/stage.sh; stage "$1"; echo "$copy"; exec sleep 60', "job", shard_set]
    settings = {"PATH": os.environ["PATH"], "XCON_STAGE": str(disk)}
    jobs = [subprocess.Popen(job, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        first = [process.stdout.readline() for process in jobs if process.stdout]
        assert sum(": copied " in line for line in first) == 1
        copy = Path(next(line for line in first if ": copied " not in line).strip())
        removal = 'remove "$1"'
        staging(removal, shard_set, disk=disk)
        assert copy.is_dir()
        jobs[0].kill()
        jobs[0].wait()
        staging(removal, shard_set, disk=disk)
        assert copy.is_dir()
    finally:
        for process in jobs:
            process.kill()
            process.communicate()
    staging(removal, shard_set, disk=disk)
    assert not copy.exists()


def test_without_room_or_card_nothing_is_copied(shard_set: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    code = 'stage "$1"; echo "[$copy]"'
    with (shard_set / "train-1.tar").open("r+b") as file:
        file.truncate(8 * 2**40)  # a sparse file: 8 TB by its name, nothing on the disk
    said, copy = staging(code, shard_set, disk=disk)
    assert copy == "[]"
    assert re.search(
        rf": not copied, {shard_set} has 8388609 MB and {disk} \d+ MB free; it is read where it is$", said
    )
    assert [file.suffix for file in disk.rglob("*") if file.is_file()] == [".lock"]

    (shard_set / "dataset.json").unlink()
    assert staging(code, shard_set, disk=disk) == ["[]"]  # the command says what is wrong


@pytest.mark.parametrize(
    ("arguments", "shards"),
    [
        (["xcon/pretrain.py", "demo", "--shards", "a b", "--out", "c"], "a b"),
        (["demo", "--shards=a", "--out", "c"], "a"),
        (["demo", "--shards", "a", "--shards", "b"], "b"),
        (["demo", "--out", "c"], ""),
        (["demo", "--shards"], ""),
    ],
)
def test_the_shards_of_a_command(arguments: list[str], shards: str, tmp_path: Path):
    assert staging('shards_of "$@"', *arguments, disk=tmp_path) == [shards]


@pytest.mark.slurm
def test_shards_then_pretraining_then_finetuning(cluster: Cluster, tmp_path: Path):
    shards, pretrained, tuned = tmp_path / "shards", tmp_path / "pre trained", tmp_path / "tuned"
    small = ["--epochs", "1", "--batch-size", "16", "--image-size", "32", "--precision", "fp32"]

    def after(job: str) -> list[str]:
        return [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]

    build = cluster.submit(
        *("slurm/build_shards.sh", "synthetic", "--out", str(shards)),
        *("--classes", "6", "--per-class", "24", "--val-per-class", "2"),
    )
    pretrain = cluster.submit(
        *("--nodes=2", *after(build), "slurm/pretrain.sh", "demo"),
        *("--shards", str(shards), "--out", str(pretrained), *small),
    )
    finetune = cluster.submit(
        *("--nodes=2", *after(pretrain), "slurm/finetune.sh", "demo"),
        *("--shards", str(shards), "--init", str(pretrained), "--out", str(tuned), *small),
    )
    for job in (build, pretrain, finetune):
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    for job, run in ((pretrain, pretrained), (finetune, tuned)):
        assert "node 1 of 2 (node1), 1 process(es)" in cluster.log(job)
        assert "node 2 of 2 (node2), 1 process(es)" in cluster.log(job)
        start, *steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert (start["event"], start["processes"]) == ("start", 2)
        assert steps
        assert (run / "model.safetensors").exists()


@pytest.mark.slurm
def test_an_array_makes_the_table(cluster: Cluster, tiny_shards: Path, tmp_path: Path):
    """Two parts, one per node; a third task has none. The last of the two to end makes the table of both."""
    out = tmp_path / "the table"
    job = cluster.submit(
        *("--array=0-2", f"--output={cluster.logs}/%A_%a.out"),
        *(
            "slurm/reproduce.sh",
            "--size",
            "laptop",
            "--shards",
            str(tiny_shards),
            "--out",
            str(out),
            "--seeds",
            "1",
        ),
        *("--rows", "inception", "inception-meta", "--budget", "1"),
        *("--backbone", "test_resnet", "--image-weights", "none", "--image-size", "32"),
    )
    assert cluster.wait(f"{job}_2") == "FAILED"
    assert "xcon reproduce: --task 2: the parts are numbered 0 to 1 (see xcon reproduce --help)\n" in cluster.log(
        f"{job}_2"
    )
    for task in (f"{job}_0", f"{job}_1"):
        assert cluster.wait(task) == "COMPLETED", cluster.log(task)
        assert f"xcon: task {task[-1]} on node" in cluster.log(task)
    assert sum("the table waits for" in cluster.log(f"{job}_{n}") for n in (0, 1)) <= 1

    image, channels = json.loads((out / "results.json").read_text())["rows"]
    assert [row["label"] for row in (image, channels)] == ["image only", "+ meta channels"]
    for row, run in ((image, out / "inception-0"), (channels, out / "inception-meta-0")):
        measured = json.loads((run / "metrics.json").read_text())
        assert (row["n"], row["top1"]["mean"]) == (measured["n"], measured["top1"])
        assert json.loads((run / "config.json").read_text())["workers"] == 0  # of one core


@pytest.mark.slurm
def test_a_wrong_recipe_fails_the_job_and_is_named_in_its_log(cluster: Cluster, tmp_path: Path):
    job = cluster.submit("slurm/pretrain.sh", "dmeo", "--shards", "none", "--out", str(tmp_path / "run"))
    assert cluster.wait(job) == "FAILED"
    assert [line for line in cluster.log(job).splitlines() if "no recipe 'dmeo': one of paper, clip" in line]
    assert not (tmp_path / "run").exists()
