"""The job scripts: linted, and run on a real SLURM of two nodes that tests/minislurm.sh starts here."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from xcon.records import Card, Shard

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PATIENCE = 600  # seconds, on a busy machine
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

    def run(self, *command: str, cwd: Path = ROOT, **settings: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("XCON_")}
        done = subprocess.run(
            [ROOT / "tests/minislurm.sh", *command],
            env=environment | self.settings | settings,
            cwd=cwd,
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

    def jobs(self, *number: str) -> list[dict[str, str]]:
        """What SLURM knows of a job, or of all."""
        lines = self.run("exec", "scontrol", "show", "job", "--oneliner", *number).splitlines()
        return [dict(field.split("=", 1) for field in line.split() if "=" in field) for line in lines]

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of one job."""
        (facts,) = self.jobs(job)
        return facts

    def wait(self, job: str) -> str:
        """Returns the state in which the job ended (`sbatch --wait` polls too seldom)."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            state = self.show(job)["JobState"]
            if state in ENDED:
                return state
            time.sleep(0.5)
        return f"still {state} after {PATIENCE} s"

    def local_files(self, node: str) -> list[str]:
        """The files on the own disk of a node."""
        found = self.run("exec", "srun", f"--nodelist={node}", "find", str(self.local), "-type", "f")
        return [Path(file).name for file in found.splitlines()]

    def log(self, job: str) -> str:
        file = self.logs / f"{job}.out"
        return file.read_text() if file.exists() else "(no log)"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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


def test_the_image_has_what_the_package_needs():
    """Apptainer, which builds it, wants a network; checked here is that it copies all that it installs."""
    text = (ROOT / "slurm/xcon.def").read_text()
    header, *rest = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    assert list(sections) == ["files", "post", "environment", "test", "runscript"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    base = re.search(r"^Bootstrap: docker\nFrom: python:(\d)\.(\d+)-slim-\w+$", header, flags=re.MULTILINE)
    assert base
    assert project["project"]["requires-python"] == f">={base[1]}.{base[2]}"
    needed = [*project["project"]["license-files"], project["project"]["readme"], "pyproject.toml"]
    needed += project["tool"]["setuptools"]["packages"]
    copied = dict(line.split() for line in sections["files"].splitlines() if line)
    assert copied == {name: f"/opt/xcon/{name}" for name in needed}
    assert all((ROOT / name).exists() for name in copied)
    for name in project["project"]["scripts"]:
        assert f"/opt/venv/bin/{name} --help\n" in sections["test"]
    for section in ("post", "environment", "test", "runscript"):
        checked = [BIN / "shellcheck", "--shell=sh", "--exclude=SC1091", "-"]
        done = subprocess.run(checked, input=sections[section], text=True, capture_output=True, check=False)
        assert done.stdout + done.stderr == ""


def site(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A piece of a job script that has sourced the site's."""
    return subprocess.run(
        ["bash", "-euc", f"source slurm/site.sh; {code}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **settings},
        text=True,
        capture_output=True,
        check=False,
    )


def test_site_runs_a_command_in_the_image_and_keeps_caches_off_the_home_directory(tmp_path: Path):
    """`singularity` is a stand-in that shows how it was called. What is bound must be there: the disk is not."""
    programs(tmp_path, singularity='#!/bin/bash\nprintf "%s\\n" "$@" "$HF_HOME" "$HF_HUB_OFFLINE"\n')
    image, scratch, jobs = (tmp_path / name for name in ("cuda 12.sif", "scratch", "my jobs"))
    image.touch()
    scratch.mkdir()
    jobs.mkdir()
    settings = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SCRATCH": str(scratch),
        "SLURM_CLUSTER_NAME": "greene",
        "SLURM_JOB_ID": "1",
        "XCON_IMAGE": str(image),
        "XCON_OVERLAY": "/scratch/me/env.ext3",
        "XCON_JOBS": str(jobs),
        "SLURM_TMPDIR": "/local disk",
    }
    become = 'become xcon --note "two  words"'
    done = site(become, **settings)
    assert done.stdout.splitlines() == [
        *("exec", "--nv", "--overlay", "/scratch/me/env.ext3:ro"),
        *("--bind", str(scratch), "--bind", str(jobs), str(image)),
        *("bash", "-c", 'source "$0" && exec "$@"', "/ext3/env.sh", "xcon", "--note", "two  words"),
        *(f"{scratch}/xcon-cache/huggingface", "1"),
    ]
    done = site(become, **settings | {"XCON_IMAGE": "docker://python", "SLURM_TMPDIR": str(tmp_path)})
    assert f"--bind\n{tmp_path}\ndocker://python\nbash\n" in done.stdout
    done = site(become, **settings | {"XCON_IMAGE": "cuda99.sif"})
    assert (done.returncode, done.stdout) == (2, "")
    images = "/scratch/work/public/singularity"
    assert done.stderr == (
        f"xcon: {images}/cuda99.sif: no such image; XCON_IMAGE is a path, or a name in {images}\n"
    )


@pytest.mark.parametrize(
    ("settings", "processes", "devices", "told"),
    [
        ({}, "1", "", True),
        ({"XCON_GPUS": "0"}, "1", "", False),
        ({"XCON_GPUS": "8"}, "8", "all", False),
        ({"XCON_GPUS": "2", "SLURM_GPUS_ON_NODE": "8"}, "2", "all", False),
        ({"SLURM_GPUS_ON_NODE": "4"}, "4", "all", False),
    ],
)
def test_gpus_that_slurm_does_not_count(settings: dict[str, str], processes: str, devices: str, told: bool):
    """On a node whose GPUs can be seen."""
    code = 'sees_gpus() { true; }; share_cores; echo "$processes" "${CUDA_VISIBLE_DEVICES-all}"'
    done = site(code, **settings)
    assert done.stdout == f"{processes} {devices}\n"
    assert ("has GPUs and SLURM gave the job none" in done.stderr) == told


# In place of the container's tool: as one written in Go it leaves no signal ignored in what it starts.
CONTAINER = """#!{python}
import os, signal, sys

for one in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(one, signal.SIG_DFL)
os.execvp("bash", sys.argv[sys.argv.index("bash") :])
"""


def programs(folder: Path, **texts: str) -> Path:
    """Stand-ins for programs, in a folder; returns a file to source, with which they are found first."""
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "env").write_text(f"PATH={folder}:$PATH\n")
    return folder / "env"


def in_container(folder: Path) -> dict[str, str]:
    """Settings by which a job runs in a container, which is a stand-in."""
    programs(folder, apptainer=CONTAINER.format(python=sys.executable))
    (folder / "image.sif").touch()
    return {"PATH": f"{folder}:{os.environ['PATH']}", "XCON_IMAGE": str(folder / "image.sif")}


@pytest.mark.parametrize("contained", [False, True])
def test_launchers_ignore_what_the_trainers_handle(contained: bool, tmp_path: Path):
    """`accelerate` is a stand-in that shows which signals it ignores: bit n - 1 stands for signal n."""
    settings = in_container(tmp_path) if contained else {"PATH": os.environ["PATH"]}
    environment = programs(tmp_path, accelerate="#!/bin/bash\nexec grep SigIgn: /proc/self/status\n")
    settings |= {"XCON_ENV": str(environment), "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "slurm/launch.sh", "xcon/pretrain.py", "demo"],
        cwd=ROOT,
        env=settings,
        text=True,
        capture_output=True,
        check=True,
    )
    ignored = int(done.stdout.splitlines()[-1].split()[1], 16)
    both = 1 << signal.SIGTERM - 1 | 1 << signal.SIGUSR1 - 1
    assert ignored & both == both


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

    patient = ["--rdzv_conf", "read_timeout=900,join_timeout=1800"]
    meet = ["--rdzv_backend", "c10d", *patient, "--main_process_ip", "node1"] if layout.nodes > 1 else []
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
    trainer = STAND_IN.format(python=sys.executable)
    launcher = f'#!/bin/bash\n{tmp_path}/trainer "$@"\nexit $?\n'  # a process of its own, as a launcher is
    environment = programs(tmp_path, accelerate=launcher, trainer=trainer, xcon=trainer)
    settings = in_container(tmp_path)

    def submit(what: str, script: str = "pretrain", *options: str, **more: str) -> str:
        options = (*(["--nodes=2"] if script == "pretrain" else []), *options)
        return cluster.submit(*options, f"slurm/{script}.sh", what, XCON_ENV=str(environment), **settings, **more)

    told, cancelled, failed = submit("waits"), submit("waits"), submit("fails")
    restless = submit("stops", XCON_MAX_IDLE="2")
    bounded = submit("stops", XCON_MAX_RESTARTS="0")
    array = submit("waits", "reproduce", "--array=0-1", f"--output={cluster.logs}/%A_%a.out")
    for job, tasks in ((told, 2), (cancelled, 2), (f"{array}_0", 1), (f"{array}_1", 1)):
        wait_until(lambda job=job, tasks=tasks: cluster.log(job).count("running") == tasks)
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
    wait_until(lambda: not list(Path(cluster.settings["XCON_JOBS"]).iterdir()))  # all notes are thrown away


# In place of SLURM: a step of one node, whose processes are a group; `scontrol` writes down
# what it was asked.
SRUN = """#!{python}
import os, sys

os.setsid()
command = sys.argv[sys.argv.index("bash") :]
with open("{folder}/steps", "a") as file:
    file.write(f"{{os.getpid()}}\\n")
os.environ["SLURM_NODEID"] = "0"
os.execvp("bash", command)
"""
SCONTROL = '#!/bin/bash\ncase $1 in show) echo node1 ;; *) echo "$@" >>"{folder}/asked" ;; esac\n'
# Imports for a while, and sees then whether it was asked to stop.
IMPORTS = """#!/bin/bash
echo waits
until [ -e "$XCON_ASKED" ]; do sleep 0.05; done
echo "step 0" >"$XCON_STOPPED"
exit 75
"""
WAITS = "#!/bin/bash\necho waits\nsleep 60\n"


def test_a_failed_job_says_why_in_its_last_line(tmp_path: Path):
    """`accelerate` is a stand-in that runs the trainer, which refuses its settings, and then says much itself."""
    trainer = f"{BIN}/xcon pretrain demo --shards none --out none --bogus 3"
    launcher = f"#!/bin/bash\n{trainer}\nstatus=$?\necho much >&2\nexit $status\n"
    stubs = {"srun": SRUN, "scontrol": SCONTROL}
    stubs = {name: text.format(python=sys.executable, folder=tmp_path) for name, text in stubs.items()}
    settings = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"}
    settings |= {"XCON_ENV": str(programs(tmp_path, **stubs, accelerate=launcher))}
    settings |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "XCON_JOBS": str(tmp_path / "jobs")}
    done = subprocess.run(
        ["bash", "slurm/pretrain.sh", "demo"],
        cwd=ROOT,
        env=settings,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    *_, before, last = done.stderr.splitlines()
    assert before == "much"
    assert last.startswith("failed: xcon pretrain: Unrecognized options: --bogus")
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.parametrize("moment", ["staging", "importing"])
def test_a_signal_before_the_trainer_hears_it_is_not_lost(moment: str, shard_set: Path, tmp_path: Path):
    stubs = {"srun": SRUN, "scontrol": SCONTROL}
    stubs = {name: text.format(python=sys.executable, folder=tmp_path) for name, text in stubs.items()}
    stubs |= {"accelerate": IMPORTS} | ({"cp": WAITS} if moment == "staging" else {})
    settings = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"}
    settings |= {"XCON_ENV": str(programs(tmp_path, **stubs)), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    settings |= {"XCON_JOBS": str(tmp_path / "jobs"), "XCON_STAGE": str(tmp_path / "disk")}
    command = ["bash", "slurm/pretrain.sh", "demo", "--shards", str(shard_set)]
    log = tmp_path / "log"
    with log.open("w") as file:
        job = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=file, stderr=subprocess.STDOUT)
    wait_until(lambda: "waits" in log.read_text())
    os.killpg(int((tmp_path / "steps").read_text().split()[-1]), signal.SIGUSR1)
    assert job.wait() == 0
    stopped = "the copying of shards" if moment == "staging" else "step 0"
    assert log.read_text().endswith(f"xcon: stopped at {stopped}; back into the queue, restart 1 of at most 50\n")
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert [file.suffix for file in (tmp_path / "disk").rglob("*") if file.is_file()] == [".lock"]


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
    (folder / "train-0.index.parquet").write_bytes(b"index")  # the other has none: xcon makes it anew
    (folder / "dataset.json").write_text(card(2))
    return folder


def card(tars: int) -> str:
    """As `Card.to_json` writes it."""
    shards = tuple(Shard(file=f"train-{number}.tar", samples=1, size=2**20, sha256="") for number in range(tars))
    return Card(classes=(), splits={"train": shards}, made_by={}).to_json()


# What a job does on a node, in its two steps.
STAGED = '(stage "$1"); use "$1"; echo "$copy"'


def test_a_copy_is_whole_and_made_once(shard_set: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    (shard_set / "audit").mkdir()
    (shard_set / "audit/notes.txt").touch()  # not of the set
    said, copy = staging(STAGED, shard_set, disk=disk)
    assert said.endswith(f": copied {shard_set}, 2 MB, to {copy}")
    shutil.rmtree(shard_set / "audit")
    whole = {file.name: file.read_bytes() for file in shard_set.iterdir()}
    assert {file.name: file.read_bytes() for file in Path(copy).iterdir()} == whole
    (shard_set / "notes.txt").touch()
    assert staging(STAGED, shard_set, disk=disk) == [copy]

    with (Path(copy) / "train-1.tar").open("r+b") as file:  # a node that went down before all was on its disk
        file.truncate(1000)
    Path(f"{copy}.part").mkdir()
    assert staging(STAGED, shard_set, disk=disk) == [said, copy]
    assert {file.name: file.read_bytes() for file in Path(copy).iterdir()} == whole
    assert sorted(file.name for file in Path(copy).parent.iterdir()) == [
        Path(copy).name,
        f"{Path(copy).name}.lock",
    ]

    (shard_set / "dataset.json").write_text(card(1))  # another set in its place
    assert staging(STAGED, shard_set, disk=disk)[-1] != copy


@contextlib.contextmanager
def reading(shard_set: Path, disk: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A job that reads a copy of the set: its process, and the copy."""
    job = ["bash", "-euc", f"source slurm/stage.sh; {STAGED}; exec sleep 60", "job", shard_set]
    settings = {"PATH": os.environ["PATH"], "XCON_STAGE": str(disk)}
    process = subprocess.Popen(job, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE)
    try:
        said = ": copied "
        while ": copied " in said:
            said = (process.stdout or io.StringIO()).readline()
        yield process, Path(said.strip())
    finally:
        process.kill()
        process.communicate()


def test_jobs_of_a_node_share_a_copy_and_the_last_removes_it(shard_set: Path, tmp_path: Path):
    disk, removal = tmp_path / "disk", 'remove "$1"'
    with reading(shard_set, disk) as (first, copy), reading(shard_set, disk) as (_, same):
        assert same == copy
        staging(removal, shard_set, disk=disk)
        assert copy.is_dir()
        first.kill()
        first.wait()
        staging(removal, shard_set, disk=disk)
        assert copy.is_dir()
    staging(removal, shard_set, disk=disk)
    assert not copy.exists()


def test_a_copy_that_is_read_is_not_made_anew(shard_set: Path, tmp_path: Path):
    """Somebody cleaned up on the node; who reads the copy reads on, and the next has the set where it is."""
    disk = tmp_path / "disk"
    with reading(shard_set, disk) as (_, copy):
        (copy / "train-1.tar").unlink()
        said, none = staging(STAGED, shard_set, disk=disk)
        assert said.endswith(
            f": not copied, another job reads a copy that is no longer whole; {shard_set} is read where it is"
        )
        assert none == ""
        assert (copy / "train-0.tar").is_file()
    assert staging(STAGED, shard_set, disk=disk)[-1] == str(copy)
    assert (copy / "train-1.tar").is_file()


def test_where_there_is_no_room_copies_that_nobody_reads_make_some(shard_set: Path, tmp_path: Path):
    """The disk's free bytes are made up: none as long as the first copy is there."""
    disk = tmp_path / "disk"
    left, kept, new = (shutil.copytree(shard_set, tmp_path / name) for name in ("left", "kept", "new"))
    (left / "dataset.json").write_text(card(1))
    (kept / "dataset.json").write_text(card(0))
    copy = staging(STAGED, left, disk=disk)[-1]
    with reading(kept, disk) as (_, read):
        room = f'free_bytes() {{ if [ -d "{copy}" ]; then echo 0; else echo {2**22}; fi; }}'
        said, made = staging(f"{room}; {STAGED}", new, disk=disk)
        assert said.endswith(f": copied {new}, 2 MB, to {made}")
        assert sorted(disk.glob("*/*[!k]")) == sorted([read, Path(made)])


def test_without_room_or_card_nothing_is_copied(shard_set: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    with (shard_set / "train-1.tar").open("r+b") as file:
        file.truncate(8 * 2**40)  # a sparse file: 8 TB by its name, nothing on the disk
    said, copy = staging(STAGED, shard_set, disk=disk)
    assert copy == ""
    assert re.search(
        rf": not copied, {shard_set} has 8388609 MB and {disk} \d+ MB free; it is read where it is$", said
    )
    assert [file.suffix for file in disk.rglob("*") if file.is_file()] == [".lock"]

    (shard_set / "dataset.json").unlink()
    settings = {"PATH": os.environ["PATH"], "XCON_STAGE": str(disk)}
    for what in ("copy", "remove"):  # the command says what is wrong
        step = ["bash", "slurm/stage.sh", what, "demo", "--shards", shard_set]
        done = subprocess.run(step, cwd=ROOT, env=settings, text=True, capture_output=True, check=True)
        assert done.stdout + done.stderr == ""


@pytest.mark.slurm
def test_a_job_says_where_its_shards_did_not_fit(cluster: Cluster, shard_set: Path, tmp_path: Path):
    """The nodes' own disks have 64 MB."""
    (tmp_path / "accelerate").write_text('#!/bin/bash\nprintf "[%s]\\n" "$@"\n')
    (tmp_path / "accelerate").chmod(0o755)
    (tmp_path / "env").write_text(f"PATH={tmp_path}:$PATH\n")
    settings = {"XCON_ENV": str(tmp_path / "env"), "XCON_STAGE": str(cluster.local)}
    command = ["slurm/evaluate.sh", "run", "--shards", str(shard_set)]

    fits = cluster.submit(*command, **settings)
    assert cluster.wait(fits) == "COMPLETED", cluster.log(fits)
    copied = re.search(r"copied .*, 2 MB, to (\S+)", cluster.log(fits))
    assert copied
    end = f"[run]\n[--shards]\n[{shard_set}]\n[--workers]\n[0]\n"
    said = "".join(line for line in cluster.log(fits).splitlines(keepends=True) if line.startswith("["))
    assert said.endswith(f"{end}[--shards]\n[{copied[1]}]\n")  # the last one counts

    with (shard_set / "train-1.tar").open("r+b") as file:
        file.truncate(2**26)
    full = cluster.submit("--nodes=2", *command, **settings)
    assert cluster.wait(full) == "COMPLETED", cluster.log(full)
    for node in ("node1", "node2"):
        assert f"xcon: {node}: not copied, {shard_set} has 65 MB and {cluster.local} 6" in cluster.log(full)
        assert [name for name in cluster.local_files(node) if not name.endswith(".lock")] == []
    assert cluster.log(full).count(end) == 2


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


# --------------------------------------------------------------------------------------------------------
# The commands of the cluster page and of the README, and what disturbs them

SIZE = ("--batch-size", "16", "--image-size", "32", "--precision", "fp32")
NETWORK = ("--image-backbone", "test_resnet", "--image-weights", "none")
PRETRAIN = (*SIZE, *NETWORK, "--text-model", "small-distilbert", "--epochs", "8", "--log-every", "1")
# What a command is given, so that it has less to do; nothing else of it is changed.
SMALL = {
    "build_shards": (),
    "pretrain": (*PRETRAIN, "--checkpoint-every", "5"),
    "finetune": (*SIZE, "--epochs", "1"),
    "evaluate": (),
    "reproduce": (
        *("--size", "laptop", "--rows", "inception", "inception-meta", "--seeds", "1", "--budget", "1"),
        *("--backbone", "test_resnet", "--image-weights", "none", "--image-size", "32"),
    ),
}
# In place of sbatch: no GPUs, two tasks in an array, few cores and little memory.
SBATCH = """#!{python}
import os, re, sys
from pathlib import Path

words = [re.sub("^--array=.*", "--array=0-1", word) for word in sys.argv[1:] if not word.startswith("--gres=")]
(script,) = [word for word in words if word.endswith(".sh")]
os.execv("/usr/bin/sbatch", ["sbatch", "--mem=1G", "--cpus-per-task=1", *words, *{small!r}[Path(script).stem]])
"""


def submissions(page: str) -> list[str]:
    """The lines of a page that submit jobs."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "sbatch " in line]


def test_the_readme_submits_what_the_cluster_page_does():
    def plain(line: str) -> list[str]:
        line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)
        own = ("--parsable", "--dependency=", "--array=0-7")
        return sorted(word for word in shlex.split(line) if not word.startswith(own))

    page = [plain(line) for line in submissions("docs/clusters.md")]
    assert len(page) == 6
    assert [line for line in submissions("README.md") if plain(line) not in page] == []


class Chain(NamedTuple):
    """What all commands of the cluster page left behind."""

    folder: Path
    logs: dict[str, list[str]]


@pytest.fixture(scope="module")
def chain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Runs them in a checkout's folder with a small made-up release in place of NABirds."""
    here = tmp_path_factory.mktemp("a checkout")
    for name in ("xcon", "shards", "slurm", "accelerate_configs"):
        (here / name).symlink_to(ROOT / name)
    release = ["--classes", "6", "--per-class", "24", "--val-per-class", "2", "--keep-source", "r/nabirds"]
    subprocess.run([BIN / "xcon-shards", "build", "synthetic", "--out", "r/set", *release], cwd=here, check=True)
    (here / "r/nabirds/nabirds_with_loc_2019.json").rename(here / "nabirds_with_loc_2019.json")
    subprocess.run(["tar", "czf", "nabirds.tar.gz", "-C", "r", "nabirds"], cwd=here, check=True)
    (here / "bin").mkdir()
    (here / "bin/sbatch").write_text(SBATCH.format(python=sys.executable, small=SMALL))
    (here / "bin/sbatch").chmod(0o755)
    commands = "\n".join(submissions("docs/clusters.md"))
    settings = {"PATH": f"{here}/bin:{os.environ['PATH']}", "XCON_STAGE": str(cluster.local)}
    cluster.run("exec", "bash", "-euc", commands, cwd=here, **settings)

    def ours() -> list[dict[str, str]]:
        return [job for job in cluster.jobs() if job["WorkDir"] == str(here).split()[0]]

    wait_until(lambda: all(job["JobState"] in ENDED for job in ours()))
    logs: dict[str, list[str]] = {}
    for file in here.glob("*.out"):
        logs.setdefault(file.name.split("-")[1], []).append(file.read_text())
    assert {job["JobState"] for job in ours()} == {"COMPLETED"}, logs
    return Chain(here, logs)


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of a run's log without what differs between two equal runs."""
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in every if line["event"] == event]


@pytest.mark.slurm
def test_every_command_of_the_cluster_page(chain: Chain):
    """Two nodes took part where two were asked for; the table is of what was measured."""
    runs = chain.folder / "runs"
    assert {name: len(logs) for name, logs in chain.logs.items()} == {
        "shards": 2,
        "pretrain": 1,
        "finetune": 1,
        "evaluate": 1,
        "reproduce": 3,
    }
    for name in ("pretrain", "evaluate"):
        for node in (1, 2):
            assert f"node {node} of 2 (node{node}), 1 process(es)" in chain.logs[name][0]
    assert lines(runs / "pretrain", "start")[0]["processes"] == 2
    assert len(lines(runs / "pretrain", "train")) == 48
    assert "each evaluated once, by 2 process(es)" in chain.logs["evaluate"][0]
    assert json.loads((runs / "paper/metrics.json").read_text())["n"] == 36

    image, channels = json.loads((runs / "table/results.json").read_text())["rows"]
    assert [row["label"] for row in (image, channels)] == ["image only", "+ meta channels"]
    for row, run in ((image, runs / "table/inception-0"), (channels, runs / "table/inception-meta-0")):
        measured = json.loads((run / "metrics.json").read_text())
        assert (row["n"], row["top1"]["mean"]) == (measured["n"], measured["top1"])
        assert json.loads((run / "config.json").read_text())["workers"] == 0  # of one core
    assert sum("without --task the table is made" in log for log in chain.logs["reproduce"]) == 2


@pytest.mark.slurm
def test_every_node_reads_from_its_own_disk_and_leaves_it_empty(chain: Chain, cluster: Cluster):
    everything = "".join(log for logs in chain.logs.values() for log in logs)
    for node in ("node1", "node2"):
        assert f"xcon: {node}: copied data/nabirds, " in everything
        assert [name for name in cluster.local_files(node) if not name.endswith(".lock")] == []
    for run in ("pretrain", "paper", "table/inception-0"):
        config = json.loads((chain.folder / "runs" / run / "config.json").read_text())
        assert config["shards"].startswith(f"{cluster.local}/")


@pytest.mark.slurm
def test_disturbed_runs_end_as_the_undisturbed_one(chain: Chain, cluster: Cluster, tmp_path: Path):
    """A node that crashes, a job with a higher priority, a signal: all of the run is there, to the bit."""
    crashed, preempted, signalled = (tmp_path / name for name in ("crashed", "preempted", "signalled"))

    def submit(run: Path, *options: str) -> str:
        arguments = ["--shards", str(chain.folder / "data/nabirds"), "--out", str(run), *SMALL["pretrain"]]
        return cluster.submit("--nodes=2", *options, "slurm/pretrain.sh", "paper", *arguments)

    def under_way(run: Path) -> bool:
        return (run / "metrics.jsonl").exists() and len(lines(run, "train")) > 5

    def interrupted(run: Path) -> None:
        assert not lines(run, "end"), "it was done before it was disturbed"

    jobs = {crashed: submit(crashed, "--partition=urgent")}
    wait_until(lambda: under_way(crashed))
    cluster.run("crash", "node2")
    interrupted(crashed)
    wait_until(lambda: cluster.show(jobs[crashed])["Restarts"] == "1")
    cluster.run("boot", "node2")

    jobs |= {preempted: submit(preempted), signalled: submit(signalled, "--partition=urgent")}
    wait_until(lambda: under_way(preempted))
    # Six of the eight cores of each node: they are free only without the job that may be preempted.
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--cpus-per-task=6", "--wrap", "sleep 1")
    interrupted(preempted)
    wait_until(lambda: under_way(signalled))
    cluster.run("exec", "scancel", "--signal=USR1", jobs[signalled])
    interrupted(signalled)

    reference = chain.folder / "runs/pretrain"
    for run, job in jobs.items():
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)
        assert cluster.show(job)["Restarts"] == "1"
        assert cluster.log(job).count("train 1/48 ") == 1  # it went on, and did not begin again
        for event in ("train", "val", "end"):
            assert lines(run, event) == lines(reference, event)
        assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
        told = [] if run == crashed else ["SIGUSR1"]
        assert re.findall(r"stopped at step \d+ by (\w+);", cluster.log(job)) == told
    assert cluster.wait(urgent) == "COMPLETED"
