"""Checkpoints: saved whole or not at all, resumed exactly.

`checkpoints/step-N/` holds what Accelerate saves of every process (weights, optimiser, loss scaler, random
states) and `state.json`, the position of the run and the hashes of those files. Beside it are the weights of the
best held-out result. The order of records needs no saving: it is a function of the step (`sampler.Order`).

What is being written or removed has a name that begins with a dot, and counts nowhere.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from safetensors import SafetensorError, safe_open
from torch import nn

from xcon import commandline, gather, launch, runlock, tracking
from xcon.config import TrainConfig, read_json
from xcon.model import weights_to_bytes
from xcon.records import atomic_write, sha256

Found = TypeVar("Found")
_OF_TORCH = ("PytorchStream", "inline_container")  # what its errors of reading and writing have in common

KEPT = 2
REMEDY = "remove the folder to resume from the one before"


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

    def ended(self, total: int, patience: int) -> bool:
        """Whether training is over: `total` steps done, or `patience` validations, not 0, without a better one."""
        return self.step >= total or 0 < patience <= self.since_best


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the run folder.
        accelerator: with everything prepared that is to be saved.
    """

    def __init__(self, run: Path, accelerator: Accelerator) -> None:
        self.run, self.folder = run, run / "checkpoints"
        self.accelerator = accelerator

    def weights(self, step: int) -> Path:
        """The weights kept of a step."""
        return self.folder / f"weights-{step}.safetensors"

    def keep_weights(self, wrapped: nn.Module, step: int) -> None:
        """Keeps the present weights as those of a step; called by all processes.

        Raises:
            OSError: they could not be written.
        """
        weights = self.accelerator.get_state_dict(wrapped)

        def write() -> None:
            with atomic_write(self.weights(step)) as file:
                file.write(weights_to_bytes(weights))
            _to_disk(self.folder)

        self._together(lambda: write() if self.accelerator.is_main_process else None)

    def save(self, position: Position) -> None:
        """Saves the run where it stands; called by all processes.

        A checkpoint takes its name only when all of it is on disk and was read back, and older ones go only then.

        Raises:
            OSError: a process could not write its part; nothing of it is left.
        """
        partial = self.folder / f".step-{position.step}.partial"
        main = self.accelerator.is_main_process
        try:
            self._together(lambda: self.accelerator.save_state(str(partial)))
            seen = self._together(lambda: self._files(partial, position))  # each certainly sees its own
            names = sorted(set().union(*seen))
            hashes = self._hashes(partial, names, _settled)
            self._together(lambda: self._complete(partial, position, hashes) if main else None)
        except OSError as error:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            question = "is there space left? " if _may_be_full(error) else ""
            raise OSError(
                f"{self.folder}: the checkpoint of step {position.step} could not be written ({error}); {question}"
                "the same command goes on from the one before"
            ) from error
        if main:
            self._prune()
        self.accelerator.wait_for_everyone()

    def _files(self, checkpoint: Path, position: Position) -> set[str]:
        """The files that a checkpoint needs, seen from it: its own, and the best weights where they are kept."""
        files = (path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(".nfs"))
        found = {str(path.relative_to(checkpoint)) for path in files}
        best = self.weights(position.best_step or 0)
        return found | ({f"../{best.name}"} if best.is_file() else set())

    def _complete(self, partial: Path, position: Position, hashes: Mapping[str, str]) -> None:
        """Says what a checkpoint is, and gives it its name."""
        state = {
            **dataclasses.asdict(position),
            "processes": self.accelerator.num_processes,
            "in_pieces": self._in_pieces,
            "strategy": launch.strategy(self.accelerator),
            "sha256": hashes,
        }
        with atomic_write(partial / "state.json") as file:
            file.write((json.dumps(state) + "\n").encode())
        if (log := self.run / tracking.LOG).is_file():
            _to_disk(log)  # a resumed run goes on with it
        for folder in {(partial / name).parent for name in (*hashes, "state.json")}:
            _to_disk(folder)
        partial.replace(self.folder / f"step-{position.step}")
        _to_disk(self.folder)

    def restore(self) -> Position:
        """Loads the newest checkpoint, where there is one; called by all processes.

        Returns:
            Where the run stands: at its beginning without a checkpoint.

        Raises:
            ValueError: it is damaged, or in pieces and saved by another number of processes.
        """
        newest, state = gather.decided(self._newest)
        if newest is None:
            return Position()
        self._check_resumable(newest, state)
        self._check(newest, state["sha256"])
        self.accelerator.load_state(str(newest))
        self.accelerator.wait_for_everyone()
        saved, now = state["processes"], self.accelerator.num_processes
        if saved != now:
            # The order of records and what is drawn for each are those of the step; dropout draws anew.
            set_seed(state["step"], device_specific=True)
            self.accelerator.print(f"{newest}: saved by {saved} processes, gone on with by {now}")
        best = state["best"] and tuple(state["best"])
        return Position(state["step"], best, state["best_step"], state["since_best"])

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest checkpoint, and what it says of itself; None without one."""
        checkpoints = self.whole()
        return (checkpoints[-1], read_json(checkpoints[-1] / "state.json")) if checkpoints else (None, {})

    def _check_resumable(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Raises ValueError where this launch cannot take the checkpoint up."""
        if "sha256" not in state:
            raise ValueError(f"{checkpoint}: of an earlier xcon; end the run with that one, or begin it again")
        if not (state["in_pieces"] or self._in_pieces):
            return
        saved, now = state["processes"], self.accelerator.num_processes
        if saved != now:
            raise ValueError(
                f"{checkpoint}: saved by {saved} processes, resumed by {now}, and each has a piece of the "
                "optimiser: launch as many as before"
            )
        before, strategy = state["strategy"], launch.strategy(self.accelerator)
        if before != strategy:
            raise ValueError(
                f"{checkpoint}: saved under {before}, resumed under {strategy}: launch with the config of before"
            )

    def _check(self, checkpoint: Path, hashes: Mapping[str, str]) -> None:
        """Raises ValueError, on all processes, unless every file is what was saved."""
        try:
            found = self._hashes(checkpoint, list(hashes), sha256)
        except OSError as error:
            raise ValueError(f"{checkpoint}: damaged ({error}); {REMEDY}") from None
        for name, digest in hashes.items():
            if found[name] != digest:
                raise ValueError(f"{checkpoint}: {name} is damaged; {REMEDY}")

    def _hashes(self, checkpoint: Path, names: list[str], digest: Callable[[Path], str]) -> dict[str, str]:
        """The SHA-256 of every file, each read by one of the processes."""
        mine = names[self.accelerator.process_index :: self.accelerator.num_processes]
        parts = self._together(lambda: {name: digest(checkpoint / name) for name in mine})
        return {name: found for part in parts for name, found in part.items()}

    def _together(self, action: Callable[[], Found]) -> list[Found]:
        """What an action on files gives on every process, by rank; called by all of them.

        Raises:
            OSError: it failed on one; on all of them, so that none waits for another in vain.
        """
        found: list[tuple[Found | None, str | None]]
        try:
            found = [(action(), None)]
        except (OSError, RuntimeError, SafetensorError, gather.CheckpointFailed) as error:
            causes = _causes(error)
            if not all(_of_files(cause) for cause in causes):
                raise
            found = [(None, "; ".join(str(cause) or repr(cause) for cause in causes))]
        everyones = gather_object(found)
        for _, trouble in everyones:
            if trouble is not None:
                raise OSError(trouble)
        return [result for result, _ in everyones]

    @property
    def _in_pieces(self) -> bool:
        return self.accelerator.distributed_type in launch.IN_PIECES

    def _prune(self) -> None:
        """Removes all but the newest checkpoints, and the weights that none of those names as its best.

        What cannot be removed stays: the run is saved, and goes on.
        """
        try:
            for old in self.whole()[:-KEPT]:
                _remove(old.replace(self.folder / f".{old.name}.partial"))
            named = {self.weights(read_json(c / "state.json")["best_step"] or 0) for c in self.whole()}
            for weights in set(self.folder.glob("weights-*.safetensors")) - named:
                weights.unlink()
        except (OSError, ValueError) as error:
            commandline.complain(str(self.folder), f"older checkpoints stay ({error})")

    def whole(self) -> list[Path]:
        """All whole checkpoints, the newest last."""
        steps = {path.name.removeprefix("step-"): path for path in self.folder.glob("step-*")}
        return [steps[step] for step in sorted(filter(str.isdecimal, steps), key=int)]


def _causes(error: BaseException) -> list[BaseException]:
    """What went wrong: where FSDP2's processes write together, torch tells all of them of each one's error."""
    if isinstance(error, gather.CheckpointFailed):
        return [cause for cause, _ in error.failures.values()]
    return [error]


def _of_files(error: BaseException) -> bool:
    """Whether an error is of reading or writing; torch says RuntimeError of its files and of much else."""
    return isinstance(error, OSError | SafetensorError) or any(words in str(error) for words in _OF_TORCH)


def _may_be_full(error: OSError) -> bool:
    """Whether the disk, or a quota, may be the reason; torch does not say why it cannot write."""
    full = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), *_OF_TORCH)
    return any(words in str(error) for words in full)


def _settled(path: Path) -> str:
    """The SHA-256 of a file that was just written, once it is on disk and found whole."""
    _to_disk(path)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            file.keys()
    return sha256(path)


def _to_disk(path: Path) -> None:
    """Returns when a file, or what a folder lists, will outlast the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_run(config: TrainConfig, **facts: Any) -> bool:
    """Makes the run folder, or finds the same run begun there; called by all processes.

    Args:
        config: the resolved settings, saved as `config.json`.
        facts: saved beside them; `command`, `method` and `shards_sha256` must be those of the run begun.

    Returns:
        Whether the run is complete already.

    Raises:
        ValueError: the folder holds something else, or a run with other settings, or another process trains there.
    """
    return gather.decided(functools.partial(_open, config, facts))


def _open(config: TrainConfig, facts: Mapping[str, Any]) -> bool:
    """`open_run` in the one process that looks into the folder and writes there."""
    run = config.out
    config.begun(facts)
    if (run / "model.json").is_file():
        return True
    run.mkdir(parents=True, exist_ok=True)
    runlock.take(run)
    if not config.begun(facts):  # now that no other process can begin it
        with atomic_write(run / "config.json") as file:
            file.write(config.to_json(**facts).encode())
    (run / "checkpoints").mkdir(exist_ok=True)
    _clear(run)
    return False


def _clear(run: Path) -> None:
    """Removes what a process left that was killed while it wrote."""
    for pattern in (".step-*.partial", ".weights-*"):
        for leftover in (run / "checkpoints").glob(pattern):
            _remove(leftover)


def _remove(path: Path) -> None:
    """Removes a file, or a folder as far as that goes.

    On NFS a file that another process reads lives on, as `.nfs...`, and its folder with it.
    """
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
    if path.exists():
        commandline.complain(str(path), "cannot be removed; it takes space and counts nowhere")
