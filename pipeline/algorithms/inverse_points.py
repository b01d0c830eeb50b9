"""Where a smooth one-to-one map takes given positions from: its inverse at points, without inverting a field."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_ITERATIONS = 60
_HALVINGS = 8


def invert_points(
    function: Callable[[Array], Array], targets: Array, start: Array, tolerance: float, step: float
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Solve function(x) = target by Newton steps, each halved until it comes nearer.

    Args:
        function: takes and returns positions [N, n], each point by itself.
        targets: [N, n].
        start: [N, n], first guesses.
        tolerance: largest distance of function(x) from its target.
        step: length over which slopes are taken, well below the size of a voxel.

    Returns:
        x [N, n], and whether each is within the tolerance [N]; where the map folds some may not be.
    """
    x = np.array(start, dtype=np.float64)
    residual = function(x) - targets
    for _ in range(_ITERATIONS):
        distance = np.linalg.norm(residual, axis=1)
        open_ = np.flatnonzero(distance > tolerance)
        if not len(open_):
            break
        moves = -_newton(function, x[open_], residual[open_], step)
        for halving in range(_HALVINGS):
            tried = x[open_] + moves / 2**halving
            left = function(tried) - targets[open_]
            nearer = np.linalg.norm(left, axis=1) < distance[open_]
            x[open_[nearer]], residual[open_[nearer]] = tried[nearer], left[nearer]
            open_, moves = open_[~nearer], moves[~nearer]
    return x, np.linalg.norm(residual, axis=1) <= tolerance


def _newton(function: Callable[[Array], Array], x: Array, residual: Array, step: float) -> Array:
    """Newton steps [N, n] from central differences; the least-squares one where the slope is singular."""
    shifts = step * np.eye(x.shape[1])
    slope = np.stack([(function(x + s) - function(x - s)) / (2 * step) for s in shifts], axis=-1)
    return np.asarray((np.linalg.pinv(slope) @ residual[..., None])[..., 0])
