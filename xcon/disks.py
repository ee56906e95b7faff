"""What a training needs of file systems: room and speed in the run's folder, a whole shard set, a filled cache."""

import dataclasses
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from huggingface_hub import constants

from xcon import health, hub, images
from xcon.health import Finding
from xcon.records import CARD_NAME
from xcon.shardset import ShardSet, Split

NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "panfs", "wekafs"}
MEMORY = {"tmpfs", "ramfs"}
PROBE = 64 * 2**20  # bytes that are written and read
CHUNK = 8 * 2**20
SLOW = 50e6  # bytes a second: a thousand photographs of 256 px are 20 MB, a checkpoint of recipe paper is 1 GB
ROOM, LITTLE_ROOM = 1e9, 10e9  # bytes: for one such checkpoint; for a run of them
FILES, FEW_FILES = 100, 10_000
QUOTA_TOOLS = (("myquota",), ("quota", "--no-wrap"))  # NYU's; Linux's own
DECODED = 32  # records of each split
CACHES = {"HF_HOME": ".cache/huggingface", "TORCH_HOME": ".cache/torch", "TRITON_CACHE_DIR": ".triton/cache",
          "TORCH_EXTENSIONS_DIR": ".cache/torch_extensions"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mount:
    """Where a folder lies: the mount point, the kind of file system, `network`, `memory` or `local`."""

    point: str
    kind: str
    where: str


def mount_of(folder: Path) -> Mount:
    """The file system of a folder that exists."""
    holding = [p for p in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(p.mountpoint)]
    deepest = max(reversed(holding), key=lambda p: len(Path(p.mountpoint).parts))  # of one point the last mounted
    kind = deepest.fstype
    where = "network" if kind in NETWORK or kind.startswith("fuse.") else "memory" if kind in MEMORY else "local"
    return Mount(deepest.mountpoint, kind, where)


# --------------------------------------------------------------------------------------------------------
# The run folder


def run_folder(folder: Path) -> list[Finding]:
    """Room, files and speed where a run will be; nothing is left there, and the folder itself is not made."""
    there = _nearest(folder)
    mount = mount_of(there)
    found = [_room(there, mount), _files(there)]
    if any(finding.level == "error" for finding in found):
        return found  # what others need there is not taken from them for a measurement
    return [*found, _speed(there, mount)]


def _room(folder: Path, mount: Mount) -> Finding:
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize
    seen = f"{folder}: {free / 1e9:,.1f} GB free of {facts.f_blocks * facts.f_frsize / 1e9:,.1f} on {mount.kind}"
    if free < ROOM:
        return Finding("error", "space", f"{seen}: not one checkpoint fits", "make room, or choose another --out")
    if free < LITTLE_ROOM:
        return Finding("warning", "space", f"{seen}: a few checkpoints fit", "make room, or choose another --out")
    return Finding("ok", "space", seen)


def _files(folder: Path) -> Finding:
    facts = os.statvfs(folder)
    if facts.f_files == 0:
        return Finding("ok", "inodes", f"{folder}: its file system does not count files")
    seen = f"{folder}: {facts.f_favail:,} more files fit"
    if facts.f_favail < FEW_FILES:
        advice = "remove small files (`du --inodes`): caches and environments have many"
        return Finding("error" if facts.f_favail < FILES else "warning", "inodes", seen, advice)
    return Finding("ok", "inodes", seen)


def quota() -> Finding:
    """What the site's tool says of the user's limits; without one a reached limit shows as a write that fails."""
    tool = next((tool for tool in QUOTA_TOOLS if shutil.which(tool[0])), None)
    if tool is None:
        return Finding("ok", "quota", f"no tool here ({' or '.join(words[0] for words in QUOTA_TOOLS)})")
    done = health.answer(tool, seconds=health.PATIENCE)
    if done.returncode and not done.stdout.strip():  # `quota` has status 1 where something is over a limit, too
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        advice = "ask the site how limits are seen; they may be reached unseen"
        return Finding("warning", "quota", f"{tool[0]} does not answer ({reason})", advice)
    full = [" ".join(line.split()) for line in done.stdout.splitlines() if _is_near_limit(line)]
    if full:
        advice = "remove what is not needed: a reached limit ends a run at its next checkpoint"
        return Finding("warning", "quota", f"{tool[0]}: {'; '.join(full)}", advice)
    return Finding("ok", "quota", f"{tool[0]} shows nothing near a limit")


def _is_near_limit(line: str) -> bool:
    """Whether a line has a share of 90 % or more, or one of the stars by which `quota` marks what is over."""
    shares = re.findall(r"(\d+(?:\.\d+)?)%", line)
    return any(float(share) >= 90 for share in shares) or re.search(r"\d\*", line) is not None


def _speed(folder: Path, mount: Mount) -> Finding:
    """Writes and reads a file; what the read is worth is said with it."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".xcon-doctor.") as file:
            written = _write(file.fileno())
            read = _read(file.fileno(), PROBE)
    except OSError as error:
        seen = f"{folder}: a file of {PROBE >> 20} MiB cannot be written ({error.strerror})"
        return Finding("error", "run folder", seen, "choose another --out, make room, or look at your quota")
    speeds = f"writes {_rate(written)} to the disk, reads {_rate(read)}{_honest(mount)}"
    seen = f"{folder}: {mount.where} ({mount.kind}), {speeds}"
    if min(written, read) < SLOW:
        return Finding("warning", "run folder", seen, "put runs on scratch or node-local storage")
    return Finding("ok", "run folder", seen)


def _write(descriptor: int) -> float:
    """Bytes a second, until the disk has them; random ones, which no file system can make smaller."""
    block, begun = os.urandom(CHUNK), time.perf_counter()
    for _ in range(PROBE // CHUNK):
        left = memoryview(block)
        while left:  # where the disk is nearly full only a part is taken, and then an error says why
            left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)
    return PROBE / (time.perf_counter() - begun)


def _read(descriptor: int, size: int) -> float:
    """Bytes a second of what the kernel was told to forget; Linux's can be told."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.perf_counter()
    for start in range(0, size, CHUNK):
        os.pread(descriptor, CHUNK, start)
    return size / (time.perf_counter() - begun)


def _rate(speed: float) -> str:
    return f"{speed / 1e6:,.0f} MB/s"


def _honest(mount: Mount) -> str:
    if mount.where == "memory":
        return " (from memory)"
    if sys.platform != "linux":
        return " (perhaps from this machine's cache)"
    return " (this machine's cache dropped" + ("; the server's may help)" if mount.where == "network" else ")")


# --------------------------------------------------------------------------------------------------------
# Shards


def shard_set(folder: Path) -> list[Finding]:
    """Whether a shard set is one, and its photographs can be read; not the whole of `xcon-shards verify`."""
    try:
        shards = ShardSet(folder)  # compares the size of every tar and the rows of every index with the card
        splits = [shards.split(split) for split in shards.card.splits if shards.has(split)]
        decoded = sum(_decode_some(split) for split in splits)
    except (ValueError, OSError) as error:
        how = f"xcon-shards verify {folder}" if (folder / CARD_NAME).is_file() else "give --shards DIR of a set"
        return [Finding("error", "shards", str(error), how)]
    counts = ", ".join(f"{split.name} {len(split):,}" for split in splits)
    seen = f"{folder}: {counts} of {len(shards.card.classes):,} classes; {decoded} photographs decode"
    return [Finding("ok", "shards", seen), _reading(folder, splits)]


def _decode_some(split: Split) -> int:
    """Decodes records spread over a split.

    Raises:
        ValueError, OSError: one does not decode; the message names it.
    """
    numbers = np.unique(np.linspace(0, len(split) - 1, DECODED, dtype=int))
    for number in numbers.tolist():
        try:
            images.decode(split.photo(number))
        except ValueError as error:
            raise ValueError(f"{split.describe(number)}: does not decode ({error})") from None
    return len(numbers)


def _reading(folder: Path, splits: Sequence[Split]) -> Finding:
    """How fast the largest tar is read, or the beginning of it."""
    tar = max((path for split in splits for path in split.tars.paths), key=lambda path: path.stat().st_size)
    mount, size = mount_of(folder), min(PROBE, tar.stat().st_size)
    with tar.open("rb") as file:
        speed = _read(file.fileno(), size)
    seen = f"{tar.name}: {mount.where} ({mount.kind}), {size / 1e6:,.1f} MB read at {_rate(speed)}{_honest(mount)}"
    if speed < SLOW:
        return Finding("warning", "shards", seen, "copy the set to node-local disk when the job starts")
    return Finding("ok", "shards", seen)


# --------------------------------------------------------------------------------------------------------
# Caches


def caches(*, cluster: bool) -> Finding:
    """Whether caches lie in the home directory, which is small on a cluster and counts files."""
    home = Path.home().resolve()
    places = {name: Path(os.environ.get(name) or home / usual) for name, usual in CACHES.items()}
    at_home = [name for name, place in places.items() if place.resolve().is_relative_to(home)]
    if cluster and at_home:
        seen = f"in the home directory: {', '.join(at_home)}"
        return Finding("warning", "caches", seen, "export SCRATCH=DIR and `source slurm/site.sh`, in jobs as well")
    return Finding("ok", "caches", f"models in {constants.HF_HUB_CACHE} ({mount_of(_nearest(hub.cache())).kind})")


def _nearest(path: Path) -> Path:
    return next(place for place in (path, *path.resolve().parents) if place.is_dir())


def models(recipe: str, *, cluster: bool) -> Finding:
    """Whether what was prefetched is whole, and is what a recipe needs.

    Args:
        recipe: of `xcon pretrain` and `xcon finetune`.
        cluster: whether jobs have no network, so that what is missing here is missing there.
    """
    needed = hub.needs([recipe])
    fetch = f"xcon prefetch {recipe}, where there is a network"
    if not needed:
        return Finding("ok", "models", f"recipe {recipe} needs nothing of the hub")
    if not hub.manifest_file().is_file():
        seen = f"nothing was prefetched ({hub.manifest_file()} is not there)"
        return Finding("warning" if cluster else "ok", "models", seen, fetch if cluster else "")
    try:
        fetched = hub.fetched()
        wrong = hub.missing(needed, fetched)
        wrong += [line for model in fetched.values() for line in hub.problems(model)]
    except (ValueError, OSError) as error:
        wrong = [str(error)]
    if wrong:
        return Finding("error", "models", "; ".join(wrong), fetch)
    return Finding("ok", "models", f"{len(fetched)} prefetched, whole, in {hub.cache()}")
