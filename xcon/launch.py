"""How a process starts: the Accelerator and the precision of its device."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    convert_outputs_to_fp32,
    parse_flag_from_env,
)
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import nn
from torch.optim import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from xcon.config import Precision

# Numbers of the buffer for gradients that DeepSpeed takes however small the model; its own default takes 2 GB.
IN_PIECES = (DistributedType.DEEPSPEED, DistributedType.FSDP)  # what is saved has a piece of each process
ZERO_BUCKET = 50_000_000


def native_precision() -> Precision:
    """The fastest precision that the device computes natively: bf16, fp16 (with a loss scaler) or fp32.

    By compute capability, since `torch.cuda.is_bf16_supported` is also true where bf16 is emulated.
    """
    if uses_cuda():
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
        ValueError: fp16 without a GPU, under DeepSpeed, which would clip gradients that are still scaled, or under
            FSDP, where it has never been tried.
    """
    in_pieces = under_deepspeed() or under_fsdp()
    if precision == "auto":
        native = native_precision()
        return "fp32" if native == "fp16" and in_pieces else native
    if precision == "fp16" and in_pieces:
        raise ValueError("--precision fp16: not under DeepSpeed or FSDP; take fp32, or DDP")
    if precision == "fp16" and not uses_cuda():
        raise ValueError("--precision fp16 needs a CUDA device: choose bf16, fp32 or auto")
    return precision


def uses_cuda() -> bool:
    """Whether this process computes on a GPU: there is one, and the launcher was not told to leave it alone."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def under_deepspeed() -> bool:
    """Whether the launcher's configuration names DeepSpeed."""
    return parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def under_fsdp() -> bool:
    """Whether the launcher's configuration names FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def make_accelerator(
    precision: str, *, batch_size: int, clip_norm: float, accumulation_steps: int = 1
) -> Accelerator:
    """The Accelerator for this process, on a GPU or not, under DDP, DeepSpeed or FSDP2.

    Args:
        precision: bf16, fp16 or fp32.
        batch_size: rows of the global batch; each process takes an equal part.
        clip_norm: the gradient norm that DeepSpeed, which clips by itself, is told.
        accumulation_steps: parts that each process computes its share of the batch in.

    Raises:
        ValueError: the batch does not divide among the processes, or the launcher's settings contradict ours.
    """
    cuda, deepspeed, fsdp = uses_cuda(), under_deepspeed(), under_fsdp()
    if fsdp and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("fsdp_version 1: take 2, as accelerate_configs/fsdp2.yaml does")
    if fsdp and not torch.cuda.is_available():
        # Accelerate takes FSDP for a matter of GPUs, and without one leaves it out without a word. All that it
        # lacks is a process group, and this name for it.
        PartialState(backend="gloo").distributed_type = DistributedType.MULTI_GPU
    with _told_of_the_compiler():
        accelerator = Accelerator(
            cpu=not (cuda or deepspeed or fsdp),  # under those, cpu=True would silently mean DDP
            gradient_accumulation_steps=accumulation_steps,
            mixed_precision="no" if precision == "fp32" or deepspeed else precision,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed and not cuda else [],
        )
    _check_launcher(accelerator, precision, accumulation_steps)
    if batch_size % (accelerator.num_processes * accumulation_steps):
        raise ValueError(
            f"--batch-size {batch_size} is the global batch and does not divide among "
            f"{accelerator.num_processes} processes x {accumulation_steps} parts"
        )
    if deepspeed:
        rows = batch_size // accelerator.num_processes // accumulation_steps
        _set_deepspeed(accelerator.state.deepspeed_plugin, precision, rows=rows, clip_norm=clip_norm)
    if fsdp:
        _set_fsdp(accelerator.state.fsdp_plugin)
    return accelerator


@contextlib.contextmanager
def _told_of_the_compiler() -> Iterator[None]:
    """Turns what DeepSpeed says where it cannot compile, as it must for processors, into one ValueError."""
    try:
        yield
    except (RuntimeError, ImportError) as error:  # the latter where another process tried to compile, in vain
        if "shm_comm" not in str(error):
            raise
        raise ValueError(
            "DeepSpeed could not compile the operator by which processors exchange numbers: g++ and ninja must be "
            f"on the PATH, or CXX name a compiler that works ({str(error).split(':')[0]})"
        ) from error


def _check_launcher(accelerator: Accelerator, precision: str, accumulation_steps: int) -> None:
    """Raises ValueError where the processes, or the strategy, are not those that the launcher was told of."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched and do not meet, each would train alone: use_cpu, --cpu or "
            "ACCELERATE_USE_CPU does that; take accelerate_configs/ddp.yaml"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if by_accelerate and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "the launcher was told of several processes and started one: single.yaml, cpu.yaml, use_cpu and --cpu "
            "do that; give --num_processes 1, or for several take ddp.yaml (CUDA_VISIBLE_DEVICES= hides a GPU)"
        )
    asked = {DistributedType.DEEPSPEED: under_deepspeed(), DistributedType.FSDP: under_fsdp()}
    for strategy, wanted in asked.items():
        if wanted and accelerator.distributed_type != strategy:
            raise ValueError(
                f"the launcher's configuration asks for {strategy.value}, and Accelerate takes "
                f"{accelerator.distributed_type.value}: use_cpu, --cpu or ACCELERATE_USE_CPU does that; remove it "
                "(CUDA_VISIBLE_DEVICES= hides a GPU)"
            )
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if theirs not in {"no", precision}:
        raise ValueError(
            f"the launcher's configuration has mixed_precision {theirs}, the settings {precision}: give "
            f"--precision {theirs}, or set mixed_precision to 'no' there"
        )
    if accelerator.gradient_accumulation_steps != accumulation_steps:
        raise ValueError(
            f"the launcher's configuration accumulates {accelerator.gradient_accumulation_steps} gradients, the "
            f"settings {accumulation_steps}: remove gradient_accumulation_steps there"
        )


def _set_deepspeed(plugin: Any, precision: str, *, rows: int, clip_norm: float) -> None:
    """Tells DeepSpeed what is ours to decide; `rows` are those of one process at a time.

    Raises:
        ValueError: its configuration asks for what cannot be had.
    """
    if {plugin.offload_optimizer_device, plugin.offload_param_device} - {"none", None}:
        raise ValueError(
            "offload_optimizer_device, offload_param_device: not with torch's AdamW; set them to none"
        )
    if plugin.zero3_init_flag:
        raise ValueError("zero3_init_flag: the weights are cut in pieces after the model is made; set it to false")
    # Whatever that flag says, Accelerate 1.15 tells Transformers of ZeRO-3, which then cuts the text model in
    # pieces as it is made, all processes at once; but the first process makes its own before the others.
    unset_hf_deepspeed_config()
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = rows
    settings["gradient_clipping"] = clip_norm
    zero = settings["zero_optimization"]
    zero["reduce_bucket_size"] = zero["allgather_bucket_size"] = ZERO_BUCKET
    # ZeRO-3 then gathers the weights, of whatever precision, where they are saved.
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    # DeepSpeed's own bf16 turns the parameters to bf16, which BatchNorm refuses; autocast does not.
    # Gradients are reduced in float32, as under DDP: no module is "safe" for less.
    settings["torch_autocast"] = {
        "enabled": precision == "bf16",
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    settings["bf16"], settings["fp16"] = {"enabled": False}, {"enabled": False}


def _set_fsdp(plugin: Any) -> None:
    """Tells FSDP2 what is ours to decide.

    Raises:
        ValueError: its configuration asks for what cannot be had.
    """
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("fsdp_cpu_ram_efficient_loading: not with weights that xcon loads; set it to false")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params: not with xcon; set it to false")
    if plugin.activation_checkpointing:
        raise ValueError("fsdp_activation_checkpointing: not with xcon; set it to false, and take --micro-batch")
    # Its own would turn parameters and gradients to bf16, which BatchNorm refuses; `prepare` takes autocast.
    plugin.mixed_precision_policy = None


def prepare(accelerator: Accelerator, module: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """`accelerator.prepare`, for every strategy.

    On several GPUs BatchNorm's statistics are those of the global batch; on processors torch has no synchronised
    BatchNorm, and they are each process's own.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        module = convert_sync_batchnorm(module)  # the parameters stay the same objects
    if accelerator.distributed_type in IN_PIECES:
        # Both read parameters as flat memory, which channels_last weights are not.
        module.to(memory_format=torch.contiguous_format)
    if accelerator.distributed_type == DistributedType.FSDP:
        # As Accelerate does under DDP, and under FSDP2 does not.
        in_precision = autocast(accelerator, accelerator.mixed_precision)(module.forward)
        module.forward = convert_outputs_to_fp32(in_precision)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        wrapped.save_checkpoint = _met_by_all(accelerator, wrapped.save_checkpoint)
    return wrapped, optimizer


def _met_by_all(accelerator: Accelerator, save: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed's processes wait for each other once they have written: one that cannot write meets them, too."""

    def met(*arguments: Any, **options: Any) -> Any:
        try:
            return save(*arguments, **options)
        except (OSError, RuntimeError):
            accelerator.wait_for_everyone()
            raise

    return met


def strategy(accelerator: Accelerator) -> str:
    """What a checkpoint's pieces are cut by."""
    plugin = accelerator.state.deepspeed_plugin
    return f"ZeRO-{plugin.zero_stage}" if plugin else accelerator.distributed_type.value


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
