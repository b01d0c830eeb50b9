"""Where the matched ROIs lie, and how well a field carries the moving ones onto the fixed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.algorithms import metrics, warp

if TYPE_CHECKING:  # loads torch
    from pipeline.algorithms.fit_problem import Roi, RoiPair

Mask = npt.NDArray[np.bool_]
Triple = tuple[float, float, float]
Bounds = tuple[warp.Array, warp.Array]
NEAR = 2.0  # shortest voxel edges
_BLOCK = 16  # rows and columns of a piece of a plane that is looked at as one


def near_rois(rois: Sequence[Roi], shape: tuple[int, int, int], spacing: Triple) -> Mask:
    """Voxels of the ROIs and those within `NEAR` shortest in-plane voxel edges along each axis: bool [D, H, W]."""
    inside = np.zeros(shape, bool)
    for roi in rois:
        inside[_box(roi)] |= roi.mask
    size = [2 * int(NEAR * min(spacing[1:]) / step + 1e-6) + 1 for step in spacing]
    return np.asarray(ndimage.maximum_filter(inside, size))


def roi_dice(pairs: Sequence[RoiPair], indices: warp.Array) -> npt.NDArray[np.float64]:
    """Dice of each fixed ROI and its moving one as `carried_onto` it: [K], 0..1.

    Args:
        pairs: matched ROIs.
        indices: [3, D, H, W], where each fixed voxel falls in the moving grid, voxels (`warp.moving_indices`).
    """
    bounds = index_bounds(indices)
    return np.array([metrics.dice(*carried_onto(pair, indices, bounds)) for pair in pairs])


def carry(roi: Roi, indices: warp.Array, in_plane: bool) -> Mask:
    """Nearest-neighbour sample of a moving ROI at `indices` [3, D, H, W], moving voxels: bool [D, H, W].

    Args:
        in_plane: look up the ROI's only slice whatever the slice index is.
    """
    place = np.rint(indices - np.reshape(roi.offset, (3, 1, 1, 1))).astype(np.int64)
    if in_plane:
        place[0] = 0
    inside = ((place >= 0) & (place < np.reshape(roi.mask.shape, (3, 1, 1, 1)))).all(axis=0)
    found = np.zeros(inside.shape, bool)
    found[inside] = roi.mask[tuple(place[:, inside])]
    return found


def index_bounds(indices: warp.Array) -> Bounds:
    """Smallest and largest index of each block of a plane: [3, D, h, w] each."""
    bounds = []
    for function in (np.minimum, np.maximum):
        found = indices
        for axis in (2, 3):
            found = function.reduceat(found, np.arange(0, indices.shape[axis], _BLOCK), axis=axis)
        bounds.append(found)
    return bounds[0], bounds[1]


def carried_onto(pair: RoiPair, indices: warp.Array, bounds: Bounds) -> tuple[Mask, Mask]:
    """The fixed ROI and its moving one, carried by nearest neighbour, in a box of the fixed grid that holds both.

    Two slabs are compared in plane: the box is of the fixed slice.

    Args:
        indices: as in `roi_dice`. bounds: its `index_bounds`.
    """
    slabs = pair.fixed.mask.shape[0] == 1 and pair.moving.mask.shape[0] == 1
    box = _box(pair.fixed)
    start, stop = np.array([s.start for s in box]), np.array([s.stop for s in box])
    piece = (1, _BLOCK, _BLOCK)
    blocks = np.argwhere(_may_reach(pair.moving, *bounds, box[0] if slabs else slice(None), slabs))
    if len(blocks):
        corner = blocks * piece + (box[0].start if slabs else 0, 0, 0)
        start = np.minimum(start, corner.min(0))
        stop = np.maximum(stop, np.minimum(corner.max(0) + np.array(piece), indices.shape[1:]))
    around = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    here = np.zeros(stop - start, bool)
    here[tuple(slice(s.start - a, s.stop - a) for s, a in zip(box, start, strict=True))] = pair.fixed.mask
    return here, carry(pair.moving, indices[(slice(None), *around)], in_plane=slabs)


def _may_reach(roi: Roi, low: warp.Array, high: warp.Array, planes: slice, in_plane: bool) -> Mask:
    """Blocks of the fixed grid some of whose voxels may fall into the bounding box of a moving ROI."""
    reach = np.ones(low[0, planes].shape, bool)
    for axis in range(int(in_plane), 3):
        first = roi.offset[axis] - 0.5
        reach &= (high[axis, planes] >= first) & (low[axis, planes] <= first + roi.mask.shape[axis])
    return reach


def _box(roi: Roi) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(roi.offset, roi.mask.shape, strict=True))
