"""How a run makes way: it saves where it stands, says so, and ends with a status that asks to be started again.

On SIGTERM or SIGUSR1 all processes agree at the end of a step, whichever of them got the signal. The file that the
environment variable `XCON_STOPPED` names then tells a batch script that the run has stopped and not failed. The
file that `XCON_ASKED` names tells the run of a signal that came before there was a trainer to hear it.
"""

import os
import signal
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from xcon import commandline, gather, launch
from xcon.checkpoint import Checkpoints, Position
from xcon.clock import Clock
from xcon.records import atomic_write
from xcon.signals import Received
from xcon.tracking import Silent


class Saver:
    """Saves a run every so many steps, and where a signal asks for its end.

    Args:
        checkpoints: of the run.
        received: the signals of this process.
        clock: does not count the time of saving.
        every: steps between two checkpoints.
    """

    def __init__(self, checkpoints: Checkpoints, received: Received, clock: Clock, *, every: int) -> None:
        self.checkpoints, self.received, self.clock, self.every = checkpoints, received, clock, every
        self.accelerator = checkpoints.accelerator

    def asked(self) -> str | None:
        """The signal that any process has received; called by all processes equally often."""
        number = gather.largest(self.received.numbers[0] if self.received.numbers else 0)
        return signal.Signals(number).name if number else None

    def asked_before(self) -> str | None:
        """`asked` before the first step: by a signal that came while all was built, or before this process was."""
        file = os.environ.get("XCON_ASKED")
        if self.accelerator.is_main_process and file and Path(file).exists() and not self.received.numbers:
            self.received.numbers.append(signal.SIGUSR1)
        return self.asked()

    def after_step(self, at: Position, loss: Tensor) -> str | None:
        """Saves the run if it is time to; called by all processes after every step.

        Args:
            at: where the run stands.
            loss: of the step, this process's part of it.

        Returns:
            The signal that asks for the run's end, if one does; the step is then saved.

        Raises:
            ValueError: training has diverged; it is not saved.
            OSError: it could not be saved.
        """
        due = at.step % self.every == 0
        if due:
            self._save(at, loss)
        signalled = self.asked()  # after a checkpoint that was due, which takes its time
        if signalled and not due:
            self._save(at, loss)
        return signalled

    def _save(self, at: Position, loss: Tensor) -> None:
        with self.clock.paused():
            launch.check_finite(self.accelerator.reduce(loss.detach(), "sum").item(), at.step)
            self.checkpoints.save(at)

    def stop(self, tracker: Silent, at: Position, signalled: str) -> NoReturn:
        """Says that the run stops where it was saved, and ends the process; called by all processes."""
        run, again = str(self.checkpoints.run), self.received.numbers[1:]
        tracker.write("stop", at.step, {"signal": signalled})
        tracker.close()
        if self.accelerator.is_main_process:
            self._tell(at)
            commandline.complain(run, f"stopped at step {at.step} by {signalled}; give the same command again")
        if again:
            names = ", ".join(signal.Signals(number).name for number in again)
            commandline.complain(run, f"{names} came while it stopped: ignored")
        self.accelerator.wait_for_everyone()  # no launcher ends the others before all is told
        launch.finish(self.accelerator, os.EX_TEMPFAIL)
        raise SystemExit(os.EX_TEMPFAIL)

    def _tell(self, at: Position) -> None:
        """Tells the batch script; where that fails the run is saved all the same, and the others wait for it."""
        if told := os.environ.get("XCON_STOPPED"):
            try:
                with atomic_write(Path(told)) as file:
                    file.write(f"step {at.step}\n".encode())
            except OSError as error:
                commandline.complain("XCON_STOPPED", f"{error}: no job comes back by itself")
