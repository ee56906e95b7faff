"""Fetches the models and tokenizers that recipes need, for nodes without a network.

    source slurm/site.sh                       # points the cache where the jobs will look
    xcon prefetch paper best                   # on a login node
    xcon prefetch laptop --text-model sentence-transformers/all-MiniLM-L6-v2
    xcon prefetch --check                      # compares the cache with the manifest, without a network

What was fetched stands in HF_HOME/xcon-prefetch.json: repository, commit, files, sizes and sha256.
"""

import dataclasses
import re
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from xcon import commandline, hub, recipes

PROGRAM = "xcon prefetch"
# Of a text model: its settings, its tokenizer and safetensors; not what it is for other libraries.
TEXT_FILES = re.compile(r"[^/]+\.(json|txt|model|jinja)|model(-\d+-of-\d+)?\.safetensors")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fetches the models and tokenizers that recipes need, for nodes without a network."""

    recipes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE...")] = ()
    """Recipes of xcon pretrain and xcon finetune; one name means both."""
    text_model: str | None = None
    """As it will be given to xcon pretrain, in place of the recipes'."""
    image_backbone: str | None = None
    """As it will be given to the trainers, in place of the recipes'."""
    check: bool = False
    """Fetch nothing: say whether all of it, or what the named recipes need, is there and whole."""

    def __post_init__(self) -> None:
        """Refuses what names nothing.

        Raises:
            ValueError: names the setting.
        """
        known = list(dict.fromkeys([*recipes.PRETRAIN, *recipes.FINETUNE]))
        if unknown := [name for name in self.recipes if name not in known]:
            raise ValueError(f"RECIPE {unknown[0]}: no such recipe; there are {', '.join(known)}")
        if not (self.recipes or self.text_model or self.image_backbone or self.check):
            raise ValueError("RECIPE...: name at least one, or --text-model or --image-backbone")


def main() -> None:
    """Entry point."""
    commandline.guarded(prefetch, PROGRAM)


def prefetch() -> None:
    """Parse, find what is needed, fetch or check it, say what there is."""
    settings = commandline.parse(Settings, PROGRAM)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    needed = hub.needs(settings.recipes, text_model=settings.text_model, image_backbone=settings.image_backbone)
    if settings.recipes and not needed:
        console.print(f"{' '.join(settings.recipes)}: nothing of the hub is needed")
        return
    if settings.check:
        check(needed, console)
        return
    models = []
    for setting, name in needed:
        if place := hub.local_folder(name):
            console.print(f"{setting} {name}: a folder here, nothing to fetch; jobs must see {place}")
            continue
        models.append(fetch_image(setting, name) if setting == hub.IMAGE else fetch_text(setting, name))
        hub.write_down(models[-1])
    show(models, console)


def fetch_image(setting: str, backbone: str) -> hub.Model:
    """A timm network's weights, and its settings where it is none of timm's own."""
    repo = hub.timm_repo(backbone)
    found = hub.listing(repo, setting=f"{setting} {backbone}")
    weights = [name for name in ("model.safetensors", "pytorch_model.bin") if name in found.files][:1]
    if not weights:
        raise ValueError(f"{setting} {backbone}: {repo} has no model.safetensors")
    names = [*weights, *(["config.json"] if "config.json" in found.files else [])]
    return hub.fetch(found, names, setting=f"{setting} {backbone}")


def fetch_text(setting: str, name: str) -> hub.Model:
    """A text model and its tokenizer, which is loaded to see that nothing is missing."""
    found = hub.listing(name, setting=f"{setting} {name}")
    names = [path for path in found.files if TEXT_FILES.fullmatch(path)]
    if "config.json" not in names or not any(path.endswith(".safetensors") for path in names):
        raise ValueError(f"{setting} {name}: has no config.json or no model.safetensors, which xcon loads")
    model = hub.fetch(found, names, setting=f"{setting} {name}")
    try:
        AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting} {name}: has no tokenizer that transformers can load ({error})") from None
    return model


def check(needed: list[tuple[str, str]], console: Console) -> None:
    """Compares the cache with the manifest.

    Raises:
        ValueError: something is missing or damaged; a line for each was printed.
        FileNotFoundError: there is no manifest.
    """
    models = hub.fetched()
    wrong = [*hub.missing(needed, models), *(line for model in models.values() for line in hub.problems(model))]
    show(list(models.values()), console)
    for line in wrong:
        commandline.say(line)
    if wrong:
        raise ValueError(
            f"{hub.manifest_file()}: {len(wrong)} problems; `xcon prefetch` fetches again what it names"
        )


def show(models: list[hub.Model], console: Console) -> None:
    """A line for each model, and where it all is."""
    if not models:
        return
    table = Table("model", "commit", "files", "MB", box=None)
    for model in models:
        size = sum(file.size for file in model.files) / 1e6
        table.add_row(model.repo, model.revision[:12], str(len(model.files)), f"{size:,.1f}")
    console.print(table)
    console.print(f"in {hub.cache()}, written down in {hub.manifest_file()}")


if __name__ == "__main__":
    main()
