"""Any set of photographs that Hugging Face's `datasets` reads: from the hub, from a folder, from `save_to_disk`.

`datasets` keeps a copy of what it loads in its cache (HF_HOME); photographs are taken from there as the bytes they
are, by row, in any process.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from shards.columns import Columns, Row, column_facts, no_label
from shards.observations import Observation, Taxon, image_id, split_of
from shards.photographs import Fit
from shards.plan import Photograph, Plan
from shards.source import Room
from xcon.records import SPLITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub(Columns):
    """Shards of any image set that `datasets` reads."""

    NAME = "hub"

    name: str
    """The set: its name on the hub, or a folder."""
    config: str | None = None
    """The set's configuration, where it has several."""
    splits: tuple[str, ...] = ()
    """OURS=THEIRS: train=train test=validation. Where not given: all, by their names."""
    image_column: str | None = None
    """The photographs. Where not given: the only column of images."""

    @property
    def made_by(self) -> dict[str, Any]:
        """As of every source; of a folder its name alone, which is not of this machine."""
        name = Path(self.name).name if Path(self.name).exists() else self.name
        return {**super().made_by, "name": name}

    def plan(self, room: Room) -> Plan:
        """Loads the set; its photographs stay where they are."""
        loaded = load(self.name, self.config, room.console)
        chosen = self._chosen(tuple(loaded))
        features = loaded[next(iter(chosen))].features
        image = self._image_column(features)
        columns = [name for name in features if name != image]
        roles = self._roles(columns, chosen)
        rows, places = self._rows(loaded, chosen, [*roles.values(), *self.hierarchy_columns])
        with self.reading() as reader:
            found, taxa = self.read(rows, roles, reader)
        if names := getattr(features[roles["label"]], "names", None):
            taxa = _named(found, taxa, names)
        facts = {
            **column_facts(columns, roles, self.hierarchy_columns, ""),
            "splits read": ", ".join(f"{ours} from {theirs}" for theirs, ours in chosen.items()),
            "splits left out": ", ".join(name for name in loaded if name not in chosen) or "none",
            **reader.facts,
        }
        rows_of = {o.image_id: place for o, place in zip(found, places, strict=True)}
        undecoded = importlib.import_module("datasets").Image(decode=False)
        photographs = {name: loaded[name].select_columns([image]).cast_column(image, undecoded) for name in chosen}
        return self.assemble(found, taxa, RowPhotographs(photographs, image, rows_of, self.fit), facts)

    def _roles(self, columns: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
        roles = self.roles(columns, self.name)
        if "label" not in roles:
            raise no_label(columns, self.name)
        if "split" in roles and self.split_column is None and len(chosen) > 1:
            column = roles["split"]
            raise ValueError(
                f"{self.name}: has splits and a column {column!r}; --split-column {column} takes the column, "
                "--split-column '' the splits"
            )
        return roles

    def _rows(
        self, loaded: Mapping[str, Any], chosen: Mapping[str, str], columns: Sequence[str]
    ) -> tuple[list[Row], list[tuple[str, int]]]:
        """Every row of the chosen splits without its photograph, and where it stands: split and number."""
        rows, places = [], []
        wanted = list(dict.fromkeys(columns))
        for theirs, ours in chosen.items():
            table = loaded[theirs].select_columns(wanted)[:]
            for number in range(len(loaded[theirs])):
                path = f"{theirs}/{number:08d}"
                values = {name: table[name][number] for name in wanted}
                rows.append(Row(f"{self.name} {theirs} row {number}", path, image_id(path), values, split=ours))
                places.append((theirs, number))
        return rows, places

    def _chosen(self, names: tuple[str, ...]) -> dict[str, str]:
        """Their split -> ours.

        Raises:
            ValueError: no such split, or a name that says nothing.
        """
        if not self.splits:
            return {name: split_of(name, self.name, "--splits train=THEIRS") for name in names}
        chosen: dict[str, str] = {}
        for text in self.splits:
            ours, _, theirs = text.partition("=")
            if ours not in SPLITS or theirs not in names:
                raise ValueError(
                    f"--splits {text}: OURS=THEIRS is needed, ours one of {', '.join(SPLITS)}, theirs one of "
                    f"{', '.join(names)}"
                )
            if theirs in chosen:
                raise ValueError(f"--splits {text}: {theirs} is {chosen[theirs]} already")
            chosen[theirs] = ours
        return chosen

    def _image_column(self, features: Mapping[str, Any]) -> str:
        images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
        if self.image_column in images:
            return self.image_column
        if self.image_column is None and len(images) == 1:
            return images[0]
        asked = f"--image-column {self.image_column}" if self.image_column else "--image-column is needed"
        raise ValueError(f"{asked}: columns of images in {self.name} are {', '.join(images) or 'none'}")


def _named(
    found: Sequence[Observation], taxa: Mapping[int | str, Taxon], names: Sequence[str]
) -> dict[int | str, Taxon]:
    """The classes by the names that a ClassLabel has for its numbers.

    Raises:
        ValueError: a number without a name: -1 stands for no label.
    """
    for o in found:
        if not 0 <= int(o.label) < len(names):
            raise ValueError(f"{o.where}: label {o.label} is no class of the set; --splits leaves a split out")
    return {label: dataclasses.replace(taxon, name=names[int(label)]) for label, taxon in taxa.items()}


@dataclasses.dataclass(frozen=True)
class RowPhotographs:
    """Photographs of a loaded set by row: a `photograph` of `shards.plan.Plan`.

    Pickled, a set is the names of its files, which each process maps for itself.

    Attributes:
        splits: their split -> its rows, images undecoded.
        column: of the images.
        rows: image id -> their split and row number.
        fit: makes a photograph small.
    """

    splits: Mapping[str, Any]
    column: str
    rows: Mapping[str, tuple[str, int]]
    fit: Fit

    def __call__(self, name: str) -> Photograph:
        """The photograph of one image id.

        Raises:
            BrokenPhotographError: it does not decode.
            ValueError: the row holds no photograph, or names a file that cannot be read.
        """
        split, row = self.rows[name]
        image = self.splits[split][row][self.column]
        where = f"{split} row {row}"
        if image is None or not (image["bytes"] or image["path"]):
            raise ValueError(f"{where}: has no photograph in column {self.column!r}")
        try:
            data = image["bytes"] or Path(image["path"]).read_bytes()
        except OSError as error:
            raise ValueError(f"{where}: {image['path']} cannot be read ({error.strerror})") from None
        return self.fit(data, where)


def load(name: str, config: str | None, console: Console) -> Mapping[str, Any]:
    """Their split -> its rows.

    Raises:
        ValueError: no such set, or `datasets` cannot read it.
    """
    datasets = importlib.import_module("datasets")  # takes seconds, and no other source needs it
    folder = Path(name)
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if not console.is_terminal:
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"--name {name}: datasets cannot load it ({reason})") from None
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
