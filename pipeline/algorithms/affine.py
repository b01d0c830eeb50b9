"""Robust affine maps from matched points."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

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
    both = _side_by_side(fixed, moving)
    return _affine_of((weight[:, None] * both[:, :4]).T @ both, prior_mm)


def _side_by_side(fixed: Points, moving: Points) -> Points:
    """[N, 7]: 1, fixed position, moving position."""
    return np.concatenate([np.ones((len(fixed), 1)), fixed, moving], axis=1)


def _affine_of(moments: npt.NDArray[np.float64], prior_mm: float) -> Affine:
    """`ridge_affine` from the weighted sums of (1, fixed) times (1, fixed, moving), [..., 4, 7]: [..., 4, 4]."""
    share = moments / moments[..., :1, :1]
    mean, fixed_mean = share[..., 0, 1:], share[..., 0, 1:4]
    centred = share[..., 1:, 1:] - fixed_mean[..., :, None] * mean[..., None, :]
    spread, across = centred[..., :3], centred[..., 3:]
    linear = np.linalg.solve(spread + prior_mm**2 * np.eye(3), across - spread) + np.eye(3)  # transposed
    matrix = np.zeros((*moments.shape[:-2], 4, 4))
    matrix[..., :3, :3] = np.swapaxes(linear, -1, -2)
    matrix[..., :3, 3] = mean[..., 3:] - (fixed_mean[..., None, :] @ linear)[..., 0, :]
    matrix[..., 3, 3] = 1.0
    return matrix


def robust_affine(fixed: Points, moving: Points, weight: Weights, prior_mm: float, iterations: int = 10) -> Affine:
    """`ridge_affine` of [N, 3] points with Cauchy weights at twice the median residual, reweighted iteratively."""
    both = _side_by_side(fixed, moving)
    matrix = _affine_of((weight[:, None] * both[:, :4]).T @ both, prior_mm)
    for _ in range(iterations):
        error = both[:, 1:4] @ matrix[:3, :3].T + matrix[:3, 3] - moving
        square = np.einsum("ij,ij->i", error, error)
        scale = 2.0 * np.sqrt(middle_value(square)) + 1e-3
        trust = weight / (1.0 + square / scale**2)
        matrix = _affine_of((trust[:, None] * both[:, :4]).T @ both, prior_mm)
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
    both = _side_by_side(fixed, moving)
    products = (weight[:, None] * both[:, :4])[:, :, None] * both[:, None, :]
    matrices = _affine_of(products[sample].sum(axis=1), prior_mm)
    points = both[:, [1, 2, 3, 0]].T.astype(np.float32)
    y, x = (matrices[:, axis].astype(np.float32) @ points - moving[:, axis].astype(np.float32) for axis in (1, 2))
    residual = np.sqrt(y * y + x * x)
    tolerance = 0.06 * float(np.hypot(*np.ptp(fixed[:, 1:], axis=0))) + 2.0
    score = np.maximum(1 - residual * np.float32(1 / tolerance), 0) @ weight.astype(np.float32)
    volume = np.abs(np.linalg.det(matrices[:, :3, :3]))
    score[(volume < _VOLUME_RATIO[0]) | (volume > _VOLUME_RATIO[1])] = -1.0
    best = int(np.argmax(score))
    inlier = residual[best] < tolerance
    if inlier.sum() < size:
        inlier[:] = True
    return robust_affine(fixed[inlier], moving[inlier], weight[inlier], prior_mm, iterations=1)
