"""What units took: the units table of a study, and progress in the log."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import progress, study
from pipeline.progress import Reporter, SilentReporter
from pipeline.request import make_request
from pipeline.study import run_study
from pipeline.usage import measured
from storage import tables
from tests import phantoms


def test_time_bytes_and_memory_of_a_unit(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(size: int) -> None:
        block = bytearray(size)
        block[::4096] = b"x" * len(block[::4096])
        path.write_bytes(block)
        assert len(path.read_bytes()) == size

    (big,) = measured(write, [("big", 200 << 20)], gpu_share=0.25)
    (small,) = measured(write, [("small", 1 << 20)], gpu_share=0.0)
    assert (big.unit, small.unit) == ("big", "small")
    assert big.gpu_seconds == pytest.approx(big.seconds / 4)
    assert small.gpu_seconds == 0.0
    for usage, size in ((big, 200 << 20), (small, 1 << 20)):
        assert usage.bytes_written == pytest.approx(size, rel=0.01)
        assert usage.bytes_read == pytest.approx(size, rel=0.1)
    assert big.peak_memory_bytes is not None
    assert small.peak_memory_bytes is not None
    assert big.peak_memory_bytes - small.peak_memory_bytes > 100 << 20


def test_every_unit_of_a_study_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "UNITS_PER_PART", 2)
    cohort = phantoms.write_cohort(tmp_path / "data", ("a", "b", "c"), (2, 40, 40))
    (tmp_path / "data" / "2.nii.gz").write_bytes(b"")
    config = phantoms_config()
    request = make_request(config, cohort, "star")
    for _ in range(2):
        run_study(config, request.cohort, tmp_path / "s", request.pairs, until="match", reporter=SilentReporter())
    rows = tables.read_table(tmp_path / "s", "units").to_pylist()
    first = [row for row in rows if row["run"] == rows[0]["run"]]
    assert [(row["stage"], row["unit"], row["failed"]) for row in first] == [
        ("encode", "a", False),
        ("encode", "b", False),
        ("encode", "c", True),
        ("match", "0000-0000", False),
        ("prototypes", "a", False),
        ("prototypes", "b", False),
    ]
    assert [row["unit"] for row in rows if row not in first] == ["c"]
    assert all(row["seconds"] > 0 and row["bytes_written"] >= 0 and row["host"] for row in rows)


def phantoms_config() -> Any:
    from pipeline.config import make_config

    return make_config({"execution": {"executor": "serial"}, "pairs": "star"})


def test_progress_in_the_log_says_what_failed_and_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.05)
    caplog.set_level(logging.INFO, "samreg")
    with Reporter().stage("fit", 4, "pairs") as advance:
        for done, failed, running in ((0, 0, 2), (3, 1, 1), (1, 1, 0)):
            advance(done, failed, running)
            time.sleep(0.2)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "fit: 4 pairs to do"
    assert "fit: 0 of 4 pairs (2 running), no rate yet" in lines
    assert [line for line in lines if line.startswith("fit: 3 of 4 pairs (1 failed, 1 running), ") and "/s, " in line]
    assert lines[-1].startswith("fit: 4 of 4 pairs, 1 failed in ")
