"""The displacement-field convention of the whole project, and warping with it.

A DDF is a pull-back field on the fixed grid: float32 [3, D, H, W], millimetres along the fixed grid's own
(z, y, x) axes (pixels for images without spacing). With q the position of a fixed voxel in fixed-local
millimetres (index * spacing, origin at the centre of voxel 0),

    moved(q) = moving(q + u(q)),

so u = 0 is the identity in world space, whatever the two grids. The moving grid enters only through
`moving_to_fixed`, the 4x4 map from moving-local to fixed-local millimetres ((z, y, x) order, see
`storage.geometry`). Composition: following u by v is w(q) = u(q) + v(q + u(q)).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array: TypeAlias = npt.NDArray[np.float64]
Affine: TypeAlias = npt.NDArray[np.float64]


def grid_points(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Array:
    """Local positions of every voxel centre: float64 [3, D, H, W] in mm."""
    axes = [np.arange(n, dtype=np.float64) * s for n, s in zip(shape, spacing_mm, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def apply_affine(matrix: Affine, points: Array) -> Array:
    """Apply a 4x4 homogeneous map to points [..., 3]."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def affine_ddf(
    matrix: Affine, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> npt.NDArray[np.float32]:
    """The DDF of an affine map of fixed-frame positions: float32 [3, D, H, W] in mm."""
    points = grid_points(shape, spacing_mm)
    moved = np.einsum("ij,jzyx->izyx", matrix[:3, :3], points) + matrix[:3, 3, None, None, None]
    return np.asarray((moved - points), dtype=np.float32)


def moving_indices(
    ddf: npt.NDArray[np.floating],
    spacing_mm: tuple[float, float, float],
    moving_to_fixed: Affine,
    moving_spacing_mm: tuple[float, float, float],
) -> Array:
    """Where each fixed voxel falls in the moving grid: float64 [3, D, H, W], voxels (z, y, x)."""
    points = grid_points(ddf.shape[1:], spacing_mm) + ddf
    back = np.linalg.inv(moving_to_fixed)
    local = np.einsum("ij,jzyx->izyx", back[:3, :3], points) + back[:3, 3, None, None, None]
    return np.asarray(local / np.asarray(moving_spacing_mm)[:, None, None, None])


def warp_image(image: npt.NDArray[np.floating], indices: Array, fill: float = 0.0) -> npt.NDArray[np.float32]:
    """Linear resampling of moving [Dm, Hm, Wm] at `indices` [3, D, H, W]; `fill` outside."""
    sampled = ndimage.map_coordinates(
        image.astype(np.float32), _inside(indices, image.shape), order=1, mode="constant", cval=fill
    )
    return np.asarray(sampled, dtype=np.float32)


def warp_labels(labels: npt.NDArray[np.integer], indices: Array) -> npt.NDArray[np.int32]:
    """Nearest-neighbour resampling of an integer label map; 0 outside."""
    sampled = ndimage.map_coordinates(
        labels.astype(np.int32), _inside(indices, labels.shape), order=0, mode="constant", cval=0
    )
    return np.asarray(sampled, dtype=np.int32)


def _inside(indices: Array, shape: tuple[int, ...]) -> Array:
    """Let positions within half a voxel of the grid count as inside, as ITK does."""
    clamped = indices.copy()
    for axis, size in enumerate(shape):
        index = clamped[axis]
        edge = (index >= -0.5) & (index < size - 0.5)
        clamped[axis] = np.where(edge, np.clip(index, 0, size - 1), index)
    return clamped


def warp_points(points_mm: Array, ddf: npt.NDArray[np.floating], spacing_mm: tuple[float, float, float]) -> Array:
    """Map fixed-local points [N, 3] (mm) to fixed-frame moving positions [N, 3] (mm), linear in the DDF.

    Points outside the grid take the displacement of the nearest voxel.
    """
    index = (points_mm / np.asarray(spacing_mm)).T
    shift = [ndimage.map_coordinates(component, index, order=1, mode="nearest") for component in ddf]
    return np.asarray(points_mm + np.stack(shift, axis=1))


def compose(
    u: npt.NDArray[np.floating], v: npt.NDArray[np.floating], spacing_mm: tuple[float, float, float]
) -> npt.NDArray[np.float32]:
    """u followed by the update v, w(q) = v(q) + u(q + v(q)): float32 [3, D, H, W] mm; both on the same grid.

    Outside the grid u is that of the nearest voxel.
    """
    index = np.indices(u.shape[1:], dtype=np.float64) + v / np.asarray(spacing_mm)[:, None, None, None]
    carried = [ndimage.map_coordinates(component, index, order=1, mode="nearest") for component in u]
    return np.asarray(v + np.stack(carried), dtype=np.float32)
