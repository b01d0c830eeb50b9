"""Robust affine maps from matched points."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import affine_loops

Affine: TypeAlias = npt.NDArray[np.float64]
Points: TypeAlias = npt.NDArray[np.float64]
Weights: TypeAlias = npt.NDArray[np.float64]

_SAMPLE = 4
_VOLUME_RATIO = (0.5, 2.0)


def ridge_affine(fixed: Points, moving: Points, weight: Weights, prior_mm: float) -> Affine:
    """Weighted least-squares affine of point pairs, shrunk towards a pure translation.

    Args:
        fixed, moving: [N, 3] positions in mm, N >= 1.
        weight: [N], non-negative, not all zero.
        prior_mm: spread at which the data and the prior weigh the same along an axis; coplanar, collinear or few
            points therefore give the map they determine and nothing more.

    Returns:
        [4, 4] float64, fixed position to moving position.
    """
    found: Affine = affine_loops.ridge(fixed, moving, weight, prior_mm)
    return found


def robust_affine(fixed: Points, moving: Points, weight: Weights, prior_mm: float, iterations: int = 10) -> Affine:
    """`ridge_affine` of [N, 3] points with Cauchy weights at twice the median residual, reweighted iteratively."""
    matrix: Affine = affine_loops.ridge(fixed, moving, weight, prior_mm)
    for _ in range(iterations):
        square = affine_loops.squared_errors(matrix, fixed, moving)
        scale = 2.0 * np.sqrt(middle_value(square)) + 1e-3
        matrix = affine_loops.ridge(fixed, moving, weight / (1.0 + square / scale**2), prior_mm)
    return matrix


@lru_cache(maxsize=16)
def _draws(trials: int, size: int, seed: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).random((trials, size))


def nearest_rigid(matrix: Affine, center: Points) -> Affine:
    """The rotation nearest to an affine's linear part (polar decomposition) that agrees with it at `center` [3] mm."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    turn = np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))])
    rigid = np.eye(4)
    rigid[:3, :3] = left @ turn @ right
    rigid[:3, 3] = (matrix[:3, :3] - rigid[:3, :3]) @ center + matrix[:3, 3]
    return rigid


def middle_value(values: npt.NDArray[np.floating]) -> float:
    """The upper median; `np.median` costs more than the rest of a reweighting step."""
    half = len(values) // 2
    return float(np.partition(values, half)[half])


def consensus_affine(
    fixed: Points, moving: Points, weight: Weights, prior_mm: float, trials: int = 100, seed: int = 0
) -> Affine:
    """The affine that most point pairs agree on (RANSAC, Fischler and Bolles 1981), then `robust_affine` of those.

    Agreement is in plane, within 6 % of the points' in-plane extent. Samples are drawn by weight, with replacement;
    the same input and seed give the same map.

    Args:
        fixed, moving: [N, 3] mm, N >= 1.
        weight: [N], positive.
        prior_mm: see `ridge_affine`.
        trials: samples of four pairs.
        seed: of the samples.
    """
    size = min(_SAMPLE, len(fixed))
    share = np.cumsum(weight)
    sample = np.searchsorted(share, _draws(trials, size, seed) * share[-1], side="right").clip(max=len(fixed) - 1)
    tolerance = 0.06 * float(np.hypot(*np.ptp(fixed[:, 1:], axis=0))) + 2.0
    best = affine_loops.best_agreement(fixed, moving, weight, sample, prior_mm, tolerance, _VOLUME_RATIO)
    inlier = affine_loops.agreeing(best, fixed, moving, tolerance)
    if inlier.sum() < size:
        inlier[:] = True
    return robust_affine(fixed[inlier], moving[inlier], weight[inlier], prior_mm, iterations=1)
