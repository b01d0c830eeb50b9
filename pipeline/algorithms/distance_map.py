# mypy: disable-error-code="no-untyped-def"
"""Exact Euclidean distance maps of masks, as fast as a fit needs them.

One axis after the other (Saito and Toriwaki, Pattern Recognition 27, 1994), in millimetres, whole rows at a time and no
further than the distance found: SciPy and SimpleITK take ten times as long for ROIs of common sizes, which at many of
them was most of a fit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.compiled import compiled

_NONE = np.float32(1e30)  # squared distance where a line meets no voxel of the mask


def signed_distance(
    mask: npt.NDArray[np.bool_], spacing_mm: tuple[float, float, float], margin: tuple[int, int, int]
) -> npt.NDArray[np.float32]:
    """Signed distance in mm (positive inside, zero on the voxel edges) of a mask padded by `margin` voxels.

    Of a mask of one slice it is the distance in plane.
    """
    flat = mask.shape[0] == 1
    half = np.float32(0.5 * min(spacing_mm[1:] if flat else spacing_mm))
    found: npt.NDArray[np.float32] = _signed(np.ascontiguousarray(mask), np.array(spacing_mm, np.float32), margin, half)
    return found


@compiled
def _signed(mask, steps, margin, half):
    depth, height, width = mask.shape
    z, y, x = margin
    padded = np.zeros((depth + 2 * z, height + 2 * y, width + 2 * x), np.bool_)
    padded[z : z + depth, y : y + height, x : x + width] = mask
    found = half - _distance(padded, steps)
    edge = 1 if depth > 1 else 0  # beyond it all is outside; of one slice, in plane only
    hollow = np.ones((depth + 2 * edge, height + 2, width + 2), np.bool_)
    hollow[edge : edge + depth, 1 : 1 + height, 1 : 1 + width] = ~mask
    inside = _distance(hollow, steps)
    for k in range(depth):
        for j in range(height):
            for i in range(width):
                if mask[k, j, i]:
                    found[k + z, j + y, i + x] = inside[k + edge, j + 1, i + 1] - half
    return found


@compiled
def _distance(mask, steps):
    """Distance [D, H, W] of every voxel to the nearest one of the mask, which holds some."""
    nz, ny, nx = mask.shape
    planes, rows = np.zeros(nz, np.bool_), np.zeros(ny, np.bool_)
    for k in range(nz):
        for j in range(ny):
            held = mask[k, j].any()
            planes[k] |= held
            rows[j] |= held
    first = np.argmax(planes)
    planes = planes[first : nz - np.argmax(planes[::-1])].copy()
    h = len(planes)
    in_row, in_plane = np.empty((ny, h, nx), np.float32), np.empty((ny, h, nx), np.float32)
    for k in range(h):
        for j in range(ny):
            _along_row(mask[first + k, j], steps[2], in_row[j, k])
    _spread(in_row.reshape(ny, h * nx), rows, 0, steps[1], in_plane.reshape(ny, h * nx))
    slices = np.empty((h, ny, nx), np.float32)
    for k in range(h):
        for j in range(ny):
            slices[k, j] = in_plane[j, k]
    found = np.empty((nz, ny, nx), np.float32)
    _spread(slices.reshape(h, ny * nx), planes, first, steps[0], found.reshape(nz, ny * nx))
    flat = found.reshape(-1)
    for i in range(len(flat)):
        flat[i] = np.sqrt(flat[i])
    return found


@compiled
def _along_row(mask, step, found):
    """Squared distance of each voxel of a row to the nearest one of the mask in the row."""
    away = _NONE
    for i in range(len(mask)):
        away = np.float32(0) if mask[i] else away + step
        found[i] = away
    away = _NONE
    for i in range(len(mask) - 1, -1, -1):
        away = np.float32(0) if mask[i] else away + step
        nearest = min(found[i], away)
        found[i] = nearest * nearest if nearest < _NONE else _NONE


@compiled
def _spread(source, held, first, step, found):
    """found[p] = min over q of source[q] + (step (p - first - q))^2 for every row p, element by element.

    source: [n, m]; those rows count that are `held`, [n].
    """
    n, last = len(found), len(source) - 1
    for p in range(n):
        nearest = n
        for q in range(last + 1):
            if held[q]:
                nearest = min(nearest, abs(first + q - p))
        found[p] = _NONE
        for d in range(nearest, n):
            added = np.float32((step * d) ** 2)
            below, above = p - first - d, p - first + d
            if (below < 0 and above > last) or ((d - nearest) % 2 and not _exceeds(found[p], added)):
                break
            if 0 <= below <= last and held[below]:
                _lower(found[p], source[below], added)
            if d and 0 <= above <= last and held[above]:
                _lower(found[p], source[above], added)


@compiled
def _lower(values, others, added):
    """values = min(values, others + added); np.minimum, because min is not vectorised."""
    for i in range(len(values)):
        values[i] = np.minimum(values[i], others[i] + added)


@compiled
def _exceeds(values, limit):
    """Whether any is above a limit: counted, because a search is not vectorised."""
    count = 0
    for i in range(len(values)):
        count += values[i] > limit
    return count > 0
