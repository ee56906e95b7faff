"""Machines that something is wrong with: it is made so, and the doctor must find it and say what to do."""

import hashlib
import importlib.metadata
import io
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from tests import commands, test_slurm
from tests.training import BIN, ROOT
from xcon import bottleneck, disks, doctor, health, hub, network, scheduler
from xcon.health import Finding
from xcon.hub import File, Model
from xcon.scheduler import Partition

cluster = test_slurm.cluster  # the fixture


def is_wrong(finding: Finding, level: str, *words: str) -> None:
    """The finding is of this level, names these things, and says what to do."""
    assert finding.level == level, finding
    assert all(word in f"{finding.seen} -> {finding.do}" for word in words), finding
    assert finding.do


def program(folder: Path, name: str, script: str) -> None:
    """A stand-in."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


# ---- the command


@pytest.mark.slow
def test_a_machine_that_is_well(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two processes meet in earnest; the run folder is not made, and nothing is left where it would be."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    out = tmp_path / "runs/a b"
    assert commands.run(doctor.main, ["demo", "--shards", str(tiny_shards), "--out", str(out)]) == 0
    *lines, line = capsys.readouterr().out.splitlines()
    assert {word.split()[0] for word in lines} <= {"ok", "warning"}
    said = "\n".join(lines)
    for expected in (
        f"torch {importlib.metadata.version('torch')}, accelerate",
        "gloo: 2 process(es) met",
        f"shards: {tiny_shards}: train 96, val 12, test 36 of 6 classes; 76 photographs decode",  # 32 + 12 + 32
        "models: recipe demo needs nothing of the hub",
        "MB/s to the disk",
    ):
        assert expected in said
    assert list(tmp_path.iterdir()) == []
    assert shlex.split(line) == [
        *("sbatch", "--nodes=1", "--gres=gpu:1", "--cpus-per-task=16", "--mem=64G", "--time=24:00:00"),
        *("slurm/pretrain.sh", "demo", "--shards", str(tiny_shards), "--out", str(out)),
    ]


def test_an_error_is_exit_status_1_and_wrong_usage_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(network, "meet_here", lambda backend, processes: Finding("ok", backend, "not tried"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert commands.run(doctor.main, ["demo", "--shards", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert f"error   shards: {tmp_path / 'none'}: no such folder" in capsys.readouterr().out
    for wrong, message in (
        (["dmeo"], "RECIPE dmeo: no such recipe; there are paper"),
        (["--nodes", "0"], "--nodes 0: at least 1"),
        (["--gpus", "-1"], "--gpus -1: 0 or more"),
        (["--partition", "gpu"], "--partition gpu: unused, give --slurm too"),
        (["--shard", "x"], "--shard"),
    ):
        assert commands.run(doctor.main, wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("xcon doctor: ")
        assert message in error
        assert error.count("\n") == 1


def test_without_slurm_asking_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert commands.run(doctor.main, ["--slurm"]) == 2
    assert capsys.readouterr().err.startswith("xcon doctor: sinfo is not on PATH: no SLURM here")


def test_a_table_for_a_terminal_and_lines_for_a_log() -> None:
    found = [Finding("ok", "GPUs", "one [H100]"), Finding("error", "space", "none", "make room")]
    assert [doctor.line(f) for f in found] == ["ok      GPUs: one [H100]", "error   space: none -> make room"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(doctor.table(found))
    rows = [line.split() for line in console.export_text().splitlines()[1:]]
    assert rows == [["ok", "GPUs", "one", "[H100]"], ["error", "space", "none", "make", "room"]]


# ---- file systems


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    """2 MB, of which another's file takes 1.5: no measurement takes the rest."""
    with mounted(tmp_path / "full", "size=2m") as folder:
        (folder / "others").write_bytes(bytes(1_500_000))
        space, inodes = disks.run_folder(folder / "run")
        is_wrong(space, "error", str(folder), "0.0 GB free of 0.0 on tmpfs", "make room")
        assert inodes.level == "ok"
        assert [path.name for path in folder.iterdir()] == ["others"]


def test_a_disk_that_fills_up_while_it_is_written(tmp_path: Path) -> None:
    """As a quota does: there is room on the disk, and yet the write fails."""
    with mounted(tmp_path / "quota", "size=20m") as folder:
        finding = disks._speed(folder, disks.mount_of(folder))
        is_wrong(
            finding, "error", f"{folder}: a file of 64 MiB cannot be written (No space left on device)", "quota"
        )
        assert list(folder.iterdir()) == []


def test_a_read_only_folder(tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "ro,size=2g") as folder:
        finding = disks.run_folder(folder)[-1]
        is_wrong(finding, "error", f"{folder}: a file of 64 MiB cannot be written (Read-only file system)")


def test_a_file_system_without_room_for_files(tmp_path: Path) -> None:
    with mounted(tmp_path / "counted", "size=20g,nr_inodes=60") as folder:
        _, inodes = disks.run_folder(folder)
        is_wrong(inodes, "error", "more files fit", "du --inodes")


@pytest.mark.parametrize(
    ("name", "over", "under"),
    [
        (
            "myquota",
            "/home $HOME Yes/No 50.0GB/30.0K 8.96GB(17.91%)/33000(110.00%)",
            "/scratch 5.0TB 0.8TB(15.84%)",
        ),
        ("quota", "/dev/vda 1200* 1000 2000 6days 12 0 0", "/dev/vdb 120 1000 2000 12 0 0"),
    ],
)
def test_a_limit_that_is_near(
    name: str, over: str, under: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tools are stand-ins: NYU's as its pages show it, Linux's as its manual page does."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert disks.quota().seen == "no tool here (myquota or quota)"
    for lines, level in (([under], "ok"), ([under, over], "warning")):
        program(tmp_path, name, "".join(f"echo '{line}'\n" for line in lines))
        assert disks.quota().level == level
    is_wrong(disks.quota(), "warning", f"{name}: {over}")
    assert under not in disks.quota().seen
    program(tmp_path, name, "echo 'server does not respond' >&2; exit 1")
    is_wrong(disks.quota(), "warning", f"{name} does not answer (server does not respond)")
    program(tmp_path, name, f"echo '{under}'; exit 1")  # of two servers one
    assert disks.quota().level == "ok"


def test_a_file_system_is_called_by_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "memory", "size=2g") as folder:
        (folder / "deep").mkdir()
        found = disks.mount_of(folder / "deep")
        assert (found.point, found.kind, found.where) == (str(folder), "tmpfs", "memory")
        assert "memory (tmpfs)" in disks.run_folder(folder)[-1].seen
    kinds = {"nfs4": "network", "lustre": "network", "fuse.sshfs": "network", "xfs": "local", "overlay": "local"}
    for kind, where in kinds.items():
        mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint="/tmp", fstype=kind)]
        monkeypatch.setattr(disks.psutil, "disk_partitions", lambda mounts=mounts, **_: mounts)
        assert disks.mount_of(Path("/tmp")).where == where


def test_caches_in_the_home_directory_matter_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in disks.CACHES:
        monkeypatch.setenv(name, str(tmp_path / "scratch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert disks.caches(cluster=True).level == "ok"
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home/models"))
    is_wrong(disks.caches(cluster=True), "warning", "HF_HOME, TORCH_HOME", "source slurm/site.sh")
    assert disks.caches(cluster=False).level == "ok"


# ---- shards


def edited(shards: Path, tmp_path: Path, change: Callable[[Path], None]) -> list[Finding]:
    """What is found in a copy of a set that something was done to."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    change(copy)
    return disks.shard_set(copy)


def test_a_shard_that_was_cut(tiny_shards: Path, tmp_path: Path) -> None:
    def cut(copy: Path) -> None:
        os.truncate(copy / "train-000000.tar", 10_240)

    (finding,) = edited(tiny_shards, tmp_path, cut)
    is_wrong(finding, "error", "train-000000.tar: 10240 bytes", "xcon-shards verify")


def test_a_photograph_that_does_not_decode(tiny_shards: Path, tmp_path: Path) -> None:
    """Its bytes are overwritten where they lie, so that all sizes stay right: only decoding can tell."""

    def overwrite(copy: Path) -> None:
        split = disks.ShardSet(copy).split("test")
        with (copy / "test-000000.tar").open("r+b") as file:
            file.seek(int(split.offset[0]))
            file.write(bytes(int(split.size[0])))

    (finding,) = edited(tiny_shards, tmp_path, overwrite)
    first = disks.ShardSet(tiny_shards).split("test").image_id[0]
    is_wrong(finding, "error", f"test-000000.tar: {first}.jpg: does not decode")


def test_a_folder_that_is_no_set(tmp_path: Path) -> None:
    (finding,) = disks.shard_set(tmp_path)
    is_wrong(finding, "error", f"{tmp_path}: no dataset.json here", "give --shards DIR")


# ---- models


def test_models_are_those_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache made by hand: recipe laptop-image needs the weights of MobileNetV2, and nothing else."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    is_wrong(
        disks.models("laptop-image", cluster=True),
        "warning",
        "nothing was prefetched",
        "xcon prefetch laptop-image",
    )
    assert disks.models("laptop-image", cluster=False).level == "ok"
    repo, commit, data = "timm/mobilenetv2_100.ra_in1k", "a" * 40, b"weights"
    folder = tmp_path / "hub/models--timm--mobilenetv2_100.ra_in1k"
    weights = folder / "snapshots" / commit / "model.safetensors"
    for path, content in ((weights, data), (folder / "refs/main", commit.encode())):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    hub.write_down(Model(repo, commit, (File(weights.name, 7, hashlib.sha256(data).hexdigest()),)))
    found = disks.models("laptop-image", cluster=True)
    assert (found.level, found.seen) == ("ok", f"1 prefetched, whole, in {tmp_path / 'hub'}")
    is_wrong(
        disks.models("image", cluster=True),
        "error",
        "timm/resnet50.a1_in1k was not fetched",
        "xcon prefetch image",
    )
    weights.write_bytes(b"changed")
    is_wrong(disks.models("laptop-image", cluster=True), "error", f"{weights}: its bytes are not those")


def test_a_mac_has_neither_of_these_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert bottleneck.cores_per_process() == os.cpu_count()
    assert "perhaps from this machine's cache" in disks._speed(tmp_path, disks.Mount("/", "apfs", "local")).seen


# ---- names, ports, meetings


def test_a_name_that_means_nothing_or_the_machine_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    is_wrong(network.name(several=False), "warning", "no-such-host.invalid", "does not resolve", "/etc/hosts")
    is_wrong(network.name(several=True), "error", "does not resolve", "GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    is_wrong(network.name(several=True), "error", "other nodes would find themselves", "NCCL_SOCKET_IFNAME")
    assert network.name(several=False).level == "ok"
    assert network.is_loopback("127.0.1.1")  # Debian's
    assert network.is_loopback("::1")
    assert not network.is_loopback("10.77.0.1")


def test_processes_that_block_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL does behind a firewall, and srun where no core is left: a stand-in, that sleeps."""
    monkeypatch.setattr(network, "_STARTED", "import time; time.sleep(600)")
    is_wrong(network.meet_here("nccl", 3, 0.2, 0.1), "error", "3 processes did not meet", "no answer in 0.3 s")
    program(tmp_path, "srun", "exec sleep 600")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    is_wrong(network.meet_across("nccl", 2, "a", 1, 0.2, 0.1), "error", "no answer in 0.3 s")


def test_all_gpus_of_a_machine_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[str, int]] = []
    monkeypatch.setattr(network, "meet_here", lambda backend, processes: met.append((backend, processes)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert len(list(doctor.meetings(doctor.Settings(), 0))) == 3
    assert met == [("gloo", 2), ("nccl", 8)]


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        is_wrong(
            network.port(number), "error", f"{number}, where", "(Address already in use)", "--main_process_port"
        )
    assert network.port(network.free_port()).level == "ok"


def report(rank: int, host: str, address: str, met: list[int], error: str = "") -> str:
    values = f'"rank": {rank}, "host": "{host}", "address": "{address}", "met": {met}, "error": "{error}"'
    return "{" + values + "}\n"


def test_the_verdict_on_a_meeting() -> None:
    """By the reports of two processes, whatever else they print, in whatever order."""
    both = report(1, "b", "10.0.0.2", [0, 1]) + "[rank0] noise\n" + report(0, "a", "10.0.0.1", [0, 1])
    assert network.verdict("gloo", 2, both, "warning") == Finding(
        "ok", "gloo", "2 process(es) on a, b met and exchanged numbers"
    )
    alone = report(0, "a", "10.0.0.1", [0]) + report(1, "b", "10.0.0.2", [0])
    is_wrong(network.verdict("gloo", 2, alone, ""), "error", "rank 0 on a: met ranks [0]", "firewall")
    trap = report(0, "a", "127.0.1.1", [], "timed out") + report(1, "b", "127.0.1.1", [], "refused")
    is_wrong(network.verdict("nccl", 2, trap, ""), "error", "rank 1 on b: refused", "a means 127.0.1.1 on itself")
    half = report(0, "a", "10.0.0.1", [0, 1])
    is_wrong(network.verdict("gloo", 2, half, "srun: error: b: task 1: Killed"), "error", "task 1: Killed")
    is_wrong(network.verdict("gloo", 2, "", ""), "error", "nothing was said", "TORCH_DISTRIBUTED_DEBUG")


# ---- the machine


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version("torch")
    wanted = ["torch>=99", "no-such-package>=1", "rich>=13", 'nothing>1; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    shown, torch_, missing = health.versions()
    assert f"torch {installed}" in shown.seen
    is_wrong(torch_, "error", f"torch {installed} is installed, xcon needs >=99", 'pip install "torch>=99"')
    is_wrong(missing, "error", "no-such-package is not installed")


def test_what_would_decide_about_a_launch_unnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    for name in health.WORLD_SIZES:
        monkeypatch.delenv(name, raising=False)
    assert [finding.level for finding in health.launcher()] == ["ok"]
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text("use_cpu: true\n")
    monkeypatch.setenv("PMI_SIZE", "4")
    config, world = health.launcher()
    is_wrong(config, "warning", "accelerate/default_config.yaml decides", "--config_file")
    is_wrong(world, "warning", "PMI_SIZE=4", "unset PMI_SIZE")


def test_a_path_without_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    is_wrong(health.compilers(), "warning", "g++ and ninja not on PATH", "gcc module")
    for name in ("g++", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    assert health.compilers().level == "ok"


def test_a_program_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """By SIGTERM, which it may catch to say something; and by SIGKILL where it stays."""
    said = health.answer(["sh", "-c", "echo out; trap 'echo told >&2; exit' TERM; sleep 9 & wait"], seconds=0.5)
    assert (said.returncode, said.stdout, said.stderr) == (124, "out\n", "told\nno answer in 0.5 s\n")
    assert health.answer(["sh", "-c", "echo a; echo b >&2; exit 3"], seconds=9).returncode == 3


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs before all others, on a machine where torch sees no GPU and nothing promises any."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(health, "KERNEL_MODULE", tmp_path / "version")
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_driver_whose_gpus_torch_does_not_see(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare, "nvidia-smi", "echo 580.95.05; echo 580.95.05")
    is_wrong(health.devices("fp32")[0], "error", "driver 580.95.05 is here", "--nv")
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        is_wrong(health.devices("fp32")[0], "warning", f"CUDA_VISIBLE_DEVICES={hidden},", "--gres=gpu:1")


def test_gpus_that_were_promised(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without --nv there is no nvidia-smi, but the kernel's module can be seen."""
    assert health.devices("fp32")[0].level == "ok"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    is_wrong(health.devices("fp32")[0], "error", "CUDA_VISIBLE_DEVICES=0,1 names some", "--nv")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    words = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12.3.0\n"
    )
    (bare / "version").write_text(words)
    is_wrong(health.devices("fp32")[0], "error", "driver 570.86.15 is here", "--nv")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    is_wrong(health.devices("fp32")[0], "error", "SLURM gave this job 4 here", "driver 570.86.15", "--nv")


def test_a_driver_that_is_broken(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it looks on a login node that has the same packages as the others: right there, wrong in a job."""
    program(bare, "nvidia-smi", "echo 'NVIDIA-SMI has failed' >&2; exit 9")
    is_wrong(health.devices("fp32")[0], "warning", "nvidia-smi is installed, but finds no driver", "login node")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    is_wrong(health.devices("fp32")[0], "error", "SLURM gave this job 1 here", "driver not found")


def test_gpus_and_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(name: str, major: int) -> SimpleNamespace:
        return SimpleNamespace(name=name, total_memory=48 * 2**30, major=major, minor=0)

    found = [gpu("RTX 8000", 7), gpu("RTX 8000", 7)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: found[n])
    gpus, precision = health.devices("fp16")
    assert gpus.level == "ok"
    assert gpus.seen.startswith("2 x RTX 8000, 48 GiB, capability 7.0; driver")
    is_wrong(precision, "warning", "--precision auto takes fp16", "8.0 or more")
    found.append(gpu("A100", 8))
    is_wrong(health.devices("bf16")[0], "warning", "2 x RTX 8000", "1 x A100", "CUDA_VISIBLE_DEVICES")


# ---- SLURM


def test_partitions_are_read_as_sinfo_writes_them() -> None:
    """Lines as `sinfo --exact` of real clusters has them; hours and counts by hand."""
    lines = {
        "test*|2|8|8000|gpu:2|infinite": Partition("test", True, 2, 8, 8000, 2, "", None),
        "h200|16|128|2063937|gpu:h200:8(S:0-1)|7-00:00:00": Partition(
            "h200", False, 16, 128, 2063937, 8, "h200", 168.0
        ),
        "cs|100|48|180000+|(null)|30:00": Partition("cs", False, 100, 48, 180000, 0, "", 0.5),
        "mix|1|64|512000|gpu:a100:3,gpu:v100:1,tmp:5|2-12": Partition("mix", False, 1, 64, 512000, 4, "", 60.0),
        "mig|1|64|512000|gpu:1g.10gb:2(S:0)|infinite": Partition("mig", False, 1, 64, 512000, 2, "1g.10gb", None),
        "short|1|4|1000|gpu:tesla_t4:1|01:30:00": Partition("short", False, 1, 4, 1000, 1, "tesla_t4", 1.5),
    }
    for line, expected in lines.items():
        assert scheduler.read_partition(line) == expected


def test_a_request_is_a_share_of_a_node() -> None:
    """Of 128 CPUs, 2,048,000 MB (2,000 GB) and 8 GPUs: 2 GPUs are a quarter; the system has a tenth of memory."""
    node = Partition("h200", False, 16, 128, 2_048_000, 8, "h200", 168.0)
    ask = scheduler.propose(node, nodes=2, gpus=2, account="a", named=True)
    line = ask.line("slurm/finetune.sh", "paper", Path("data/my birds"), Path("runs/x"))
    assert line == (
        "sbatch --account=a --partition=h200 --nodes=2 --gres=gpu:h200:2 --cpus-per-task=32 --mem=450G "
        "--time=24:00:00 slurm/finetune.sh paper --shards 'data/my birds' --out runs/x"
    )
    short = Partition("cs", True, 100, 48, 192_000, 0, "", 0.5)
    ask = scheduler.propose(short, nodes=1, gpus=None, account="", named=True)
    assert ask.line("slurm/pretrain.sh", "demo", None, Path("run")) == (
        "sbatch --nodes=1 --cpus-per-task=48 --mem=168G --time=0:30:00 "
        "slurm/pretrain.sh demo --shards DIR --out run"
    )
    assert scheduler.propose(node, nodes=1, gpus=None, account="", named=False).partition == ""  # NYU Torch
    with pytest.raises(ValueError, match="--gpus 9: a node of h200 has 8"):
        scheduler.propose(node, nodes=1, gpus=9, account="", named=True)


def test_the_partition_with_gpus_is_chosen() -> None:
    cpu, small = Partition("cs", True, 100, 48, 1, 0, "", None), Partition("gpu", False, 9, 8, 1, 2, "", None)
    large = Partition("gpu", False, 2, 8, 1, 8, "", None)
    assert scheduler.choose([cpu, small, large], None, 2) == large
    assert scheduler.choose([cpu, small, large], None, 3) == small  # of the others there are two
    assert scheduler.choose([cpu, small, large], "cs", 1) == cpu
    with pytest.raises(ValueError, match="--partition nope: SLURM has cs, gpu"):
        scheduler.choose([cpu, small, large], "nope", 1)
    with pytest.raises(ValueError, match="--nodes 10: gpu has 9 nodes"):
        scheduler.choose([small, large], None, 10)


def test_nyu_torch_wants_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XCON_SITE", "Torch")
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    is_wrong(scheduler.account(), "error", "no job without", "my_slurm_accounts")
    monkeypatch.setenv("SBATCH_ACCOUNT", "torch_pr_1_general")
    assert scheduler.account() == Finding("ok", "account", "torch_pr_1_general (site torch)")


@pytest.mark.slurm
def test_on_a_cluster(cluster: test_slurm.Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    """On the login node its line is one that SLURM takes; in a job both nodes meet, but not at localhost."""
    words = ["demo", "--slurm", "--shards", str(tiny_shards), "--out", str(tmp_path / "run")]
    home = {"HF_HOME": str(tmp_path), "SBATCH_ACCOUNT": "", "XCON_SITE": "other"}
    said = cluster.run("exec", str(BIN / "xcon"), "doctor", *words, "--nodes", "2", "--gpus", "1", **home)
    assert "partition: test (default): 2 node(s) of 8 CPUs, 8 GB, 2 GPU(s), 4 CPUs for each; no time limit" in said
    assert "warning preemption: jobs of test may be preempted (REQUEUE), after 10 s of grace, and requeued" in said
    line = shlex.split(said.splitlines()[-1])
    assert line[1:6] == ["--nodes=2", "--gres=gpu:1", "--cpus-per-task=4", "--mem=3G", "--time=24:00:00"]
    cluster.run("exec", "sbatch", "--test-only", *line[1:])

    job = cluster.submit(
        *("--nodes=2", "--ntasks-per-node=1", f"--chdir={ROOT}"),
        *("--wrap", shlex.join([str(BIN / "xcon"), "doctor", *words])),
        **home,
    )
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    assert "ok      name: node1 is 10.77.0.1" in log
    assert f"port: {10000 + int(job)}, where processes meet, is free" in log
    assert "gloo: 2 process(es) on node1, node2 met" in log

    trap = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456", "LOCAL_RANK": "0"}
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--mem=3G", str(BIN / "python"), "-c"]
    printed = cluster.run("exec", *step, "from xcon import network; network.join()", "gloo", "3", **trap)
    is_wrong(network.verdict("gloo", 2, printed, ""), "error", "rank 1 on node2: ", "firewall")
