"""Which column says what: the settings and the reading that all sources with a table share."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shards.observations import Observation, Observations, Reader, Taxon, is_unknown, split_of

# What is read without being asked for: these names, and those of Darwin Core (GBIF, iNaturalist).
KNOWN = {
    "label": ("label",),
    "lon": ("lon", "longitude", "decimalLongitude"),
    "lat": ("lat", "latitude", "decimalLatitude"),
    "date": ("date", "eventDate", "observed_on"),
    "user_id": ("user_id",),
    "split": ("split",),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One photograph: a row of a table, and what its place in folders or splits says.

    Attributes:
        where: file and row, for messages.
        path: of the photograph, or what stands for it: kept in the record as `file_name`.
        image_id: for a table without such a column.
        values: column -> value.
        label: raw class id, for a table without such a column.
        groups: names above the class, from the top, for a table without such columns.
        split: for a table without such a column.
    """

    where: str
    path: str
    image_id: str
    values: Mapping[str, Any]
    label: int | str | None = None
    groups: tuple[str, ...] = ()
    split: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns(Observations):
    """Settings of every source with a table. A column "" is not read, even where its name is known."""

    label_column: str | None = None
    """What is to be recognised. Where not given: `label`."""
    lon_column: str | None = None
    """Degrees east. Where not given: `lon`, `longitude` or `decimalLongitude`."""
    lat_column: str | None = None
    """Degrees north. Where not given: `lat`, `latitude` or `decimalLatitude`."""
    date_column: str | None = None
    """ISO date, or fraction of the year. Where not given: `date`, `eventDate` or `observed_on`."""
    user_id_column: str | None = None
    """Who made the observation. Where not given: `user_id`."""
    split_column: str | None = None
    """train, val or test. Where not given: `split`."""
    image_id_column: str | None = None
    """Id of the photograph. Where not given it is made from the path."""
    scientific_name_column: str | None = None
    """Scientific name of the class."""
    hierarchy_columns: tuple[str, ...] = ()
    """Names above the class, from the top: family genus."""

    def roles(self, columns: Sequence[str], where: str) -> dict[str, str]:
        """What is read -> its column, for those that are there.

        Raises:
            ValueError: a column that a setting names is not there, or two could be meant.
        """
        found: dict[str, str] = {}
        for role in (*KNOWN, "image_id", "scientific_name"):
            asked = getattr(self, f"{role}_column")
            flag = f"--{role.replace('_', '-')}-column"
            if asked:
                found[role] = _named(asked, flag, columns, where)
            elif asked is None and (known := _known(role, columns)):
                if len(known) > 1:
                    raise ValueError(f"{where}: has columns {' and '.join(known)}; {flag} says which is meant")
                found[role] = known[0]
        for name in self.hierarchy_columns:
            _named(name, "--hierarchy-columns", columns, where)
        if ("lon" in found) != ("lat" in found):
            have, lack = ("lon", "lat") if "lon" in found else ("lat", "lon")
            raise ValueError(
                f"{where}: column {found[have]!r} is the {have}, which is the {lack}? --{lack}-column names one "
                f"of {', '.join(columns)}; or --{have}-column '' reads no places"
            )
        return found

    def read(
        self, rows: Iterable[Row], roles: Mapping[str, str], reader: Reader
    ) -> tuple[list[Observation], dict[int | str, Taxon]]:
        """The observations of a table, and its classes.

        Args:
            rows: all photographs.
            roles: from `roles`.
            reader: counts what it forgives.

        Raises:
            ValueError: a cell is not what its column should hold; the message names file and row.
        """
        found = []
        first: dict[int | str, tuple[str, Taxon]] = {}
        for row in rows:
            observation = self._observation(row, roles, reader)
            taxon = self._taxon(row, observation.label, roles)
            where, known = first.setdefault(observation.label, (row.where, taxon))
            if taxon != known:
                first[observation.label] = where, _same(known, taxon, f"{row.where} and {where}")
            found.append(observation)
        if len({type(observation.label) for observation in found}) > 1:
            raise ValueError(f"column {roles['label']!r} holds numbers in some rows and words in others")
        return found, {label: taxon for label, (_, taxon) in first.items()}

    def _observation(self, row: Row, roles: Mapping[str, str], reader: Reader) -> Observation:
        cells = {role: row.values[column] for role, column in roles.items()}
        lon, lat = reader.place(cells.get("lon"), cells.get("lat"), row.where)
        user = cells.get("user_id")
        return Observation(
            where=row.where,
            image_id=_text(cells["image_id"], row.where, roles["image_id"])
            if "image_id" in cells
            else row.image_id,
            label=_label(cells["label"], row.where, roles["label"]) if "label" in cells else _own_label(row),
            lon=lon,
            lat=lat,
            date=reader.date(cells.get("date"), row.where),
            split=split_of(_text(cells["split"], row.where, roles["split"]), row.where, "--split-column")
            if "split" in cells
            else row.split or "train",
            extra={"user_id": None if is_unknown(user) else str(user), "file_name": row.path},
        )

    def _taxon(self, row: Row, label: int | str, roles: Mapping[str, str]) -> Taxon:
        cell = row.values[roles["scientific_name"]] if "scientific_name" in roles else None
        above = [row.values[column] for column in self.hierarchy_columns]
        return Taxon(
            name=str(label),
            scientific_name=None if is_unknown(cell) else str(cell),
            hierarchy=tuple(str(name) for name in above if not is_unknown(name)) or row.groups,
        )


def column_facts(
    columns: Sequence[str], roles: Mapping[str, str], more: Sequence[str], label: str
) -> dict[str, str]:
    """What was read from where, for people.

    Args:
        columns: all there are.
        roles: from `Columns.roles`.
        more: other columns that were read.
        label: where the class comes from if no column says it.
    """
    read = [f"{role} from {column}" for role, column in roles.items() if role != "label"]
    unread = [name for name in columns if name not in {*roles.values(), *more}]
    return {
        "class": f"column {roles['label']}" if "label" in roles else label,
        "columns": ", ".join([*read, *more]) or "none",
        "columns not read": ", ".join(unread) or "none",
    }


def _named(name: str, flag: str, columns: Sequence[str], where: str) -> str:
    if not columns:
        raise ValueError(f"{flag} {name}: {where} has no table; put a metadata.csv there, or name one with --meta")
    if name not in columns:
        raise ValueError(f"{flag} {name}: {where} has no such column, only {', '.join(columns)}")
    return name


def _known(role: str, columns: Sequence[str]) -> list[str]:
    """The columns whose names say what they are, in whatever case."""
    names = {name.lower() for name in KNOWN.get(role, ())}
    return [column for column in columns if column.lower() in names]


def no_label(columns: Sequence[str], where: str) -> ValueError:
    """The error where nothing says which class a photograph is of."""
    return ValueError(f"{where}: has no column 'label'; --label-column names one of {', '.join(columns)}")


def _text(value: Any, where: str, column: str) -> str:
    if is_unknown(value):
        raise ValueError(f"{where}: column {column!r} is empty; fill it in, or take the row out")
    return str(value)


def _label(value: Any, where: str, column: str) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return _text(value, where, column)


def _own_label(row: Row) -> int | str:
    assert row.label is not None  # a source without a column has seen to it
    return row.label


def _same(one: Taxon, other: Taxon, where: str) -> Taxon:
    """One taxon of two that may each lack what the other has."""
    merged = Taxon(
        one.name,
        one.scientific_name or other.scientific_name,
        one.hierarchy or other.hierarchy,
    )
    for field in ("scientific_name", "hierarchy"):
        values = [getattr(taxon, field) for taxon in (one, other)]
        if all(values) and values[0] != values[1]:
            shown = [" > ".join(value) if isinstance(value, tuple) else value for value in values]
            raise ValueError(f"{where}: class {one.name!r} is {shown[1]!r} in one and {shown[0]!r} in the other")
    return merged
