"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a hidden file beside `path` to write to; it takes the place of `path` on a clean exit.

    The hidden file keeps the suffix, because some writers choose their format by it. It is locked while its
    writer lives, so that the next writer of the same path can clear what a killed one left.

    Raises:
        OSError: naming `path`, for example when the disk is full; `path` is then as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with temporary.open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
    except OSError as error:
        raise named_error(error, path) from error.__cause__
    finally:
        temporary.unlink(missing_ok=True)


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


def _clear_stale(path: Path) -> None:
    prefix, ending = f".{path.stem}.", f".tmp{path.suffix}"
    for name in os.listdir(path.parent):
        middle = name.removeprefix(prefix).removesuffix(ending)
        left = path.parent / name
        if name == f"{prefix}{middle}{ending}" and len(middle) == 8 and is_abandoned(left):
            left.unlink(missing_ok=True)
