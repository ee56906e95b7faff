"""How a process starts: precision by capability, what DeepSpeed and several GPUs need."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]

from tests import training
from xcon import launch
from xcon.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")],
)
def test_precision_by_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    """Ampere and later compute bf16; Volta and Turing only emulate it. The device is made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert launch.resolve_precision("auto") == expected


@pytest.mark.parametrize(("flag", "expected"), [(True, "bf16"), (False, "fp32")])
def test_precision_of_a_processor(monkeypatch: pytest.MonkeyPatch, flag: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": flag})
    assert launch.resolve_precision("auto") == expected


@pytest.mark.parametrize("strategy", ["DEEPSPEED", "FSDP"])
def test_pieces_take_no_fp16(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{strategy}", "true")
    monkeypatch.setattr(launch, "native_precision", lambda: "fp16")
    assert launch.resolve_precision("auto") == "fp32"
    with pytest.raises(ValueError, match="--precision fp16: not under DeepSpeed"):
        launch.resolve_precision("fp16")


def test_synchronised_batchnorm_keeps_the_parameters_that_the_optimiser_knows() -> None:
    network = timm.create_model("resnet10t", num_classes=0)
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    converted = convert_sync_batchnorm(network)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in converted.modules())
    assert {name: id(parameter) for name, parameter in converted.named_parameters()} == before


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_batchnorm_is_synchronised_before_a_strategy_cuts_the_model(kind: DistributedType) -> None:
    """Two GPUs are made up: what Accelerate is given to prepare is converted, whole, and flat in memory."""
    network = torch.nn.Sequential(timm.create_model("resnet10t", num_classes=0)).to(
        memory_format=torch.channels_last
    )
    network.save_checkpoint = None  # type: ignore[assignment] # as DeepSpeed's engine has one
    known = {id(parameter) for parameter in network.parameters()}
    accelerator = SimpleNamespace(
        num_processes=2, device=torch.device("cuda"), distributed_type=kind, mixed_precision="no",
        prepare=lambda module, optimizer: (module, optimizer),
    )  # fmt: skip
    given, _ = launch.prepare(accelerator, network, None)  # type: ignore[arg-type]
    norms = [m for m in given.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    assert {id(parameter) for parameter in given.parameters()} == known
    flat = all(parameter.is_contiguous() for parameter in given.parameters())
    assert flat == (kind != DistributedType.MULTI_GPU)


def test_processes_that_do_not_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `use_cpu: true` in a yaml of two processes does: each has a world of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "Accelerator", lambda **_: type("Alone", (), {"num_processes": 1}))
    with pytest.raises(ValueError, match="2 processes were launched and do not meet"):
        launch.make_accelerator("fp32", batch_size=2, clip_norm=1.0)


def test_one_process_in_place_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` does, whatever its config asks for."""
    training.fresh_accelerator()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="was told of several processes and started one"):
        launch.make_accelerator("fp32", batch_size=2, clip_norm=1.0)


def test_a_gpu_is_left_alone_where_the_config_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cpu.yaml` beside a GPU, which is made up: neither its precision is taken nor the device itself."""
    training.fresh_accelerator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert launch.resolve_precision("auto") == "fp32"
    assert launch.make_accelerator("fp32", batch_size=2, clip_norm=1.0).device.type == "cpu"
    training.fresh_accelerator()


def test_pieces_are_resumed_by_the_strategy_that_cut_them(tmp_path: Path) -> None:
    training.fresh_accelerator()
    checkpoint = tmp_path / "checkpoints" / "step-5"
    checkpoint.mkdir(parents=True)
    state = {"step": 5, "processes": 1, "in_pieces": True, "strategy": "ZeRO-2", "sha256": {}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="step-5: saved under ZeRO-2, resumed under NO: launch with the config"):
        Checkpoints(tmp_path, Accelerator(cpu=True)).restore()
