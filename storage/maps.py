# mypy: disable-error-code="no-untyped-call"
"""Scalar maps on the grid of an image file, as NIfTI that every tool reads."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from storage.atomic import replace_file
from storage.geometry import Geometry, to_file_axes


def write_map(path: Path, values: npt.NDArray[np.floating[Any]], geometry: Geometry) -> None:
    """Write [D, H, W] in analysis orientation as float32 on the file's own grid, whole or not at all.

    Args:
        path: `.nii.gz` file.
        values: a number per voxel.
        geometry: grid of the image; a 2D file gives a 2D map.

    Raises:
        OSError: naming the file, with the system's errno, for example when the disk is full.
    """
    turned = np.ascontiguousarray(to_file_axes(values, geometry), dtype=np.float32)
    n, grid = geometry.source_dimension, geometry.file_grid()
    image = sitk.GetImageFromArray(turned[0] if n == 2 else turned)
    image.SetSpacing(grid.spacing[:n])
    image.SetOrigin(grid.origin[:n])
    image.SetDirection([float(v) for v in np.reshape(grid.direction, (3, 3))[:n, :n].ravel()])
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "map.nii"
        sitk.WriteImage(image, str(plain))
        packed = gzip.compress(plain.read_bytes(), compresslevel=6, mtime=0)
    with replace_file(path) as temporary:
        temporary.write_bytes(packed)
