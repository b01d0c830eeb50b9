"""One driver per study in an object store: a lock object that its holder keeps rewriting.

The object is made by a conditional write (If-None-Match on S3), so of two drivers one finds it there. A store that
ignores the condition lets both write; then the last one holds, and the other sees that at its next beat and stops.
Parts and subjects are whole objects that depend on their inputs only, so until then the two write the same.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import lock
from pipeline.errors import FolderError
from storage.places import ObjectStoreError, modified, put_object, read_bytes, remove

LOG = logging.getLogger("samreg")
_TRIES = 5


@dataclass
class ObjectLock:
    """The lock of a study while it is held.

    Attributes:
        path: the lock object.
        text: holder and token; the object's content is this and the number of the beat.
    """

    path: Path
    text: str
    _lost: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Call between units.

        Raises:
            FolderError: when another driver has taken over, as after this machine was cut off for long.
        """
        if self._lost:
            raise FolderError(f"{self.path.parent} {self._lost}; this run stops. What it finished is kept")

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat in the background; the object is deleted at the end."""
        thread = threading.Thread(target=self._beat, name="samreg-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            if _read(self.path).startswith(self.text):
                remove(self.path)

    def _beat(self) -> None:
        last, beats = time.monotonic(), 0
        while not self._stop.wait(lock.BEAT_SECONDS):
            try:
                found = _read(self.path)
                if not found.startswith(self.text):
                    self._lost = f"was taken over by {_holder(found) or 'another driver'}"
                    return
                beats += 1
                put_object(self.path, f"{self.text} {beats}".encode())
                last = time.monotonic()
            except OSError as error:
                if time.monotonic() - last > lock.STALE_SECONDS:
                    self._lost = f"has been out of reach for {lock.STALE_SECONDS:g} s ({error}) and may be taken over"
                    return


@contextmanager
def hold_object(root: Path) -> Iterator[ObjectLock]:
    """Hold a study in an object store for this driver.

    A holder that does not beat is waited for, until its last beat is STALE_SECONDS old, and then taken over.

    Raises:
        FolderError: naming host and process of another living driver, or why the store cannot be written.
    """
    path = root / ".lock"
    text = f"process {os.getpid()} on {socket.gethostname()} {secrets.token_hex(8)}"
    try:
        _claim(root, path, text)
    except ObjectStoreError as error:
        raise FolderError(str(error)) from error
    held = ObjectLock(path, text)
    with held.beating():
        yield held


def _claim(root: Path, path: Path, text: str) -> None:
    for _ in range(_TRIES):
        with suppress(FileExistsError):
            put_object(path, f"{text} 0".encode(), new=True)
        found = _read(path)
        if found.startswith(text):
            return
        if found:
            _wait_for_beat(root, path, found)
            LOG.warning("%s: taking over from %s, which has given no sign of life", root, _holder(found))
            remove(path)
    raise _held(root, "other drivers that start at the same time")


def _wait_for_beat(root: Path, path: Path, found: str) -> None:
    """Return when the holder is dead or gone.

    Raises:
        FolderError: as soon as it beats.
    """
    wait = lock.STALE_SECONDS - _age(root, path)
    if wait > 0:
        LOG.warning("%s was being written by %s; waiting up to %.0f s for it", root, _holder(found), wait)
    end = time.monotonic() + wait
    while time.monotonic() < end:
        time.sleep(min(lock.LOOK_SECONDS, max(0.0, end - time.monotonic())))
        if _read(path) not in (found, ""):
            raise _held(root, f"{_holder(found)}, which lives. Wait for it or end it")


def _age(root: Path, path: Path) -> float:
    """Seconds since the last beat, by the store's clock."""
    probe = root / f".now.{secrets.token_hex(4)}"
    try:
        put_object(probe, b"")
        return max(0.0, modified(probe) - modified(path))
    except FileNotFoundError:  # released meanwhile
        return lock.STALE_SECONDS
    finally:
        remove(probe)


def _held(root: Path, by: str) -> FolderError:
    return FolderError(f"{root} is being written by {by}; the same command goes on from there")


def _read(path: Path) -> str:
    try:
        return read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _holder(text: str) -> str:
    """Process and host without what follows them."""
    return " ".join(text.split()[:4])
