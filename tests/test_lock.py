"""The lock of a study: one driver, whatever machine the other is or was on, and whatever its clock says."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import heartbeat
from pipeline.errors import FolderError
from pipeline.lock import hold
from tests.phantoms import environment

ELSEWHERE = "process 12 on elsewhere 0123456789abcdef"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 0.05)


def _left(root: Path, age: float = 0.0) -> Path:
    path = root / ".lock"
    path.write_text(ELSEWHERE, encoding="utf-8")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_it_is_held_once_and_free_afterwards(tmp_path: Path) -> None:
    with hold(tmp_path / "s"), pytest.raises(FolderError, match=rf"written by process {os.getpid()} on .*end it"):  # noqa: SIM117
        with hold(tmp_path / "s"):
            pass
    with hold(tmp_path / "s"):
        pass
    assert [path.name for path in (tmp_path / "s").iterdir()] == [".lock"]
    assert (tmp_path / "s" / ".lock").read_text(encoding="utf-8") == ""


def test_a_killed_holder_on_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    code = f"import os, pathlib; from pipeline.lock import hold; held = hold(pathlib.Path({str(tmp_path)!r})); held.__enter__(); os._exit(9)"  # noqa: E501
    subprocess.run([sys.executable, "-c", code], env=environment(), check=False, timeout=60)
    assert "process" in (tmp_path / ".lock").read_text(encoding="utf-8")
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("age", [0.0, 1000.0, -86400.0], ids=["just died", "died long ago", "clock a day ahead"])
def test_a_holder_elsewhere_without_a_beat_is_taken_over(tmp_path: Path, age: float) -> None:
    path = _left(tmp_path, age)
    start = time.monotonic()
    with hold(tmp_path) as held:
        held.check()
        assert f"process {os.getpid()} on " in path.read_text(encoding="utf-8")
    assert (time.monotonic() - start > 0.5) == (age < 1000)


@pytest.fixture
def beating(tmp_path: Path) -> Iterator[Path]:
    """A holder elsewhere that lives."""
    path, stop = _left(tmp_path), threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    yield tmp_path
    stop.set()
    thread.join()


def test_a_holder_elsewhere_that_beats_is_left_alone(beating: Path) -> None:
    with pytest.raises(FolderError, match=r"written by process 12 on elsewhere, which lives"), hold(beating):
        pass
    assert (beating / ".lock").read_text(encoding="utf-8") == ELSEWHERE


def test_whoever_was_taken_over_stops(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        held.check()
        (tmp_path / ".lock").write_text(ELSEWHERE, encoding="utf-8")
        time.sleep(0.5)
        with pytest.raises(FolderError, match=r"was taken over by process 12 on elsewhere; this run stops"):
            held.check()
    assert (tmp_path / ".lock").read_text(encoding="utf-8") == ELSEWHERE


def test_a_lock_that_was_deleted_is_lost(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        (tmp_path / ".lock").unlink()
        time.sleep(0.3)
        with pytest.raises(FolderError, match="taken over by another driver"):
            held.check()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FolderError, match=r"file/study cannot be written: Not a directory. Choose another --out"):  # noqa: SIM117
        with hold(tmp_path / "file" / "study"):
            pass
