"""ROIs as ellipses: the overlap of two regions from their centroids and covariances alone."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Gate:
    """Which pairs of [N] and [M] ellipses can reach an `overlap` of some value, or could if moved a little.

    Overlap needs exp(-d^2 / (4 lambda)) > value, with lambda the mean of the two largest variances; half as much d^2
    again is let through: the pairs whose rows have a product below 0.5, which costs next to nothing.
    """

    left: npt.NDArray[np.float32]
    right: npt.NDArray[np.float32]

    @classmethod
    def between(cls, centre_a: Array, cov_a: Array, centre_b: Array, cov_b: Array, least: float) -> Gate:
        """The gate of ellipses with centres [N, 2], [M, 2] mm and covariances [N, 3], [M, 3] mm^2; least 0..1."""
        middle = centre_a.mean(axis=0) if len(centre_a) else np.zeros(2)
        reach = -3 * np.log(max(least, 1e-6))
        a, b = centre_a - middle, centre_b - middle
        rest_a, rest_b = ((x**2).sum(1) - reach * _largest(c) for x, c in ((a, cov_a), (b, cov_b)))
        left = np.column_stack([-2 * a, rest_a, np.ones(len(a))]).astype(np.float32)
        right = np.column_stack([b, np.ones(len(b)), rest_b]).astype(np.float32)
        return cls(left, right)


def _largest(covariance: Array) -> Array:
    """Largest eigenvalue of each covariance [N, 3]."""
    yy, yx, xx = covariance.T
    return np.asarray((yy + xx) / 2 + np.hypot((yy - xx) / 2, yx))
