"""Checkpoints: saved whole or not at all, resumed exactly.

`checkpoints/step-N/` holds what Accelerate saves of every process (weights, optimiser, loss scaler, random
states) and `state.json`, the position of the run and the sizes of those files. The order of records needs no
saving: it is a function of the step (`sampler.Order`).
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from safetensors import SafetensorError
from torch import nn

from xcon import launch
from xcon.config import TrainConfig, read_json
from xcon.model import weights_to_bytes
from xcon.records import atomic_write

KEPT = 2
# Strategies whose checkpoints have a piece for each process.
IN_PIECES = (DistributedType.DEEPSPEED, DistributedType.FSDP)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        best: the best held-out result so far, higher is better, compared from left to right.
        best_step: when it was; its weights are kept by that number.
        since_best: validations since then.
    """

    step: int = 0
    best: tuple[float, ...] | None = None
    best_step: int | None = None
    since_best: int = 0

    def after(self, score: tuple[float, ...]) -> "Position":
        """The position after a validation."""
        if self.best is None or score > self.best:
            return dataclasses.replace(self, best=score, best_step=self.step, since_best=0)
        return dataclasses.replace(self, since_best=self.since_best + 1)

    def anew(self) -> "Position":
        """The position without its best: what comes after is not compared with what came before."""
        return Position(step=self.step)

    def exhausted(self, patience: int) -> bool:
        """Whether training stops early: `patience` validations, not 0, without a better result."""
        return 0 < patience <= self.since_best


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the run folder.
        accelerator: with everything prepared that is to be saved.
    """

    def __init__(self, run: Path, accelerator: Accelerator) -> None:
        self.folder = run / "checkpoints"
        self.accelerator = accelerator

    def weights(self, step: int) -> Path:
        """The weights kept of a step."""
        return self.folder / f"weights-{step}.safetensors"

    def keep_weights(self, wrapped: nn.Module, step: int) -> None:
        """Keeps the present weights as those of a step; called by all processes."""
        weights = self.accelerator.get_state_dict(wrapped)
        if self.accelerator.is_main_process:
            with atomic_write(self.weights(step)) as file:
                file.write(weights_to_bytes(weights))

    def save(self, position: Position) -> None:
        """Saves the run where it stands; called by all processes.

        A checkpoint takes its name only when it is whole, and older ones go only after that.

        Raises:
            OSError: it could not be written; nothing of it is left.
        """
        step = position.step
        partial = self.folder / f".step-{step}.partial"
        try:
            self.accelerator.save_state(str(partial))
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _of_files(error):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"{self.folder}: the checkpoint of step {step} could not be written ({error}); is there space "
                "left? The run goes on from the one before"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                **dataclasses.asdict(position),
                "processes": self.accelerator.num_processes,
                "in_pieces": self._in_pieces,
                "strategy": launch.strategy(self.accelerator),
                "sizes": {
                    str(f.relative_to(partial)): f.stat().st_size for f in partial.rglob("*") if f.is_file()
                },
            }
            with atomic_write(partial / "state.json") as file:
                file.write((json.dumps(state) + "\n").encode())
            partial.replace(self.folder / f"step-{step}")
            self._prune()
        self.accelerator.wait_for_everyone()

    def restore(self) -> Position:
        """Loads the newest checkpoint, where there is one; called by all processes.

        Returns:
            Where the run stands: at its beginning without a checkpoint.

        Raises:
            ValueError: it is damaged, or in pieces and saved by another number of processes.
        """
        checkpoints = self.whole()
        if not checkpoints:
            return Position()
        newest = checkpoints[-1]
        state = read_json(newest / "state.json")
        saved, now = state["processes"], self.accelerator.num_processes
        if saved != now and (state.get("in_pieces") or self._in_pieces):
            raise ValueError(
                f"{newest}: saved by {saved} processes, resumed by {now}, and each has a piece of the optimiser: "
                "launch as many as before"
            )
        before, strategy = state.get("strategy"), launch.strategy(self.accelerator)
        if before != strategy and (state.get("in_pieces") or self._in_pieces):
            raise ValueError(
                f"{newest}: saved under {before}, resumed under {strategy}: launch with the config of before"
            )
        for name, size in state["sizes"].items():  # Accelerate goes on without random states that it cannot read
            if not (newest / name).is_file() or (newest / name).stat().st_size != size:
                raise ValueError(f"{newest}: {name} is damaged; remove the folder to resume from the one before")
        try:
            self.accelerator.load_state(str(newest))
        except (OSError, RuntimeError, SafetensorError, EOFError) as error:
            if not _of_files(error):
                raise
            raise ValueError(f"{newest}: damaged ({error}); remove it to resume from the one before") from None
        self.accelerator.wait_for_everyone()
        if (
            saved != now
        ):  # the order of records and what is drawn for each are those of the step; dropout draws anew
            set_seed(state["step"], device_specific=True)
            self.accelerator.print(f"{newest}: saved by {saved} processes, gone on with by {now}")
        best = state["best"] and tuple(state["best"])
        return Position(state["step"], best, state["best_step"], state["since_best"])

    @property
    def _in_pieces(self) -> bool:
        return self.accelerator.distributed_type in IN_PIECES

    def _prune(self) -> None:
        """Removes all but the newest checkpoints, and the weights that none of those names as its best."""
        for old in self.whole()[:-KEPT]:
            shutil.rmtree(old)
        named = {self.weights(read_json(c / "state.json")["best_step"] or 0) for c in self.whole()}
        for weights in set(self.folder.glob("weights-*.safetensors")) - named:
            weights.unlink()

    def whole(self) -> list[Path]:
        """All whole checkpoints, the newest last."""
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _of_files(error: Exception) -> bool:
    """Whether an error is of reading or writing; torch says RuntimeError of its files and of much else."""
    return not isinstance(error, RuntimeError) or any(
        w in str(error) for w in ("PytorchStream", "inline_container")
    )


def open_run(config: TrainConfig, accelerator: Accelerator, **facts: Any) -> bool:
    """Makes the run folder, or finds the same run begun there; called by all processes.

    Args:
        config: the resolved settings, saved as `config.json`.
        accelerator: of this process.
        facts: saved beside them; `command`, `method` and `shards_sha256` must be those of the run begun.

    Returns:
        Whether the run is complete already.

    Raises:
        ValueError: the folder holds something else, or a run with other settings.
    """
    run, begun = config.out, config.begun(facts)
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        for leftover in (run / "checkpoints").glob(".step-*.partial"):
            shutil.rmtree(leftover)
        if not begun:
            with atomic_write(run / "config.json") as file:
                file.write(config.to_json(**facts).encode())
    accelerator.wait_for_everyone()
    return (run / "model.json").is_file()
