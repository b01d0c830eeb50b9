"""The files that make up an image, where these are several, and their digest."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from storage.sources import ImageError, local_copy

NIFTI_PAIRS = (".hdr", ".img", ".hdr.gz", ".img.gz")
_NAMING = (".mhd", ".mha", ".nhdr", ".nrrd")  # their headers may name the files of the voxels
_CLAUSE = re.compile(r"(?im)^(?:ElementDataFile[ \t]*=|data ?file:)[ \t]*(.+?)[ \t\r]*$")
_NUMBERED = re.compile(r"(\S*%0?\d?d\S*)\s+(-?\d+)\s+(-?\d+)\s+(-?[1-9]\d*)(?:\s+\d+)?")  # format, first, last, step
_HEADER_BYTES = 1 << 16
_BLOCK = 1 << 20


def image_files(path: Path) -> list[Path]:
    """Every file whose bytes belong to an image, the one of this path first; of a folder all of its files, by name.

    Raises:
        ImageError: for a header that names files of voxels in an unknown way, or files that are not there.
    """
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    name = path.name.lower()
    if name.endswith(NIFTI_PAIRS):
        return [path, *(file for file in nifti_files(path) if file != path and file.exists())]
    return [path, *_named_files(path)] if name.endswith(_NAMING) else [path]


def nifti_files(path: Path) -> tuple[Path, Path]:
    """(header file, voxel file); `.hdr` and `.img` come in pairs, either possibly compressed."""
    name = path.name
    suffix = next((s for s in NIFTI_PAIRS if name.lower().endswith(s)), None)
    if suffix is None:
        return path, path
    stem = name[: -len(suffix)]

    def sibling(kind: str) -> Path:
        if suffix.startswith(kind):
            return path
        plain = path.with_name(stem + kind)
        return plain if plain.exists() else path.with_name(f"{stem}{kind}.gz")

    return sibling(".hdr"), sibling(".img")


def content_digest(path: str | Path) -> str:
    """sha256 (hex) of the bytes of an image's files, in the order of `image_files`.

    Raises:
        ImageError: when it does not exist, or as `image_files`.
    """
    total = hashlib.sha256()
    with local_copy(path) as local:
        for file in image_files(local):
            with file.open("rb") as stream:
                shutil.copyfileobj(stream, cast(Any, _HashSink(total)), _BLOCK)
    return total.hexdigest()


class _HashSink:
    def __init__(self, total: Any) -> None:
        self.write = total.update


def _named_files(header: Path) -> list[Path]:
    """Files of voxels that a MetaImage or NRRD header names: one, a numbered series, or a list of them."""
    with header.open("rb") as stream:
        text = stream.read(_HEADER_BYTES).decode("latin-1")
    if text.startswith("NRRD"):
        text = re.split(r"\r?\n\r?\n", text, maxsplit=1)[0]
    clause = _CLAUSE.search(text)
    if clause is None or clause[1].lower() == "local":
        return []
    if (header.parent / clause[1]).is_file():
        return [header.parent / clause[1]]
    files = [header.parent / name for name in _names(header, clause)]
    if not files or not all(file.is_file() for file in files):
        raise ImageError(
            f"{header}: the header names files of voxels that are not there; store the image as one file (.mha, .nrrd)"
        )
    return files


def _names(header: Path, clause: re.Match[str]) -> Iterator[str]:
    if clause[1].split()[0].upper() == "LIST":
        lines = header.read_bytes().decode("latin-1")[clause.end() :].splitlines()
        yield from (line.strip() for line in lines if line.strip())
    elif numbered := _NUMBERED.fullmatch(clause[1]):
        first, last, step = (int(numbered[group]) for group in (2, 3, 4))
        yield from (numbered[1] % number for number in range(first, last + (1 if step > 0 else -1), step))
