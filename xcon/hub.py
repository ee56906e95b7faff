"""Models of the Hugging Face hub in the cache: fetched, compared with what the hub says, written down.

The cache is huggingface_hub's own, where timm and transformers look. A manifest in HF_HOME names each file that
was fetched, so that a node without a network can be told what it has.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from xcon import recipes
from xcon.config import BACKBONE, WEIGHTS, FinetuneConfig, PretrainConfig, read_json
from xcon.encoders import SMALL_TEXT
from xcon.records import atomic_write, sha256

MANIFEST_NAME = "xcon-prefetch.json"
FORMAT = "xcon-prefetch/1"
IMAGE, TEXT = "--image-backbone", "--text-model"  # the settings that name models


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a repository: its name there, its bytes and their hash."""

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Model:
    """A repository that was fetched.

    Attributes:
        repo: its name as timm or transformers will ask for it.
        revision: the commit that its main branch was at.
        files: all that xcon reads of it.
    """

    repo: str
    revision: str
    files: tuple[File, ...]


def manifest_file() -> Path:
    """Where the manifest is, or would be."""
    return Path(constants.HF_HOME) / MANIFEST_NAME


def cache() -> Path:
    """Where the models are."""
    return Path(constants.HF_HUB_CACHE)


def fetched() -> dict[str, Model]:
    """The manifest: repository -> what was fetched of it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = manifest_file()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; xcon prefetch makes it")
    values = read_json(path)
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        models = [Model(m["repo"], m["revision"], tuple(File(**f) for f in m["files"])) for m in values["models"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a manifest of xcon prefetch ({error}); remove it and fetch again") from None
    return {model.repo: model for model in models}


def write_down(model: Model) -> None:
    """Adds a model to the manifest, or replaces it there."""
    path = manifest_file()
    known = (fetched() if path.is_file() else {}) | {model.repo: model}
    models = [dataclasses.asdict(known[repo]) for repo in sorted(known)]
    path.parent.mkdir(parents=True, exist_ok=True)  # where HF_HUB_CACHE is elsewhere
    with atomic_write(path) as file:
        file.write((json.dumps({"format": FORMAT, "models": models}, indent=1) + "\n").encode())


def problems(model: Model) -> list[str]:
    """What is wrong with the files of a model that was fetched; reads all of them."""
    found = []
    for file in model.files:
        path = _cached(model.repo, file.name, model.revision)
        if path is None:
            found.append(f"{model.repo}: {file.name} is missing from {cache()}")
        elif (size := path.stat().st_size) != file.size:
            found.append(f"{path}: {size:,} bytes, fetched were {file.size:,}: cut or edited")
        elif sha256(path) != file.sha256:
            found.append(f"{path}: its bytes are not those that were fetched (sha256 differs)")
    first = model.files[0].name
    if not found and _cached(model.repo, first, "main") != _cached(model.repo, first, model.revision):
        found.append(f"{model.repo}: jobs would load another revision than {model.revision}, which was checked")
    return found


def _cached(repo: str, name: str, revision: str) -> Path | None:
    """Where a file lies; None where it is missing."""
    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


# --------------------------------------------------------------------------------------------------------
# What recipes need


def needs(
    names: Sequence[str], *, text_model: str | None = None, image_backbone: str | None = None
) -> list[tuple[str, str]]:
    """The settings that name models of the hub, each once, and what they name.

    Args:
        names: recipes of `xcon pretrain` and `xcon finetune`; one name means both.
        text_model: given in place of the recipes' own.
        image_backbone: likewise.
    """
    configs: list[PretrainConfig | FinetuneConfig] = []
    for name in names:
        configs += [book[name][1] for book in (recipes.PRETRAIN, recipes.FINETUNE) if name in book]
    found = [(IMAGE, image_backbone)] if image_backbone else []
    found += [(TEXT, text_model)] if text_model else []
    for cfg in configs:
        if not image_backbone and "image" in cfg.modalities and (cfg.image_weights or WEIGHTS) == WEIGHTS:
            found.append((IMAGE, cfg.image_backbone or BACKBONE))
        if not text_model and isinstance(cfg, PretrainConfig) and "text" in cfg.modalities:
            found.append((TEXT, cfg.text_model))
    return [need for need in dict.fromkeys(found) if need[1] != SMALL_TEXT]


def local_folder(name: str) -> Path | None:
    """The folder that a name means, as timm and transformers read it; None: it means a model of the hub."""
    path = Path(name.removeprefix("local-dir:"))
    return path.resolve() if path.is_dir() else None


def timm_repo(backbone: str) -> str:
    """The repository where timm looks for the weights of a network.

    Raises:
        ValueError: timm has no such network, or no weights of it on the hub.
    """
    if backbone.startswith("hf-hub:"):
        return backbone.removeprefix("hf-hub:")
    if not timm.is_model(backbone):
        raise ValueError(f"{IMAGE} {backbone}: timm has no such network")
    facts = timm.models.get_pretrained_cfg(backbone)
    if facts is None or not facts.hf_hub_id:
        raise ValueError(
            f"{IMAGE} {backbone}: timm has no weights of it on the hub; take another, --image-weights none, or "
            "--image-weights FILE.safetensors"
        )
    return str(facts.hf_hub_id)


def missing(needed: Sequence[tuple[str, str]], fetched: Mapping[str, Model]) -> list[str]:
    """A line for each of `needs` that was not fetched."""
    found = []
    for setting, name in needed:
        repo = timm_repo(name) if setting == IMAGE else name
        if not local_folder(name) and repo not in fetched:
            found.append(f"{setting} {name}: {repo} was not fetched")
    return found


# --------------------------------------------------------------------------------------------------------
# Fetching


@dataclasses.dataclass(frozen=True)
class Listing:
    """A repository as the hub describes it at one commit: file name -> size and hashes."""

    repo: str
    revision: str
    files: dict[str, RepoFile]


def listing(repo: str, *, setting: str) -> Listing:
    """Asks the hub what a repository has.

    Args:
        repo: as `timm/resnet50.a1_in1k`.
        setting: that needs it, for messages.

    Raises:
        FileNotFoundError: no such repository, or one that is not for everybody.
        OSError: no network.
    """
    try:
        api = HfApi()
        revision = api.model_info(repo).sha
        assert revision is not None  # the hub's own answer always has it
        entries = api.list_repo_tree(repo, revision=revision)
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{setting}: {constants.ENDPOINT} has no model {repo}, or shows it only to some: look at its name, or "
            "`hf auth login`"
        ) from None
    except OfflineModeIsEnabled:
        raise OSError(f"{setting}: HF_HUB_OFFLINE is set, so nothing can be fetched; unset it here") from None
    except (HTTPError, OSError) as error:
        raise OSError(
            f"{setting}: {constants.ENDPOINT} cannot be reached ({_reason(error)}); fetch on a machine with a "
            "network, as a login node"
        ) from None
    return Listing(repo, revision, files)


def fetch(found: Listing, names: Sequence[str], *, setting: str) -> Model:
    """Fetches files into the cache, and compares each with what the hub says of it.

    Only when all are whole do they become what the cache's `main` means, so that an earlier revision stays in use
    until then. What is in the cache already is compared as well, and fetched again where it is damaged.

    Args:
        found: the repository.
        names: of files that it has.
        setting: that needs them, for messages.

    Raises:
        ValueError: a file is damaged whenever it is fetched.
        OSError: no network any more, or the disk is full.
    """
    try:
        files = tuple(_fetch_file(found, name) for name in names)
        hf_hub_download(found.repo, names[0])  # writes down what main is
    except (HTTPError, OSError) as error:
        raise OSError(
            f"{setting}: {found.repo} was not fetched into {cache()} ({_reason(error)}); the same command goes on"
        ) from None
    model = Model(found.repo, found.revision, files)
    if wrong := problems(model):
        raise ValueError(f"{setting}: {wrong[0]}; it may have changed meanwhile, give the same command again")
    return model


def _fetch_file(found: Listing, name: str) -> File:
    """One file, whose second attempt is for what lay damaged in the cache."""
    said = found.files[name]
    for _ in range(2):
        path = Path(hf_hub_download(found.repo, name, revision=found.revision))
        digest, size = sha256(path), path.stat().st_size
        whole = digest == said.lfs.sha256 if said.lfs else _git_digest(path) == said.blob_id
        if whole and size == said.size:
            return File(name, size, digest)
        path.resolve().unlink()  # the name in the snapshot is a link to it
        path.unlink(missing_ok=True)
    raise ValueError(
        f"{found.repo}: {name} came twice with another hash than the hub says, so it was removed; something "
        "between here and the hub changes files"
    )


def _git_digest(path: Path) -> str:
    """As git names a file, and the hub those that are not in its store of large ones."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _reason(error: Exception) -> str:
    """The system's words where the system refused, else the first line of the hub's."""
    cause: Any = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
