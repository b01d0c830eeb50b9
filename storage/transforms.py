"""Transforms on disk, which ITK tools apply to the user's own files.

A transform takes positions of the fixed file to positions of the moving one, as ITK's do and as
pipeline/algorithms/warp.py does in memory, so `sitk.Resample(moving, fixed, sitk.ReadTransform(path))` warps the
original files. The field is held as it was fitted, by its affine part and by vectors at the nodes of a lattice
that may be coarser than the image: T(X) = A (X + v(X)), with v linear between the nodes. That is what ITK computes
for a composite of an affine and a displacement field, so nothing is lost by the saving in space. Beyond the lattice
ITK takes v as zero, and `Transform.at` as at the nearest border, which is continuous.

Positions are world mm LPS (x, y, z); for pictures without spacing the pixel size that ITK reads from the file
counts. A 2D file gives a 2D transform. The signature lies in the same file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from storage.atomic import replace_file
from storage.geometry import Affine, Geometry, Triple
from storage.itk_hdf5 import decode, encode, signature_of
from storage.places import ObjectStoreError, exists, place

Array = npt.NDArray[np.float64]

ROUNDING = 2.0**-10  # of the smallest voxel edge, which is taken down to a power of two
_SAME_PLACE = 1e-3  # of a voxel edge


class TransformError(ValueError):
    """A transform file that cannot be read, or does not fit its image; says the file."""


@dataclass(frozen=True)
class Transform:
    """T(X) = A (X + v(X)) of world positions, n = 2 or 3 coordinates.

    Attributes:
        affine: float64 [n + 1, n + 1], A.
        vectors: float32 [(nz,) ny, nx, n], mm (x, y, z): v at the nodes.
        origin: [n], position of the first node.
        spacing: [n], mm between nodes along the lattice's x, y, z axis.
        direction: [n, n]; its columns are the world directions of these axes.
    """

    affine: Affine
    vectors: npt.NDArray[np.float32]
    origin: Array
    spacing: Array
    direction: Array

    def at(self, points: Array) -> Array:
        """Moving positions float64 [N, n] of fixed positions [N, n], both mm (x, y, z)."""
        index = (np.linalg.solve(self.direction, (points - self.origin).T).T / self.spacing)[:, ::-1].T
        shift = [ndimage.map_coordinates(v, index, order=1, mode="nearest") for v in np.moveaxis(self.vectors, -1, 0)]
        moved: Array = (points + np.stack(shift, axis=1)) @ self.affine[:-1, :-1].T + self.affine[:-1, -1]
        return moved

    def nodes(self) -> Array:
        """Positions of the nodes, float64 [(nz,) ny, nx, n] mm (x, y, z)."""
        index = np.moveaxis(np.indices(self.vectors.shape[:-1], dtype=np.float64), 0, -1)[..., ::-1]
        positions: Array = (index * self.spacing) @ self.direction.T + self.origin
        return positions

    def dense(self, geometry: Geometry) -> Transform:
        """The same with a node on every voxel of the fixed image, in analysis orientation.

        Raises:
            TransformError: when the lattice does not start on the first voxel of the image and cover it.
        """
        origin, edges, direction = _placed(geometry)
        n = len(self.origin)
        steps = self.spacing / edges[:n]  # voxels between nodes
        reach = steps * (np.array(self.vectors.shape[-2::-1]) - 1)
        if n != geometry.source_dimension or (reach < np.array(geometry.shape[::-1])[:n] - 1 - _SAME_PLACE).any():
            raise TransformError(f"the transform does not cover an image of {geometry.describe()}")
        offset = np.abs(self.origin - origin[:n]).max() / edges[:n].min()
        if offset > _SAME_PLACE or not np.allclose(self.direction, direction[:n, :n], atol=_SAME_PLACE):
            raise TransformError("the transform lies elsewhere than the image: origin or direction differ")
        dense = self.vectors.astype(np.float64)
        for axis, (step, voxels) in enumerate(zip(steps[::-1], geometry.shape[3 - n :], strict=True)):
            position = np.arange(voxels) / step
            weights = np.clip(1 - np.abs(position[:, None] - np.arange(dense.shape[axis])), 0, None)
            dense = np.moveaxis(np.tensordot(weights, dense, axes=(1, axis)), 0, axis)
        return replace(self, vectors=dense.astype(np.float32), spacing=edges[:n])


def make_transform(
    affine: Affine,
    values: npt.NDArray[np.floating[Any]],
    step_mm: Triple,
    geometry: Geometry,
    moving: Geometry | None = None,
) -> Transform:
    """The transform of a fitted field q -> affine q + u(q) in local mm (px without spacing), rounded.

    Args:
        affine: 4x4, fixed-local to fixed-frame moving positions.
        values: [3, nz, ny, nx], u at the nodes of a lattice whose first lies on voxel 0 and that covers the image.
        step_mm: distance of the nodes (z, y, x).
        geometry: grid of the fixed image.
        moving: grid of the moving image; only needed for pictures without spacing whose files carry different
            printing resolutions, which ITK takes for a spacing.

    Raises:
        ValueError: for a lattice that does not cover the image, NaN or infinite values, a singular affine part.
    """
    if values.ndim != 4 or len(values) != 3:
        raise ValueError(f"lattice must be [3, nz, ny, nx], got {values.shape}")
    reach = (np.array(values.shape[1:]) - 1) * step_mm - (np.array(geometry.shape) - 1) * geometry.spacing_mm
    if (reach < -_SAME_PLACE * np.array(geometry.spacing_mm)).any():
        raise ValueError(f"a lattice of {values.shape[1:]} nodes, {step_mm} apart, covers no {geometry.describe()}")
    if not (np.isfinite(values).all() and np.isfinite(affine).all()):
        raise ValueError("field holds NaN or infinite displacements")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ValueError("the affine part of the field is singular")
    here, there = _frames(geometry, moving)
    world = there @ affine @ np.linalg.inv(here)
    vectors = np.moveaxis(values, 0, -1) @ np.linalg.solve(world[:3, :3], there[:3, :3]).T
    origin, edges, direction = _placed(geometry)
    spacing = edges * (np.array(step_mm) / geometry.spacing_mm)[::-1]
    n = geometry.source_dimension
    quantum = 2.0 ** np.floor(np.log2(edges[:n].min())) * ROUNDING
    rounded = (np.rint(vectors / quantum) * quantum).astype(np.float32) + np.float32(0)
    if n == 2:
        rounded, world = rounded[0, ..., :2], world[np.ix_([0, 1, 3], [0, 1, 3])]
    return Transform(world, np.ascontiguousarray(rounded), origin[:n], spacing[:n], direction[:n, :n])


def to_itk(points: Array, geometry: Geometry) -> Array:
    """Local positions [N, 3] (z, y, x) of an image as ITK gives them for its file, [N, n] (x, y, z)."""
    matrix, _ = _frames(geometry, None)
    positions: Array = (points @ matrix[:3, :3].T + matrix[:3, 3])[:, : geometry.source_dimension]
    return positions


def from_itk(points: Array, geometry: Geometry) -> Array:
    """Inverse of to_itk."""
    matrix, _ = _frames(geometry, None)
    world = np.pad(points, ((0, 0), (0, 3 - points.shape[1])))
    local: Array = (world - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
    return local


def stored_field(
    transform: Transform, geometry: Geometry, moving: Geometry | None = None
) -> tuple[Affine, Array, Triple]:
    """What make_transform was given, as it is after rounding: affine, values [3, nz, ny, nx] and step_mm."""
    vectors, affine = transform.vectors.astype(np.float64), _homogeneous(transform)
    if len(transform.origin) == 2:
        vectors = np.pad(vectors, ((0, 0), (0, 0), (0, 1)))[None]
    here, there = _frames(geometry, moving)
    back = np.linalg.solve(there, affine)
    steps = np.ones(3)
    steps[: len(transform.spacing)] = transform.spacing / _placed(geometry)[1][: len(transform.spacing)]
    z, y, x = (float(step) for step in steps[::-1] * geometry.spacing_mm)
    return back @ here, np.ascontiguousarray(np.moveaxis(vectors @ back[:3, :3].T, -1, 0)), (z, y, x)


def make_ddf(transform: Transform, geometry: Geometry, moving: Geometry | None = None) -> npt.NDArray[np.float32]:
    """The field of `pipeline.algorithms.warp`, float32 [3, D, H, W] mm; arguments as in make_transform.

    Raises:
        TransformError: when the transform is that of another grid.
    """
    vectors, affine = transform.dense(geometry).vectors, _homogeneous(transform)
    if geometry.source_dimension == 2:
        vectors = np.pad(vectors[None], ((0, 0), (0, 0), (0, 0), (0, 1)))
    here, there = _frames(geometry, moving)
    back = np.linalg.solve(there, affine)
    local = back @ here - np.eye(4)
    points = np.moveaxis(np.indices(geometry.shape, dtype=np.float64), 0, -1) * geometry.spacing_mm
    ddf = vectors @ back[:3, :3].T + points @ local[:3, :3].T + local[:3, 3]
    return np.ascontiguousarray(np.moveaxis(ddf, -1, 0), dtype=np.float32)


def write_transform(
    path: str | Path,
    affine: Affine,
    values: npt.NDArray[np.floating[Any]],
    step_mm: Triple,
    geometry: Geometry,
    signature: dict[str, Any],
    moving: Geometry | None = None,
) -> None:
    """Write the transform of a fitted field (arguments as in make_transform), whole or not at all.

    Args:
        path: `.h5` file.
        signature: JSON-safe record of what the field depends on.

    Raises:
        ValueError: for a suffix other than .h5, and as make_transform.
        OSError: naming the file, with the system's errno, for example when the disk is full.
    """
    target = place(path)
    if target.suffix != ".h5":
        raise ValueError(f"{target}: transforms are written as .h5")
    content = encode(make_transform(affine, values, step_mm, geometry, moving), signature)
    with replace_file(target) as temporary:
        temporary.write_bytes(content)


def read_transform(path: str | Path) -> Transform:
    """Read a transform written by write_transform.

    Raises:
        FileNotFoundError: when it does not exist.
        TransformError: when it is truncated, or was not written by write_transform.
    """
    if not exists(place(path)):
        raise FileNotFoundError(f"{path}: no such transform")
    try:
        return Transform(*decode(path))
    except (PermissionError, ObjectStoreError):
        raise
    except (OSError, KeyError, ValueError):
        raise TransformError(f"{path}: not a transform that samreg wrote, or a truncated or damaged one") from None


def read_ddf(path: str | Path, geometry: Geometry, moving: Geometry | None = None) -> npt.NDArray[np.float32]:
    """The field of a transform file on the grid of its fixed image, as make_ddf.

    Raises:
        FileNotFoundError, TransformError: as read_transform; naming the file when it is that of another grid.
    """
    transform = read_transform(path)
    try:
        return make_ddf(transform, geometry, moving)
    except TransformError as error:
        raise TransformError(f"{path}: {error}") from None


def transform_signature(path: str | Path) -> dict[str, Any] | None:
    """Signature of a transform, None when there is none that is whole; the field is not read."""
    try:
        return signature_of(path)
    except (PermissionError, ObjectStoreError):
        raise
    except (OSError, KeyError):
        return None


def _homogeneous(transform: Transform) -> Affine:
    """The affine part as 4x4, also of a 2D transform."""
    affine = np.eye(4)
    kept = [*range(len(transform.origin)), 3]
    affine[np.ix_(kept, kept)] = transform.affine
    return affine


def _placed(geometry: Geometry) -> tuple[Array, Array, Array]:
    """World origin [3], voxel edges [3] (x, y, z) and directions [3, 3] of an image as ITK reads its file."""
    here, _ = _frames(geometry, None)
    columns = here[:3, 2::-1]
    length = np.linalg.norm(columns, axis=0)
    return here[:3, 3], length * geometry.spacing_mm[::-1], columns / length


def _frames(geometry: Geometry, moving: Geometry | None) -> tuple[Affine, Affine]:
    """4x4 from fixed-frame local mm to world: for positions in the fixed and for those in the moving file."""
    if geometry.has_spacing:
        return geometry.local_to_world(), geometry.local_to_world()
    here, there = (np.array([*g.nominal_spacing, 1.0]) for g in (geometry, geometry if moving is None else moving))
    swap = np.eye(4)[[2, 1, 0, 3]]
    return swap @ np.diag(here), swap @ np.diag(there)
