"""How a process starts: the Accelerator and the precision of its device."""

import math
import os
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import nn
from torch.optim import Optimizer

from xcon.config import Precision


def native_precision() -> Precision:
    """The fastest precision that the device computes natively: bf16, fp16 (with a loss scaler) or fp32.

    By compute capability, since `torch.cuda.is_bf16_supported` is also true where bf16 is emulated.
    """
    if torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability()
        return "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"


def check_finite(loss: float, step: int) -> None:
    """Raises ValueError where training has diverged."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: lower the learning rates or take --precision fp32")


def resolve_precision(precision: Precision) -> Precision:
    """`auto` as what this process will compute in.

    Raises:
        ValueError: fp16 without a GPU, or under DeepSpeed, which would clip gradients that are still scaled.
    """
    deepspeed = under_deepspeed()
    if precision == "auto":
        native = native_precision()
        return "fp32" if native == "fp16" and deepspeed else native
    if precision == "fp16" and deepspeed:
        raise ValueError("--precision fp16: not under DeepSpeed; take fp32, or DDP")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--precision fp16 needs a CUDA device: choose bf16, fp32 or auto")
    return precision


def under_deepspeed() -> bool:
    """Whether the launcher's configuration names DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def make_accelerator(
    precision: str, *, batch_size: int, clip_norm: float, accumulation_steps: int = 1
) -> Accelerator:
    """The Accelerator for this process, on a GPU or not, under DDP or DeepSpeed.

    Args:
        precision: bf16, fp16 or fp32.
        batch_size: rows of the global batch; each process takes an equal part.
        clip_norm: the gradient norm that DeepSpeed, which clips by itself, is told.
        accumulation_steps: parts that each process computes its share of the batch in.

    Raises:
        ValueError: the batch does not divide among the processes, or the launcher's settings contradict ours.
    """
    cuda, deepspeed = torch.cuda.is_available(), under_deepspeed()
    accelerator = Accelerator(
        cpu=not cuda and not deepspeed,  # under DeepSpeed, cpu=True would silently mean DDP
        gradient_accumulation_steps=accumulation_steps,
        mixed_precision="no" if precision == "fp32" or deepspeed else precision,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed and not cuda else [],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched and do not meet, each would train alone: use_cpu, --cpu or "
            "ACCELERATE_USE_CPU does that; take accelerate_configs/ddp.yaml"
        )
    if accelerator.gradient_accumulation_steps != accumulation_steps:
        raise ValueError(
            f"the launcher's configuration accumulates {accelerator.gradient_accumulation_steps} gradients, the "
            f"settings {accumulation_steps}: remove gradient_accumulation_steps there"
        )
    if batch_size % (accelerator.num_processes * accumulation_steps):
        raise ValueError(
            f"--batch-size {batch_size} is the global batch and does not divide among "
            f"{accelerator.num_processes} processes x {accumulation_steps} parts"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = batch_size // accelerator.num_processes // accumulation_steps
        settings["gradient_clipping"] = clip_norm
        # DeepSpeed's own bf16 turns the parameters to bf16, which BatchNorm refuses; autocast does not.
        # Gradients are reduced in float32, as under DDP: no module is "safe" for less.
        settings["torch_autocast"] = {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
        settings["bf16"], settings["fp16"] = {"enabled": False}, {"enabled": False}
    return accelerator


def prepare(accelerator: Accelerator, module: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """`accelerator.prepare`, for every strategy.

    On several GPUs BatchNorm's statistics are those of the global batch; on processors torch has no synchronised
    BatchNorm, and they are each process's own.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        module = convert_sync_batchnorm(module)  # the parameters stay the same objects
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Its first broadcast reads parameters as flat bytes, which channels_last weights are not.
        module.to(memory_format=torch.contiguous_format)
    return accelerator.prepare(module, optimizer)


def check_whole(accelerator: Accelerator) -> None:
    """Raises ValueError where no process has all weights, to average them."""
    plugin = accelerator.state.deepspeed_plugin
    if accelerator.distributed_type == DistributedType.FSDP or (plugin and plugin.zero_stage == 3):
        raise ValueError("--ema: not under ZeRO-3 or FSDP, which cut the weights in pieces; take DDP or ZeRO-2")


def autocast(accelerator: Accelerator, precision: str) -> torch.autocast:
    """Mixed precision for modules that are not prepared."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(accelerator.device.type, dtype=dtype, enabled=dtype is not None)


def finish(accelerator: Accelerator, status: int = 0) -> None:
    """The last call of an entry script: leaves the process group; one of several processes ends here.

    DDP keeps gloo's threads beyond the process group (torch 2.15), and one that wakes up while Python is taken
    down aborts the process after all is done: seen in one launch of thirty.

    Args:
        accelerator: of this process.
        status: the exit status of one of several processes.
    """
    several = accelerator.num_processes > 1
    accelerator.end_training()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
