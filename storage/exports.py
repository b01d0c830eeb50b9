# mypy: disable-error-code="no-untyped-call"
"""A transform in the forms that other programs read, all on the grid of the fixed file.

- displacement: T(X) - X as a vector image, mm LPS (x, y, z). As NIfTI it is (X, Y, Z, 1, 3) with intent 1007.
- the two parts that ANTs chains, T(X) = A (X + v(X)): the image of v, and the affine.
- Learn2Reg: (X, Y, Z, 3) voxels in the order of the file's own axes, from a fixed voxel to the moving voxel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from storage.atomic import replace_file
from storage.geometry import FileGrid, Geometry, to_file_axes
from storage.transforms import Array, Transform
from storage.warping import make_image, write_error


def displacement_image(transform: Transform, fixed: Geometry) -> sitk.Image:
    """T(X) - X of every voxel, float32 [n] mm (x, y, z).

    Raises:
        TransformError: when the transform is that of another image than `fixed`.
    """
    positions, vectors = _on_file_grid(transform, fixed)
    return _vector_image(_moved(transform, positions + vectors) - positions, fixed)


def offset_image(transform: Transform, fixed: Geometry) -> sitk.Image:
    """v(X) of every voxel, which the affine follows, float32 [n] mm (x, y, z); raises as displacement_image."""
    return _vector_image(_on_file_grid(transform, fixed)[1], fixed)


def voxel_displacement_image(transform: Transform, fixed: Geometry, moving: Geometry) -> sitk.Image:
    """Learn2Reg's field, float32 (i, j, k, 3): moving voxel (i, j, k) minus fixed voxel; raises as displacement_image.

    It is a 4D image. Of pictures, k is 0.
    """
    positions, vectors = _on_file_grid(transform, fixed)
    n, grid = fixed.source_dimension, moving.file_grid()
    moved = _moved(transform, positions + vectors) - grid.origin[:n]
    index = np.linalg.solve(_direction(grid, n), moved.reshape(-1, n).T).T.reshape(moved.shape) / grid.spacing[:n]
    shift = np.zeros((*index.shape[:3], 3), np.float32)
    shift[..., :n] = index - _indices(index.shape[:3])[..., :n]
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(shift, -1, 0)), isVector=False)
    here = fixed.file_grid()
    image.SetSpacing([*here.spacing, 1.0])
    image.SetOrigin([*here.origin, 0.0])
    direction = np.eye(4)
    direction[:3, :3] = np.reshape(here.direction, (3, 3))
    image.SetDirection(direction.ravel().tolist())
    return image


def affine_transform(transform: Transform) -> sitk.AffineTransform:
    """A alone, fixed to moving positions."""
    affine = sitk.AffineTransform(len(transform.origin))
    affine.SetMatrix(transform.affine[:-1, :-1].ravel().tolist())
    affine.SetTranslation(transform.affine[:-1, -1].tolist())
    return affine


def write_affine(affine: sitk.AffineTransform, path: Path) -> None:
    """Write `.mat` (ITK's and ANTs' binary form) or `.tfm` (text), whole or not at all.

    Raises:
        OSError: naming the file, with the system's errno, for example when the disk is full.
    """
    with replace_file(path) as temporary:
        try:
            sitk.WriteTransform(affine, str(temporary))
            sitk.ReadTransform(str(temporary))  # ITK says nothing of a full disk
        except RuntimeError as error:
            raise write_error(path, temporary) from error


def _on_file_grid(transform: Transform, fixed: Geometry) -> tuple[Array, Array]:
    """X and v(X) of every voxel, float64 [z, y, x, n] of the fixed file."""
    vectors = transform.dense(fixed).vectors
    turned = to_file_axes(vectors if vectors.ndim == 4 else vectors[None], fixed).astype(np.float64)
    grid, n = fixed.file_grid(), fixed.source_dimension
    positions = (_indices(turned.shape[:3])[..., :n] * grid.spacing[:n]) @ _direction(grid, n).T + grid.origin[:n]
    return positions, turned


def _moved(transform: Transform, positions: Array) -> Array:
    moved: Array = positions @ transform.affine[:-1, :-1].T + transform.affine[:-1, -1]
    return moved


def _indices(shape: tuple[int, ...]) -> Array:
    """(i, j, k) of every voxel [z, y, x, 3]."""
    return np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)[..., ::-1]


def _direction(grid: FileGrid, n: int) -> Array:
    return np.asarray(grid.direction, dtype=np.float64).reshape(3, 3)[:n, :n]


def _vector_image(vectors: npt.NDArray[np.floating[Any]], fixed: Geometry) -> sitk.Image:
    return make_image(vectors.astype(np.float32), fixed.file_grid(), fixed.source_dimension)
