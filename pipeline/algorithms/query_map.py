"""Where regions of one subject are to be expected in many others, estimated for a block of subjects at once.

What `pipeline.algorithms.consistency` does for one pair, with the same maps, but in arrays over subjects: the context,
some ROIs around the region asked for, is paired with each subject's ROIs, a robust affine is fitted to the pairs, and a
kernel mean of their residuals bends it locally.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.affine import consensus_affine, robust_affine

Array = npt.NDArray[np.float64]
Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]


def mutual_best(score: Float) -> tuple[Index, Array]:
    """Pairs that are each other's best.

    Args:
        score: [B, N, M] of the N ROIs of B subjects with M regions, 0 where a pair is out of the question.

    Returns:
        int64 [B, M], the best ROI of each region, and its score, 0 where the ROI has a better region: float64 [B, M].
    """
    best, other = score.argmax(axis=1), score.argmax(axis=2)
    value = np.take_along_axis(score, best[:, None], axis=1)[:, 0]
    agree = np.take_along_axis(other, best, axis=1) == np.arange(score.shape[2])
    return best, np.where(agree, value, 0).astype(np.float64)


def consensus_affines(here: Array, there: Array, weight: Array, prior_mm: float, trials: int) -> Array:
    """`pipeline.algorithms.affine.consensus_affine` for B subjects.

    Args:
        here: [M, 3] mm, of the regions.
        there: [B, M, 3] mm, of their partners.
        weight: [B, M], 0 where there is none.
        prior_mm: see `pipeline.algorithms.affine.ridge_affine`.
        trials: samples of four pairs.

    Returns:
        [B, 4, 4], `here` to `there`; the identity where there is no partner at all.
    """
    return _each(lambda x, y, w: consensus_affine(x, y, w, prior_mm, trials), here, there, weight)


def robust_affines(here: Array, there: Array, weight: Array, prior_mm: float, iterations: int) -> Array:
    """`pipeline.algorithms.affine.robust_affine` for B subjects; arguments as `consensus_affines`."""
    return _each(lambda x, y, w: robust_affine(x, y, w, prior_mm, iterations), here, there, weight)


def load_loops() -> None:
    """Load the compiled loops, a third of a second that the first query would wait for otherwise."""
    points, weight = np.eye(4, 3), np.ones((1, 4))
    consensus_affines(points, points[None], weight, prior_mm=1.0, trials=1)


def _each(fit: Callable[[Array, Array, Array], Array], here: Array, there: Array, weight: Array) -> Array:
    matrices = np.tile(np.eye(4), (len(weight), 1, 1))
    for matrix, partners, trust in zip(matrices, there, weight, strict=True):
        paired = trust > 0
        if paired.any():
            matrix[:] = fit(here[paired], partners[paired], trust[paired])
    return matrices


def expected_places(here: Array, there: Array, weight: Array, matrices: Array, reach: Array) -> Array:
    """Every region under its subject's affine, shifted by a robust kernel mean of the residuals: [B, M, 3] mm.

    Args:
        here, there, weight: as `consensus_affines`.
        matrices: [B, 4, 4].
        reach: [3] mm, standard deviation of the kernel along each axis.
    """
    carried = _carry(matrices, here)
    residual = there - carried
    near = here / reach
    kernel = np.exp(-0.5 * ((near[:, None] - near) ** 2).sum(axis=-1))
    trust = weight
    for _ in range(2):
        error = np.sqrt(((residual - _kernel_mean(kernel, residual, trust)) ** 2).sum(axis=-1))
        trust = weight / (1 + (error / (2 * _middle_of_weighted(error, weight)[:, None] + 1e-3)) ** 2)
    return carried + _kernel_mean(kernel, residual, trust)


def _kernel_mean(kernel: Array, values: Array, weight: Array) -> Array:
    """Weighted mean of values [B, M, 3] under a kernel [M, M], shrunk to zero where little weight is near."""
    total = kernel @ np.concatenate([weight[..., None] * values, weight[..., None]], axis=-1)
    return np.asarray(total[..., :3] / (total[..., 3:] + 1))


def _carry(matrices: Array, points: Array) -> Array:
    """Points [M, 3] under maps [..., 4, 4]: [..., M, 3]."""
    return np.asarray(points @ np.swapaxes(matrices[..., :3, :3], -1, -2) + matrices[..., None, :3, 3])


def _middle_of_weighted(values: Array, weight: Array) -> Array:
    """Upper median of the values [B, M] that have weight: [B]; 0 where none has."""
    ordered = np.sort(np.where(weight > 0, values, np.inf), axis=1)
    middle = np.take_along_axis(ordered, (weight > 0).sum(axis=1)[:, None] // 2, axis=1)[:, 0]
    return np.where(np.isfinite(middle), middle, 0)
