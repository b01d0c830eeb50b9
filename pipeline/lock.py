"""One driver per study: a lock that goes with the process that held it, on this machine or another.

On one machine, and wherever the file system passes locks on, the lock is the kernel's. Beyond that the holder beats:
it touches the lock file, and one that stops beating is dead. Only times that the file system itself has set are
compared, so the clocks of the machines need not agree.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import FolderError

LOG = logging.getLogger("samreg")
BEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
LOOK_SECONDS = 2.0
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})


@dataclass
class StudyLock:
    """The lock of a study while it is held.

    Attributes:
        path: the lock file.
        descriptor: of the file, under the kernel's lock.
        text: what we wrote into it; whoever reads something else has been taken over.
    """

    path: Path
    descriptor: int
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
        """Beat in the background."""
        thread = threading.Thread(target=self._beat, name="samreg-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            if self._is_ours():
                os.ftruncate(self.descriptor, 0)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if not self._is_ours():
                    self._lost = f"was taken over by {_holder(self.path) or 'another driver'}"
                    return
                os.utime(self.descriptor)
                last = time.monotonic()
            except OSError as error:
                if time.monotonic() - last > STALE_SECONDS:
                    self._lost = f"has been out of reach for {STALE_SECONDS:g} s ({error}) and may be taken over"
                    return

    def _is_ours(self) -> bool:
        """Whether the file is still the one we locked, with what we wrote."""
        try:
            if os.stat(self.path).st_ino != os.fstat(self.descriptor).st_ino:
                return False
        except FileNotFoundError:
            return False
        return _read(self.descriptor) == self.text


@contextmanager
def hold(root: Path) -> Iterator[StudyLock]:
    """Hold a study folder for this driver, creating it.

    A holder elsewhere that does not beat is waited for, up to STALE_SECONDS, and then taken over.

    Raises:
        FolderError: naming host and process of another living driver, or why the folder cannot be written.
    """
    path = root / ".lock"
    descriptor = _claim(root, path)
    try:
        text = f"process {os.getpid()} on {socket.gethostname()} {secrets.token_hex(8)}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        lock = StudyLock(path, descriptor, text)
        with lock.beating():
            yield lock
    finally:
        os.close(descriptor)


def _claim(root: Path, path: Path) -> int:
    """Descriptor of the lock file, locked, once nobody living holds it."""
    while True:
        descriptor, ours = _open(root, path), False
        try:
            holder = _shown(_read(descriptor))
            free = _lock(descriptor)
            elsewhere = bool(holder) and not holder.endswith(f" on {socket.gethostname()}")
            if not free and not elsewhere:
                raise _held(root, f"{holder or 'another process'}. Wait for it or end it")
            if free and not elsewhere:
                ours = True
                return descriptor
            _wait_for_beat(root, path, holder)
            LOG.warning("%s: taking over from %s, which has given no sign of life", root, holder)
            if free:
                ours = True
                return descriptor
            path.unlink(missing_ok=True)  # a server still holds the lock of a machine that is gone
        finally:
            if not ours:
                os.close(descriptor)


def _held(root: Path, by: str) -> FolderError:
    return FolderError(f"{root} is being written by {by}; the same command goes on from there")


def _wait_for_beat(root: Path, path: Path, holder: str) -> None:
    """Return when a holder on another machine is dead.

    Raises:
        FolderError: as soon as it beats.
    """
    first = _mtime(path)
    age = max(0.0, _now(root) - first)
    if age < STALE_SECONDS:
        LOG.warning("%s was being written by %s; waiting up to %.0f s for it", root, holder, STALE_SECONDS - age)
    end = time.monotonic() + STALE_SECONDS - age
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        if _mtime(path) != first:
            raise _held(root, f"{holder}, which lives. Wait for it or end it there")


def _open(root: Path, path: Path) -> int:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise FolderError(f"{root} cannot be written: {error.strerror}. Choose another --out") from None


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _mtime(path: Path) -> int | float:
    """Time of the last beat, from an open file, whose attributes network file systems fetch anew."""
    try:
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _now(root: Path) -> float:
    """The time by the clock of the file system."""
    probe = root / f".now.{secrets.token_hex(4)}"
    try:
        with probe.open("wb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace").strip()


def _holder(path: Path) -> str:
    return _shown(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else ""


def _shown(text: str) -> str:
    """Process and host without the token that follows them."""
    return " ".join(text.split()[:4])
