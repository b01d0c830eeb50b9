"""Files as the user gave them, local or remote."""

from __future__ import annotations

import errno
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_DETACHED_SUFFIXES = (".mhd", ".nhdr", ".hdr", ".img", ".hdr.gz", ".img.gz")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_CLIENT_ERRORS = {  # of the clients that fsspec's packages use, by module; other errors of theirs are OSErrors
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
}
_VERSIONS = (  # what stores call that which changes with an object
    *("ETag", "etag", "md5Hash", "generation", "Content-MD5", "Digest"),
    *("LastModified", "last_modified", "Last-Modified", "mtime", "created"),
)


class ImageError(ValueError):
    """An input file that cannot be used: says its path, what was expected and what to do."""


def is_remote(path: str | Path) -> bool:
    """Whether the path is a URI that fsspec must fetch."""
    return "://" in str(path)


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A local path to the file or folder; a URI is downloaded through fsspec and dropped afterwards.

    Raises:
        ImageError: when it does not exist or cannot be fetched.
    """
    if not is_remote(path):
        local = Path(path)
        if not local.exists():
            raise ImageError(f"{path}: no such file or folder; check the path in the manifest")
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="samreg-") as folder:
        yield _download(str(path), Path(folder))


def remote_size(uri: str) -> int | None:
    """Bytes of an object, without fetching it; None where its store does not say.

    Raises:
        ImageError: when it does not exist or cannot be reached.
    """
    with _fetching(uri):
        files, location = fsspec.core.url_to_fs(uri)
        size: int | None = files.info(location)["size"]
        return size


def remote_stamp(uri: str) -> list[list[object]] | None:
    """What changes when an object does, or one under a prefix: names, sizes and versions; None where there are none.

    Raises:
        ImageError: when it does not exist or cannot be reached.
    """
    with _fetching(uri):
        files, location = fsspec.core.url_to_fs(uri)
        if "file" in files.protocol:
            return None
        found = files.info(location)
        infos = [found] if found["type"] == "file" else files.find(location, detail=True).values()
    versions = [[str(info[key]) for key in _VERSIONS if info.get(key)] for info in infos]
    if not all(versions):
        return None
    return [[info["name"], info["size"], *version] for info, version in zip(infos, versions, strict=True)]


def client_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """OSError, the errors of the object stores' clients that have been loaded, and some more."""
    loaded = [(sys.modules[module], kinds) for module, kinds in _CLIENT_ERRORS.items() if module in sys.modules]
    return (OSError, *(getattr(module, name) for module, kinds in loaded for name in kinds), *more)


@contextmanager
def _fetching(uri: str) -> Iterator[None]:
    """Turn what goes wrong with a URI into one error that says it; a full disk here is no fault of the URI."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"{uri}: no such file or folder; check the address in the manifest") from None
    except client_errors(ImportError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise
        raise ImageError(f"{uri}: could not be fetched ({type(error).__name__}: {error})") from error


def _download(uri: str, folder: Path) -> Path:
    if uri.lower().endswith(_DETACHED_SUFFIXES):
        raise ImageError(f"{uri}: header and voxels are separate files; store them as one (.mha, .nrrd, .nii.gz)")
    with _fetching(uri):
        files, location = fsspec.core.url_to_fs(uri)
        if files.protocol == "file" or "file" in files.protocol:
            if not Path(location).exists():
                raise FileNotFoundError(location)
            return Path(location)
        target = folder / Path(location.rstrip("/")).name
        if files.isdir(location):
            files.get(location.rstrip("/") + "/", f"{target}/", recursive=True)
        else:
            files.get_file(location, str(target))
    return target


def suffix(path: Path) -> str:
    """Lower-case file suffix, `.nii.gz` as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix
