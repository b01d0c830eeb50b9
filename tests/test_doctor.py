"""`samreg doctor`: what it finds here, what it says of faults, and what it never shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.config import make_config
from tests import phantoms


def test_this_machine_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    image = phantoms.write_cohort(tmp_path / "data", ("a",)).with_name("0.nii.gz")
    done = phantoms.samreg("doctor", "--out", tmp_path / "study", "--uri", image.as_uri())
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("Python", "cores", "memory", "/dev/shm", "GPU", "weights", "space", "writing", "URI file", "Ray"):
        assert f"│ {name} " in done.stdout
    assert list((tmp_path / "study").iterdir()) == []


def test_whatever_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMREG_WEIGHTS", str(tmp_path))
    faults = ("--out", "/proc/study", "--uri", "file:///nowhere/image.nii.gz", "--address", "http://127.0.0.1:1")
    done = phantoms.samreg("doctor", *faults, "--set", "segmenter=sam_vit_b")
    assert done.returncode == 1, done.stdout
    shown = " ".join(done.stdout.replace("│", " ").split())
    for said in ("flock", "no such file", "no Ray cluster answers", "samreg weights fetch sam_vit_b"):
        assert said in shown
    assert shown.count(" fail ") == 4
    assert "Traceback" not in done.stderr


def test_missing_and_wrong_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=99", "no-such-package>=1", 'timm>=1; extra == "mobile"', "zarr>=3"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    check = doctor.check_packages()
    assert check.state == "fail"
    assert "is not >=99" in check.found
    assert "no-such-package is missing" in check.found
    assert "timm" not in check.found


def test_more_threads_than_workers_want_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert doctor.check_threads().state == "warn"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor, "_cgroup_cores", lambda: None)
    assert doctor.check_threads().state == "ok"
    monkeypatch.setattr(doctor, "_cgroup_cores", lambda: 0.5)
    assert "execution.workers=1" in doctor.check_threads().advice


def test_secrets_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecretvalue")
    uris = ["http://me:hidden@127.0.0.1:1/verysecretvalue.nii.gz?X-Amz-Signature=abcdef"]
    checks = list(doctor.examine(make_config({}), None, None, uris))
    text = str(checks)
    assert "127.0.0.1:1" in text
    assert not [secret for secret in ("hidden", "verysecretvalue", "abcdef") if secret in text]
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "verysecretvalue"


def test_a_folder_that_cannot_be_one_is_a_row_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    checks = {check.name: check for check in doctor.examine(make_config({}), tmp_path / "file" / "study", None, [])}
    assert (checks["writing"].state, "Not a directory" in checks["writing"].found) == ("fail", True)
    assert "Ray" in checks


def test_a_check_that_cannot_look_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_MEMINFO", tmp_path)
    checks = {check.name: check for check in doctor.examine(make_config({}), None, None, [])}
    assert (checks["memory"].state, "IsADirectoryError" in checks["memory"].found) == ("fail", True)
    assert checks["Python"].state == "ok"


def test_memory_that_the_cgroup_holds_is_not_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path)
    monkeypatch.setattr(doctor, "_free_memory", lambda: 64 * doctor.GIB)
    for name, text in (("max", 8 * doctor.GIB), ("current", 7 * doctor.GIB), ("stat", f"inactive_file {doctor.GIB}")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n", encoding="utf-8")
    check = doctor.check_memory()
    assert check.found == "2.0 GiB free, cgroup limit 8.0 GiB"
    assert check.state == "warn"
