"""Faults of clusters: workers killed in the middle of a write, a poison subject, a lost node, a read-only disk.

Each ends with tables equal to those of an undisturbed run, and nothing half-written left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from storage import tables
from tests import phantoms
from tests.saboteur import busy_workers, happened, sabotaged

NAMES = ("a", "b", "c", "poison")
SHAPE = (3, 40, 40)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_cohort(tmp_path_factory.mktemp("cohort"), NAMES, SHAPE)


@pytest.fixture(scope="module")
def calm(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "study"
    assert phantoms.samreg(*_arguments(cohort, out, "--executor", "serial")).returncode == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(calm: Path) -> dict[str, Any]:
    """Its tables."""
    return phantoms.study_tables(calm)


def _arguments(cohort: Path, out: Path, *more: str) -> list[str]:
    quick = ["--set", f"fit={json.dumps(phantoms.QUICK_FIT)}", "--set", "pairs=star"]
    return ["run", "--cohort", str(cohort), "--out", str(out), *quick, *more]


def _run(variables: Mapping[str, str], cohort: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = phantoms.command(*_arguments(cohort, out, "--executor", "ray", "--workers", "2", *more))
    return subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", timeout=240, check=False)


def _visible(out: Path) -> set[str]:
    """Files of a study, without the hidden ones, which writers use and the next run clears."""
    found = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    return {
        str(path)
        for path in found
        if path.parts[0] not in ("runs", "units") and not any(p.startswith(".") for p in path.parts)
    }


@pytest.mark.ray
def test_workers_killed_in_the_middle_of_writing_cost_nothing(
    cohort: Path, calm: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """One in the middle of an embedding, one before its matches and one before its transform take their place."""
    out, log = tmp_path / "study", tmp_path / "faults"
    faults = [
        (r"\.wip/.*/features/c/1/", 1),
        (r"/correspondences/\.[^/]*\.parquet$", 1),
        (r"/transforms/\.[^/]*\.h5$", 1),
    ]
    done = _run(sabotaged(log, faults), cohort, out)
    assert done.returncode == 0, done.stderr
    assert happened(log) == ["0.0", "1.0", "2.0"]
    assert done.stderr.count("lost the worker of") == 3
    assert phantoms.study_tables(out) == undisturbed
    assert _visible(out) == _visible(calm)
    assert phantoms.samreg("status", out).returncode == 0


@pytest.mark.ray
def test_a_subject_that_kills_its_worker_is_blamed_alone(
    cohort: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out, log = tmp_path / "study", tmp_path / "faults"
    done = _run(sabotaged(log, [(r"/3\.nii\.gz$", 99)]), cohort, out)
    assert done.returncode == 1, done.stderr
    assert len(happened(log)) == 3
    failures = tables.read_table(out, "failures").to_pylist()
    assert [(row["unit"], row["error"]) for row in failures] == [
        ("poison", "WorkerLost"),
        ("poison__a", "SubjectFailed"),
    ]
    assert "died 3 times, the last time alone" in failures[0]["message"]
    assert set(tables.read_table(out, "metrics").column("pair").to_pylist()) == {"b__a", "c__a"}
    healed = phantoms.samreg(*_arguments(cohort, out, "--executor", "serial"))
    assert healed.returncode == 0, healed.stderr
    assert phantoms.study_tables(out) == undisturbed


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_die_at_their_start_end_the_run(cohort: Path, tmp_path: Path) -> None:
    done = _run(sabotaged(tmp_path / "faults", [(r"/actors/(__pycache__/)?pool\.", 99)]), cohort, tmp_path / "study")
    assert done.returncode == 2, done.stderr
    assert "encode: no worker stays alive" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody can write to."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a read-only file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_place_is_refused_in_one_line(cohort: Path, read_only: Path) -> None:
    done = phantoms.samreg(*_arguments(cohort, read_only / "study", "--executor", "serial"))
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"samreg: {read_only}/study cannot be written: Read-only file system. Choose another --out\n"


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_node_costs_nothing(cohort: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Two nodes with a worker each; one goes while both encode, and its worker never comes back."""
    from ray.cluster_utils import Cluster

    out = tmp_path / "study"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        variables = {**phantoms.environment(), "RAY_ADDRESS": cluster.address}
        command = phantoms.command(*_arguments(cohort, out, "--executor", "ray"))
        with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) as process:
            raylet = lost.all_processes["raylet"][0].process.pid
            while not (list(out.glob("embeddings.zarr/*/zarr.json")) and busy_workers(raylet)):
                assert process.poll() is None
                time.sleep(0.02)
            cluster.remove_node(lost, allow_graceful=False)
            log = process.communicate(timeout=300)[1]
    finally:
        cluster.shutdown()
    assert process.returncode == 0, log
    assert "lost the worker of" in log
    assert phantoms.study_tables(out) == undisturbed


@pytest.mark.slow
def test_two_drivers_started_together_end_with_the_tables_of_one(
    cohort: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    command = phantoms.command(*_arguments(cohort, out, "--executor", "serial"))
    both = [subprocess.Popen(command, env=phantoms.environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    logs = [process.communicate(timeout=240)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], logs
    refused = logs[[process.returncode for process in both].index(2)]
    winner = both[[process.returncode for process in both].index(0)].pid
    assert f"is being written by process {winner} on {os.uname().nodename}" in refused
    assert phantoms.study_tables(out) == undisturbed


_GPU_DRIVER = """
import logging
from pipeline import window
from pipeline.dispatch import RayExecutor, Task
from pipeline.execution import ExecutionConfig
from tests.test_dispatch import UNITS, _build_square

logging.basicConfig(level=logging.WARNING)
window.WAIT_SECONDS = 1.0
config = ExecutionConfig(executor="ray", device="cuda", gpu_fraction=0.5, encode_workers=8)
with RayExecutor(config) as executor:
    outcomes = {u.value: o for u, o in executor.map_units(Task("encode", _build_square, uses_gpu=True), UNITS)}
    print(sorted(value for value in outcomes.values() if isinstance(value, int)), executor.ledger[0].gpu_seconds > 0)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_gpus_that_come_later_are_waited_for_and_used(tmp_path: Path) -> None:
    """As on a cluster that starts GPU nodes on demand; of eight workers asked for, one node has room for one."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        variables = {**phantoms.environment(), "RAY_ADDRESS": cluster.address}
        command = [sys.executable, "-c", _GPU_DRIVER]
        with subprocess.Popen(command, env=variables, stdout=-1, stderr=-1, text=True) as driver:
            assert driver.stderr is not None
            said = driver.stderr.readline()
            assert "encode: waiting for workers; each wants {'CPU': 1.0, 'GPU': 0.5}" in said
            cluster.add_node(num_cpus=1, num_gpus=1)
            found, _ = driver.communicate(timeout=200)
    finally:
        cluster.shutdown()
    assert driver.returncode == 0
    assert found.splitlines()[-1] == "[0, 1, 4, 16, 25] True"
