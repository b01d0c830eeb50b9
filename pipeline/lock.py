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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import heartbeat
from pipeline.errors import FolderError
from pipeline.heartbeat import Heartbeat, held_by, own_name
from pipeline.heartbeat import holder as shown

LOG = logging.getLogger("samreg")
_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST})


@contextmanager
def hold(root: Path) -> Iterator[Heartbeat]:
    """Hold a study folder for this driver, creating it.

    A holder elsewhere that does not beat is waited for, up to `heartbeat.STALE_SECONDS`, and then taken over.

    Raises:
        FolderError: naming host and process of another living driver, or why the folder cannot be written.
    """
    path = root / ".lock"
    descriptor = _claim(root, path)
    try:
        text = own_name()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        beat = Heartbeat(root, lambda: _renew(path, descriptor, text))
        try:
            with beat.beating():
                yield beat
        finally:
            if _is_ours(path, descriptor, text):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _renew(path: Path, descriptor: int, text: str) -> str | None:
    if not _is_ours(path, descriptor, text):
        return _holder(path)
    os.utime(descriptor)
    return None


def _is_ours(path: Path, descriptor: int, text: str) -> bool:
    """Whether the file is still the one we locked, with what we wrote."""
    try:
        if os.stat(path).st_ino != os.fstat(descriptor).st_ino:
            return False
    except FileNotFoundError:
        return False
    return _read(descriptor) == text


def _claim(root: Path, path: Path) -> int:
    """Descriptor of the lock file, locked, once nobody living holds it."""
    while True:
        descriptor, ours = _open(root, path), False
        try:
            holder = shown(_read(descriptor))
            free = _lock(descriptor)
            elsewhere = bool(holder) and not holder.endswith(f" on {socket.gethostname()}")
            if not free and not elsewhere:
                raise held_by(root, f"{holder or 'another process'}. Wait for it or end it")
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


def _wait_for_beat(root: Path, path: Path, holder: str) -> None:
    """Return when a holder on another machine is dead.

    Raises:
        FolderError: as soon as it beats.
    """
    first = _mtime(path)
    wait = heartbeat.STALE_SECONDS - max(0.0, _now(root) - first)
    if wait > 0:
        LOG.warning("%s was being written by %s; waiting up to %.0f s for it", root, holder, wait)
    end = time.monotonic() + wait
    while time.monotonic() < end:
        time.sleep(heartbeat.LOOK_SECONDS)
        if _mtime(path) != first:
            raise held_by(root, f"{holder}, which lives. Wait for it or end it there")


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
    return shown(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else ""
