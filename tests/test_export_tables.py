"""`samreg export --format csv` and `duckdb`: the tables of a study for other programs."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.csv
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from storage import tables
from tests.phantoms import REPO, environment
from tests.sample_study import HOSTILE, write_study

EXPORTED = ["correspondences", "failures", "metrics", "rois", "runs", "subjects"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("export-tables"), hostile=True)


def _call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, " ".join(result.output.split())


def test_csv_files_hold_the_tables(study: Path, tmp_path: Path) -> None:
    code, said = _call(study, "--out", tmp_path, "--format", "csv")
    assert code == 0, said
    assert sorted(path.stem for path in (tmp_path / "tables").iterdir()) == EXPORTED
    assert list(tmp_path.iterdir()) == [tmp_path / "tables"]
    stored = tables.read_table(study, "metrics")
    kinds = pyarrow.csv.ConvertOptions(column_types=stored.schema, strings_can_be_null=False)
    assert pyarrow.csv.read_csv(tmp_path / "tables" / "metrics.csv", convert_options=kinds).equals(stored)
    with (tmp_path / "tables" / "subjects.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["subject"] for row in rows] == [HOSTILE, "subject-02", "subject-03"]
    assert set(rows[0]) == {"subject", "group", "session"}


def test_the_database_holds_the_tables_with_their_meaning(study: Path, tmp_path: Path) -> None:
    code, said = _call(study, "--out", tmp_path, "--format", "duckdb")
    assert (code, said) == (0, str(tmp_path / "study.duckdb"))
    with duckdb.connect(str(tmp_path / "study.duckdb"), read_only=True) as database:
        assert [row[0] for row in database.execute("SHOW TABLES").fetchall()] == EXPORTED
        for name in EXPORTED[:-1]:
            found = database.sql(f"SELECT * FROM {name}").to_arrow_table()
            assert found.cast(tables.SCHEMAS[name]).equals(tables.read_table(study, name).combine_chunks())
        comments = dict(
            database.execute("SELECT column_name, comment FROM duckdb_columns() WHERE table_name='metrics'").fetchall()
        )
        assert comments["tre_mm"].endswith("after registration; empty without spacing [mm]")
        assert all(comments.values())
        joined = "SELECT avg(dice) FROM metrics JOIN subjects ON fixed = subject WHERE \"group\" = '<b>g</b>'"
        assert database.execute(joined).fetchone() == (pytest.approx(0.9),)


def test_tables_and_transforms_together(study: Path, tmp_path: Path) -> None:
    code, said = _call(study, "--out", tmp_path, "--format", "csv", "--format", "itk")
    assert code == 1  # the third pair has no transform
    assert "2 pairs" in said
    assert (tmp_path / "tables" / "metrics.csv").exists()
    assert len(list(tmp_path.rglob("*.h5"))) == 2


def test_a_damaged_part_is_named_and_nothing_is_left_half_done(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "study")
    part = next((tmp_path / "study" / "metrics").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    code, said = _call(tmp_path / "study", "--out", tmp_path / "out", "--format", "duckdb")
    assert code == 2
    assert f"{part.name}: truncated or damaged" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_without_duckdb_the_extra_is_named(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    code, said = _call(study, "--out", tmp_path, "--format", "duckdb")
    assert code == 2
    assert "needs the package duckdb: pip install 'samreg[analytics]', or --format csv" in said


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    code, said = _call(tmp_path, "--out", tmp_path / "out", "--format", "csv")
    assert code == 2
    assert "is not a study folder" in said


@pytest.mark.slow
def test_memory_does_not_grow_with_the_study(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "study")
    part = tables.read_table(study, "correspondences")
    many = pa.concat_tables([part] * (40_000 // part.num_rows + 1))
    peaks = []
    for parts in (2, 60):
        for number in range(parts):
            tables.write_part(tmp_path / "study", "correspondences", f"p{number:02d}", many)
        words = [str(tmp_path / "study"), "--out", str(tmp_path / "out"), "--format", "duckdb", "--format", "csv"]
        code = (
            "import resource, sys; from pipeline.cli_export import export; from pathlib import Path;"
            "export(Path(sys.argv[1]), out=Path(sys.argv[3]), formats=['csv', 'duckdb']);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPO, env=environment(), capture_output=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 400, peaks  # MiB; all parts together take more than 500
