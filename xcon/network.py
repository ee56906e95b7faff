"""Whether processes can meet: what this machine's name means, whether a port is free, and a rendezvous itself.

They meet as the trainers do, by Accelerate over gloo or NCCL, and gather a number of each.
"""

import dataclasses
import datetime
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather

from xcon import health
from xcon.health import WORLD_SIZES, Finding

Backend = Literal["gloo", "nccl"]
SECONDS = 60.0  # that processes wait for one another
START = 120.0  # seconds that they may take besides, to import torch from a slow disk
_STARTED = "from xcon import network; network.join()"
_INTERFACE = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the nodes (`ip -br addr`)"


def name(*, several: bool) -> Finding:
    """Whether this machine's name means an address that others can reach.

    Args:
        several: whether machines are to meet; one alone needs no name.
    """
    host = socket.gethostname()
    try:
        found = addresses(host)
    except socket.gaierror as error:
        seen = f"{host}, this machine's own name, does not resolve ({error.strerror})"
        return Finding("error" if several else "warning", "name", seen, f"add it to /etc/hosts, or {_INTERFACE}")
    seen = f"{host} is {', '.join(found)}"
    if not is_loopback(found[0]):
        return Finding("ok", "name", seen)
    if several:
        return Finding("error", "name", f"{seen}: other nodes would find themselves there", _INTERFACE)
    return Finding("ok", "name", f"{seen}, itself: right for one machine, wrong for a node among several")


def addresses(host: str) -> list[str]:
    """What a name resolves to, each once, the preferred one first.

    Raises:
        socket.gaierror: nothing.
    """
    return list(dict.fromkeys(str(a[4][0]) for a in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))


def is_loopback(address: str) -> bool:
    """Whether an address means the machine itself, for whoever asks."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def port(number: int) -> Finding:
    """Whether a port is free on this machine."""
    with socket.socket() as probe:
        try:
            probe.bind(("", number))
        except OSError as error:
            seen = f"{number}, where processes would meet, cannot be taken ({error.strerror})"
            return Finding("error", "port", seen, "give accelerate launch another --main_process_port")
    return Finding("ok", "port", f"{number}, where processes meet, is free")


def free_port() -> int:
    """One that the system gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --------------------------------------------------------------------------------------------------------
# A meeting


@dataclasses.dataclass(frozen=True)
class Report:
    """What one process saw.

    Attributes:
        rank: its own.
        host: the name of its machine.
        address: what that name means there; empty: nothing.
        met: the ranks it gathered, itself included; empty: the meeting failed.
        error: why.
    """

    rank: int
    host: str
    address: str
    met: tuple[int, ...]
    error: str


def join() -> None:
    """Entry of one process: meets the others that its environment names, and prints its report as JSON."""
    backend, patience = sys.argv[1], datetime.timedelta(seconds=float(sys.argv[2]))
    os.environ.setdefault("RANK", os.environ.get("SLURM_PROCID", ""))
    rank, host = int(os.environ["RANK"]), socket.gethostname()
    met, error = [], ""
    try:
        state = PartialState(cpu=backend == "gloo", backend=backend, timeout=patience)
        met = gather(torch.tensor([rank], device=state.device)).tolist()
    except (RuntimeError, ValueError) as problem:
        error = str(problem).strip().splitlines()[0]
    try:
        address = addresses(host)[0]
    except socket.gaierror:
        address = ""
    report = Report(rank, host, address, tuple(met), error)
    sys.stdout.write(json.dumps(dataclasses.asdict(report)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a failed process group would wait for the others once more


def meet_here(backend: Backend, processes: int, seconds: float = SECONDS, start: float = START) -> Finding:
    """Lets processes of this machine meet.

    Args:
        backend: by which.
        processes: how many.
        seconds: that they wait for one another; what blocks inside NCCL is not bound by it.
        start: seconds after which, added to those, they are ended.
    """
    world = _world(processes, "127.0.0.1", free_port())
    started = [
        subprocess.Popen(
            _command(backend, seconds), env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]  # fmt: skip
    end = time.monotonic() + seconds + start
    said = []
    for process in started:
        try:
            said.append(process.communicate(timeout=max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            printed, complaints = process.communicate()
            said.append((printed, f"{complaints}no answer in {seconds + start:g} s\n"))
    return verdict(backend, processes, *("".join(parts) for parts in zip(*said, strict=True)))


def meet_across(
    backend: Backend, nodes: int, head: str, number: int, seconds: float = SECONDS, start: float = START
) -> Finding:
    """Lets a process of each node of this SLURM job meet at a port of the first one.

    Args:
        backend: by which.
        nodes: of the job.
        head: the name of the first one.
        number: of the port.
        seconds: that they wait for one another.
        start: seconds after which, added to those, they are ended; srun waits without end for a core in use.
    """
    step = ["srun", "--export=ALL", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap"]
    world = {**_world(nodes, head, number), "LOCAL_RANK": "0"}
    done = health.answer([*step, *_command(backend, seconds)], seconds=seconds + start, env=world)
    return verdict(backend, nodes, done.stdout, done.stderr)


def _command(backend: Backend, seconds: float) -> list[str]:
    return [sys.executable, "-c", _STARTED, backend, str(seconds)]


def _world(processes: int, head: str, number: int) -> dict[str, str]:
    """The environment of processes that are to meet, without what another launcher left there."""
    stray = {*WORLD_SIZES, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    kept = {k: v for k, v in os.environ.items() if k not in stray and not k.startswith("ACCELERATE_")}
    where = {"MASTER_ADDR": head, "MASTER_PORT": str(number)}
    return {**kept, **where, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}


def verdict(backend: Backend, processes: int, printed: str, complaints: str) -> Finding:
    """What came of a meeting.

    Args:
        backend: by which.
        processes: that were to meet.
        printed: their reports among whatever else they printed.
        complaints: their stderr, for those that left no report.
    """
    reports = _read(printed)
    hosts = ", ".join(dict.fromkeys(report.host for report in reports))
    everyone = tuple(range(processes))
    if [r.rank for r in reports] == list(everyone) and all(r.met == everyone for r in reports):
        where = f"on {hosts} " if len({r.host for r in reports}) > 1 else ""
        return Finding("ok", backend, f"{processes} process(es) {where}met and exchanged numbers")
    alone = [report for report in reports if report.met != everyone]
    errors = [f"rank {r.rank} on {r.host}: {r.error or f'met ranks {list(r.met)}'}" for r in alone]
    last = (complaints.strip().splitlines() or ["nothing was said"])[-1]
    return Finding(
        "error", backend, f"{processes} processes did not meet: {'; '.join(errors) or last}", _advice(reports)
    )


def _advice(reports: Sequence[Report]) -> str:
    wrong = [r for r in reports if not r.address or is_loopback(r.address)]
    if len({r.host for r in reports}) > 1 and wrong:
        return f"{wrong[0].host} means {wrong[0].address or 'nothing'} on itself: {_INTERFACE}"
    if reports:
        return f"look for a firewall between the nodes, or {_INTERFACE}"
    return "run the same as a job of its own to see all it says, with TORCH_DISTRIBUTED_DEBUG=DETAIL"


def _read(printed: str) -> list[Report]:
    found: list[Mapping] = [json.loads(line) for line in printed.splitlines() if line.startswith('{"rank"')]
    reports = [Report(**{**values, "met": tuple(values["met"])}) for values in found]
    return sorted(reports, key=lambda report: report.rank)
