"""Rows of a manifest or pair list, CSV or Parquet, with messages that name the row."""

from __future__ import annotations

import csv
import difflib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


class CohortError(ValueError):
    """A manifest or pair list that cannot be used; says the file, the row and what was expected."""


def read_rows(path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Rows as text by column, with their line number (Parquet: counted from 1); blank lines are left out."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    columns, lines = _parquet_lines(path) if path.suffix == ".parquet" else _csv_lines(path)
    missing = [column for column in required if column not in columns]
    if missing:
        raise CohortError(f"{path}: no column {', '.join(missing)}; found {', '.join(columns) or 'none'}")
    for column in (c for c in columns if c not in required + optional):
        near = difflib.get_close_matches(column.lower(), [c for c in optional if c not in columns], 1, 0.8)
        if near:
            raise CohortError(f"{path}: column {column!r} is not known; did you mean {near[0]!r}?")
    rows = []
    for number, cells in lines:
        if len(cells) > len(columns):
            raise CohortError(f"{path}, row {number}: {len(cells)} cells but {len(columns)} columns")
        row = dict.fromkeys((*required, *optional), "") | dict(zip(columns, cells, strict=False))
        if any(row.values()):
            rows.append((number, row))
    return rows


def _csv_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error):
        raise CohortError(f"{path}: not a UTF-8 CSV file; save it as CSV UTF-8 or Parquet") from None
    return (table[0][1], table[1:]) if table else ([], [])


def _parquet_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid:
        raise CohortError(f"{path}: not a Parquet file, or a truncated one") from None
    cells = zip(*(["" if v is None else str(v).strip() for v in c.to_pylist()] for c in table.columns), strict=True)
    return table.column_names, [(i, list(row)) for i, row in enumerate(cells, 1)]
