"""Two processes as `accelerate launch` sets them up, in a moment: forked from one that has imported everything."""

import concurrent.futures
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 - starts the processes
from accelerate.commands import launch as launcher
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ROOT = Path(__file__).parent.parent
PROCESSES = 2


def launched(config: Path) -> dict[str, str]:
    """The environment that `accelerate launch --config_file CONFIG` gives its processes, but for their ranks."""
    words = ["--config_file", str(config), "--main_process_port", "0", "script.py"]
    settings, defaults, _ = launcher._validate_launch_command(launcher.launch_command_parser().parse_args(words))
    if not settings.use_deepspeed:
        return prepare_multi_gpu_env(settings)
    settings.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(settings)[1]


@contextmanager
def host() -> Iterator[concurrent.futures.Executor]:
    """A process that imports everything once, and forks others: `host.submit(run, ...)`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            patch.delenv(name)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # ninja
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
            yield executor


def run(
    config: str | Path, folder: Path, work: Callable[..., None], *argv: Any, until: tuple[Path, str] | None = None
) -> None:
    """Forks the processes of a config and waits; each calls `work(rank, *argv)`.

    Args:
        config: its file, or its name in `accelerate_configs/`.
        folder: an empty one, where they meet.
        work: found by its name in the host.
        argv: what it is given.
        until: folder and pattern of a file; all processes get a SIGKILL when it is there.
    """
    environment = launched(config if isinstance(config, Path) else ROOT / "accelerate_configs" / f"{config}.yaml")
    if "ACCELERATE_USE_DEEPSPEED" in environment:  # here once, which takes 15 s, and not in the tests
        importlib.import_module("deepspeed")
        torch.compile(torch.nn.Identity())  # imports the compiler, as DeepSpeed's optimisers do
    started = torch.multiprocessing.start_processes(
        begin, (environment, folder, work, argv), nprocs=PROCESSES, join=False, start_method="fork"
    )
    while not started.join(timeout=0.02):
        if until and list(until[0].glob(until[1])):
            for process in started.processes:
                process.kill()
                process.join()
            return
    assert until is None, f"ended before there was {until}"


def begin(rank: int, environment: dict[str, str], folder: Path, work: Callable[..., None], argv: Any) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    work(rank, *argv)
    dist.destroy_process_group()


def command(rank: int, script: str, argv: Sequence[str]) -> None:
    """A `work`: the command line of an entry script, which ends the process itself."""
    sys.argv = [f"xcon/{script}.py", *argv]
    importlib.import_module(f"xcon.{script}").main()
