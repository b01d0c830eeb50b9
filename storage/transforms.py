# mypy: disable-error-code="no-untyped-call"
"""Displacement fields as ITK transforms on the user's own files.

`sitk.Resample(moving, fixed, sitk.ReadTransform(path))` on the original files does what
pipeline/algorithms/warp.py does in memory: ITK transforms, like ours, take fixed to moving positions. Vectors
are mm LPS (x, y, z) on the fixed file's own grid; outside it ITK takes the displacement as zero. A 2D file
gives a 2D transform. Beside `<name>.h5` lies `<name>.json` with the signature, written last: a transform
without it is not finished.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from storage.atomic import replace_file
from storage.geometry import Geometry, from_file_axes, to_file_axes

HDF5_OVERHEAD = 1 << 16  # bytes


class TransformError(ValueError):
    """A transform file that cannot be read, or does not fit its image; says the file."""


def write_transform(
    path: str | Path,
    ddf: npt.NDArray[np.float32],
    geometry: Geometry,
    signature: dict[str, Any],
    moving: Geometry | None = None,
) -> None:
    """Write a displacement field, whole or not at all.

    Args:
        path: `.h5` file.
        ddf: [3, D, H, W] mm along the axes of the fixed image (px without spacing), pull-back.
        geometry: grid of the fixed image.
        signature: JSON-safe record of what the field depends on.
        moving: grid of the moving image; only needed for pictures without spacing whose files carry different
            printing resolutions, which ITK takes for a spacing.

    Raises:
        ValueError: for a suffix other than .h5, a field of another shape, or NaN or infinite displacements.
        OSError: naming the file, with the system's errno, for example when the disk is full.
    """
    target = Path(path)
    if target.suffix != ".h5":
        raise ValueError(f"{target}: transforms are written as .h5")
    transform = sitk.DisplacementFieldTransform(ddf_to_itk(ddf, geometry, moving))
    _sidecar(target).unlink(missing_ok=True)
    size = 8 * geometry.source_dimension * ddf[0].size + HDF5_OVERHEAD
    with replace_file(target) as temporary:
        _reserve(temporary, size)
        try:
            sitk.WriteTransform(transform, str(temporary))
        except RuntimeError as error:
            free = os.statvfs(target.parent)
            code = errno.ENOSPC if free.f_bavail * free.f_frsize < size else errno.EIO
            raise OSError(code, os.strerror(code), str(target)) from error
    with replace_file(_sidecar(target)) as temporary:
        temporary.write_text(json.dumps(signature, sort_keys=True, indent=1))


def read_transform(path: str | Path) -> sitk.DisplacementFieldTransform:
    """Read a transform written by write_transform.

    Raises:
        FileNotFoundError: when it does not exist.
        TransformError: when it is truncated, or not a displacement field.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such transform")
    try:
        return sitk.DisplacementFieldTransform(sitk.ReadTransform(str(path)))
    except RuntimeError:
        raise TransformError(f"{path}: not a displacement field, or a truncated or damaged one") from None


def transform_signature(path: str | Path) -> dict[str, Any] | None:
    """Signature of a finished transform, None when it is absent or unfinished."""
    if not Path(path).exists():
        return None
    try:
        signature: dict[str, Any] = json.loads(_sidecar(Path(path)).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return signature


def remove_transform(path: str | Path) -> None:
    """Delete a transform and its signature; one that does not exist is no error."""
    _sidecar(Path(path)).unlink(missing_ok=True)
    Path(path).unlink(missing_ok=True)


def ddf_to_itk(ddf: npt.NDArray[np.floating[Any]], geometry: Geometry, moving: Geometry | None = None) -> sitk.Image:
    """Vector image (float64, 2 or 3 components) of a [3, D, H, W] field; arguments as in write_transform."""
    if ddf.shape != (3, *geometry.shape):
        raise ValueError(f"field must be [3, {', '.join(map(str, geometry.shape))}], got {ddf.shape}")
    if not np.isfinite(ddf).all():
        raise ValueError("field holds NaN or infinite displacements")
    vectors = to_file_axes(np.moveaxis(np.asarray(ddf, dtype=np.float64), 0, -1), geometry)
    world = _local_vectors_to_world(vectors, geometry, moving)
    dimension, grid = geometry.source_dimension, geometry.file_grid()
    if dimension == 2:
        world = world[0, ..., :2]
    field = sitk.GetImageFromArray(np.ascontiguousarray(world), isVector=True)
    field.SetSpacing(grid.spacing[:dimension])
    field.SetOrigin(grid.origin[:dimension])
    matrix = np.asarray(grid.direction).reshape(3, 3)[:dimension, :dimension]
    field.SetDirection([float(v) for v in matrix.ravel()])
    return field


def itk_to_ddf(field: sitk.Image, geometry: Geometry, moving: Geometry | None = None) -> npt.NDArray[np.float32]:
    """Inverse of ddf_to_itk: float32 [3, D, H, W].

    Raises:
        TransformError: when the field lies on another grid than the fixed file's.
    """
    dimension, grid = geometry.source_dimension, geometry.file_grid()
    if field.GetSize() != grid.size[:dimension]:
        raise TransformError(f"field has size {field.GetSize()} (x, y, z), the image {grid.size[:dimension]}")
    if not np.allclose(
        [*field.GetSpacing(), *field.GetOrigin()], [*grid.spacing[:dimension], *grid.origin[:dimension]]
    ):
        raise TransformError("field lies elsewhere than the image: spacing or origin differ")
    world = sitk.GetArrayFromImage(field).astype(np.float64)
    if dimension == 2:
        world = np.pad(world, ((0, 0), (0, 0), (0, 1)))[None]
    vectors = from_file_axes(_world_vectors_to_local(world, geometry, moving), geometry)
    return np.ascontiguousarray(np.moveaxis(vectors, -1, 0), dtype=np.float32)


def _local_vectors_to_world(
    vectors: npt.NDArray[np.float64], geometry: Geometry, moving: Geometry | None
) -> npt.NDArray[np.float64]:
    """[z, y, x, (z, y, x)] on the file's grid to [z, y, x, (x, y, z)] world."""
    if geometry.has_spacing:
        return vectors @ geometry.local_to_world()[:3, :3].T
    here, there = _pitches(geometry, moving)
    return (vectors[..., ::-1] + _pixels(vectors.shape)) * there - _pixels(vectors.shape) * here


def _world_vectors_to_local(
    world: npt.NDArray[np.float64], geometry: Geometry, moving: Geometry | None
) -> npt.NDArray[np.float64]:
    if geometry.has_spacing:
        return world @ geometry.local_to_world()[:3, :3]
    here, there = _pitches(geometry, moving)
    return ((world + _pixels(world.shape) * here) / there - _pixels(world.shape))[..., ::-1]


def _pitches(fixed: Geometry, moving: Geometry | None) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(x, y, z) size that ITK gives a pixel of the fixed and of the moving file."""
    source = fixed if moving is None else moving
    return np.array(fixed.nominal_spacing[::-1]), np.array(source.nominal_spacing[::-1])


def _pixels(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Index (x, y, z) of every voxel, [z, y, x, 3]."""
    return np.moveaxis(np.indices(shape[:3], dtype=np.float64), 0, -1)[..., ::-1]


def _reserve(path: Path, size: int) -> None:
    """Make sure of the space before HDF5 needs it: it ends the process when a write of its own fails."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with path.open("wb") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve
                raise


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")
