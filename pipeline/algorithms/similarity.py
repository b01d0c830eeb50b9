"""How alike two sets of prototypes are (Eq. 6), and from which value on a pair is believed (Eq. 7).

The paper normalises the similarities to 0..1 and trusts those above a fixed epsilon; its public code uses the plain
cosine. What value means "the same structure" differs between backends, data sets and even pairs, so epsilon can
instead be calibrated on the pair itself: ROIs of very different size, or from opposite ends of the two volumes,
cannot match, and how alike such pairs are tells how alike wrong pairs get.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Band: TypeAlias = tuple[slice, slice]
Kind = Literal["cosine", "centred", "minmax"]

_STEPS = 400
_AREA_RATIO = 4.0
_DEPTH_APART = 0.5
_NULL_ROWS = 128


def compare(moving: Float, fixed: Float, bands: Sequence[Band], kind: Kind) -> Float:
    """Similarity of the pairs of prototypes in a band.

    Args:
        moving: float32 [N, C], unit norm.
        fixed: float32 [M, C], unit norm.
        bands: disjoint blocks of pairs: rows, and the columns they are compared with.
        kind: "cosine"; "centred" takes what both sets have in common (the mean of their two mean prototypes) off
            first, which spreads the cosines of backends whose features all look alike; "minmax" stretches the
            cosines of this pair to 0..1, as Eq. 6 is written.

    Returns:
        float32 [N, M], 0..1; 0 outside the band and for negative cosines.
    """
    if kind == "centred" and len(moving) and len(fixed):
        middle = (moving.mean(axis=0) + fixed.mean(axis=0)) / 2
        moving, fixed = (_unit(values - middle) for values in (moving, fixed))
    similarity = np.zeros((len(moving), len(fixed)), np.float32)
    for rows, columns in bands:
        similarity[rows, columns] = moving[rows] @ fixed[columns].T
    if kind == "minmax":
        inside = [similarity[band] for band in bands if similarity[band].size]
        low = min((float(block.min()) for block in inside), default=0.0)
        high = max((float(block.max()) for block in inside), default=1.0)
        for block in inside:
            block -= low
            block /= max(high - low, 1e-6)
    return np.clip(similarity, 0, 1, out=similarity)


def restrict(similarity: Float, bands: Sequence[Band]) -> Float:
    """A copy that is 0 outside the bands."""
    inside = np.zeros_like(similarity)
    for band in bands:
        inside[band] = similarity[band]
    return inside


def impossible_pairs(
    area: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    depth: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> Mask:
    """Pairs that cannot match: one four times the other's area, or half the depth of the volume apart.

    Args:
        area: of the moving [N] and the fixed ROIs [M], in one unit.
        depth: of their slices as a share of their volumes, 0..1.

    Returns:
        bool [N, M].
    """
    size = [np.log(values) for values in area]
    apart = np.abs(size[0][:, None] - size[1]) > np.log(_AREA_RATIO)
    return np.asarray(apart | (np.abs(depth[0][:, None] - depth[1]) > _DEPTH_APART))


def calibrated_epsilon(similarity: Float, possible: Mask, impossible: Mask, false_discovery: float) -> float | None:
    """Least similarity above which at most a share of the possible pairs is expected to be wrong.

    The expectation is the rate at which impossible pairs exceed that value, times the number of possible pairs, as in
    Efron's empirical null for the Benjamini-Hochberg rule.

    Args:
        similarity: float32 [N, M], 0..1.
        possible, impossible: bool [N, M], disjoint.
        false_discovery: accepted share of wrong pairs, 0..1.

    Returns:
        0..1, 1 where no value is good enough; None where no pair is possible, or none impossible.
    """
    rows = np.unique(np.linspace(0, len(similarity) - 1, min(len(similarity), _NULL_ROWS)).astype(np.int64))
    step = (similarity[rows] * _STEPS).astype(np.int64)
    counts = [
        np.bincount(step[mask[rows]], minlength=_STEPS + 1)[::-1].cumsum()[::-1] for mask in (possible, impossible)
    ]
    if not counts[0][0] or not counts[1][0]:
        return None
    expected = counts[1] / counts[1][0] * counts[0][0]
    good = np.flatnonzero((expected <= false_discovery * counts[0]) & (counts[0] > 0))
    return float(good[0] / _STEPS) if len(good) else 1.0


def _unit(values: Float) -> Float:
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-8), np.float32)
