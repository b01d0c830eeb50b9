"""RESULTS.md: what was measured is named with its machine and commit, and what was not is listed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import results_page
import results_scaling

from pipeline.baseline_methods import choose
from pipeline.baselines import run_baselines
from pipeline.folder import StudyFolder
from storage import tables
from tests.sample_study import write_study

NOW = (("b", "now"), ("c", "now"))
RUN = {"machine": "a processor, 2 cores, load 1", "commit": "0123456789", "date": "2026-01-02 03:04 UTC"}


@pytest.fixture
def page(tmp_path: Path) -> str:
    study = write_study(tmp_path)
    run = StudyFolder(study).read_run()
    StudyFolder(study).write_run({**(run or {}), "digests": {"config": "abcdef0123456789"}})
    run_baselines(study, choose(["identity"]), execution={"executor": "serial"})
    (tmp_path / "provenance.json").write_text(json.dumps({"samreg": RUN, "identity": RUN}), encoding="utf-8")
    target = tmp_path / "RESULTS.md"
    names = {"hearts": tmp_path, "lungs": tmp_path / "nowhere"}
    results_page.write(
        target, tmp_path / "figures", names, ["hearts"], {"niftyreg": "not found on PATH"}, {}, {}, tmp_path
    )
    assert (tmp_path / "figures" / "results_dice.png").stat().st_size > 1000
    return target.read_text(encoding="utf-8")


def test_numbers_carry_their_source(page: str) -> None:
    assert "Configuration abcdef012345. samreg, identity: commit 0123456789, 2026-01-02, a processor, 2 cores" in page
    assert "| samreg | 2 | 0.800 ± 0.141 | 0.760 |" in page
    assert "| identity | 3 |" in page
    assert "not comparable" in page


def test_what_was_not_run_is_listed(page: str) -> None:
    missing = page.partition("## What was not run")[2]
    assert "- lungs: nothing" in missing
    assert "ants-syn (0 of 2)" in missing
    assert "- niftyreg: not found on PATH" in missing
    assert "- ablations on hearts: Table 2, Table 3, Table 4, Table 5, Table 6" in missing


def test_few_or_equal_pairs_are_not_tested() -> None:
    rows = {str(n): {"dice": n / 10} for n in range(8)}
    better = {name: {"dice": row["dice"] + 0.01 * int(name)} for name, row in rows.items()}
    assert results_page._compared(rows, rows) == ("–", "0 of 8")
    assert results_page._compared(dict(list(better.items())[:5]), rows) == ("–", "4 of 5")
    p, won = results_page._compared(better, rows)
    assert np.isclose(float(p), 0.016, atol=0.005)
    assert won == "7 of 8"


def test_processor_time_is_that_of_every_run_of_the_newest_configuration_that_a_stage_ran_in(tmp_path: Path) -> None:
    """A resumed study names its units alike in both runs; what a new configuration leaves took its time before."""
    runs = [{"run": name, "stage": "fit", "config_digest": digest} for name, digest in (("a", "old"), *NOW)]
    units = [
        {"run": run, "stage": stage, "unit": "0000-0000.000", "processor_seconds": seconds, "failed": failed}
        for run, stage, seconds, failed in (
            ("a", "fit", 100.0, False),
            ("a", "prototypes", 4.0, False),
            ("b", "encode", 3.0, False),
            ("b", "fit", 6.0, False),
            ("b", "fit", 50.0, True),
            ("c", "fit", 2.0, False),
        )
    ]
    tables.write_part(tmp_path, "runs", "all", tables.table_from_rows("runs", runs))
    tables.write_part(tmp_path, "units", "all", tables.table_from_rows("units", units))
    assert results_page._cost(tmp_path, "samreg refined", {str(n): {} for n in range(4)})[0] == "2.00 (3.75)"


def test_the_cost_of_matching_names_its_source(tmp_path: Path) -> None:
    row = {"subjects": "100", "ROIs each": "240", "product ms": "0.20", "in the run ms": "2.00"}
    (tmp_path / "100x10.json").write_text(json.dumps({"row": row, "run": RUN}), encoding="utf-8")
    shown = "\n".join(results_scaling.text(tmp_path, tmp_path))
    assert "| 100 | 240 | 0.20 | 2.00 |" in shown
    assert "commit 0123456789, 2026-01-02, a processor, 2 cores, load 1." in shown
    assert (tmp_path / "results_scaling.png").exists()
    assert results_scaling.text(tmp_path / "nothing", tmp_path) == []
