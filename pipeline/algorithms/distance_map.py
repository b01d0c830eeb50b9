# mypy: disable-error-code="no-untyped-def"
"""Exact Euclidean distance maps of masks, as fast as a fit needs them.

One axis after the other (Saito and Toriwaki, Pattern Recognition 27, 1994), in millimetres: in volumes whole rows at a
time and no further than the distance found. SciPy and SimpleITK take ten times as long for ROIs of common sizes, which
at many of them was most of a fit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.compiled import compiled
from pipeline.algorithms.spacing import shortest_edge_mm

_NONE = np.float32(1e30)  # squared distance where a line meets no voxel of the mask
_BLOCK = 256


def signed_distance(
    mask: npt.NDArray[np.bool_], spacing_mm: tuple[float, float, float], margin: tuple[int, int, int]
) -> npt.NDArray[np.float32]:
    """Signed distance in mm (positive inside, zero on the voxel edges) of a mask padded by `margin` voxels.

    Of a mask of one slice it is the distance in plane.
    """
    half = np.float32(0.5 * shortest_edge_mm(mask.shape, spacing_mm))
    found: npt.NDArray[np.float32] = _signed(np.ascontiguousarray(mask), np.array(spacing_mm, np.float32), margin, half)
    return found


@compiled
def _signed(mask, steps, margin, half):
    depth, height, width = mask.shape
    z, y, x = margin
    found = _distance(mask, steps, margin)
    flat = found.reshape(-1)
    for i in range(len(flat)):
        flat[i] = half - np.sqrt(flat[i])
    edge = 1 if depth > 1 else 0  # beyond it all is outside; of one slice, in plane only
    hollow = np.ones((depth + 2 * edge, height + 2, width + 2), np.bool_)
    hollow[edge : edge + depth, 1 : 1 + height, 1 : 1 + width] = ~mask
    inside = _distance(hollow, steps, (0, 0, 0))
    for k in range(depth):
        for j in range(height):
            for i in range(width):
                if mask[k, j, i]:
                    found[k + z, j + y, i + x] = np.sqrt(inside[k + edge, j + 1, i + 1]) - half
    return found


@compiled
def _distance(mask, steps, margin):
    """Squared distance of every voxel to the nearest one of the mask, which holds some: [d + 2 z, h + 2 y, w + 2 x]."""
    depth, height, width = mask.shape
    nz, ny, nx = depth + 2 * margin[0], height + 2 * margin[1], width + 2 * margin[2]
    planes, rows = np.zeros(depth, np.bool_), np.zeros(height, np.bool_)
    in_row, in_plane = np.empty((height, depth, nx), np.float32), np.empty((ny, depth, nx), np.float32)
    for k in range(depth):
        for j in range(height):
            held = _along_row(mask[k, j], margin[2], steps[2], in_row[j, k])
            planes[k] |= held
            rows[j] |= held
    if nz == 1:
        _envelopes(in_row.reshape(height, nx), margin[1], steps[1], in_plane.reshape(ny, nx))
        return in_plane.reshape(1, ny, nx)
    _spread(in_row.reshape(height, depth * nx), rows, margin[1], steps[1], in_plane.reshape(ny, depth * nx))
    slices = np.empty((depth, ny, nx), np.float32)
    for k in range(depth):
        for j in range(ny):
            for i in range(nx):
                slices[k, j, i] = in_plane[j, k, i]
    found = np.empty((nz, ny, nx), np.float32)
    _spread(slices.reshape(depth, ny * nx), planes, margin[0], steps[0], found.reshape(nz, ny * nx))
    return found


@compiled
def _along_row(mask, margin, step, found):
    """Squared distance of each voxel of a row to the nearest one of the mask in the row; whether that holds any."""
    first, last = 0, len(mask) - 1
    while first <= last and not mask[first]:
        first += 1
    if first > last:
        found[:] = _NONE
        return False
    while not mask[last]:
        last -= 1
    first, last = margin + first, margin + last
    for i in range(first):
        found[i] = (step * np.float32(first - i)) ** 2
    for i in range(last + 1, len(found)):
        found[i] = (step * np.float32(i - last)) ** 2
    away = 0
    for i in range(first, last + 1):
        away = 0 if mask[i - margin] else away + 1
        found[i] = away
    away = 0
    for i in range(last, first - 1, -1):
        away = 0 if mask[i - margin] else away + 1
        found[i] = (step * min(np.float32(away), found[i])) ** 2
    return True


@compiled
def _envelopes(source, first, step, found):
    """What `_spread` finds, by the lower envelope of the parabolas of each column: sooner where distances are long.

    After Felzenszwalb and Huttenlocher, Theory of Computing 8, 2012.
    """
    n, m = found.shape
    lowest, height, start = np.empty(len(source)), np.empty(len(source)), np.empty(len(source))
    for i in range(m):
        count = 0
        for q in range(len(source)):
            if source[q, i] >= _NONE:
                continue
            place, begin = float(first + q), -np.inf
            value = source[q, i] / np.float64(step * step)
            while count:
                k = count - 1
                begin = (value - height[k]) / (place - lowest[k]) + (place + lowest[k])
                if begin > start[k]:
                    break
                count, begin = k, -np.inf
            lowest[count], height[count], start[count] = place, value, begin
            count += 1
        k = 0
        for p in range(n):
            while k + 1 < count and start[k + 1] < 2 * p:
                k += 1
            found[p, i] = step * step * ((p - lowest[k]) ** 2 + height[k])


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
    """Whether any is above a limit: counted by blocks, because a search is not vectorised."""
    for start in range(0, len(values), _BLOCK):
        count = 0
        for i in range(start, min(start + _BLOCK, len(values))):
            count += values[i] > limit
        if count:
            return True
    return False
