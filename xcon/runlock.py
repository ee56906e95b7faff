"""One training at a time in a run folder: two would remove each other's checkpoints.

The lock is the system's, on a file that stays: it ends with the process that holds it, however that ends.
"""

import fcntl
import json
import os
import socket
from pathlib import Path

from xcon import commandline

NAME = "lock"


def take(run: Path) -> None:
    """Makes this process the only one that trains in a run folder, for the rest of its life.

    A lock of POSIX: no process that this one forks has it, and on NFS, Lustre and GPFS all nodes see it.

    Raises:
        ValueError: another process has it.
        OSError: the file cannot be written.
    """
    path = run / NAME
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # left open: to close it would give the lock up
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        _refuse(run, os.pread(handle, 1000, 0))
        return
    except OSError as error:
        commandline.complain(
            str(run), f"no lock is to be had here ({error.strerror}); see that nothing else trains in this folder"
        )
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(_holder()).encode(), 0)


def _holder() -> dict[str, str | int | None]:
    """Who this process is."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {"host": socket.gethostname(), "process": os.getpid(), "job": job, "restarts": restarts}


def _refuse(run: Path, told: bytes) -> None:
    """Raises ValueError, unless the holder is an earlier start of this very job, which SLURM has ended.

    Of a node that is lost, a file server keeps the locks for a while.

    Args:
        run: the run folder.
        told: by the holder; nothing if it has just taken the lock.
    """
    holder, mine = json.loads(told or b"{}"), _holder()
    who = "process {process} on {host}".format_map(holder) if holder else "another process"
    if holder.get("job"):
        who += f" of SLURM job {holder['job']}"
        if holder["job"] == mine["job"] and holder["restarts"] < mine["restarts"]:
            commandline.complain(str(run), f"still locked by {who}, which ended before this one: taken over")
            return
    raise ValueError(f"{run}: {who} is training there: wait for its end, or choose another --out")
