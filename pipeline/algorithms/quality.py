"""Which of many results are unlike the others: robust scores, and how well matches agree with one affine map."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Starts = npt.NDArray[np.int64]

LIMIT = 2.0  # score from which a result stands out
LARGEST = 10.0  # z beyond this says nothing more
WORST = 3  # a score is the mean of so many z: one may be large by chance
FEWEST = 8  # results to compare with; median and spread of fewer mean little
FEWEST_MATCHES = 8  # matches of a pair, for a residual about their affine map and its 12 numbers
ROUNDS = 4
_CONSISTENT = 1.4826  # median absolute deviation to standard deviation, of a normal distribution


def badness(values: Values, floor: float) -> Values:
    """Robust z of one quantity: (value - median) / (1.4826 median absolute deviation).

    Args:
        values: float64 [n], larger is worse, NaN where unknown.
        floor: least spread, > 0: what differs by less is no worse in practice.

    Returns:
        float64 [n]; NaN where unknown, and everywhere if fewer than `FEWEST` are known.
    """
    known = values[np.isfinite(values)]
    if len(known) < FEWEST:
        return np.full(len(values), np.nan)
    middle = np.median(known)
    spread = max(_CONSISTENT * float(np.median(np.abs(known - middle))), floor)
    scores: Values = np.where(np.isfinite(values), (values - middle) / spread, np.nan)
    return scores


def combine(scores: Values) -> Values:
    """Score of every result: the mean of its `WORST` largest z, each cut to 0 .. `LARGEST`; an unknown z counts as 0.

    Args:
        scores: float64 [quantities, n], see `badness`.

    Returns:
        float64 [n], NaN where every quantity is unknown.
    """
    if not len(scores):
        return np.full(scores.shape[1], np.nan)
    cut = np.clip(np.nan_to_num(scores, nan=0.0), 0, LARGEST)
    worst = -np.sort(-cut, axis=0)[:WORST]
    known = np.isfinite(scores).any(axis=0)
    combined: Values = np.where(known, worst.sum(axis=0) / WORST, np.nan)
    return combined


def group_medians(values: Values, starts: Starts) -> Values:
    """Median of each of consecutive groups.

    Args:
        values: float64 [n], finite.
        starts: int64 [g], ascending from 0; no group is empty.
    """
    sizes = np.diff(starts, append=len(values))
    ordered = values[np.lexsort((values, np.repeat(np.arange(len(starts)), sizes)))]
    medians: Values = (ordered[starts + (sizes - 1) // 2] + ordered[starts + sizes // 2]) / 2
    return medians


def affine_residuals(fixed: Values, moving: Values, starts: Starts) -> Values:
    """How far the matches of each pair are from one affine map: the median distance, by reweighted least squares.

    Args:
        fixed, moving: float64 [n, 3], positions of matched ROIs, consecutive by pair.
        starts: int64 [g], first match of every pair, ascending from 0.

    Returns:
        float64 [g], in the unit of `moving`; NaN for pairs with fewer than `FEWEST_MATCHES`.
    """
    sizes = np.diff(starts, append=len(fixed))
    group = np.repeat(np.arange(len(starts)), sizes)

    def about_mean(points: Values) -> Values:
        means = np.add.reduceat(points, starts) / sizes[:, None]
        return np.asarray(points - means[group])

    source = np.column_stack([about_mean(fixed), np.ones(len(fixed))])
    target, weights = about_mean(moving), np.ones(len(fixed))
    products = source[:, :, None] * np.concatenate([source, target], axis=1)[:, None, :]
    distance = np.zeros(len(fixed))
    for _ in range(ROUNDS):
        normal = np.add.reduceat(products * weights[:, None, None], starts)
        affine = np.linalg.pinv(normal[:, :, :4], rcond=1e-9, hermitian=True) @ normal[:, :, 4:]
        distance = np.linalg.norm(np.einsum("ni,nij->nj", source, affine[group]) - target, axis=1)
        scale = np.maximum(2 * group_medians(distance, starts), 1e-9)
        weights = 1 / (1 + (distance / scale[group]) ** 2) ** 2
    return np.where(sizes >= FEWEST_MATCHES, group_medians(distance, starts), np.nan)
