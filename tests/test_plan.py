"""The plan: sizes near those of a real run, times by executor, and rates from earlier runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.dispatch import RAY_START_SECONDS
from pipeline.errors import UsageError
from pipeline.folder import StudyFolder
from pipeline.plan import START_SECONDS, Plan, describe_plan, make_plan
from pipeline.probe import folder_bytes
from pipeline.progress import SilentReporter
from pipeline.request import read_request
from pipeline.study import run_study
from storage import tables
from tests import phantoms

RUN = {"run": "r", "executor": "auto"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_cohort(tmp_path_factory.mktemp("cohort"), [f"s{n}" for n in range(8)], (4, 96, 80))


def _plan(cohort: Path, out: Path, *overrides: str, pairs: str = "all") -> Plan:
    return make_plan(read_request(None, cohort, pairs, overrides), out)


def test_sizes_are_those_of_the_run(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "acdc_cardiac"
    rows = [{"subject": name, "image": str(folder / f"patient068_{name}.nii.gz")} for name in ("ED", "ES")]
    request = read_request(
        None, phantoms.write_csv(tmp_path / "cohort.csv", rows), "star", ["execution.executor=serial"]
    )
    plan = make_plan(request, tmp_path / "study")
    run_study(request.config, request.cohort, tmp_path / "study", reporter=SilentReporter())
    study = StudyFolder(tmp_path / "study")
    assert plan.store_bytes == pytest.approx(folder_bytes(study.embeddings), rel=0.5)
    assert plan.transform_bytes == pytest.approx(folder_bytes(study.transforms), rel=0.3)
    again = make_plan(request, tmp_path / "study")
    assert again.source == "from earlier runs in this folder"
    assert START_SECONDS < again.seconds < 10 * plan.seconds


def test_workers_share_the_work_and_starting_ray_costs_time(cohort: Path, tmp_path: Path) -> None:
    serial = _plan(cohort, tmp_path, "execution.executor=serial").seconds - START_SECONDS
    ray = _plan(cohort, tmp_path, "execution.executor=ray", "execution.workers=4").seconds - START_SECONDS
    assert ray == pytest.approx(RAY_START_SECONDS + serial / 4)
    automatic = _plan(cohort, tmp_path, "execution.workers=4").seconds - START_SECONDS
    assert automatic == pytest.approx(min(serial, ray))


def test_rates_come_from_the_largest_earlier_runs(cohort: Path, tmp_path: Path) -> None:
    rates = {"encode": 2.0, "prototypes": 0.5, "match": 0.1, "fit": 0.9}
    rows = [
        {**RUN, "stage": stage, "units_done": n, "seconds": rate * n / 2 + (n < 3) * 100, "workers": 2}
        for stage, rate in rates.items()
        for n in (0, 1, 10)
    ]
    tables.write_part(tmp_path, "runs", "r", tables.table_from_rows("runs", rows))
    plan = _plan(cohort, tmp_path, "execution.executor=serial", pairs="star")
    assert plan.source == "from earlier runs in this folder"
    assert plan.seconds == pytest.approx(START_SECONDS + 8 * 2.5 + 7 * 1.0)


def test_a_probe_scales_what_a_few_subjects_took(tmp_path: Path) -> None:
    cohort = phantoms.write_cohort(tmp_path / "data", [f"s{n}" for n in range(4)], (2, 40, 40))
    request = read_request(None, cohort, "star", ["execution.executor=serial", "segmenter=labels"])
    with pytest.raises(UsageError, match="the probe failed at encode of s0: segmenter 'labels' needs"):
        make_plan(request, tmp_path / "s", probe=True)
    request = read_request(None, cohort, "star", ["execution.executor=serial"])
    plan = make_plan(request, tmp_path / "s", probe=True)
    assert plan.source == "from a probe"
    assert not (tmp_path / "s").exists()
    run_study(request.config, request.cohort, tmp_path / "s", reporter=SilentReporter())
    study = StudyFolder(tmp_path / "s")
    assert plan.store_bytes == pytest.approx(folder_bytes(study.embeddings), rel=0.3)
    assert plan.transform_bytes == pytest.approx(folder_bytes(study.transforms), rel=0.3)
    peaks = tables.read_table(study.root, "units").column("peak_memory_bytes").to_pylist()
    assert plan.worker_bytes == pytest.approx(max(peaks), rel=0.3)
    size = (
        f"{plan.worker_bytes / 2**30:.1f} GiB" if plan.worker_bytes >= 2**30 else f"{plan.worker_bytes / 2**20:.0f} MiB"
    )
    assert f"memory    {size} a worker" in describe_plan(plan)
