"""ROIs as ellipses: the overlap of two regions from their centroids and covariances alone."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Real = TypeVar("Real", npt.NDArray[np.float32], npt.NDArray[np.float64])


def transform(covariance: Array, linear: Array) -> Array:
    """Covariances [N, 3] (yy, yx, xx) under a 2x2 map: L C L^T, [N, 3]."""
    (a, b), (c, d) = linear
    yy, yx, xx = covariance.T
    return np.stack(
        [
            a * a * yy + 2 * a * b * yx + b * b * xx,
            a * c * yy + (a * d + b * c) * yx + b * d * xx,
            c * c * yy + 2 * c * d * yx + d * d * xx,
        ],
        axis=1,
    )


def overlap(centre_a: Real, cov_a: Real, centre_b: Real, cov_b: Real) -> Real:
    """Squared Bhattacharyya coefficient of pairs of Gaussians, 0..1: a smooth stand-in for mask overlap.

    Args:
        centre_a, centre_b: [N, 2] (y, x) mm.
        cov_a, cov_b: [N, 3] (yy, yx, xx) mm^2, positive definite.
    """
    yy, yx, xx = (0.5 * (cov_a + cov_b)).T
    determinant = yy * xx - yx * yx
    dy, dx = (centre_a - centre_b).T
    distance = (xx * dy * dy - 2 * yx * dy * dx + yy * dx * dx) / determinant
    product = (cov_a[:, 0] * cov_a[:, 2] - cov_a[:, 1] ** 2) * (cov_b[:, 0] * cov_b[:, 2] - cov_b[:, 1] ** 2)
    return np.asarray(np.sqrt(product) / determinant * np.exp(-distance / 4))


def may_overlap(
    centre_a: Real, largest_a: Real, centre_b: Real, largest_b: Real, least: float
) -> npt.NDArray[np.bool_]:
    """Which pairs of ellipses can reach an `overlap` of `least`, 0..1, or could if moved a little: bool [N].

    Overlap needs exp(-d^2 / (4 lambda)) > least, with lambda the mean of the two largest variances; half as much d^2
    again is let through.

    Args:
        centre_a, centre_b: [N, 2] (y, x) mm.
        largest_a, largest_b: [N] mm^2, see `largest`.
    """
    reach = -3 * np.log(max(least, 1e-6))
    dy, dx = (centre_a - centre_b).T
    return np.asarray(dy * dy + dx * dx < np.float32(reach) * (largest_a + largest_b))


def largest(covariance: Array) -> Array:
    """Largest variance along any direction, of covariances [N, 3] (yy, yx, xx)."""
    yy, yx, xx = covariance.T
    return np.asarray((yy + xx) / 2 + np.hypot((yy - xx) / 2, yx))
