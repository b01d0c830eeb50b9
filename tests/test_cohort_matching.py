"""The benchmark of cohort matching runs on what the program writes today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.phantoms import REPO, environment


def test_the_benchmark_matches_all_pairs_of_a_synthetic_cohort(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "benchmarks" / "cohort_matching.py"), "--executor", "serial"]
    size = ["--subjects", "4", "--slices", "3", "--rois", "20", "--channels", "80", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, *size], env=environment(), capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines())
    found = dict(zip(header, row, strict=True))
    assert (found["subjects"], found["ROIs each"], found["pairs"]) == ("4", "60", "6")
    assert 1 <= int(found["matches a pair"]) <= 60
