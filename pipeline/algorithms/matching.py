"""Matching the ROIs of two subjects by their prototypes (Eq. 6-9, Algorithm 1).

With `spatial` off this is the paper: similarity inside a window of slices, then one-to-one selection above epsilon, or
every pair above it. With `spatial` on, `pipeline.algorithms.consistency` selects again by similarity together with
agreement in space. Only prototypes and moments are read, never masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import consistency
from pipeline.algorithms.affine import Affine
from pipeline.algorithms.consistency import Places, SpatialConfig, consistent_pairs
from pipeline.algorithms.selection import Rule, one_to_one
from pipeline.algorithms.similarity import Band, Kind, Span, calibrated_epsilon, compare, impossible_pairs
from pipeline.algorithms.staged import Staged, complete

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
_ROUNDING = 1e-9
_SUREST = np.float32(0.98)  # below what levels of the fit ask for that follow outlines exactly


@dataclass(frozen=True)
class MatchConfig:
    """Settings of the matching.

    Attributes:
        similarity: what is compared, see `pipeline.algorithms.similarity.compare` (Eq. 6).
        epsilon: similarity that a pair must exceed, 0..1 (Eq. 7).
        false_discovery: accepted share of wrong candidates, by which epsilon is calibrated for every pair of
            subjects; 0 keeps the fixed epsilon, as does a pair of subjects that offers nothing to calibrate on.
        one_to_one: true: each ROI in at most one pair (Eq. 8); false: every pair above epsilon; "hybrid": one-to-one,
            then a second partner in another slice for ROIs left over (needs `spatial`).
        selection: rule of the one-to-one selection: "greedy" (Eq. 9), "mutual" or "optimal".
        scope: one-to-one over the "volume", or over the "window" of each moving slice as Algorithm 1 is written.
        slice_range: half width of the window, inclusive (delta s).
        slice_unit: of `slice_range`: "slices" (index), "relative" (share of each volume's depth) or "mm" (world).
        max_pairs: best pairs kept (Table 3); 0 is no limit.
        max_pairs_per: "volume", or "slice" of the moving image.
        spatial: spatially consistent selection.
    """

    similarity: Kind = "cosine"
    epsilon: float = 0.64
    false_discovery: float = 0.0
    one_to_one: bool | Literal["hybrid"] = True
    selection: Rule = "greedy"
    scope: Literal["volume", "window"] = "volume"
    slice_range: float = 0.15
    slice_unit: Literal["slices", "relative", "mm"] = "relative"
    max_pairs: int = 0
    max_pairs_per: Literal["volume", "slice"] = "volume"
    spatial: SpatialConfig = field(default_factory=SpatialConfig)

    def __post_init__(self) -> None:
        if self.one_to_one == "hybrid" and not self.spatial.enabled:
            raise ValueError("match.one_to_one is hybrid, which needs match.spatial.enabled: true")
        if not 0 <= self.false_discovery < 1:
            raise ValueError(f"match.false_discovery is {self.false_discovery}; it must be in [0, 1)")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"match.epsilon is {self.epsilon}; it must be in [0, 1]")
        for name in ("slice_range", "max_pairs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"match.{name} is {getattr(self, name)}; expected a number of 0 or more")


@dataclass(frozen=True)
class RoiSet:
    """The ROIs of one subject.

    Attributes:
        prototypes: float32 [N, C], unit norm.
        slice: int32 [N], ascending.
        centroid_mm: float64 [N, 3] local (z, y, x).
        area_mm2: float64 [N].
        covariance_mm2: float64 [N, 3] (yy, yx, xx).
        n_slices: slices of the image.
        track: int32 [N], see `pipeline.algorithms.tracks.link`; None where `track_support` is not used.
    """

    prototypes: Float
    slice: npt.NDArray[np.int32]
    centroid_mm: npt.NDArray[np.float64]
    area_mm2: npt.NDArray[np.float64]
    covariance_mm2: npt.NDArray[np.float64]
    n_slices: int
    track: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Matches:
    """Matched pairs, best first.

    Attributes:
        moving_index, fixed_index: int64 [K] into the two RoiSets.
        similarity: float32 [K], 0..1, of `MatchConfig.similarity` (Eq. 6).
        margin: float32 [K], similarity less that of the moving ROI's best other candidate in the window.
        confidence: float32 [K], 0..0.98, weights the fit: see `pipeline.algorithms.consistency.confidence`, with the
            least overlap where too few pairs determine a map; the similarity where `spatial` is off.
    """

    moving_index: Index
    fixed_index: Index
    similarity: Float
    margin: Float
    confidence: Float


def match(moving: RoiSet, fixed: RoiSet, moving_to_fixed: Affine, config: MatchConfig) -> Matches:
    """Match the ROIs of two subjects.

    Args:
        moving, fixed: their ROIs; prototypes of the same backend and settings.
        moving_to_fixed: 4x4, moving-local to fixed-local mm.
        config: settings.

    Returns:
        Matches, possibly none. Ties are broken by (moving, fixed) index, so the result is deterministic.
    """
    return complete(match_in_stages(moving, fixed, moving_to_fixed, config))


def match_in_stages(moving: RoiSet, fixed: RoiSet, moving_to_fixed: Affine, config: MatchConfig) -> Staged[Matches]:
    """`match`, for `pipeline.algorithms.in_step`."""
    spatial = config.spatial
    here, there = slice_places(moving, fixed, moving_to_fixed, config)
    bands = slice_bands(moving, here, there, config.slice_range * (spatial.widening if spatial.enabled else 1))
    alike = compare(moving.prototypes, fixed.prototypes, config.similarity, bands)
    epsilon = _epsilon(moving, fixed, (here, there), alike.span, config)
    yield sum(block.nbytes for block in alike.blocks)
    i, j, score = alike.above(max(epsilon, 0.0))
    inside = np.flatnonzero(np.abs(here[i] - there[j]) <= config.slice_range + _ROUNDING)
    i, j, score = i[inside], j[inside], score[inside]
    yield 0
    seeds = one_to_one(i, j, score, "mutual") if spatial.enabled else inside[:0]
    if len(seeds) >= 3:
        i, j, similarity, score, confidence = yield from consistent_pairs(
            (i[seeds], j[seeds], score[seeds]),
            lambda gate: alike.above(max(epsilon - spatial.slack, 0.0), gate),
            Places(fixed.centroid_mm, fixed.covariance_mm2, fixed.track),
            Places(moving.centroid_mm, moving.covariance_mm2, moving.track).moved(moving_to_fixed),
            lambda i, j, score: _select(i, j, score, moving, config),
            spatial,
            more=(moving.slice, fixed.slice) if config.one_to_one == "hybrid" else None,
        )
    else:
        chosen = _select(i, j, score, moving, config)
        i, j = i[chosen], j[chosen]
        similarity = score = confidence = score[chosen]
        if spatial.enabled:
            confidence = consistency.confidence(score, np.full_like(score, spatial.min_overlap), spatial)
    yield 0
    order = np.lexsort((j, i, -score))
    order = order[_capped(moving.slice[i[order]], config)]
    i, j, similarity = i[order], j[order], similarity[order]
    return Matches(i, j, similarity, alike.margin(i, j, similarity), np.minimum(confidence[order], _SUREST))


def slice_places(
    moving: RoiSet, fixed: RoiSet, moving_to_fixed: Affine, config: MatchConfig
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Where the slice of every ROI lies, in the unit of the window: [N_moving] and [N_fixed].

    In mm, a moving slice lies where the middle of its ROIs does.

    Raises:
        ValueError: for ROIs that are not in the order of their slices.
    """
    if (np.diff(moving.slice) < 0).any() or (np.diff(fixed.slice) < 0).any():
        raise ValueError("ROIs must come in the order of their slices")
    here, there = moving.slice.astype(np.float64), fixed.slice.astype(np.float64)
    if config.slice_unit == "relative":
        return (here + 0.5) / moving.n_slices, (there + 0.5) / fixed.n_slices
    if config.slice_unit == "mm":
        place = moving.centroid_mm @ moving_to_fixed[0, :3] + moving_to_fixed[0, 3]
        _, member, count = np.unique(moving.slice, return_inverse=True, return_counts=True)
        return (np.bincount(member, place) / count)[member], fixed.centroid_mm[:, 0]
    return here, there


def slice_bands(
    moving: RoiSet, here: npt.NDArray[np.float64], there: npt.NDArray[np.float64], reach: float
) -> list[Band]:
    """The window of slices: the ROIs of each moving slice, and the fixed ROIs in reach of it."""
    first = np.unique(moving.slice, return_index=True)[1]
    last = [*first[1:].tolist(), len(moving.slice)]
    low = np.searchsorted(there, here[first] - reach - _ROUNDING, "left")
    high = np.searchsorted(there, here[first] + reach + _ROUNDING, "right")
    ends = zip(first.tolist(), last, low.tolist(), high.tolist(), strict=False)
    return [(slice(start, stop), slice(left, right)) for start, stop, left, right in ends]


def _epsilon(
    moving: RoiSet,
    fixed: RoiSet,
    places: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    span: Span | None,
    config: MatchConfig,
) -> float:
    """Epsilon, calibrated if asked to, by the `slice_places` and for similarities of a span."""
    if not config.false_discovery or not len(moving.slice) or not len(fixed.slice):
        return config.epsilon
    depth = ((moving.slice + 0.5) / moving.n_slices, (fixed.slice + 0.5) / fixed.n_slices)
    impossible = impossible_pairs((moving.area_mm2, fixed.area_mm2), depth)
    possible = (np.abs(places[0][:, None] - places[1]) <= config.slice_range + _ROUNDING) & ~impossible
    everywhere = compare(moving.prototypes, fixed.prototypes, config.similarity, span=span).blocks[0].clip(0, 1)
    calibrated = calibrated_epsilon(everywhere, possible, impossible, config.false_discovery)
    return config.epsilon if calibrated is None else calibrated


def _select(i: Index, j: Index, score: Float, moving: RoiSet, config: MatchConfig) -> Index:
    """Positions of the pairs that the one-to-one rule, or its absence, takes."""
    if not config.one_to_one:
        return np.arange(len(i))
    if config.scope == "window":
        j = j + moving.slice[i].astype(np.int64) * (j.max(initial=0) + 1)
    return one_to_one(i, j, score, config.selection)


def _capped(slices: npt.NDArray[np.int32], config: MatchConfig) -> Index:
    """Positions, in order of score, within the cap on the number of pairs."""
    everything = np.arange(len(slices))
    if not config.max_pairs:
        return everything
    if config.max_pairs_per == "volume":
        return everything[: config.max_pairs]
    place = np.zeros(len(slices), np.int64)
    for value in np.unique(slices):
        members = np.flatnonzero(slices == value)
        place[members] = np.arange(len(members))
    return everything[place < config.max_pairs]
