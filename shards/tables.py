"""Tables that people keep beside their photographs: CSV (commas, semicolons or tabs), JSON lines, Parquet."""

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_DELIMITERS = ",;\t"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table read whole.

    Attributes:
        columns: names, in order.
        rows: where it stands, for messages -> column -> value; a cell of a CSV is text, its spelling kept.
    """

    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Any]]


def read_table(path: Path) -> Table:
    """Reads a table by the suffix of its name.

    Raises:
        ValueError: no such file, no such kind of table, or a damaged one; the message names file and line.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"{path}: no table by its name; save it as one of {', '.join(TABLE_SUFFIXES)}")
    try:
        table = readers[suffix](path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if not table.rows:
        raise ValueError(f"{path}: has no rows")
    return table


def _read_csv(path: Path) -> Table:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
        head = file.readline()
        file.seek(0)
        lines = csv.reader(file, delimiter=max(_DELIMITERS, key=head.count))
        try:
            columns = tuple(name.strip() for name in next(lines, []))
            _check_columns(path, columns)
            rows = dict(_csv_rows(path, lines, columns))
        except csv.Error as error:
            raise ValueError(f"{path} line {lines.line_num}: {error}") from None
    return Table(columns, rows)


def _csv_rows(path: Path, lines: Any, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    for cells in lines:
        if not any(cells):
            continue  # spreadsheets end in lines of commas
        where = f"{path} line {lines.line_num}"
        if len(cells) != len(columns):
            raise ValueError(f"{where}: has {len(cells)} cells, the first line has {len(columns)}")
        yield where, dict(zip(columns, cells, strict=True))


def _check_columns(path: Path, columns: tuple[str, ...]) -> None:
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}")


def _read_jsonl(path: Path) -> Table:
    rows: dict[str, dict[str, Any]] = {}
    columns: dict[str, None] = {}
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path} line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(values, dict):
                raise ValueError(f"{where}: not a JSON object")
            rows[where] = values
            columns.update(dict.fromkeys(values))
    filled = {where: {**dict.fromkeys(columns), **values} for where, values in rows.items()}
    return Table(tuple(columns), filled)


def _read_parquet(path: Path) -> Table:
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from None
    columns = tuple(table.column_names)
    _check_columns(path, columns)
    return Table(columns, {f"{path} row {n}": row for n, row in enumerate(table.to_pylist(), start=1)})
