"""Matching the ROIs of two subjects by their prototypes (Eq. 6-9, Algorithm 1).

With `spatial` off this is the paper: cosine similarity inside a window of slices, greedy one-to-one selection above
epsilon (or every pair above it). With `spatial` on, the greedy pairs only seed a consensus affine; candidates are then
selected again by similarity together with how well their ellipses overlap under the map, first the affine, then a
smooth local one estimated from the pairs themselves. Only prototypes and moments are read, never masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import ellipses
from pipeline.algorithms.affine import Affine, consensus_affine, middle_value, robust_affine
from pipeline.algorithms.selection import greedy_one_to_one

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
_SEEDS = 200
_VOTERS = 250


@dataclass(frozen=True)
class SpatialConfig:
    """Settings of the spatially consistent selection.

    Attributes:
        enabled: off gives the paper's selection by similarity alone.
        epsilon: similarity that a pair must exceed once the map is known.
        min_overlap: least overlap of the two ellipses under the map, 0..1.
        weight: share of the overlap in the score; the rest is the similarity.
        affine_rounds, local_rounds: selections under the affine and under the local map.
        reach: how far pairs inform the local map, as a share of the spread of the fixed ROIs.
        prior_mm: see `pipeline.algorithms.affine.ridge_affine`.
    """

    enabled: bool = True
    epsilon: float = 0.55
    min_overlap: float = 0.2
    weight: float = 0.4
    affine_rounds: int = 1
    local_rounds: int = 2
    reach: float = 0.35
    prior_mm: float = 20.0


@dataclass(frozen=True)
class MatchConfig:
    """Settings of the matching.

    Attributes:
        epsilon: similarity that a pair must exceed, 0..1 (Eq. 7).
        one_to_one: each ROI in at most one pair (Eq. 8); else every pair above epsilon.
        scope: one-to-one over the "volume", or over the "window" of each moving slice as Algorithm 1 is written.
        slice_range: half width of the window, inclusive (delta s).
        slice_unit: of `slice_range`: "slices" (index), "relative" (share of each volume's depth) or "mm" (world).
        max_pairs: best pairs kept (Table 3); 0 is no limit.
        max_pairs_per: "volume", or "slice" of the moving image.
        spatial: spatially consistent selection.
    """

    epsilon: float = 0.75
    one_to_one: bool = True
    scope: Literal["volume", "window"] = "volume"
    slice_range: float = 0.15
    slice_unit: Literal["slices", "relative", "mm"] = "relative"
    max_pairs: int = 0
    max_pairs_per: Literal["volume", "slice"] = "volume"
    spatial: SpatialConfig = SpatialConfig()


@dataclass(frozen=True)
class RoiSet:
    """The ROIs of one subject.

    Attributes:
        prototypes: float32 [N, C], unit norm.
        slice: int32 [N].
        centroid_mm: float64 [N, 3] local (z, y, x).
        area_mm2: float64 [N].
        covariance_mm2: float64 [N, 3] (yy, yx, xx).
        n_slices: slices of the image.
    """

    prototypes: Float
    slice: npt.NDArray[np.int32]
    centroid_mm: npt.NDArray[np.float64]
    area_mm2: npt.NDArray[np.float64]
    covariance_mm2: npt.NDArray[np.float64]
    n_slices: int


@dataclass(frozen=True)
class Matches:
    """Matched pairs, best first.

    Attributes:
        moving_index, fixed_index: int64 [K] into the two RoiSets.
        similarity: float32 [K], cosine clipped to 0..1 (Eq. 6).
        margin: float32 [K], similarity less that of the moving ROI's best other candidate in the window.
        confidence: float32 [K], 0..1: the score that the selection used, which also weights the fit.
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
    similarity = moving.prototypes @ fixed.prototypes.T
    np.clip(similarity, 0, 1, out=similarity)
    similarity *= slice_window(moving, fixed, moving_to_fixed, config)
    i, j = _positions(similarity > max(config.epsilon, 0.0))
    score = similarity[i, j]
    chosen = _select(i, j, score, moving, config)
    i, j, score = i[chosen], j[chosen], score[chosen]
    if config.spatial.enabled and len(i) >= 3:
        i, j, score = _consistent(i, j, score, similarity, moving, fixed, moving_to_fixed, config)
    order = np.lexsort((j, i, -score))
    order = order[_capped(moving.slice[i[order]], config)]
    return _matches(i[order], j[order], score[order], similarity)


def slice_window(moving: RoiSet, fixed: RoiSet, moving_to_fixed: Affine, config: MatchConfig) -> npt.NDArray[np.bool_]:
    """Which pairs lie in the window of slices: bool [N_moving, N_fixed]."""
    reach = config.slice_range + 1e-9
    if config.slice_unit == "mm":
        here = moving.centroid_mm @ moving_to_fixed[0, :3] + moving_to_fixed[0, 3]
        return np.asarray(np.abs(here[:, None] - fixed.centroid_mm[:, 0]) <= reach)
    here, there = np.arange(moving.n_slices, dtype=np.float64), np.arange(fixed.n_slices, dtype=np.float64)
    if config.slice_unit == "relative":
        here, there = (here + 0.5) / moving.n_slices, (there + 0.5) / fixed.n_slices
    near = np.abs(here[:, None] - there) <= reach
    return np.asarray(near[moving.slice][:, fixed.slice])


def _positions(chosen: npt.NDArray[np.bool_]) -> tuple[Index, Index]:
    i, j = np.divmod(np.flatnonzero(chosen), chosen.shape[1])
    return i, j


def _select(i: Index, j: Index, score: Float, moving: RoiSet, config: MatchConfig) -> Index:
    """Positions of the pairs that the one-to-one rule, or its absence, takes."""
    if not config.one_to_one:
        return np.arange(len(i))
    if config.scope == "window":
        return greedy_one_to_one(i, j + moving.slice[i].astype(np.int64) * (j.max(initial=0) + 1), score)
    return greedy_one_to_one(i, j, score)


def _consistent(
    i: Index,
    j: Index,
    score: Float,
    similarity: Float,
    moving: RoiSet,
    fixed: RoiSet,
    moving_to_fixed: Affine,
    settings: MatchConfig,
) -> tuple[Index, Index, Float]:
    """Select again under a map estimated from the seeds (i, j); see the module docstring."""
    config = settings.spatial
    here, there = fixed.centroid_mm, moving.centroid_mm @ moving_to_fixed[:3, :3].T + moving_to_fixed[:3, 3]
    turned = ellipses.transform(moving.covariance_mm2, moving_to_fixed[1:3, 1:3])
    seeds = np.argsort(-score, kind="stable")[:_SEEDS]
    affine = consensus_affine(here[j[seeds]], there[i[seeds]], score[seeds].astype(np.float64), config.prior_mm)
    carried = here @ affine[:3, :3].T + affine[:3, 3]
    spread = ellipses.transform(fixed.covariance_mm2, affine[1:3, 1:3])
    gate = ellipses.may_overlap(there[:, 1:], turned, carried[:, 1:], spread, config.min_overlap)
    ci, cj = _positions(gate & (similarity > config.epsilon))
    alike = similarity[ci, cj]
    centre, extent = there[:, 1:].astype(np.float32)[ci], turned.astype(np.float32)[ci]
    for round_number in range(config.affine_rounds + config.local_rounds):
        if round_number:
            weight = score.astype(np.float64)
            affine = robust_affine(here[j], there[i], weight**2, config.prior_mm, iterations=3)
            carried = here @ affine[:3, :3].T + affine[:3, 3]
            spread = ellipses.transform(fixed.covariance_mm2, affine[1:3, 1:3])
        if round_number >= config.affine_rounds:
            carried = carried + _local_shift(here, j, there[i] - carried[j], weight, config.reach)
        overlap = ellipses.overlap(centre, extent, carried[:, 1:].astype(np.float32)[cj], spread.astype(np.float32)[cj])
        near = np.flatnonzero(overlap > config.min_overlap)
        blend = (1 - config.weight) * alike[near] + config.weight * np.sqrt(overlap[near])
        joint = np.asarray(blend, dtype=np.float32)
        best = _select(ci[near], cj[near], joint, moving, settings)
        i, j, score = ci[near[best]], cj[near[best]], joint[best]
        if len(i) < 3:
            break
    return i, j, score


def _local_shift(
    here: npt.NDArray[np.float64],
    j: Index,
    residual: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    reach: float,
) -> npt.NDArray[np.float64]:
    """Robust kernel regression of the surest pairs' residuals at every fixed ROI: [N, 3] mm."""
    if len(j) > _VOTERS:
        surest = np.sort(np.argpartition(-weight, _VOTERS)[:_VOTERS])
        j, residual, weight = j[surest], residual[surest], weight[surest]
    spread = reach * np.maximum(here.std(axis=0), 1e-3)
    spread[1:] = np.sqrt((spread[1:] ** 2).mean())
    x = (here / spread).astype(np.float32)
    gap = ((x**2).sum(1)[:, None] + (x[j] ** 2).sum(1) - 2 * x @ x[j].T).clip(0)
    kernel = np.exp(-0.5 * gap)
    trust = weight
    shift = np.zeros_like(here)
    for _ in range(3):
        votes = np.column_stack([trust[:, None] * residual, trust]).astype(np.float32)
        total = kernel @ votes
        shift = (total[:, :3] / (total[:, 3:] + 1)).astype(np.float64)
        error = np.linalg.norm(residual - shift[j], axis=1)
        trust = weight / (1 + (error / (2 * middle_value(error) + 1e-3)) ** 2)
    return shift


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


def _matches(i: Index, j: Index, score: Float, similarity: Float) -> Matches:
    raw = similarity[i, j]
    others = similarity[i]
    others[np.arange(len(i)), j] = 0
    best_other = others.max(axis=1, initial=0)
    return Matches(i, j, raw, raw - best_other, score.astype(np.float32))
