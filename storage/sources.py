"""Files as the user gave them: local or remote, and their digest."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import fsspec

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_DETACHED_SUFFIXES = (".mhd", ".nhdr", ".hdr", ".img")
_BLOCK = 1 << 20


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


@contextmanager
def _fetching(uri: str) -> Iterator[None]:
    """Turn what goes wrong with a URI into one error that says it."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f"{uri}: no such file or folder; check the address in the manifest") from None
    except (OSError, ImportError, ValueError) as error:
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


def content_digest(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes and its detached data file's; of a folder: of its files' in name order.

    Raises:
        ImageError: when it does not exist.
    """
    total = hashlib.sha256()
    with local_copy(path) as local:
        inside = sorted(p for p in local.rglob("*") if p.is_file())
        files = inside if local.is_dir() else [local, *_detached(local)]
        for file in files:
            with file.open("rb") as stream:
                shutil.copyfileobj(stream, cast(Any, _HashSink(total)), _BLOCK)
    return total.hexdigest()


class _HashSink:
    def __init__(self, total: Any) -> None:
        self.write = total.update


def _detached(header: Path) -> list[Path]:
    if suffix(header) in (".hdr", ".img"):
        pair = [header.with_suffix(".img"), header.with_suffix(".hdr")]
        return [p for p in pair if p != header and p.exists()]
    if suffix(header) in (".mhd", ".nhdr"):
        with header.open("rb") as stream:
            text = stream.read(1 << 16).decode("latin-1")
        named = re.search(r"(?im)^(?:ElementDataFile\s*=|data file:)\s*(.+?)\s*$", text)
        if named and (header.parent / named[1]).is_file():
            return [header.parent / named[1]]
    return []
