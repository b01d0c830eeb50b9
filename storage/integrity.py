"""Damage that ITK reads without complaint: files cut short, and NaN or infinite voxels of NIfTI.

ITK's NIfTI reader returns zeros for missing bytes, and for every voxel that is not a number. Its readers of
MHA, NRRD and TIFF pass such voxels on, so `storage.images` finds them in the array.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from storage.image_files import NIFTI_PAIRS, nifti_files
from storage.sources import PICTURE_SUFFIXES, ImageError

EXPECTED = "expected NIfTI, MHA, NRRD, a DICOM series folder, PNG, JPEG or TIFF"
_NIFTI_SUFFIXES = (".nii", ".nii.gz", *NIFTI_PAIRS)
_FLOATS = {16: "f4", 64: "f8", 32: "f4", 1792: "f8"}  # datatype code; complex numbers are pairs of floats
_HEADER_BYTES = 348  # NIfTI-1 and Analyze; ITK does not read NIfTI-2
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _NiftiHeader:
    """Where the voxels of a NIfTI or Analyze file start, and their type if they are floats."""

    offset: int
    float_type: np.dtype[np.floating] | None


def check_file(path: Path, shown: str, voxel_bytes: int) -> None:
    """Raise for a NIfTI, JPEG, PNG or TIFF file that ITK would read wrongly; other formats pass.

    A NIfTI file is read once, and not at all where its size says enough.

    Args:
        path: local file.
        shown: path to name in the message.
        voxel_bytes: bytes of all voxels by the header.

    Raises:
        ImageError: when bytes are missing, the compressed stream is damaged, or voxels are NaN or infinite.
    """
    name = path.name.lower()
    if name.endswith(_NIFTI_SUFFIXES):
        _check_nifti(path, shown, voxel_bytes)
    elif name.endswith(PICTURE_SUFFIXES):
        _check_picture(path, shown)


def _check_picture(path: Path, shown: str) -> None:
    try:
        with Picture.open(path) as picture:
            picture.load()
    except UnidentifiedImageError:
        return  # a flavour that only ITK knows
    except (OSError, SyntaxError, ValueError):
        raise ImageError(f"{shown}: the picture is truncated or damaged; copy it again") from None


def _check_nifti(path: Path, shown: str, voxel_bytes: int) -> None:
    header_file, voxel_file = nifti_files(path)
    if not (header_file.exists() and voxel_file.exists()):
        return  # a format of the same suffix, or a name that only ITK resolves
    try:
        with _opened(header_file) as stream:
            header = _parse_header(stream.read(_HEADER_BYTES))
        if header is None:
            return
        offset = max(header.offset, _HEADER_BYTES if header_file == voxel_file else 0)  # as ITK does
        if header.float_type is None and not _is_gzip(voxel_file):
            found, bad = max(0, voxel_file.stat().st_size - offset), 0
        else:
            with _opened(voxel_file) as stream:
                stream.read(offset)
                found, bad = _scan(stream, voxel_bytes, header.float_type)
    except (EOFError, OSError, zlib.error):
        raise ImageError(f"{shown}: the file is truncated or damaged; copy it again") from None
    if found < voxel_bytes:
        raise ImageError(
            f"{shown}: the file is truncated, {voxel_bytes} bytes of voxels expected, {found} found; copy it again"
        )
    if bad:
        size = voxel_bytes // cast("np.dtype[np.floating]", header.float_type).itemsize
        raise not_finite(shown, bad, size)


def not_finite(shown: str | Path, bad: int, size: int) -> ImageError:
    """The error of an image with `bad` of `size` voxels NaN or infinite."""
    return ImageError(f"{shown}: {bad} of {size} voxels are NaN or infinite; replace them by numbers")


def _scan(stream: IO[bytes], voxel_bytes: int, float_type: np.dtype[np.floating] | None) -> tuple[int, int]:
    """(bytes found, values not finite) of the next `voxel_bytes`; a compressed stream is read to its checksum."""
    found = bad = 0
    while block := stream.read(_BLOCK):
        here = block[: max(0, voxel_bytes - found)]
        found += len(here)
        if float_type is not None:
            values = np.frombuffer(here, float_type, len(here) // float_type.itemsize)
            bad += int(values.size - np.isfinite(values).sum())
    return found, bad


def _parse_header(header: bytes) -> _NiftiHeader | None:
    """None where it is no NIfTI or Analyze header."""
    if len(header) < _HEADER_BYTES:
        return None
    for order in "<>":
        if struct.unpack_from(f"{order}i", header)[0] == _HEADER_BYTES:
            (code,), (offset,) = (
                struct.unpack_from(f"{order}h", header, 70),
                struct.unpack_from(f"{order}f", header, 108),
            )
            float_type = np.dtype(order + _FLOATS[code]) if code in _FLOATS else None
            return _NiftiHeader(int(offset) if np.isfinite(offset) else 0, float_type)
    return None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    opener = gzip.open if _is_gzip(path) else open
    with cast("IO[bytes]", opener(path, "rb")) as stream:
        yield stream


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def unreadable(path: str | Path, error: RuntimeError) -> ImageError:
    """What to say of a file that ITK cannot read, without what ITK quotes of its header."""
    if "orthonormal" in str(error):
        return ImageError(f"{path}: the header's axes are not at right angles; resample the image")
    return ImageError(f"{path}: not an image, or a truncated or damaged one; {EXPECTED}")
