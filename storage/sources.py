"""Files as the user gave them: local or remote, whole or cut short, and their digest."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from PIL import Image as Picture
from PIL import UnidentifiedImageError

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


def _download(uri: str, folder: Path) -> Path:
    if uri.lower().endswith(_DETACHED_SUFFIXES):
        raise ImageError(
            f"{uri}: header and voxels are separate files; store them as one (.mha, .nrrd, .nii.gz)"
        )
    try:
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
    except FileNotFoundError:
        raise ImageError(f"{uri}: no such file or folder; check the address in the manifest") from None
    except (OSError, ImportError, ValueError) as error:
        raise ImageError(f"{uri}: could not be fetched ({type(error).__name__}: {error})") from error
    return target


def suffix(path: Path) -> str:
    """Lower-case file suffix, `.nii.gz` as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def check_whole(path: Path, shown: str, voxel_bytes: int) -> None:
    """Raise where a file was cut short in a way that ITK reads without complaint (NIfTI, JPEG, PNG, TIFF).

    Args:
        path: local file.
        shown: path to name in the message.
        voxel_bytes: bytes of all voxels by the header.

    Raises:
        ImageError: when bytes are missing or the compressed stream is damaged.
    """
    kind = suffix(path)
    if kind in (".nii", ".nii.gz"):
        opener = gzip.open if _is_gzip(path) else open
        try:
            with cast(IO[bytes], opener(path, "rb")) as stream:
                header = stream.read(352)
                found = len(header) + sum(len(block) for block in iter(lambda: stream.read(_BLOCK), b""))
        except (EOFError, OSError, zlib.error):
            raise ImageError(f"{shown}: the file is truncated or damaged; copy it again") from None
        if found < _nifti_offset(header) + voxel_bytes:
            raise ImageError(
                f"{shown}: the file is truncated, {voxel_bytes} bytes of voxels expected, "
                f"{max(0, found - _nifti_offset(header))} found; copy it again"
            )
    elif kind in (".hdr", ".img"):
        data = path.with_suffix(".img")
        if data.exists() and data.stat().st_size < voxel_bytes:
            raise ImageError(f"{shown}: the .img file is truncated; copy it again")
    elif kind in PICTURE_SUFFIXES:
        try:
            with Picture.open(path) as picture:
                picture.load()
        except UnidentifiedImageError:
            return  # a flavour that only ITK knows
        except (OSError, SyntaxError, ValueError):
            raise ImageError(f"{shown}: the picture is truncated or damaged; copy it again") from None


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _nifti_offset(header: bytes) -> int:
    order = "<" if struct.unpack("<i", header[:4])[0] in (348, 540) else ">"
    if struct.unpack(f"{order}i", header[:4])[0] == 540:
        return int(struct.unpack(f"{order}q", header[168:176])[0])
    return int(struct.unpack(f"{order}f", header[108:112])[0])


def content_digest(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes and its detached data file's; of a folder: of its files' in name order.

    Raises:
        ImageError: when it does not exist.
    """
    total = hashlib.sha256()
    with local_copy(path) as local:
        if local.is_dir():
            files = sorted(p for p in local.rglob("*") if p.is_file())
        else:
            files = [local, *_detached(local)]
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
