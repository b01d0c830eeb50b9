"""Real faults: killed workers and drivers, bad files, hostile names, a full disk, Ctrl-C.

Each ends with the same command again, and tables equal to those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from storage import tables
from tests import phantoms
from tests.saboteur import alive, busy_workers

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_cohort(tmp_path_factory.mktemp("cohort"), NAMES)


@pytest.fixture(scope="module")
def undisturbed(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tables of a study that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "study"
    assert _run(cohort, out).returncode == 0
    return phantoms.study_tables(out)


def _arguments(cohort: Path, out: Path, *more: str) -> list[str]:
    quick = ["--set", f"fit={json.dumps(phantoms.QUICK_FIT)}", "--set", "pairs=star"]
    return ["run", "--cohort", str(cohort), "--out", str(out), *quick, *more]


def _run(cohort: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return phantoms.samreg(*_arguments(cohort, out, "--executor", "serial", *more))


def _start(cohort: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, which Ctrl-C reaches even if the tests run in a shell's background."""
    return subprocess.Popen(
        phantoms.command(*_arguments(cohort, out, *more)),
        env=phantoms.environment(),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 90) -> Any:
    """Poll until the condition is true while the process lives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        if process.poll() is not None:
            pytest.fail(f"the run ended first: {process.stderr and process.stderr.read()}")
        time.sleep(0.005)
    pytest.fail("the moment never came")


@pytest.mark.ray
def test_killing_a_worker_during_encoding_costs_nothing(
    cohort: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    with _start(cohort, out, "--executor", "ray", "--workers", "2") as process:
        victim = _wait_for(lambda: busy_workers(process.pid), process)[0]
        os.kill(victim, signal.SIGKILL)
        assert process.stderr is not None
        log = process.stderr.read()
    assert process.returncode == 0, log
    assert "lost the worker of" in log
    assert phantoms.study_tables(out) == undisturbed


MOMENTS = {
    "first embedding": "embeddings.zarr/*/zarr.json",
    "first prototypes": "embeddings.zarr/*/prototypes/zarr.json",
    "correspondences": "correspondences/*.parquet",
    "first transform": "transforms/*.h5",
    "first metrics": "metrics/*.parquet",
}


def test_killing_the_driver_again_and_again_costs_nothing(
    cohort: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    for moment, pattern in MOMENTS.items():
        before = len(list(out.glob(pattern)))
        with _start(cohort, out, "--executor", "serial") as process:
            _wait_for(lambda p=pattern, n=before: len(list(out.glob(p))) > n, process)
            os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, moment
    assert phantoms.samreg("status", out).returncode == 1
    assert _run(cohort, out).returncode == 0
    assert phantoms.study_tables(out) == undisturbed
    assert {path.name for path in out.rglob(".*") if path.is_file()} <= {".lock", ".digests.json"}
    assert not list((out / ".embeddings.zarr.wip").glob("*"))
    assert phantoms.samreg("status", out).returncode == 0


@pytest.mark.ray
def test_killing_a_ray_driver_costs_nothing(cohort: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "study"
    with _start(cohort, out, "--executor", "ray", "--workers", "2") as process:
        _wait_for(lambda: busy_workers(process.pid), process)
        os.kill(process.pid, signal.SIGKILL)
    assert _run(cohort, out).returncode == 0
    assert phantoms.study_tables(out) == undisturbed


@pytest.mark.ray
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_ctrl_c_and_sigterm_stop_cleanly_and_say_how_to_go_on(
    cohort: Path, undisturbed: dict[str, Any], tmp_path: Path, stop: signal.Signals
) -> None:
    """A terminal interrupts the whole process group; a scheduler ends the driver alone."""
    out = tmp_path / "study"
    with _start(cohort, out, "--executor", "ray", "--workers", "2") as process:
        workers = _wait_for(lambda: list(out.glob(MOMENTS["first embedding"])) and busy_workers(process.pid), process)
        os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
        assert process.stderr is not None
        log = process.stderr.read()
    assert process.returncode == (130 if stop == signal.SIGINT else 143), log
    assert "interrupted" in log
    assert "Run the same command again" in log
    assert "Traceback" not in log
    end = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < end, "the workers have outlived their driver"
        time.sleep(0.1)
    again = _run(cohort, out)
    assert again.returncode == 0, again.stderr
    assert phantoms.study_tables(out) == undisturbed


def test_sigterm_during_a_serial_run_loses_nothing(cohort: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "study"
    with _start(cohort, out, "--executor", "serial") as process:
        _wait_for(lambda: list(out.glob(MOMENTS["first transform"])), process)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read()
    assert process.returncode == 143, log
    assert len([line for line in log.splitlines() if line.startswith("samreg: interrupted")]) == 1
    assert "Traceback" not in log
    assert _run(cohort, out).returncode == 0
    assert phantoms.study_tables(out) == undisturbed


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


def test_files_that_cannot_grow_stop_the_run(cohort: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "study"
    stopped = subprocess.run(
        phantoms.command(*_arguments(cohort, out, "--executor", "serial")),
        env=phantoms.environment(),
        preexec_fn=_limit_file_size,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert stopped.returncode == 1, stopped.stderr
    assert "no space left for" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert _run(cohort, out).returncode == 0
    assert phantoms.study_tables(out) == undisturbed


def test_a_full_disk_stops_the_run(cohort: Path, undisturbed: dict[str, Any], small_disk: Path) -> None:
    out = small_disk / "study"
    stopped = _run(cohort, out)
    assert stopped.returncode == 1, stopped.stderr
    assert "no space left for" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert _run(cohort, out).returncode == 0
    assert phantoms.study_tables(out) == undisturbed


def _file_of(name: str) -> str:
    return f"{name}.mha" if name == "nan" else f"{name}.nii.gz"


def _bad_cohort(folder: Path) -> Path:
    """Two good subjects, and one of each kind of bad input."""
    manifest = phantoms.write_cohort(folder, ("good", "also_good"))
    image, labels = phantoms.ellipses()
    whole = (folder / "0.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nii.gz").write_text("not an image", encoding="utf-8")
    phantoms.write_volume(folder / "constant.nii.gz", np.full_like(image, 7))
    phantoms.write_volume(folder / "nan.mha", np.where(labels == 1, np.nan, image))
    phantoms.write_volume(folder / "infinite.nii.gz", np.where(labels == 1, np.inf, image))
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(image)] * 2), str(folder / "four_d.nii.gz"))
    phantoms.write_volume(folder / "other_grid_gt.nii.gz", labels[:, :40, :40])
    edge = np.zeros_like(image)
    edge[:, :, 24:] = 100
    phantoms.write_volume(folder / "no_roi.nii.gz", edge)
    rows = [
        {"subject": "good", "image": "0.nii.gz", "label": "0_gt.nii.gz"},
        {"subject": "also_good", "image": "1.nii.gz", "label": "1_gt.nii.gz"},
        {"subject": "other_grid", "image": "1.nii.gz", "label": "other_grid_gt.nii.gz"},
    ]
    bad = ("truncated", "empty", "text", "constant", "nan", "infinite", "four_d", "no_roi", "missing")
    rows += [{"subject": name, "image": _file_of(name), "label": ""} for name in bad]
    return phantoms.write_csv(manifest, rows)


EXPECTED = {
    "truncated": ("encode", "ImageError"),
    "empty": ("encode", "ImageError"),
    "text": ("encode", "ImageError"),
    "constant": ("encode", "ImageError"),
    "nan": ("encode", "ImageError"),
    "infinite": ("encode", "ImageError"),
    "four_d": ("encode", "ImageError"),
    "missing": ("encode", "ImageError"),
    "no_roi": ("prototypes", "NoRoiError"),
}


def test_bad_inputs_fail_alone_with_a_clear_reason(tmp_path: Path) -> None:
    manifest = _bad_cohort(tmp_path / "data")
    pairs = phantoms.write_csv(
        tmp_path / "pairs.csv",
        [{"moving": moving, "fixed": "good"} for moving in ("also_good", "other_grid", *EXPECTED, "never_heard_of")],
    )
    out = tmp_path / "study"
    done = _run(manifest, out, "--pairs", str(pairs))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    failures = tables.read_table(out, "failures").to_pylist()
    by_subject = {row["subject"]: row for row in failures if row["pair"] is None}
    assert {name: (row["stage"], row["error"]) for name, row in by_subject.items()} == EXPECTED
    for name in ("truncated", "empty", "text", "constant", "nan", "infinite", "four_d", "missing"):
        assert _file_of(name) in by_subject[name]["message"]
    by_pair = {row["pair"]: row for row in failures if row["pair"] is not None}
    assert len(by_pair) == len(EXPECTED) + 2
    assert by_pair["never_heard_of__good"]["error"] == "UnknownSubject"
    assert "row 13" in by_pair["never_heard_of__good"]["message"]
    assert "labels are on another grid" in by_pair["other_grid__good"]["message"]
    assert by_pair["nan__good"]["subject"] == "nan"
    assert "moving subject 'nan': encode failed with ImageError" in by_pair["nan__good"]["message"]
    metrics = tables.read_table(out, "metrics")
    assert set(metrics.column("pair").to_pylist()) == {"also_good__good"}
    status = phantoms.samreg("status", out)
    assert status.returncode == 1
    assert "failed encode truncated: " in status.stdout


HOSTILE = (
    "../../evil",
    "/etc/evil",
    "a b",
    "Übung-心臓",
    "x" * 200,
    "..",
    "con/../rois",
    "a\\b",
    "'; drop",
    "zarr.json",
)


def test_hostile_names_stay_inside_the_study(tmp_path: Path) -> None:
    manifest = phantoms.write_cohort(tmp_path / "data", HOSTILE, shape=(2, 40, 40))
    out = tmp_path / "place" / "study"
    done = _run(manifest, out)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "place"]
    assert [path.name for path in out.parent.iterdir()] == ["study"]
    assert set(tables.read_table(out, "rois").column("subject").to_pylist()) == set(HOSTILE)
    metrics = tables.read_table(out, "metrics")
    assert set(metrics.column("moving").to_pylist()) == set(HOSTILE[1:])
    assert len(list((out / "transforms").glob("*.h5"))) == len(HOSTILE) - 1
    assert phantoms.samreg("status", out).returncode == 0
    assert _run(manifest, out).returncode == 0


def test_subjects_of_different_depth_spacing_and_orientation_work(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    image, labels = phantoms.ellipses((5, 48, 48))
    deep, deep_labels = phantoms.ellipses((9, 48, 48), (2, 1))
    phantoms.write_volume(folder / "a.nii.gz", image)
    phantoms.write_volume(folder / "a_gt.nii.gz", labels)
    phantoms.write_volume(folder / "b.nii.gz", deep, (1.4, 1.4, 3.0))
    phantoms.write_volume(folder / "b_gt.nii.gz", deep_labels, (1.4, 1.4, 3.0))
    for name in ("b", "b_gt"):
        turned = sitk.DICOMOrient(sitk.ReadImage(str(folder / f"{name}.nii.gz")), "RAI")
        sitk.WriteImage(sitk.DICOMOrient(turned, "ASR"), str(folder / f"{name}.nii.gz"))
    rows = [{"subject": name, "image": f"{name}.nii.gz", "label": f"{name}_gt.nii.gz"} for name in ("a", "b")]
    done = _run(phantoms.write_csv(folder / "cohort.csv", rows), tmp_path / "study")
    assert done.returncode == 0, done.stderr
    mean = next(row for row in tables.read_table(tmp_path / "study", "metrics").to_pylist() if row["label"] == 0)
    assert mean["dice"] > mean["dice_before"]
