"""Selecting pairs by similarity together with agreement in space.

Pairs that are each other's best by similarity are seeds: enough of them agree on a robust affine map. Candidates are
then selected again by similarity and by how well their ellipses overlap under the map, first the affine, then a smooth
local one estimated from the pairs themselves, so that every round is led by the neighbourhood of a ROI. Stacks of
slices seldom begin and end at the same anatomy, so the map also says in which slice a partner is expected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import ellipses
from pipeline.algorithms.affine import Affine, consensus_affine, middle_value, robust_affine
from pipeline.algorithms.selection import best_of_each
from pipeline.algorithms.staged import Staged
from pipeline.algorithms.track_support import Track, favour

Array = npt.NDArray[np.float64]
Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
Pairs: TypeAlias = tuple[Index, Index, Float]
Select: TypeAlias = Callable[[Index, Index, Float], Index]
_SEEDS = 150
_VOTERS = 100


@dataclass(frozen=True)
class SpatialConfig:
    """Settings of the spatially consistent selection.

    Attributes:
        enabled: off gives the paper's selection by similarity alone.
        slack: how far below epsilon similarity may lie once the map is known.
        min_overlap: least overlap of the two ellipses under the map, 0..1.
        weight: share of the overlap in the score; the rest is the similarity.
        widening: width of the window of slices once the map is known, in windows.
        depth: distance from the expected slice at which the overlap counts 0.6, as a share of the depth of the
            moving candidates.
        affine_rounds, local_rounds: selections under the affine and under the local map.
        reach: how far pairs inform the local map, as a share of the spread of the fixed ROIs.
        second: least score of the second partner that `one_to_one: hybrid` allows.
        calibration: constant, similarity and root of overlap in the logit of `confidence`. The defaults were fitted to
            hearts of other subjects with the default segmenter; see `benchmarks/matching_quality.py`.
        prior_mm: see `pipeline.algorithms.affine.ridge_affine`.
        track_support: weight of the tracks' votes in the last selection, see `pipeline.algorithms.track_support`.
    """

    enabled: bool = True
    slack: float = 0.15
    min_overlap: float = 0.2
    weight: float = 0.4
    widening: float = 1.4
    depth: float = 0.1
    affine_rounds: int = 1
    local_rounds: int = 1
    reach: float = 0.35
    second: float = 0.7
    calibration: tuple[float, float, float] = (-5.8, 2.3, 6.1)
    prior_mm: float = 20.0
    track_support: float = 0.0

    def __post_init__(self) -> None:
        if self.affine_rounds < 1 or self.local_rounds < 0:
            found = f"{self.affine_rounds} and {self.local_rounds}"
            raise ValueError(f"match.spatial.affine_rounds and local_rounds are {found}; at least 1 and 0 are needed")
        for name in ("prior_mm", "reach"):
            if not getattr(self, name) > 0:
                raise ValueError(f"match.spatial.{name} is {getattr(self, name)}; expected a number above 0")


@dataclass(frozen=True)
class Places:
    """Where ROIs lie in the fixed frame.

    Attributes:
        centroid_mm: float64 [N, 3]. covariance_mm2: float64 [N, 3] (yy, yx, xx).
        track: int32 [N], the track that each belongs to; None where `track_support` is 0.
    """

    centroid_mm: Array
    covariance_mm2: Array
    track: Track | None = None

    def moved(self, matrix: Affine) -> Places:
        """The ROIs under a 4x4 map."""
        centroid = self.centroid_mm @ matrix[:3, :3].T + matrix[:3, 3]
        return Places(centroid, ellipses.transform(self.covariance_mm2, matrix[1:3, 1:3]), self.track)

    def planar(self) -> Float:
        """Centroid and covariance as contiguous rows, which arithmetic goes through fastest: float32 [6, N]."""
        return np.concatenate([self.centroid_mm.T, self.covariance_mm2.T], dtype=np.float32)


def consistent_pairs(
    seeds: Pairs,
    candidates: Callable[[ellipses.Gate], Pairs],
    fixed: Places,
    moving: Places,
    select: Select,
    config: SpatialConfig,
    more: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None,
) -> Staged[tuple[Index, Index, Float, Float, Float]]:
    """Select again under a map estimated from the seeds, in stages.

    Args:
        seeds: moving index, fixed index and similarity of at least three pairs.
        candidates: gives moving index, fixed index and similarity of the pairs that are alike enough, of those that
            a gate lets through.
        fixed, moving: places in the fixed frame, mm.
        select: positions of the pairs that the one-to-one rule takes of scored candidates.
        config: settings.
        more: slices of the moving and of the fixed ROIs, if ROIs left over get a partner that has one already in
            another slice.

    Returns:
        Moving index, fixed index, similarity, score 0..1 and `confidence` of the pairs.
    """
    i, j, score = seeds
    here, there = fixed.centroid_mm, moving.centroid_mm
    first = np.argsort(-score, kind="stable")[:_SEEDS]
    affine = consensus_affine(here[j[first]], there[i[first]], score[first].astype(np.float64), config.prior_mm)
    yield 0
    carried = fixed.moved(affine)
    gate = ellipses.Gate.between(
        there[:, 1:], moving.covariance_mm2, carried.centroid_mm[:, 1:], carried.covariance_mm2, config.min_overlap
    )
    yield 0
    ci, cj, alike = candidates(gate)
    place = moving.planar().take(ci, axis=1)
    rounds = config.affine_rounds + config.local_rounds
    for round_number in range(rounds):
        yield 0
        if round_number:
            weight = score.astype(np.float64)
            affine = robust_affine(here[j], there[i], weight**2, config.prior_mm, iterations=1)
            carried = fixed.moved(affine)
        yield 0
        if round_number >= config.affine_rounds:
            shift = _local_shift(here, j, there[i] - carried.centroid_mm[j], weight, config.reach)
            carried = Places(carried.centroid_mm + shift, carried.covariance_mm2)
        yield 0
        overlap = _overlap(carried, place, cj, config, in_depth=round_number > 0)
        joint = _joint_score(alike, overlap, config)
        yield 0
        near = np.flatnonzero(joint)
        voted = config.track_support if round_number == rounds - 1 else 0.0
        wanted = favour(ci[near], cj[near], joint[near], moving.track, fixed.track, voted)
        best = near[select(ci[near], cj[near], wanted)]
        i, j, score = ci[best], cj[best], joint[best]
        if len(i) < 3:
            break
    if more and len(i) >= 3:
        best = np.concatenate([best, _second_partners(ci, cj, joint, best, *more, config.second)])
    return ci[best], cj[best], alike[best], joint[best], confidence(alike[best], overlap[best], config)


def confidence(alike: Float, overlap: Float, config: SpatialConfig) -> Float:
    """How probable it is that a pair shows the same structure: logistic in similarity and root of overlap, 0..1."""
    base, by_similarity, by_overlap = config.calibration
    logit = base + by_similarity * alike + by_overlap * np.sqrt(overlap)
    return np.asarray(1 / (1 + np.exp(-logit)), np.float32)


def _overlap(carried: Places, moving: Float, j: Index, config: SpatialConfig, in_depth: bool) -> Float:
    """Overlap of the ellipses in plane, less the farther the slice is from the expected one: [n], 0..1.

    Args:
        moving: float32 [6, n], centroid and covariance of each candidate's moving ROI.
    """
    fixed = carried.planar().take(j, axis=1)
    overlap = ellipses.overlap(moving[1:3].T, moving[3:].T, fixed[1:3].T, fixed[3:].T)
    if in_depth and config.depth:
        sigma = config.depth * max(float(np.ptp(moving[0])), 1e-3)
        overlap = overlap * np.exp(-0.5 * ((moving[0] - fixed[0]) / sigma) ** 2)
    return np.asarray(overlap, np.float32)


def _joint_score(alike: Float, overlap: Float, config: SpatialConfig) -> Float:
    """Similarity and overlap in one number, 0 where the overlap is too small."""
    joint = (1 - config.weight) * alike + config.weight * np.sqrt(overlap)
    return np.asarray(np.where(overlap > config.min_overlap, joint, 0), np.float32)


def _second_partners(
    i: Index,
    j: Index,
    score: Float,
    chosen: Index,
    here: npt.NDArray[np.int32],
    there: npt.NDArray[np.int32],
    least: float,
) -> Index:
    """Positions of pairs of ROIs that `chosen` leaves over, with a partner that is free or taken in another slice.

    Where one stack has more slices than the other, a structure has more ROIs in one than in the other; one-to-one
    leaves the surplus unused. No ROI gets a second partner in a slice where it has one, nor more than one.

    Args:
        here, there: slices of the moving and of the fixed ROIs.
    """
    left = score > least
    for roi, slices in ((i, there[j]), (j, here[i])):
        place = roi * (int(slices.max(initial=0)) + 1) + slices
        left &= ~np.isin(place, place[chosen])
    extra = []
    for free, other in ((j, i), (i, j)):
        lone = np.flatnonzero(left & ~np.isin(free, free[chosen]))
        for roi in (free, other):
            lone = lone[best_of_each(roi[lone], score[lone])]
        extra.append(lone)
    return np.unique(np.concatenate(extra))


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
    half = 0.5 * (x * x).sum(axis=1)
    kernel = x @ x[j].T
    kernel -= half[:, None]
    kernel -= half[j]
    np.exp(kernel, out=kernel)
    among, trust = kernel[j], weight
    for _ in range(2):
        shift = _kernel_mean(among, residual, trust)
        error = np.sqrt(((residual - shift) ** 2).sum(axis=1))
        trust = weight / (1 + (error / (2 * middle_value(error) + 1e-3)) ** 2)
    return _kernel_mean(kernel, residual, trust)


def _kernel_mean(kernel: Float, values: Array, weight: Array) -> Array:
    """Weighted mean of `values` under a kernel [N, V], shrunk to zero where little weight is near: [N, 3]."""
    total = kernel @ np.column_stack([weight[:, None] * values, weight]).astype(np.float32)
    return (total[:, :3] / (total[:, 3:] + 1)).astype(np.float64)
