"""What a training needs of a machine: devices, precision, versions, compilers, nothing stray. Each a finding."""

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

SHOWN = ("torch", "accelerate", "deepspeed", "transformers", "timm")
PATIENCE = 30.0  # seconds for a program that may meet a server, or a driver, that is gone
HIDDEN = ("", "-1", "NoDevFiles")  # of CUDA_VISIBLE_DEVICES: no GPU; the last is SLURM's
KERNEL_MODULE = Path("/proc/driver/nvidia/version")  # seen in containers, too, where nvidia-smi is not
# A world that somebody else's launcher has named; Accelerate takes each of them for its own.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Attributes:
        level: error where a training would fail, warning where it would be slow, or fail elsewhere.
        subject: what was looked at.
        seen: what is so.
        do: what to change; empty where nothing is to be.
    """

    level: Literal["ok", "warning", "error"]
    subject: str
    seen: str
    do: str = ""


def answer(
    command: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What a program says. One that does not end is ended, and has failed as by `timeout`: with status 124.

    Args:
        command: the program and its arguments.
        seconds: that it is given.
        env: its environment; None: this one's.
    """
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            said, complained = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # srun ends what it has started
        else:
            return subprocess.CompletedProcess(command, process.returncode, said, complained)
        try:
            said, complained = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            said, complained = "", ""
    return subprocess.CompletedProcess(command, 124, said, f"{complained}no answer in {seconds:g} s\n")


def versions() -> list[Finding]:
    """The versions that matter, and each package that is missing or not as xcon requires."""
    shown = [f"{name} {importlib.metadata.version(name)}" for name in SHOWN if not _misfit(name, "")]
    found = [Finding("ok", "versions", ", ".join([f"python {platform.python_version()}", *shown]))]
    for required in map(Requirement, importlib.metadata.requires("xcon") or []):
        if required.marker and not required.marker.evaluate({"extra": ""}):
            continue
        if problem := _misfit(required.name, str(required.specifier)):
            found.append(Finding("error", "versions", problem, f'pip install "{required}"'))
    return found


def _misfit(name: str, specifier: str) -> str | None:
    """How an installed package is not as required."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed"
    fits = Requirement(f"{name}{specifier}").specifier.contains(version, prereleases=True)
    return None if fits else f"{name} {version} is installed, xcon needs {specifier}"


def devices(precision: str) -> list[Finding]:
    """The GPUs that torch sees, or why it sees none, and the precision that `--precision auto` takes."""
    found = [_gpus(driver_version())]
    on = "this GPU" if torch.cuda.is_available() else "this processor"
    slow = torch.cuda.is_available() and precision != "bf16"
    advice = "prefer GPUs of compute capability 8.0 or more (A100, L40S, H100 and later)" if slow else ""
    found.append(
        Finding("warning" if slow else "ok", "precision", f"--precision auto takes {precision} on {on}", advice)
    )
    return found


def _gpus(driver: str | None) -> Finding:
    if torch.cuda.is_available():
        facts = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        kinds = [f"{f.name}, {f.total_memory / 2**30:.0f} GiB, capability {f.major}.{f.minor}" for f in facts]
        seen = "; ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
        seen += f"; driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
        if len(set(kinds)) > 1:
            advice = "choose equal ones by CUDA_VISIBLE_DEVICES: the slowest sets the pace"
            return Finding("warning", "GPUs", seen, advice)
        return Finding("ok", "GPUs", seen)
    return _no_gpu(driver)


def _no_gpu(driver: str | None) -> Finding:
    """Whether it is right that torch sees none: not where there is a driver, or somebody has promised some."""
    build = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    given, visible = os.environ.get("SLURM_GPUS_ON_NODE", "0"), os.environ.get("CUDA_VISIBLE_DEVICES")
    with_nv = "start a container with --nv"
    if given != "0":
        seen = f"SLURM gave this job {given} here, but {build} sees none; driver {driver or 'not found'}"
        return Finding("error", "GPUs", seen, f"{with_nv}; else `nvidia-smi` in a job, and ask the site")
    if driver and visible in HIDDEN:
        seen = f"hidden: CUDA_VISIBLE_DEVICES={visible}, as in a job that asked for none"
        return Finding("warning", "GPUs", seen, "unset CUDA_VISIBLE_DEVICES, or ask for some by --gres=gpu:1")
    if driver:
        advice = f"install a torch whose CUDA the driver knows; {with_nv}"
        return Finding("error", "GPUs", f"driver {driver} is here, but {build} sees no GPU", advice)
    if visible not in (None, *HIDDEN):
        seen = f"CUDA_VISIBLE_DEVICES={visible} names some, but there is no NVIDIA driver"
        return Finding("error", "GPUs", seen, f"{with_nv}, or unset CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi"):
        seen = "none here: nvidia-smi is installed, but finds no driver"
        return Finding("warning", "GPUs", seen, "nothing on a login node; where GPUs should be, ask the site")
    return Finding("ok", "GPUs", "none here, and no NVIDIA driver: training is on the processor")


def driver_version() -> str | None:
    """Of NVIDIA's driver, by its program or its module in the kernel; None where there is neither."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]):
        done = answer(query, seconds=PATIENCE)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    if not KERNEL_MODULE.is_file():
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", KERNEL_MODULE.read_text())
    return found[0] if found else "unknown"


def compilers() -> Finding:
    """Whether DeepSpeed can build the operators of its first run."""
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if missing:
        seen = f"{' and '.join(missing)} not on PATH: DeepSpeed (zero*.yaml) cannot build its operators"
        advice = "load the site's gcc module; ninja is in the environment's bin; ddp.yaml needs neither"
        return Finding("warning", "compilers", seen, advice)
    return Finding("ok", "compilers", "g++ and ninja are here, for DeepSpeed's operators")


def launcher() -> list[Finding]:
    """What would decide about a launch without being named in its command."""
    found = []
    for name in ("default_config.yaml", "default_config.json"):
        stray = Path(constants.HF_HOME) / "accelerate" / name
        if stray.is_file():
            seen = f"{stray} decides wherever `accelerate launch` is given no --config_file"
            found.append(Finding("warning", "launcher", seen, "remove it, or always give --config_file"))
    for name in WORLD_SIZES:
        if os.environ.get(name, "1") not in ("", "1"):
            seen = f"{name}={os.environ[name]} in this shell: a training without a launcher would wait for others"
            found.append(Finding("warning", "launcher", seen, f"unset {name}"))
    return found or [Finding("ok", "launcher", "no stray Accelerate config, no world left in the environment")]
