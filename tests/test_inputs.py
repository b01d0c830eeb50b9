"""Digests of the inputs: what is remembered, what is read again, and what a run cut short leaves."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import fsspec
import pytest

from pipeline import inputs
from pipeline.config import make_config
from pipeline.errors import StudyError
from pipeline.inputs import DigestCache, digest_inputs
from pipeline.progress import Reporter, SilentReporter
from pipeline.study import run_study
from storage import tables
from storage.cohort import Cohort, Subject


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What had to be read."""
    seen: list[str] = []

    def content_digest(location: str, whole=inputs.content_digest) -> str:
        seen.append(location)
        return str(whole(location))

    monkeypatch.setattr(inputs, "content_digest", content_digest)
    return seen


def _digest(cache: Path, location: str) -> str:
    known = DigestCache(cache)
    found = known.digest(location)
    known.save()
    return found


def _age(*files: Path, seconds: float) -> None:
    for file in files:
        past = file.stat().st_mtime - seconds
        os.utime(file, (past, past))


def test_an_object_is_fetched_again_only_when_it_changed(tmp_path: Path, read: list[str]) -> None:
    memory, uri = fsspec.filesystem("memory"), "memory://inputs/a.nii.gz"
    memory.pipe("/inputs/a.nii.gz", b"one")
    before = _digest(tmp_path / "cache", uri)
    assert _digest(tmp_path / "cache", uri) == before
    assert read == [uri]
    memory.pipe("/inputs/a.nii.gz", b"two")
    assert _digest(tmp_path / "cache", uri) != before
    assert read == [uri, uri]


@pytest.mark.parametrize("named", ["a.mhd", "."])
def test_every_file_of_an_image_is_looked_at(tmp_path: Path, read: list[str], named: str) -> None:
    folder = tmp_path / "image"
    folder.mkdir()
    header, voxels = folder / "a.mhd", folder / "a.raw"
    header.write_text("ElementDataFile = a.raw\n", encoding="utf-8")
    voxels.write_bytes(b"one")
    location = str(folder / named)
    before = _digest(tmp_path / "cache", location)
    assert _digest(tmp_path / "cache", location) == before
    assert len(read) == 2, "what is new is not trusted"
    _age(header, voxels, seconds=100)
    assert {_digest(tmp_path / "cache", location) for _ in range(2)} == {before}
    assert len(read) == 3
    voxels.write_bytes(b"two")
    _age(voxels, seconds=50)
    assert _digest(tmp_path / "cache", location) != before


def test_what_was_read_before_a_run_is_cut_short_is_remembered(
    tmp_path: Path, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"image")
        _age(tmp_path / name, seconds=100)
    subjects = [Subject(name, str(tmp_path / name)) for name in "ab"]

    def stopped_by_the_user(subject: Subject) -> str:
        if subject.subject == "b":
            raise KeyboardInterrupt
        return cache.digest(subject.image)

    cache = DigestCache(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        digest_inputs(subjects, cache, stopped_by_the_user)
    with caplog.at_level(logging.INFO, "samreg"):
        digest_inputs(subjects, DigestCache(tmp_path / "cache"), reporter=Reporter())
    assert read == [subject.image for subject in subjects]
    assert "inputs: 2 of 2 subjects" in caplog.text


def test_a_disk_that_fills_up_while_fetching_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/inputs/full.nii.gz", b"image")

    def get_file(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(memory), "get_file", get_file)
    cohort = Cohort(tuple(Subject(name, "memory://inputs/full.nii.gz") for name in "ab"))
    config = make_config({"execution": {"executor": "serial"}})
    with pytest.raises(StudyError, match="No space left"):
        run_study(config, cohort, tmp_path / "study", reporter=SilentReporter())
    assert tables.read_table(tmp_path / "study", "failures").num_rows == 0
