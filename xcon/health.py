"""What a training needs of a machine: devices, precision, versions, compilers, nothing stray. Each a finding."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

SHOWN = ("torch", "accelerate", "deepspeed", "transformers", "timm")
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
    if driver is None:
        return Finding("ok", "GPUs", "none here, and no NVIDIA driver: training is on the processor")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Finding("warning", "GPUs", "hidden: CUDA_VISIBLE_DEVICES is empty", "unset CUDA_VISIBLE_DEVICES")
    build = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    advice = "install a torch whose CUDA the driver knows; start a container with --nv"
    return Finding("error", "GPUs", f"driver {driver} is here, but {build} sees no GPU", advice)


def driver_version() -> str | None:
    """Of NVIDIA's driver; None where it is not installed or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, text=True, capture_output=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


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
