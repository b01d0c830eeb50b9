# mypy: disable-error-code="no-untyped-def"
"""The loops of the robust affine maps in `pipeline.algorithms.affine`. Arrays are float64."""

from __future__ import annotations

import numpy as np

from pipeline.algorithms.compiled import compiled


@compiled
def affine_of(moments, prior_mm, matrix):
    """Affine [4, 4], in `matrix`, of weighted sums of (1, fixed) times (1, fixed, moving) [4, 7]; its determinant."""
    system, right = np.empty((3, 3)), np.empty((3, 3))
    for a in range(3):
        for b in range(3):
            spread = (moments[a + 1, b + 1] - moments[a + 1, 0] * moments[0, b + 1] / moments[0, 0]) / moments[0, 0]
            across = (moments[a + 1, b + 4] - moments[a + 1, 0] * moments[0, b + 4] / moments[0, 0]) / moments[0, 0]
            system[a, b] = spread + (prior_mm**2 if a == b else 0.0)
            right[a, b] = across - spread
    s = system
    c00, c01, c02 = (
        s[1, 1] * s[2, 2] - s[1, 2] * s[2, 1],
        s[1, 2] * s[2, 0] - s[1, 0] * s[2, 2],
        s[1, 0] * s[2, 1] - s[1, 1] * s[2, 0],
    )
    c11, c12, c22 = (
        s[0, 0] * s[2, 2] - s[0, 2] * s[2, 0],
        s[0, 1] * s[2, 0] - s[0, 0] * s[2, 1],
        s[0, 0] * s[1, 1] - s[0, 1] * s[1, 0],
    )
    scale = 1 / (s[0, 0] * c00 + s[0, 1] * c01 + s[0, 2] * c02)
    for c in range(3):  # of the symmetric system, by its adjugate
        x, y, z = right[0, c] * scale, right[1, c] * scale, right[2, c] * scale
        matrix[c, 0] = c00 * x + c01 * y + c02 * z
        matrix[c, 1] = c01 * x + c11 * y + c12 * z
        matrix[c, 2] = c02 * x + c12 * y + c22 * z
        matrix[c, c] += 1
        shift = moments[0, c + 4]
        for a in range(3):
            shift -= matrix[c, a] * moments[0, a + 1]
        matrix[c, 3] = shift / moments[0, 0]
        matrix[3, c] = 0
    matrix[3, 3] = 1
    m = matrix
    minor = m[1, 1] * m[2, 2] - m[1, 2] * m[2, 1]
    return (
        m[0, 0] * minor
        - m[0, 1] * (m[1, 0] * m[2, 2] - m[1, 2] * m[2, 0])
        + m[0, 2] * (m[1, 0] * m[2, 1] - m[1, 1] * m[2, 0])
    )


@compiled
def gather(fixed, moving, p, weight, moments):
    """Add a point pair to the moments."""
    for a in range(4):
        left = weight if a == 0 else weight * fixed[p, a - 1]
        moments[a, 0] += left
        for b in range(3):
            moments[a, b + 1] += left * fixed[p, b]
            moments[a, b + 4] += left * moving[p, b]


@compiled
def ridge(fixed, moving, weight, prior_mm):
    """`affine.ridge_affine`."""
    moments, matrix = np.zeros((4, 7)), np.empty((4, 4))
    for p in range(len(fixed)):
        gather(fixed, moving, p, weight[p], moments)
    affine_of(moments, prior_mm, matrix)
    return matrix


@compiled
def squared_errors(matrix, fixed, moving):
    """Squared distance of each point from where the map puts it: [n]."""
    found = np.zeros(len(fixed))
    for p in range(len(fixed)):
        for c in range(3):
            m = matrix[c, 0] * fixed[p, 0] + matrix[c, 1] * fixed[p, 1] + matrix[c, 2] * fixed[p, 2] + matrix[c, 3]
            found[p] += (m - moving[p, c]) ** 2
    return found


@compiled
def best_agreement(fixed, moving, weight, sample, prior_mm, tolerance, volumes):
    """Of the affines of samples [trials, size] that on which the largest weight agrees in plane: [4, 4]."""
    matrix, best, highest = np.empty((4, 4)), np.eye(4), -2.0
    for t in range(len(sample)):
        moments = np.zeros((4, 7))
        for p in sample[t]:
            gather(fixed, moving, p, weight[p], moments)
        volume, score = abs(affine_of(moments, prior_mm, matrix)), 0.0
        if volume < volumes[0] or volume > volumes[1]:
            score = -1.0
        else:
            for p in range(len(fixed)):
                error = in_plane(matrix, fixed, moving, p)
                score += max(1 - error / tolerance, 0.0) * weight[p]
        if score > highest:
            highest = score
            best[:] = matrix
    return best


@compiled
def in_plane(matrix, fixed, moving, p):
    """Distance in plane of a point from where the map puts it."""
    total = 0.0
    for c in range(1, 3):
        m = matrix[c, 0] * fixed[p, 0] + matrix[c, 1] * fixed[p, 1] + matrix[c, 2] * fixed[p, 2] + matrix[c, 3]
        total += (m - moving[p, c]) ** 2
    return np.sqrt(total)


@compiled
def agreeing(matrix, fixed, moving, tolerance):
    """Whether each point lies within a tolerance in plane of where the map puts it: bool [n]."""
    found = np.empty(len(fixed), np.bool_)
    for p in range(len(fixed)):
        found[p] = in_plane(matrix, fixed, moving, p) < tolerance
    return found
