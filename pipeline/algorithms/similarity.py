"""How alike two sets of prototypes are (Eq. 6), and from which value on a pair is believed (Eq. 7).

The paper normalises the similarities to 0..1 and trusts those above a fixed epsilon; its public code uses the plain
cosine. What value means "the same structure" differs between backends, data sets and even pairs, so epsilon can
instead be calibrated on the pair itself: ROIs of very different size, or from opposite ends of the two volumes,
cannot match, and how alike such pairs are tells how alike wrong pairs get.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import match_loops
from pipeline.algorithms.ellipses import Gate
from pipeline.algorithms.prototypes import unit_norm

Float = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]
Band: TypeAlias = tuple[slice, slice]
Span: TypeAlias = tuple[float, float]
Kind = Literal["cosine", "centred", "minmax"]

_BLOCK_ROWS = 60
_STEPS = 400
_AREA_RATIO = 4.0
_DEPTH_APART = 0.5
_NULL_ROWS = 128
_OPEN = np.zeros((0, 4), np.float32)


@dataclass(frozen=True)
class Similarities:
    """How alike the pairs of a window are, in blocks that hold little else.

    Attributes:
        bands: rows and columns of each block; no row in two of them.
        blocks: float32 [rows, columns], up to 1; at most 0 for negative cosines and outside the window.
        span: smallest and largest cosine, which "minmax" has stretched to 0..1; None for the other kinds.
    """

    bands: Sequence[Band]
    blocks: Sequence[Float]
    span: Span | None = None

    def above(self, least: float, gate: Gate | None = None) -> tuple[Index, Index, Float]:
        """Row, column and value of what exceeds `least` >= 0, of the pairs that the gate lets through if there is one.

        Returns:
            int64 [n], int64 [n] and float32 [n], 0..1, in the order of rows and columns.
        """
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for (rows, columns), block in zip(self.bands, self.blocks, strict=True):
            left, right = (_OPEN, _OPEN) if gate is None else (gate.left[rows], gate.right[columns])
            i, j, value = match_loops.exceeding(block, np.float32(least), left, right)
            found.append((i + rows.start, j + columns.start, value))
        i, j, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return i, j, values

    def margin(self, i: Index, j: Index, value: Float) -> Float:
        """How much more alike the pairs (i, j) are than the best other candidate of row i: float32 [n]."""
        other = np.zeros(len(i), np.float32)
        for (rows, columns), block in zip(self.bands, self.blocks, strict=True):
            here = np.flatnonzero((i >= rows.start) & (i < rows.stop))
            other[here] = match_loops.rivals(block, i[here] - rows.start, j[here] - columns.start)
        return np.asarray(value - np.minimum(other, 1), np.float32)


def compare(
    moving: Float, fixed: Float, kind: Kind, bands: Sequence[Band] | None = None, span: Span | None = None
) -> Similarities:
    """Similarity of the pairs of prototypes (Eq. 6).

    Args:
        moving: float32 [N, C], unit norm.
        fixed: float32 [M, C], unit norm.
        kind: "cosine"; "centred" takes what both sets have in common (the mean of their two mean prototypes) off
            first, which spreads the cosines of backends whose features all look alike; "minmax" stretches the
            cosines of these bands to 0..1, as Eq. 6 is written. Negative values are 0.
        bands: the window: rows, ascending and next to each other, and the columns that each is compared with; None
            is everything.
        span: cosines that "minmax" stretches to 0 and 1, in place of the extreme ones of these bands.
    """
    if kind == "centred" and len(moving) and len(fixed):
        middle = (moving.mean(axis=0) + fixed.mean(axis=0)) / 2
        moving, fixed = (unit_norm(values - middle) for values in (moving, fixed))
    found: list[tuple[Band, Float]] = []
    windows: list[Float] = []
    for members in _grouped(bands or [(slice(0, len(moving)), slice(0, len(fixed)))]):
        top, left = members[0][0].start, min(columns.start for _, columns in members)
        band = slice(top, members[-1][0].stop), slice(left, max(columns.stop for _, columns in members))
        block = moving[band[0]] @ fixed[band[1]].T
        for rows, columns in members:
            lines = block[rows.start - top : rows.stop - top]
            lines[:, : columns.start - left] = lines[:, columns.stop - left :] = 0
            windows.append(lines[:, columns.start - left : columns.stop - left])
        found.append((band, block))
    if kind == "minmax":
        span = _stretch([window for window in windows if window.size], span)
    return Similarities([band for band, _ in found], [block for _, block in found], span)


def _grouped(bands: Sequence[Band]) -> Iterator[list[Band]]:
    """Bands in groups of some rows, since one product of matrices is faster than several small ones."""
    group: list[Band] = []
    for band in bands:
        group.append(band)
        if band[0].stop - group[0][0].start >= _BLOCK_ROWS:
            yield group
            group = []
    if group:
        yield group


def _stretch(windows: Sequence[Float], span: Span | None) -> Span:
    """Map a span, or else the range of all values, to 0..1, in place; the span."""
    low, high = span or (
        min((float(window.min()) for window in windows), default=0.0),
        max((float(window.max()) for window in windows), default=1.0),
    )
    for window in windows:
        window -= np.float32(low)
        window /= np.float32(max(high - low, 1e-6))
    return low, high


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
