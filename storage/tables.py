"""Result tables: Parquet datasets of parts, each part written by one unit of work, whole or not at all.

<root>/<table>/<part>.parquet, where a part's name is its file name: letters, digits and `. _ ~ -`. For a subject
or pair, which may be called anything, it is `storage.cohort.subject_key` of the name.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.atomic import replace_file
from storage.places import ObjectStoreError, exists, names, place, read_bytes, remove
from storage.schemas import CORRESPONDENCES, FAILURES, METRICS, ROIS, RUNS, SCHEMA_VERSION, SCHEMAS, UNMATCHED
from storage.sources import is_remote

__all__ = [
    "CORRESPONDENCES",
    "FAILURES",
    "METRICS",
    "ROIS",
    "RUNS",
    "SCHEMAS",
    "SCHEMA_VERSION",
    "UNMATCHED",
    "TableError",
    "describe",
    "has_part",
    "part_names",
    "read_part",
    "read_table",
    "remove_part",
    "table_from_rows",
    "write_part",
]


_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,127}")


class TableError(ValueError):
    """A table or part that does not fit its schema, is damaged, or of another version; says the file."""


def table_from_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Build a table from rows; a column left out of a row, None and NaN are null.

    Raises:
        TableError: for a column that the table does not have, or a value that does not fit its type.
    """
    schema, records = _schema(name), list(rows)
    unknown = sorted({column for row in records for column in row} - set(schema.names))
    if unknown:
        raise TableError(f"table {name!r} has no column {', '.join(unknown)}; it has {', '.join(schema.names)}")
    arrays = []
    for field in schema:
        try:
            arrays.append(pa.array([_or_null(row.get(field.name)) for row in records], field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise TableError(f"table {name!r}, column {field.name} ({field.type}): {error}") from None
    return pa.table(arrays, schema=schema)


def write_part(root: str | Path, table_name: str, part: str, table: pa.Table) -> Path:
    """Write one part, replacing it; columns are cast to the pinned types and order.

    Raises:
        TableError: when the columns are not those of the table, or for a part that is no plain file name.
        OSError: naming the part, for example when the disk is full.
    """
    schema = _schema(table_name)
    if set(table.column_names) != set(schema.names):
        missing = sorted(set(schema.names) - set(table.column_names))
        extra = sorted(set(table.column_names) - set(schema.names))
        raise TableError(f"table {table_name!r}: missing columns {missing}, unknown columns {extra}")
    try:
        cast = table.select(schema.names).cast(schema).replace_schema_metadata(schema.metadata)
    except (pa.ArrowInvalid, ValueError) as error:
        raise TableError(f"table {table_name!r}, part {part!r}: {error}") from None
    path = _part_path(place(root), table_name, part)
    repeated = [field.name for field in schema if field.type != pa.float32()]  # a score is hardly ever seen twice
    with replace_file(path) as temporary:
        pq.write_table(cast, temporary, compression="zstd", store_schema=True, use_dictionary=repeated)
    return path


def read_part(root: str | Path, table_name: str, part: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part, or some columns of it.

    Raises:
        FileNotFoundError: when it does not exist.
        TableError: when it is truncated or of another schema version.
    """
    return _read(_part_path(place(root), table_name, part), table_name, columns)


def read_table(root: str | Path, table_name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All parts, or some columns of them, in the order of their names; no parts give an empty table.

    Raises:
        TableError: naming the part that is truncated or of another schema version.
    """
    folder = place(root) / table_name
    parts = [_read(folder / f"{name}.parquet", table_name, columns) for name in part_names(root, table_name)]
    if parts:
        return pa.concat_tables(parts)
    empty = pa.Table.from_batches([], _schema(table_name))  # Schema.empty_table() would import pandas
    return empty if columns is None else empty.select(columns)


def part_names(root: str | Path, table_name: str) -> list[str]:
    """Names of the finished parts of a table, sorted."""
    _schema(table_name)
    stems = (n.removesuffix(".parquet") for n in names(place(root) / table_name) if n.endswith(".parquet"))
    return sorted(stem for stem in stems if _PART.fullmatch(stem))


def has_part(root: str | Path, table_name: str, part: str) -> bool:
    """Whether a part is there, without listing the others."""
    return exists(_part_path(place(root), table_name, part))


def remove_part(root: str | Path, table_name: str, part: str) -> None:
    """Delete a part; one that does not exist is no error."""
    remove(_part_path(place(root), table_name, part))


def describe(name: str) -> list[tuple[str, str, str, str]]:
    """(column, type, unit, description) of every column of a table, in order."""
    rows = []
    for field in _schema(name):
        notes = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        rows.append((field.name, str(field.type), notes["unit"], notes["description"]))
    return rows


def _or_null(value: Any) -> Any:
    return None if isinstance(value, (float, np.floating)) and np.isnan(value) else value


def _schema(name: str) -> pa.Schema:
    if name not in SCHEMAS:
        raise TableError(f"no table {name!r}; tables are {', '.join(SCHEMAS)}")
    return SCHEMAS[name]


def _part_path(root: Path, table_name: str, part: str) -> Path:
    _schema(table_name)
    if not _PART.fullmatch(part):
        raise TableError(f"{part!r} cannot name a part of a table; use storage.cohort.subject_key of it")
    return root / table_name / f"{part}.parquet"


def _read(path: Path, table_name: str, columns: Sequence[str] | None) -> pa.Table:
    try:
        file = pq.ParquetFile(io.BytesIO(read_bytes(path)) if is_remote(path) else path)
        schema, table = file.schema_arrow, file.read(columns)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, ObjectStoreError | FileNotFoundError) or getattr(error, "errno", None) is not None:
            raise
        raise TableError(f"{path}: truncated or damaged Parquet file; delete it and run again") from error
    found = (schema.metadata or {}).get(b"schema_version", b"none").decode()
    if found != SCHEMA_VERSION:
        raise TableError(
            f"{path}: schema version {found}, this program reads {SCHEMA_VERSION}; use a new output folder"
        )
    if not schema.equals(_schema(table_name)):
        raise TableError(f"{path}: columns differ from table {table_name!r} of version {SCHEMA_VERSION}")
    return table
