# mypy: disable-error-code="no-untyped-def"
"""The loops of the fit for processors, each what the torch code beside its caller computes on other devices.

Fused, they keep no arrays between their steps. Arrays are C-contiguous float32, indices int64; the first axis of fields
is the fit. Sums go in the same order whatever else is in a batch.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.algorithms.compiled import compiled


@compiled
def _between(position, last):
    """The node below a position that is clamped to 0..last, the node above, and the share of the latter."""
    position = min(max(position, np.float32(0)), np.float32(last))
    low = min(int(position), max(last - 1, 0))
    return low, min(low + 1, last), position - np.float32(low)


@compiled
def _linear(grid, k, up, fz, j, down, fy, i, right, fx):
    """Linear interpolation of a grid [nz, ny, nx] between two nodes along each axis."""
    a = grid[k, j, i] + fx * (grid[k, j, right] - grid[k, j, i])
    b = grid[k, down, i] + fx * (grid[k, down, right] - grid[k, down, i])
    a += fy * (b - a)
    if up == k:
        return a
    c = grid[up, j, i] + fx * (grid[up, j, right] - grid[up, j, i])
    d = grid[up, down, i] + fx * (grid[up, down, right] - grid[up, down, i])
    c += fy * (d - c)
    return a + fz * (c - a)


@compiled
def carry(x, fit, matrix, values, step):
    """A x + u(x) of points [P, 3] mm of the fits [P]: [P, 3] mm; matrix [B, 4, 4], values [B, 3, ...], step [B, 3]."""
    y = np.empty_like(x)
    _, _, nz, ny, nx = values.shape
    for p in range(len(x)):
        b = fit[p]
        k, up, fz = _between(x[p, 0] / step[b, 0], nz - 1)
        j, down, fy = _between(x[p, 1] / step[b, 1], ny - 1)
        i, right, fx = _between(x[p, 2] / step[b, 2], nx - 1)
        for c in range(3):
            m = matrix[b, c]
            shift = _linear(values[b, c], k, up, fz, j, down, fy, i, right, fx)
            y[p, c] = m[0] * x[p, 0] + m[1] * x[p, 1] + m[2] * x[p, 2] + m[3] + shift
    return y


@compiled
def centre(mask):
    """Mean index [3] of the voxels of a mask [d, h, w], and their number."""
    total, count = np.zeros(3), 0
    depth, height, width = mask.shape
    for k in range(depth):
        for j in range(height):
            for i in range(width):
                if mask[k, j, i]:
                    total[0] += k
                    total[1] += j
                    total[2] += i
                    count += 1
    return total / count, count


@compiled
def near(distance, corner, spacing, stride, reach, most):
    """Voxels of a map [d, h, w] within a reach of zero, on every `stride`-th row and column; fewer if above `most`.

    corner: [3] index of the first voxel. spacing: [3] mm. Returns positions [P, 3] mm, values [P] and the stride taken.
    """
    count = _count_near(distance, stride, reach)
    if count > most:
        stride *= int(np.ceil(np.sqrt(count / most)))
        count = _count_near(distance, stride, reach)
    x, value = np.empty((count, 3), np.float32), np.empty(count, np.float32)
    depth, height, width = distance.shape
    p = 0
    for k in range(depth):
        for j in range(0, height, stride):
            for i in range(0, width, stride):
                if abs(distance[k, j, i]) < reach:
                    x[p, 0] = (k + corner[0]) * spacing[0]
                    x[p, 1] = (j + corner[1]) * spacing[1]
                    x[p, 2] = (i + corner[2]) * spacing[2]
                    value[p] = distance[k, j, i]
                    p += 1
    return x, value, stride


@compiled
def _count_near(distance, stride, reach):
    depth, height, width = distance.shape
    count = 0
    for k in range(depth):
        for j in range(0, height, stride):
            row = distance[k, j]
            for i in range(0, width, stride):
                count += abs(row[i]) < reach
    return count


@compiled
def unlike(place, index, fixed, corner, moving, origin, band, reach):
    """Points where a moved ROI may differ from the fixed one, `band` mm from the fixed boundary or more.

    place, index: [P, 3] fixed voxels and where they fall in the moving grid. fixed, moving: maps [d, h, w] from
    `corner` and `origin` on; beyond them nothing of a ROI is near, and of a ROI of one slice no other is known. reach:
    mm from the moved boundary that count, too.
    Returns which [S], and their distance to the fixed ROI, -inf where its map ends.
    """
    chosen, distance = np.empty(len(place), np.int64), np.empty(len(place), np.float32)
    count = 0
    for p in range(len(place)):
        if len(fixed) == 1 and place[p, 0] != corner[0]:
            continue
        here = _looked_up(fixed, place[p, 0] - corner[0], place[p, 1] - corner[1], place[p, 2] - corner[2])
        if abs(here) < band:
            continue
        k = int(np.rint(index[p, 0] - origin[0]))
        j = int(np.rint(index[p, 1] - origin[1]))
        i = int(np.rint(index[p, 2] - origin[2]))
        there = _looked_up(moving, k, j, i)
        if (here < 0 and there > -reach) or (here > 0 and there < reach):
            chosen[count], distance[count] = p, here
            count += 1
    return chosen[:count].copy(), distance[:count].copy()


@compiled
def _looked_up(distance, k, j, i):
    """A map's value, -inf outside it."""
    depth, height, width = distance.shape
    inside = 0 <= k < depth and 0 <= j < height and 0 <= i < width
    return distance[k, j, i] if inside else np.float32(-np.inf)


@compiled
def affine_votes(basis, residual, slope, weight, fit, fits):
    """Normal matrix and gradient of the 12 entries of each fit's affine, row by row: [fits, 12, 13].

    basis: [P, 4] what the entries of a row multiply. residual: [P] mm. slope: [P, 3] its change per mm of y.
    """
    found = np.zeros((fits, 12, 13), np.float32)
    row = np.empty(13, np.float32)
    for p in range(len(residual)):
        for c in range(3):
            for a in range(4):
                row[4 * c + a] = slope[p, c] * basis[p, a]
        row[12] = residual[p]
        for c in range(12):
            factor = weight[p] * row[c]
            for a in range(c, 13):
                found[fit[p], c, a] += factor * row[a]
    for b in range(fits):
        for c in range(12):
            for a in range(c):
                found[b, c, a] = found[b, a, c]
    return found


@compiled
def sample(y, roi, fit, to_index, maps, base, dims, origin):
    """The map of each point's ROI at y [P, 3] mm, linear, and its gradient per mm: [P], [P, 3].

    maps are flat; base [K], dims and origin [K, 3] say where each lies; to_index [B, 3, 4] turns mm into indices.
    """
    value, gradient = np.empty(len(y), np.float32), np.empty_like(y)
    for p in range(len(y)):
        r, t = roi[p], to_index[fit[p]]
        nz, ny, nx = dims[r, 0], dims[r, 1], dims[r, 2]
        z, yy, xx = y[p, 0], y[p, 1], y[p, 2]
        k, up, fz = _between(t[0, 0] * z + t[0, 1] * yy + t[0, 2] * xx + t[0, 3] - origin[r, 0], nz - 1)
        j, down, fy = _between(t[1, 0] * z + t[1, 1] * yy + t[1, 2] * xx + t[1, 3] - origin[r, 1], ny - 1)
        i, right, fx = _between(t[2, 0] * z + t[2, 1] * yy + t[2, 2] * xx + t[2, 3] - origin[r, 2], nx - 1)
        row, high = base[r] + (k * ny + j) * nx, base[r] + (up * ny + j) * nx
        jump = (down - j) * nx
        a, b = maps[row + i], maps[row + right]
        c, d = maps[row + jump + i], maps[row + jump + right]
        top, bottom = a + fx * (b - a), c + fx * (d - c)
        plane, slope_y, slope_x = top + fy * (bottom - top), bottom - top, (b - a) + fy * (d - c - b + a)
        slope_z = np.float32(0)
        if nz > 1:
            a, b = maps[high + i], maps[high + right]
            c, d = maps[high + jump + i], maps[high + jump + right]
            top, bottom = a + fx * (b - a), c + fx * (d - c)
            slope_z = top + fy * (bottom - top) - plane
            plane += fz * slope_z
            slope_y += fz * (bottom - top - slope_y)
            slope_x += fz * ((b - a) + fy * (d - c - b + a) - slope_x)
        value[p] = plane
        for axis in range(3):
            gradient[p, axis] = slope_z * t[0, axis] + slope_y * t[1, axis] + slope_x * t[2, axis]
    return value, gradient


@compiled
def votes(x, y, distance, slope, fixed, tau, weight, anchor, centre_z, fit, matrix, step, nz, ny, nx, parts):
    """Gradient and curvature of half the points' weighted squared residuals, each summed at the point's nearest node.

    x, y, distance, slope: see `carry` and `sample`. fixed: [P] distance to the fixed boundary. tau: [P]. weight: [P].
    anchor, centre_z: [P] weight and height of the pull of slabs to their slice. Lengths in mm.
    Returns [B, 9, nz, ny, nx]: the gradient z, y, x and the curvature zz, zy, zx, yy, yx, xx; of two `parts`, the
    displacements along y and x alone, [B, 5, nz, ny, nx].
    """
    one, four = np.float32(1), np.float32(4)
    found = np.zeros((len(matrix), 9 if parts == 3 else 5, nz, ny, nx), np.float32)
    for p in range(len(y)):
        b, w, pull = fit[p], weight[p], anchor[p]
        m = matrix[b]
        moved = one / (one + math.exp(-distance[p] / tau[p]))
        goal = one / (one + math.exp(-fixed[p] / tau[p]))
        residual = w * four * tau[p] * (moved - goal)
        factor = four * moved * (one - moved)
        gz, gy, gx = factor * slope[p, 0], factor * slope[p, 1], factor * slope[p, 2]
        sz = gz * m[0, 0] + gy * m[1, 0] + gx * m[2, 0]
        sy = gz * m[0, 1] + gy * m[1, 1] + gx * m[2, 1]
        sx = gz * m[0, 2] + gy * m[1, 2] + gx * m[2, 2]
        az, ay, ax = pull * m[0, 0], pull * m[0, 1], pull * m[0, 2]
        offset = y[p, 0] - centre_z[p]
        k = int(min(max(np.rint(x[p, 0] / step[b, 0]), 0), nz - 1))
        j = int(min(max(np.rint(x[p, 1] / step[b, 1]), 0), ny - 1))
        i = int(min(max(np.rint(x[p, 2] / step[b, 2]), 0), nx - 1))
        if parts == 2:
            found[b, 0, k, j, i] += sy * residual + ay * offset
            found[b, 1, k, j, i] += sx * residual + ax * offset
            found[b, 2, k, j, i] += w * sy * sy + ay * m[0, 1]
            found[b, 3, k, j, i] += w * sy * sx + ay * m[0, 2]
            found[b, 4, k, j, i] += w * sx * sx + ax * m[0, 2]
            continue
        found[b, 0, k, j, i] += sz * residual + az * offset
        found[b, 1, k, j, i] += sy * residual + ay * offset
        found[b, 2, k, j, i] += sx * residual + ax * offset
        found[b, 3, k, j, i] += w * sz * sz + az * m[0, 0]
        found[b, 4, k, j, i] += w * sz * sy + az * m[0, 1]
        found[b, 5, k, j, i] += w * sz * sx + az * m[0, 2]
        found[b, 6, k, j, i] += w * sy * sy + ay * m[0, 1]
        found[b, 7, k, j, i] += w * sy * sx + ay * m[0, 2]
        found[b, 8, k, j, i] += w * sx * sx + ax * m[0, 2]
    return found


@compiled
def compose(values, delta, matrix, step):
    """u(x + delta) + A delta at the nodes: [B, 3, nz, ny, nx] mm."""
    moved = np.empty_like(values)
    fits, _, nz, ny, nx = values.shape
    for b in range(fits):
        m = matrix[b]
        for k0 in range(nz):
            for j0 in range(ny):
                for i0 in range(nx):
                    dz, dy, dx = delta[b, 0, k0, j0, i0], delta[b, 1, k0, j0, i0], delta[b, 2, k0, j0, i0]
                    k, up, fz = _between(np.float32(k0) + dz / step[b, 0], nz - 1)
                    j, down, fy = _between(np.float32(j0) + dy / step[b, 1], ny - 1)
                    i, right, fx = _between(np.float32(i0) + dx / step[b, 2], nx - 1)
                    for c in range(3):
                        shift = _linear(values[b, c], k, up, fz, j, down, fy, i, right, fx)
                        moved[b, c, k0, j0, i0] = shift + m[c, 0] * dz + m[c, 1] * dy + m[c, 2] * dx
    return moved


@compiled
def determinants(values, matrix, step):
    """Determinant of the derivative of A x + u(x) at the nodes (forward differences): [B, nz, ny, nx]."""
    fits, _, nz, ny, nx = values.shape
    found = np.empty((fits, nz, ny, nx), np.float32)
    for b in range(fits):
        m = matrix[b]
        rz, ry, rx = 1 / step[b, 0], 1 / step[b, 1], 1 / step[b, 2]
        v0, v1, v2 = values[b, 0], values[b, 1], values[b, 2]
        for k in range(nz):
            k0 = max(min(k, nz - 2), 0)
            k1 = min(k0 + 1, nz - 1)
            for j in range(ny):
                j0 = max(min(j, ny - 2), 0)
                j1 = min(j0 + 1, ny - 1)
                for i in range(nx):
                    i0 = max(min(i, nx - 2), 0)
                    i1 = min(i0 + 1, nx - 1)
                    a0, b0, c0 = m[0, 0], m[0, 1], m[0, 2]
                    a1, b1, c1 = m[1, 0], m[1, 1], m[1, 2]
                    a2, b2, c2 = m[2, 0], m[2, 1], m[2, 2]
                    a0 += (v0[k1, j, i] - v0[k0, j, i]) * rz
                    a1 += (v1[k1, j, i] - v1[k0, j, i]) * rz
                    a2 += (v2[k1, j, i] - v2[k0, j, i]) * rz
                    b0 += (v0[k, j1, i] - v0[k, j0, i]) * ry
                    b1 += (v1[k, j1, i] - v1[k, j0, i]) * ry
                    b2 += (v2[k, j1, i] - v2[k, j0, i]) * ry
                    c0 += (v0[k, j, i1] - v0[k, j, i0]) * rx
                    c1 += (v1[k, j, i1] - v1[k, j, i0]) * rx
                    c2 += (v2[k, j, i1] - v2[k, j, i0]) * rx
                    found[b, k, j, i] = a0 * (b1 * c2 - b2 * c1) - a1 * (b0 * c2 - b2 * c0) + a2 * (b0 * c1 - b1 * c0)
    return found
