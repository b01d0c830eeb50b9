"""Result tables: pinned columns, whole parts, clear errors."""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.atomic import clear_abandoned, replace_file
from storage.cohort import subject_key
from storage.tables import (
    SCHEMA_VERSION,
    SCHEMAS,
    TableError,
    describe,
    has_part,
    part_names,
    read_part,
    read_table,
    remove_part,
    table_from_rows,
    write_part,
)

REPO = Path(__file__).resolve().parents[1]
ISSUE_COLUMNS = {
    "metrics": "pair moving fixed label dice_before dice_affine dice tre_mm_before tre_mm hd95_mm sdlogj "
    "fold_fraction n_rois seconds_fit",
    "correspondences": "pair moving fixed moving_roi fixed_roi moving_slice fixed_slice similarity margin "
    "rank "
    "moving_centroid_z_mm moving_centroid_y_mm moving_centroid_x_mm fixed_centroid_z_mm fixed_centroid_y_mm "
    "fixed_centroid_x_mm moving_area_mm2 fixed_area_mm2",
    "failures": "stage unit error message traceback attempt",
}


def _failures(*units):
    return table_from_rows("failures", [{"stage": "fit", "unit": unit, "attempt": 1} for unit in units])


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_column_is_described(name):
    columns = describe(name)
    assert [row[0] for row in columns] == SCHEMAS[name].names
    assert all(row[1] and row[3] for row in columns)
    assert set(ISSUE_COLUMNS.get(name, "").split()) <= {row[0] for row in columns}


def test_parts_read_back_in_name_order(tmp_path):
    write_part(tmp_path, "failures", "b", _failures("u3"))
    write_part(tmp_path, "failures", "a", _failures("u1", "u2"))
    assert read_table(tmp_path, "failures")["unit"].to_pylist() == ["u1", "u2", "u3"]
    write_part(tmp_path, "failures", "a", _failures("u9"))
    assert read_part(tmp_path, "failures", "a")["unit"].to_pylist() == ["u9"]
    remove_part(tmp_path, "failures", "a")
    remove_part(tmp_path, "failures", "a")
    assert part_names(tmp_path, "failures") == ["b"]
    assert pq.read_schema(tmp_path / "failures" / "b.parquet").metadata[b"schema_version"] == SCHEMA_VERSION.encode()


def test_absent_table_is_empty(tmp_path):
    table = read_table(tmp_path, "metrics")
    assert table.num_rows == 0
    assert table.schema == SCHEMAS["metrics"]


def test_some_columns_only(tmp_path):
    assert read_table(tmp_path, "failures", ["unit"]).column_names == ["unit"]
    write_part(tmp_path, "failures", "a", _failures("u1", "u2"))
    assert read_part(tmp_path, "failures", "a", ["unit", "stage"])["unit"].to_pylist() == ["u1", "u2"]
    assert read_table(tmp_path, "failures", ["unit"]).to_pydict() == {"unit": ["u1", "u2"]}


def test_nan_and_absent_values_are_null(tmp_path):
    table = table_from_rows("metrics", [{"pair": "p", "dice": np.float32("nan"), "label": np.int64(2)}, {}])
    assert table["dice"].null_count == 2
    assert table["label"].to_pylist() == [2, None]
    write_part(tmp_path, "metrics", "p", table)
    assert read_part(tmp_path, "metrics", "p").equals(table)


def test_times_are_utc(tmp_path):
    now = datetime.datetime.now(datetime.UTC)
    write_part(tmp_path, "runs", "r", table_from_rows("runs", [{"run": "r", "started": now}]))
    assert read_table(tmp_path, "runs")["started"].to_pylist() == [now]


@pytest.mark.parametrize("name", ["../../a b", "a/b", "", ".hidden", "..", "a b", "ü", "x" * 200])
def test_a_part_is_called_by_its_file_name(tmp_path, name):
    for use in (
        lambda: write_part(tmp_path, "failures", name, _failures("u")),
        lambda: read_part(tmp_path, "failures", name),
        lambda: remove_part(tmp_path, "failures", name),
    ):
        with pytest.raises(TableError, match="cannot name a part"):
            use()
    write_part(tmp_path, "failures", subject_key(name), _failures("u"))
    (listed,) = part_names(tmp_path, "failures")
    assert listed == subject_key(name)
    assert has_part(tmp_path, "failures", listed)
    assert read_part(tmp_path, "failures", listed).num_rows == 1
    remove_part(tmp_path, "failures", listed)
    assert not has_part(tmp_path, "failures", listed)
    assert part_names(tmp_path, "failures") == []


def test_columns_that_do_not_fit(tmp_path):
    with pytest.raises(TableError, match="no column dise"):
        table_from_rows("metrics", [{"dise": 1.0}])
    with pytest.raises(TableError, match="column label"):
        table_from_rows("metrics", [{"label": "left"}])
    table = _failures("u").rename_columns({"attempt": "tries"})
    with pytest.raises(TableError, match=r"missing columns \['attempt'\], unknown columns \['tries'\]"):
        write_part(tmp_path, "failures", "a", table)
    with pytest.raises(TableError, match="no table 'metric'"):
        read_table(tmp_path, "metric")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_part_is_named(tmp_path, keep):
    path = write_part(tmp_path, "failures", "a", _failures("u"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(TableError, match=r"a\.parquet: truncated"):
        read_table(tmp_path, "failures")


def test_another_schema_version_is_refused(tmp_path):
    path = write_part(tmp_path, "failures", "a", _failures("u"))
    pq.write_table(_failures("u").replace_schema_metadata({"schema_version": "0"}), path)
    with pytest.raises(TableError, match=f"schema version 0, this program reads {SCHEMA_VERSION}"):
        read_table(tmp_path, "failures")
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"schema_version": SCHEMA_VERSION}), path)
    with pytest.raises(TableError, match="columns differ"):
        read_part(tmp_path, "failures", "a")


def test_equal_tables_give_equal_bytes(tmp_path):
    paths = [write_part(tmp_path / d, "failures", "a", _failures("u", "v")) for d in ("one", "two")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError), replace_file(path) as temporary:
        temporary.write_text("new \ud800", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_full_disk_names_the_file(tmp_path):
    """A limit on file size stands in for the full disk: the write itself fails half-way."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    code = f"""
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from storage.tables import table_from_rows, write_part
import secrets
rows = [dict(stage="fit", message=secrets.token_hex(500)) for _ in range(100)]
try:
    write_part({str(tmp_path)!r}, "failures", "a", table_from_rows("failures", rows))
except OSError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        cwd=REPO,
        check=True,
    )
    assert str(tmp_path / "failures" / "a.parquet") in done.stdout
    assert os.listdir(tmp_path / "failures") == []


def _flock_of_nfs(descriptor, operation, flock=fcntl.flock):
    if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    flock(descriptor, operation)


@pytest.mark.parametrize("flock", [fcntl.flock, _flock_of_nfs], ids=["local", "nfs"])
def test_what_a_killed_writer_left_is_cleared_and_a_living_one_kept(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    code = f"""
import os, signal
from pathlib import Path
from storage.atomic import replace_file
with replace_file(Path({str(tmp_path)!r}) / "a.parquet") as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False)
    assert len(os.listdir(tmp_path)) == 2
    with replace_file(tmp_path / "a.parquet") as temporary:
        temporary.write_text("whole", encoding="utf-8")
        clear_abandoned([tmp_path, tmp_path / "none"])
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["a.parquet"]
