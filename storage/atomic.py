"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a hidden file beside `path` to write to; it takes the place of `path` on a clean exit.

    The hidden file keeps the suffix, because some writers choose their format by it. A lock file beside it is
    held while its writer lives, so that the next writer of the same path can clear what a killed one left.

    Raises:
        OSError: naming `path`, for example when the disk is full; `path` is then as it was before.
    """
    name = f".{path.name}.{secrets.token_hex(4)}"
    temporary, lock = path.with_name(name + path.suffix), path.with_name(f"{name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(path)
        with lock.open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
    except OSError as error:
        raise named_error(error, path) from error.__cause__
    finally:
        temporary.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)


def named_error(error: OSError, path: Path) -> OSError:
    """The error itself when it names a file, else one of the same kind that names `path`."""
    if error.filename is not None or str(path) in str(error):
        return error
    if error.errno is None:
        return OSError(f"{path}: {error}")
    return OSError(error.errno, error.strerror or str(error), str(path))


def is_abandoned(locked_file: Path) -> bool:
    """Whether no living process holds the lock of a file that a writer made."""
    try:
        with locked_file.open("rb") as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, gone, or a file system without locks: leave it
        return False
    return True


def _clear_abandoned(path: Path) -> None:
    pattern = re.compile(rf"(\.{re.escape(path.name)}\.[0-9a-f]{{8}})\.lock")
    for name in os.listdir(path.parent):
        match = pattern.fullmatch(name)
        if match and is_abandoned(path.parent / name):
            path.with_name(match[1] + path.suffix).unlink(missing_ok=True)
            path.with_name(name).unlink(missing_ok=True)
