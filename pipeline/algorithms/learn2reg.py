"""Measures as the evaluator of Learn2Reg and that of LUMIR define them, for comparison with their leader boards.

They differ from those of `pipeline.algorithms.metrics` in units and in what they leave out, so columns made of them
have names of their own. Fields are (I, J, K, 3), voxels, on the file's axes: fixed voxel x, moving voxel x + u(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Field = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]
_BORDER = 2
_RAISED = 3.0
_LEAST, _MOST = 1e-9, 1e9


def warp_labels(moving: Labels, field: Field) -> Labels:
    """The nearest moving label of every fixed voxel; 0 beyond the centres of the outermost moving voxels."""
    index = np.indices(field.shape[:3], dtype=np.float64) + np.moveaxis(field, -1, 0)
    return np.asarray(ndimage.map_coordinates(moving, index, order=0, mode="constant", cval=0))


def shared_labels(fixed: Labels, moving: Labels) -> list[int]:
    """Labels above 0 of both images; the evaluator leaves out the others, even where the moved image lost one."""
    return sorted((set(np.unique(fixed).tolist()) & set(np.unique(moving).tolist())) - {0})


def sdlogj(field: Field) -> float:
    """Standard deviation of log(det J + 3), which is the evaluator's, over all but the outer two voxels of each side.

    Central differences. NaN for a field of less than five voxels along an axis.
    """
    if min(field.shape[:3]) <= 2 * _BORDER:
        return float("nan")
    inner = (slice(_BORDER, -_BORDER),) * 3
    rows = np.stack([np.gradient(field.astype(np.float64), axis=axis)[inner] for axis in range(3)], axis=-1)
    return float(np.log(np.clip(np.linalg.det(rows + np.eye(3)) + _RAISED, _LEAST, _MOST)).std())


def ndv_percent(field: Field) -> float:
    """Non-diffeomorphic volume in percent of the grid, as LUMIR has it.

    Every voxel is the apex of ten tetrahedra of displaced neighbours, one in each octant and two across; half the
    volume of those turned inside out counts (Liu et al., On Finite Difference Jacobian Computation in Deformable Image
    Registration, IJCV 2024). Beyond the grid the displacement of the nearest voxel goes on.
    """
    padded = np.pad(field.astype(np.float64), ((1, 1), (1, 1), (1, 1), (0, 0)), mode="edge")
    size = field.shape[:3]
    here = padded[1:-1, 1:-1, 1:-1]

    def edge(*step: int) -> Field:
        """From each displaced voxel to the displaced neighbour so many voxels away."""
        there = padded[tuple(slice(1 + s, 1 + s + n) for s, n in zip(step, size, strict=True))]
        return np.asarray(there - here + step)

    along = {(axis, sign): edge(*(sign * (k == axis) for k in range(3))) for axis in range(3) for sign in (1, -1)}
    inverted = 0.0
    for signs in product((1, -1), repeat=3):
        edges = [signs[axis] * along[axis, signs[axis]] for axis in range(3)]
        inverted -= np.minimum(_determinant(edges), 0).sum()
    for sign, order in ((-1, ((1, 1, 0), (1, 0, 1), (0, 1, 1))), (1, ((1, 1, 0), (0, 1, 1), (1, 0, 1)))):
        edges = [edge(*(sign * s for s in step)) for step in order]
        inverted -= np.minimum(_determinant(edges), 0).sum()
    return float(100 * 0.5 * inverted / 6 / here[..., 0].size)


def landmark_errors(
    fixed: npt.NDArray[np.float64],
    moving: npt.NDArray[np.float64],
    field: Field,
    moving_spacing: Sequence[float],
) -> npt.NDArray[np.float64]:
    """Distance of each carried fixed landmark [N, 3] from the moving one, voxels both, in mm of the moving image.

    The field is interpolated by cubic splines and is 0 beyond the grid.
    """
    carried = fixed + np.stack([ndimage.map_coordinates(field[..., axis], fixed.T) for axis in range(3)], axis=1)
    return np.asarray(np.linalg.norm((carried - moving) * np.asarray(moving_spacing), axis=1))


def _determinant(edges: Sequence[Field]) -> Field:
    a, b, c = edges
    return np.asarray((a * np.cross(b, c)).sum(axis=-1))
