# mypy: disable-error-code="no-untyped-def"
"""The full Gauss-Newton system of the fit for processors, with banded splines: what `bspline.solve` is elsewhere."""

from __future__ import annotations

import numpy as np

from pipeline.algorithms.compiled import compiled

_REACH = 4  # control points that a cubic spline sees at a node


@compiled
def _bands(nodes, ratio, count, first, weight):
    """First control point of each node and the weights [nodes, 4] of those from there on; one where `count` is one."""
    for i in range(nodes):
        place = i * ratio
        first[i] = max(min(int(place), count - _REACH), 0)
        for a in range(_REACH):
            t = abs(place - np.float32(first[i] + a - 1))
            inner = np.float32(2) / 3 - t * t + t * t * t / 2
            outer = max(2 - t, np.float32(0)) ** 3 / 6
            weight[i, a] = inner if t < 1 else outer
        if count == 1:
            weight[i, 0] = 1


@compiled
def _is_shift(first, nodes):
    """Whether there is a control point on every node: rows are then computed without looking up where."""
    for i in range(nodes):
        if first[i] != i:
            return False
    return nodes > 1


@compiled
def _expand(d, firsts, weights, along_x, along_y, out):
    """Coefficients [c, cz, cy, cx] to values at the nodes, [c, nz, ny, nx] in `out`."""
    parts, cz, cy, cx = d.shape
    _, nz, ny, nx = out.shape
    shifted, v = _is_shift(firsts[2], nx), weights[2, 0]
    for c in range(parts):
        for k in range(cz):
            for j in range(cy):
                if shifted:
                    for i in range(nx):
                        total = v[0] * d[c, k, j, i] + v[1] * d[c, k, j, i + 1]
                        along_x[k, j, i] = total + v[2] * d[c, k, j, i + 2]
                    continue
                for i in range(nx):
                    total = np.float32(0)
                    for a in range(min(_REACH, cx)):
                        total += weights[2, i, a] * d[c, k, j, firsts[2, i] + a]
                    along_x[k, j, i] = total
            for j in range(ny):
                for i in range(nx):
                    along_y[k, j, i] = 0
                for a in range(min(_REACH, cy)):
                    w, other = weights[1, j, a], firsts[1, j] + a
                    for i in range(nx):
                        along_y[k, j, i] += w * along_x[k, other, i]
        for k in range(nz):
            for j in range(ny):
                for i in range(nx):
                    out[c, k, j, i] = 0
                for a in range(min(_REACH, cz)):
                    w, other = weights[0, k, a], firsts[0, k] + a
                    for i in range(nx):
                        out[c, k, j, i] += w * along_y[other, j, i]


@compiled
def _collect(values, firsts, weights, along_x, along_y, out):
    """The adjoint of `_expand`: values at the nodes [c, nz, ny, nx] to [c, cz, cy, cx] in `out`."""
    parts, cz, cy, cx = out.shape
    _, nz, ny, nx = values.shape
    shifted, v = _is_shift(firsts[2], nx), weights[2, 0]
    for c in range(parts):
        along_y.fill(0)
        along_x.fill(0)
        out[c].fill(0)
        for k in range(nz):
            for j in range(ny):
                for a in range(min(_REACH, cz)):
                    w, other = weights[0, k, a], firsts[0, k] + a
                    for i in range(nx):
                        along_y[other, j, i] += w * values[c, k, j, i]
        for k in range(cz):
            for j in range(ny):
                for a in range(min(_REACH, cy)):
                    w, other = weights[1, j, a], firsts[1, j] + a
                    for i in range(nx):
                        along_x[k, other, i] += w * along_y[k, j, i]
            for j in range(cy):
                if shifted:
                    for a in range(_REACH - 1):
                        for i in range(nx):
                            out[c, k, j, i + a] += v[a] * along_x[k, j, i]
                    continue
                for i in range(nx):
                    for a in range(min(_REACH, cx)):
                        out[c, k, j, firsts[2, i] + a] += weights[2, i, a] * along_x[k, j, i]


@compiled
def _stiffen(d, weight, floor, out):
    """Add the weighted graph Laplacian (Neumann) of the coefficients [c, cz, cy, cx] and floor * d to `out`."""
    parts, cz, cy, cx = d.shape
    for c in range(parts):
        for k in range(cz):
            below, above = max(k - 1, 0), min(k + 1, cz - 1)
            for j in range(cy):
                up, down = max(j - 1, 0), min(j + 1, cy - 1)
                for i in range(cx):
                    here = d[c, k, j, i]
                    bend = weight[0] * (2 * here - d[c, below, j, i] - d[c, above, j, i])
                    bend += weight[1] * (2 * here - d[c, k, up, i] - d[c, k, down, i])
                    bend += weight[2] * (2 * here - d[c, k, j, max(i - 1, 0)] - d[c, k, j, min(i + 1, cx - 1)])
                    out[c, k, j, i] += bend + floor * here


@compiled
def _multiply(curvature, v):
    """Symmetric blocks [6 or 3, nz, ny, nx] times vectors [3 or 2, nz, ny, nx], in place."""
    parts, nz, ny, nx = v.shape
    for k in range(nz):
        for j in range(ny):
            if parts == 2:
                for i in range(nx):
                    b, c, yx = v[0, k, j, i], v[1, k, j, i], curvature[1, k, j, i]
                    v[0, k, j, i] = curvature[0, k, j, i] * b + yx * c
                    v[1, k, j, i] = yx * b + curvature[2, k, j, i] * c
                continue
            for i in range(nx):
                a, b, c = v[0, k, j, i], v[1, k, j, i], v[2, k, j, i]
                zy, zx, yx = curvature[1, k, j, i], curvature[2, k, j, i], curvature[4, k, j, i]
                v[0, k, j, i] = curvature[0, k, j, i] * a + zy * b + zx * c
                v[1, k, j, i] = zy * a + curvature[3, k, j, i] * b + yx * c
                v[2, k, j, i] = zx * a + yx * b + curvature[5, k, j, i] * c


@compiled
def _diagonal(curvature, nodes):
    """The diagonals of symmetric blocks [6 or 3, nz, ny, nx], in `nodes` [3 or 2, nz, ny, nx]."""
    entry = 0
    for c in range(len(nodes)):
        nodes[c] = curvature[entry]
        entry += len(nodes) - c


@compiled
def _precondition(inverse, smooth):
    """Turn the summed diagonal into one over that of the system; returns what keeps it definite where none votes."""
    total = 0.0
    for i in range(len(inverse)):
        total += np.float64(inverse[i])
    floor = np.float32(3e-6 * total / len(inverse) + 1e-12)
    for i in range(len(inverse)):
        inverse[i] = 1 / (inverse[i] + 6 * smooth + floor)
    return floor


@compiled
def _advance(d, r, p, ap, inverse, rz):
    """One step of preconditioned conjugate gradients on flat arrays in place; returns the next r' M r."""
    size, following = 0.0, 0.0
    for i in range(len(d)):
        size += np.float64(p[i]) * np.float64(ap[i])
    alpha = np.float32(rz / max(size, 1e-30))
    for i in range(len(d)):
        d[i] += alpha * p[i]
        r[i] -= alpha * ap[i]
        following += np.float64(r[i]) * np.float64(inverse[i] * r[i])
    beta = np.float32(following / max(rz, 1e-30))
    for i in range(len(d)):
        p[i] = inverse[i] * r[i] + beta * p[i]
    return following


@compiled
def solve(gradient, curvature, ratio, spacing, smooth, counts, iterations):
    """Preconditioned conjugate gradients for (B' C B + smooth L) d = -B' g: coefficients [fits, parts, *counts].

    gradient: [fits, 3, nz, ny, nx] g and curvature: [fits, 6, nz, ny, nx] C (zz, zy, zx, yy, yx, xx) at the nodes; of
    two parts, y and x, [fits, 2, ...] and [fits, 3, ...].
    ratio: [fits, 3] lattice step over control spacing. spacing: [fits, 3] of the control points. smooth: [fits].
    """
    fits, parts, nz, ny, nx = gradient.shape
    cz, cy, cx = counts
    found = np.zeros((fits, parts, cz, cy, cx), np.float32)
    nodes = np.empty((parts, nz, ny, nx), np.float32)
    along_x, along_y = np.empty((cz, cy, nx), np.float32), np.empty((cz, ny, nx), np.float32)
    r, p = np.empty((parts, cz, cy, cx), np.float32), np.empty((parts, cz, cy, cx), np.float32)
    ap, inverse = np.empty((parts, cz, cy, cx), np.float32), np.empty((parts, cz, cy, cx), np.float32)
    firsts, weights = np.zeros((3, max(nz, ny, nx)), np.int64), np.zeros((3, max(nz, ny, nx), _REACH), np.float32)
    stiffness = np.empty(3, np.float32)
    for b in range(fits):
        for axis in range(3):
            _bands(gradient.shape[axis + 2], ratio[b, axis], counts[axis], firsts[axis], weights[axis])
        _diagonal(curvature[b], nodes)
        _collect(nodes, firsts, weights, along_x, along_y, inverse)
        floor = _precondition(inverse.reshape(-1), smooth[b])
        shortest = min(spacing[b, 0], spacing[b, 1], spacing[b, 2])
        for axis in range(3):
            stiffness[axis] = smooth[b] * (shortest / spacing[b, axis]) ** 2
        _collect(gradient[b], firsts, weights, along_x, along_y, r)
        flat_d, flat_r, flat_p, flat_ap = found[b].reshape(-1), r.reshape(-1), p.reshape(-1), ap.reshape(-1)
        flat_inverse, rz = inverse.reshape(-1), 0.0
        for i in range(len(flat_r)):
            flat_r[i] = -flat_r[i]
            flat_p[i] = flat_inverse[i] * flat_r[i]
            rz += np.float64(flat_r[i]) * np.float64(flat_p[i])
        for _ in range(iterations):
            _expand(p, firsts, weights, along_x, along_y, nodes)
            _multiply(curvature[b], nodes)
            _collect(nodes, firsts, weights, along_x, along_y, ap)
            _stiffen(p, stiffness, floor, ap)
            rz = _advance(flat_d, flat_r, flat_p, flat_ap, flat_inverse, rz)
    return found
