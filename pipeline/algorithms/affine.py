"""Robust affine maps from matched points."""

from __future__ import annotations

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
        fixed, moving: [..., N, 3] positions in mm, N >= 1; leading axes are independent problems.
        weight: [..., N], non-negative, not all zero.
        prior_mm: spread at which the data and the prior weigh the same along an axis; coplanar, collinear or few
            points therefore give the map they determine and nothing more.

    Returns:
        [..., 4, 4] float64, fixed position to moving position.
    """
    share = (weight / weight.sum(axis=-1, keepdims=True))[..., None]
    fixed_mean, moving_mean = (share * fixed).sum(axis=-2), (share * moving).sum(axis=-2)
    x, y = fixed - fixed_mean[..., None, :], moving - moving_mean[..., None, :]
    weighted = np.swapaxes(x * share, -1, -2)
    spread = weighted @ x + prior_mm**2 * np.eye(3)
    linear = np.eye(3) + np.swapaxes(np.linalg.solve(spread, weighted @ (y - x)), -1, -2)
    matrix = np.zeros((*linear.shape[:-2], 4, 4))
    matrix[..., :3, :3] = linear
    matrix[..., :3, 3] = moving_mean - (linear @ fixed_mean[..., None])[..., 0]
    matrix[..., 3, 3] = 1.0
    return matrix


def robust_affine(fixed: Points, moving: Points, weight: Weights, prior_mm: float, iterations: int = 10) -> Affine:
    """`ridge_affine` of [N, 3] points with Cauchy weights at twice the median residual, reweighted iteratively."""
    matrix = ridge_affine(fixed, moving, weight, prior_mm)
    for _ in range(iterations):
        residual = np.linalg.norm(fixed @ matrix[:3, :3].T + matrix[:3, 3] - moving, axis=1)
        scale = 2.0 * middle_value(residual) + 1e-3
        matrix = ridge_affine(fixed, moving, weight / (1.0 + (residual / scale) ** 2), prior_mm)
    return matrix


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
    rng = np.random.default_rng(seed)
    size = min(_SAMPLE, len(fixed))
    share = np.cumsum(weight)
    sample = np.searchsorted(share, rng.random((trials, size)) * share[-1], side="right").clip(max=len(fixed) - 1)
    matrices = ridge_affine(fixed[sample], moving[sample], weight[sample], prior_mm)
    points = np.column_stack([fixed, np.ones(len(fixed))]).astype(np.float32).T
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
