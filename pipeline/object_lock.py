"""One driver per study in an object store: a lock object that its holder keeps rewriting.

The object is made by a conditional write (If-None-Match on S3), so of two drivers one finds it there. A store that
ignores the condition lets both write; then the last one holds, and the other sees that at its next beat and stops.
Parts and subjects are whole objects that depend on their inputs only, so until then the two write the same.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from pipeline import heartbeat
from pipeline.errors import FolderError
from pipeline.heartbeat import Heartbeat, held_by, holder, own_name
from storage.places import ObjectStoreError, modified, put_object, read_bytes, remove

LOG = logging.getLogger("samreg")
_TRIES = 5


@contextmanager
def hold_object(root: Path) -> Iterator[Heartbeat]:
    """Hold a study in an object store for this driver.

    A holder that does not beat is waited for, up to `heartbeat.STALE_SECONDS`, and then taken over.

    Raises:
        FolderError: naming host and process of another living driver, or why the store cannot be written.
    """
    path, text, beats = root / ".lock", own_name(), count(1)
    try:
        _claim(root, path, text)
    except ObjectStoreError as error:
        raise FolderError(str(error)) from error

    def renew() -> str | None:
        found = _read(path)
        if not found.startswith(text):
            return holder(found)
        put_object(path, f"{text} {next(beats)}".encode())
        return None

    beat = Heartbeat(root, renew)
    try:
        with beat.beating():
            yield beat
    finally:
        if _read(path).startswith(text):
            remove(path)


def _claim(root: Path, path: Path, text: str) -> None:
    for _ in range(_TRIES):
        with suppress(FileExistsError):
            put_object(path, f"{text} 0".encode(), new=True)
        found = _read(path)
        if found.startswith(text):
            return
        if found:
            _wait_for_beat(root, path, found)
            LOG.warning("%s: taking over from %s, which has given no sign of life", root, holder(found))
            remove(path)
    raise held_by(root, "other drivers that start at the same time")


def _wait_for_beat(root: Path, path: Path, found: str) -> None:
    """Return when the holder is dead or gone.

    Raises:
        FolderError: as soon as it beats.
    """
    wait = heartbeat.STALE_SECONDS - _age(root, path)
    if wait > 0:
        LOG.warning("%s was being written by %s; waiting up to %.0f s for it", root, holder(found), wait)
    end = time.monotonic() + wait
    while time.monotonic() < end:
        time.sleep(min(heartbeat.LOOK_SECONDS, max(0.0, end - time.monotonic())))
        if _read(path) not in (found, ""):
            raise held_by(root, f"{holder(found)}, which lives. Wait for it or end it")


def _age(root: Path, path: Path) -> float:
    """Seconds since the last beat, by the store's clock."""
    probe = root / f".now.{secrets.token_hex(4)}"
    try:
        put_object(probe, b"")
        return max(0.0, modified(probe) - modified(path))
    except FileNotFoundError:  # released meanwhile
        return heartbeat.STALE_SECONDS
    finally:
        remove(probe)


def _read(path: Path) -> str:
    try:
        return read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return ""
