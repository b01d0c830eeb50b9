"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.places import put_file
from storage.sources import is_remote, suffix

_TOKEN_LENGTH = 8
_LOCK = re.compile(rf"\..+\.[0-9a-f]{{{_TOKEN_LENGTH}}}\.lock")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a hidden file beside `path` to write to; it takes the place of `path` on a clean exit.

    The hidden file keeps the suffix, because some writers choose their format by it. A lock file beside it is
    held while its writer lives, so that `clear_abandoned` can tell what a killed one left. For an object the file
    is a local one, uploaded at the end.

    Raises:
        OSError: naming `path`, for example when the disk is full; `path` is then as it was before.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="samreg-") as folder:
            local = Path(folder) / f"object{suffix(path)}"
            yield local
            put_file(local, path)
        return
    name = f".{path.name}.{secrets.token_hex(_TOKEN_LENGTH // 2)}"
    temporary, lock = path.with_name(name + suffix(path)), path.with_name(f"{name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
        with locked_file.open("r+b") as probe:  # NFS locks exclusively only what is open for writing
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, gone, or a file system without locks: leave it
        return False
    return True


def clear_abandoned(folders: Iterable[Path]) -> None:
    """Delete the hidden files that killed writers left in these folders; call it once, before writing many."""
    for folder in folders:
        for lock in [] if is_remote(folder) else _locks(folder):
            if is_abandoned(lock):
                name = lock.name.removesuffix(".lock")  # .<name>.<token>
                ending = suffix(Path(name[1 : -_TOKEN_LENGTH - 1]))
                lock.with_name(name + ending).unlink(missing_ok=True)
                lock.unlink(missing_ok=True)


def _locks(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [folder / name for name in os.listdir(folder) if _LOCK.fullmatch(name)]
