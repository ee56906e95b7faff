"""Draws where a species lives: xcon map species RUN --species NAME --out FILE.png (paper, Figure 3b).

H, W: rows (north to south) and columns (west to east) of a grid of places; b: places at once; C: classes;
D: width of an embedding.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from xcon import cartography, classifier, commandline, images, records
from xcon.cartography import Floats
from xcon.classifier import Classifier
from xcon.model import ModelSpec

PROGRAM = "xcon map"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Draws a species' probability at each place, image and date held constant."""

    what: Annotated[Literal["species"], tyro.conf.Positional]
    """What to draw."""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Fine-tuned run that uses metadata."""
    species: str
    """Class name; a name without its plumage in parentheses adds up all plumages."""
    out: Path
    """Picture to write: a .png file."""
    image: Path | None = None
    """Photograph held constant; none for a run on metadata alone."""
    date: str = "2026-07-01"
    """Day of the year, as an ISO date; the paper takes the middle of the year."""
    region: cartography.Region = (-180.0, -90.0, 180.0, 90.0)
    """WEST SOUTH EAST NORTH in degrees; the whole world where none is given."""
    step: float = 0.5
    """Side of a grid cell in degrees."""
    batch: int = 32_768
    """Places computed at once."""

    def __post_init__(self) -> None:
        """Refuses settings that could only fail later.

        Raises:
            ValueError: names the setting.
        """
        cartography.check_region(self.region, self.step)
        records.year_fraction(self.date)
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: at least 1 is needed")
        if not self.out.parent.is_dir():
            raise ValueError(f"--out {self.out}: no such folder as {self.out.parent}")
        if self.out.suffix != ".png":
            raise ValueError(f"--out {self.out}: a name ending in .png is needed")


def held_constant(network: Classifier, spec: ModelSpec, photo: Path | None) -> dict[str, Tensor]:
    """Embeddings [1, ...] of what a run sees beside place and date, computed once for the whole map.

    Raises:
        FileNotFoundError: no such photograph.
        ValueError: the run sees no metadata, the photograph is missing or not wanted, or does not decode.
    """
    if not spec.with_meta:
        raise ValueError("this run sees photographs only, all places are alike to it; one with meta is needed")
    if (spec.image is None) != (photo is None):
        raise ValueError(f"--image: this run sees {'no photograph' if photo else 'a photograph, name one'}")
    if spec.image is None or photo is None:
        return {}
    if not photo.is_file():
        raise FileNotFoundError(f"--image {photo}: no such file")
    try:
        pixels = images.decode(photo.read_bytes())
    except ValueError as error:
        raise ValueError(f"--image {photo}: {error}") from None
    view = images.eval_transform(spec.image)
    with torch.inference_mode():
        return {"image": network.embed("image", view(pixels)[None])}


@torch.inference_mode()
def species_probability(
    network: Classifier,
    held: Mapping[str, Tensor],
    classes: Sequence[int],
    *,
    lon: Floats,
    lat: Floats,
    date: str,
    batch: int,
) -> Floats:
    """Probability of a species at each place, image and date held constant (paper, section 4.4).

    Args:
        network: the fine-tuned classifier, in evaluation mode.
        held: modality -> embedding [1, ...], as `held_constant` gives it.
        classes: class ids that are this species; their probabilities are added.
        lon: [W], degrees.
        lat: [H], degrees.
        date: ISO date.
        batch: places computed at once.

    Returns:
        [H, W], in [0, 1].
    """
    lats, lons = (a.ravel() for a in np.meshgrid(lat, lon, indexing="ij"))  # [H * W]
    days = np.full_like(lons, records.year_fraction(date))
    places = torch.from_numpy(np.stack([lons, lats, days], axis=1)).float()  # [H * W, 3]
    found = []
    for part in places.split(batch):  # [b, 3]
        embeddings = {modality: vector.expand(len(part), *vector.shape[1:]) for modality, vector in held.items()}
        scores = network.classify({**embeddings, "meta": network.embed("meta", part)})  # [b, C]
        found.append(scores.softmax(dim=1)[:, list(classes)].sum(dim=1))
    return torch.cat(found).reshape(len(lat), len(lon)).numpy()


def species_title(settings: Settings, plumages: int) -> str:
    """What the map shows: species, day, what is held constant."""
    held = f"the photograph {settings.image.name} and the date" if settings.image else "the date"
    what = f"{settings.species} (sum of {plumages} plumages)" if plumages > 1 else settings.species
    seen = "" if settings.image else ", no photograph"
    return f"{what}\nProbability at each place on {settings.date}{seen}; {held} held constant"


def run() -> None:
    """Reads the command line, asks the model, draws."""
    settings = commandline.parse(Settings, PROGRAM)
    network, spec = classifier.load(settings.run)
    classes = records.classes_called([info["name"] for info in spec.classes], settings.species)
    held = held_constant(network, spec, settings.image)
    lon, lat = cartography.grid(settings.region, settings.step)
    probability = species_probability(
        network, held, classes, lon=lon, lat=lat, date=settings.date, batch=settings.batch
    )
    cartography.draw_species(probability, lon, lat, title=species_title(settings, len(classes)), out=settings.out)


def main() -> None:
    """Entry point."""
    commandline.guarded(run, PROGRAM)


if __name__ == "__main__":
    main()
