# mypy: disable-error-code="no-untyped-call"
"""The result tables of a study for other programs: a CSV file each, or one DuckDB database.

    OUT/tables/<table>.csv      and subjects.csv, the manifest of the latest run
    OUT/study.duckdb            the same as tables, with unit and meaning as the comment of each column

A part is read at a time, so that memory does not grow with the study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.csv

from pipeline.errors import UsageError
from pipeline.folder import StudyFolder
from pipeline.record import planned_subjects
from storage import tables
from storage.atomic import clear_abandoned, replace_file
from storage.cohort import Subject

if TYPE_CHECKING:
    import duckdb

_SUBJECTS = "subjects"
_MEMORY = "512MB"


def export_tables(study: Path, out: Path, formats: Sequence[str]) -> list[Path]:
    """Write the tables that have rows, and the manifest.

    Args:
        formats: some of `TABLE_FORMATS`.

    Returns:
        The files written.

    Raises:
        UsageError: for a folder that is no study, or DuckDB where it is not installed.
        TableError: for a part that is damaged or of another version.
        OSError: naming the file, for example when the disk is full.
    """
    folder = StudyFolder(study)
    plan = folder.latest_plan()
    subjects = _subjects(planned_subjects(plan))
    names = [name for name in tables.SCHEMAS if tables.part_names(study, name)]
    clear_abandoned([out, out / "tables"])
    return [path for name in formats for path in TABLE_FORMATS[name](study, out, names, subjects)]


def _write_csv(study: Path, out: Path, names: Sequence[str], subjects: pa.Table) -> Iterator[Path]:
    for name in (*names, _SUBJECTS):
        schema = subjects.schema if name == _SUBJECTS else tables.SCHEMAS[name]
        path = out / "tables" / f"{name}.csv"
        with replace_file(path) as temporary, pyarrow.csv.CSVWriter(temporary, schema) as writer:
            for part in _parts(study, name, subjects):
                writer.write_table(part.cast(schema))
        yield path


def _write_duckdb(study: Path, out: Path, names: Sequence[str], subjects: pa.Table) -> Iterator[Path]:
    try:
        import duckdb
    except ImportError:
        raise UsageError(
            "--format duckdb needs the package duckdb: pip install 'samreg[analytics]', or --format csv"
        ) from None
    path = out / "study.duckdb"
    settings: dict[str, str | bool | int | float | list[str]] = {"memory_limit": _MEMORY, "threads": 1}
    with replace_file(path) as temporary, duckdb.connect(str(temporary), config=settings) as database:
        for name in (*names, _SUBJECTS):
            _fill(database, name, _parts(study, name, subjects))
        database.close()  # what it holds back is written before the file is moved
    yield path


def _fill(database: duckdb.DuckDBPyConnection, name: str, parts: Iterator[pa.Table]) -> None:
    for number, part in enumerate(parts):
        database.register("part", part)
        how = f"INSERT INTO {name}" if number else f"CREATE TABLE {name} AS"
        database.execute(f"{how} SELECT * FROM part")
        database.unregister("part")
    for column, _, unit, meaning in tables.describe(name) if name != _SUBJECTS else ():
        text = (f"{meaning} [{unit}]" if unit else meaning).replace("'", "''")
        database.execute(f"COMMENT ON COLUMN {name}.\"{column}\" IS '{text}'")


def _parts(study: Path, name: str, subjects: pa.Table) -> Iterator[pa.Table]:
    if name == _SUBJECTS:
        yield subjects
    else:
        yield from (tables.read_part(study, name, part) for part in tables.part_names(study, name))


def _subjects(found: Sequence[Subject]) -> pa.Table:
    """The manifest, without the paths of files."""
    shown = [f.name for f in fields(Subject) if f.name in ("subject", "group", "session")]
    return pa.table({name: pa.array([getattr(s, name) for s in found], pa.string()) for name in shown})


TABLE_FORMATS: Mapping[str, Callable[[Path, Path, Sequence[str], pa.Table], Iterator[Path]]] = {
    "csv": _write_csv,
    "duckdb": _write_duckdb,
}
