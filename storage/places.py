"""Places a study may lie at: folders, and prefixes of object stores that fsspec reaches (s3://, gs://, az://, …).

Both are handled as paths: a place in an object store is a `upath.UPath`, which joins and names like pathlib. An object
store has no rename, no locks and no half-written objects: an object appears whole, by one PUT. Its errors are turned
into one that names the object; requests that fail for a moment are repeated first.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from upath import UPath

from storage.sources import client_errors, is_remote

S3_SETTINGS: dict[str, Any] = {  # botocore tries again after 500, 503, timeouts and cut lines, with growing pauses
    "retries": {"max_attempts": 8, "mode": "standard"},
    "connect_timeout": 10,
    "read_timeout": 60,
}


class ObjectStoreError(OSError):
    """An object store that does not do what it is asked: says the object, why, and what to do."""


def place(location: str | Path) -> Path:
    """A folder or file as a path; a URL as a path over fsspec, whose listings are never taken from a cache."""
    if isinstance(location, UPath) or not is_remote(location):
        return Path(location) if isinstance(location, str) else location
    url = str(location).rstrip("/")
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = dict(S3_SETTINGS)
    return cast(Path, UPath(url, **options))


def read_bytes(path: Path) -> bytes:
    """Content of a file or object.

    Raises:
        FileNotFoundError: when there is none.
        ObjectStoreError: for an object that cannot be read.
    """
    if not is_remote(path):
        return path.read_bytes()
    with reaching(path):
        files, key = _address(path)
        return cast(bytes, files.cat_file(key))


def names(folder: Path) -> list[str]:
    """Names of what lies in a folder, none for one that does not exist; one listing."""
    try:
        with reaching(folder):
            if not is_remote(folder):
                return [path.name for path in folder.iterdir()]
            files, prefix = _address(folder)
            return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(prefix, detail=False) if entry != prefix]
    except (FileNotFoundError, NotADirectoryError):
        return []


def exists(path: Path) -> bool:
    """Whether a file or object is there.

    Raises:
        ObjectStoreError: when the store does not say.
    """
    if not is_remote(path):
        return path.exists()
    try:
        with reaching(path):
            files, key = _address(path)
            return bool(files.info(key)["type"] == "file")  # isfile() takes every error for an absence
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Delete a file or object; one that does not exist is no error."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    with reaching(path), suppress(FileNotFoundError):
        files, key = _address(path)
        files.rm_file(key)


def remove_tree(folder: Path) -> None:
    """Delete a folder, or every object under a prefix; one that does not exist is no error."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with reaching(folder):
        files, prefix = _address(folder)
        found = files.find(prefix)
        if found:
            files.rm(found)


def put_object(path: Path, content: bytes, *, new: bool = False) -> None:
    """Write an object at once.

    Args:
        new: only if there is none, where the store can tell (S3 by If-None-Match).

    Raises:
        FileExistsError: for `new`, when there is one.
        ObjectStoreError: when it cannot be written.
    """
    with reaching(path, writing=True):
        files, key = _address(path)
        try:
            files.pipe_file(key, content, mode="create" if new else "overwrite")
        except OSError as error:
            if new and "PreconditionFailed" in f"{error}{error.__cause__!r}":
                raise FileExistsError(str(path)) from None
            raise


def put_file(source: Path, path: Path) -> None:
    """Write a local file as an object, which appears when all of it is there."""
    with reaching(path, writing=True):
        files, key = _address(path)
        files.put_file(str(source), key)


def put_folder(source: Path, target: Path, last: str) -> None:
    """Replace a prefix by the files of a local folder; `last`, which marks it whole, is gone first and written last."""
    marker = target / last
    remove(marker)
    remove_tree(target)
    inside = sorted(path for path in source.rglob("*") if path.is_file() and path != source / last)
    with reaching(target, writing=True):
        files, prefix = _address(target)
        if inside:
            files.put(
                [str(path) for path in inside],
                [f"{prefix}/{path.relative_to(source).as_posix()}" for path in inside],
            )
    put_file(source / last, marker)


def modified(path: Path) -> float:
    """When an object was last written, by the store's clock, s.

    Raises:
        FileNotFoundError: when there is none.
    """
    with reaching(path):
        files, key = _address(path)
        return float(files.modified(key).timestamp())


@contextmanager
def reaching(path: Path, writing: bool = False) -> Iterator[None]:
    """Turn what an object store's client raises into an error that names the object.

    Raises:
        FileNotFoundError: when reading, for an object that is not there.
        FileExistsError: as it is.
        ObjectStoreError: for everything else that the network or the store is to blame for.
    """
    if not is_remote(path):
        yield
        return
    try:
        yield
    except (FileExistsError, ObjectStoreError):
        raise
    except ImportError as error:
        raise ObjectStoreError(f"{path}: {error}; install the package, for S3 by pip install 'samreg[s3]'") from None
    except client_errors() as error:
        if isinstance(error, FileNotFoundError) and not writing:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from None
        raise ObjectStoreError(
            f"{path}: {type(error).__name__}: {error}. Look at the bucket's name, the credentials of this node "
            "(environment variables or role), their rights to get, put, list and delete, and the endpoint "
            "(AWS_ENDPOINT_URL); then run the same command again"
        ) from error


def _address(path: Path) -> tuple[Any, str]:
    """File system and key of an object."""
    remote = cast(Any, path)
    return remote.fs, str(remote.path).rstrip("/")
