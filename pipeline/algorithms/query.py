"""Where a region of one subject is in every other subject, by prototypes and agreement in space.

The matching of a pair (`pipeline.algorithms.matching`) finds partners for all ROIs; a query asks for those of a few,
so for the rest only a context is matched: ROIs around the region, which say where it is to be expected. Similarity
(Eq. 6), the overlap of the ellipses at the expected place and `confidence` are those of the matching.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import ellipses
from pipeline.algorithms.consistency import SpatialConfig, confidence
from pipeline.algorithms.query_map import Array, Float, Index, consensus_affines, expected_places, mutual_best
from pipeline.algorithms.query_map import robust_affines as robust


@dataclass(frozen=True)
class QueryConfig:
    """Settings of a query; what it shares with the matching is taken from there.

    Attributes:
        context: ROIs around the region that are matched too.
        slice_range: how far apart in depth two slices of like regions may lie, as a share of each volume's depth.
        near: distance at which a partner of a context ROI counts 0.6, as a share of the spread of the regions.
        trials: samples of the consensus affine.
        min_confidence: least confidence of an answer, 0..1.
        relays: surest subjects through which the others are asked once more; None takes as many, 6 at most, as ask
            1,000 subjects in all.
    """

    context: int = 64
    slice_range: float = 0.15
    near: float = 0.5
    trials: int = 32
    min_confidence: float = 0.3
    relays: int | None = None

    def __post_init__(self) -> None:
        if self.context < 4:
            raise ValueError(f"context is {self.context}; a map needs at least 4 ROIs")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence is {self.min_confidence:g}; it must be in [0, 1)")
        if self.relays is not None and self.relays < 0:
            raise ValueError(f"relays is {self.relays}; it must be 0 or more")


@dataclass(frozen=True)
class Regions:
    """Regions of one subject: first those asked for, one per slice, then the context.

    Attributes:
        prototypes: float32 [M, C], unit norm.
        centroid_mm: float64 [M, 3] local (z, y, x).
        covariance_mm2: float64 [M, 3] (yy, yx, xx).
        depth: float64 [M], middle of the slice as a share of the volume's depth, 0..1.
        asked: how many are asked for.
    """

    prototypes: Float
    centroid_mm: Array
    covariance_mm2: Array
    depth: Array
    asked: int


@dataclass(frozen=True)
class Block:
    """The ROIs of B subjects: T in all, one subject after the other; where they lie is padded to N a subject.

    Attributes:
        prototypes: float32 [T, C], unit norm.
        inside: bool [B, N], the ROIs that there are, T of them.
        centroid_mm, covariance_mm2: float64 [B, N, 3], as `Regions`; a covariance of 1, 0, 1 where there is none.
        depth: float64 [B, N], -9 where there is none.
        height_mm: float64 [B], between the outer slices.
    """

    prototypes: Float
    inside: npt.NDArray[np.bool_]
    centroid_mm: Array
    covariance_mm2: Array
    depth: Array
    height_mm: Array


@dataclass(frozen=True)
class Answers:
    """ROIs that show a region asked for, at most one of a slice, by subject and ROI.

    Attributes:
        subject, roi: int64 [n] into a Block.
        region: int64 [n], which of the regions asked for it is most like.
        similarity, overlap, confidence: float32 [n], 0..1.
    """

    subject: Index
    roi: Index
    region: Index
    similarity: Float
    overlap: Float
    confidence: Float


def choose_context(centroid_mm: Array, asked_mm: Array, count: int) -> Index:
    """The `count` ROIs of [N, 3] that lie nearest to any region asked for [q, 3], in units of the ROIs' spread."""
    spread = _spread(centroid_mm)
    apart = ((centroid_mm[:, None] - asked_mm) / spread) ** 2
    distance = apart.sum(axis=-1).min(axis=1)
    return np.asarray(np.argsort(distance, kind="stable")[:count], np.int64)


def region_at_point(centroid_mm: Array, area_mm2: Array, quality: Float, place_mm: Array) -> int:
    """Which of the ROIs [N] that hold a point it stands for best: of good quality, with the point near its middle.

    Args:
        centroid_mm: [N, 2] (y, x).
        area_mm2, quality: [N].
        place_mm: [2] (y, x), the point.
    """
    off = np.sqrt(((centroid_mm - place_mm) ** 2).sum(axis=1) / area_mm2)
    return int(np.argmax(quality * np.exp(-off)))


def answer(regions: Regions, block: Block, epsilon: float, spatial: SpatialConfig, config: QueryConfig) -> Answers:
    """Find the regions in a block of subjects.

    Args:
        epsilon: similarity that a context pair must exceed (Eq. 7).
        spatial: of the matching; its `slack`, `min_overlap`, `weight`, `widening`, `depth`, `reach`, `calibration` and
            `prior_mm` are read.
        config: settings.
    """
    alike = np.zeros((*block.inside.shape, len(regions.depth)), np.float32)
    alike[block.inside] = block.prototypes @ regions.prototypes.T
    apart = np.abs(block.depth.astype(np.float32)[..., None] - regions.depth.astype(np.float32))
    alike *= apart <= config.slice_range * spatial.widening + 1e-6
    matrices, place = _expect(regions, block, alike, apart, epsilon, spatial, config)
    asked = slice(0, regions.asked)
    subject, roi, region = np.nonzero(alike[..., asked] > epsilon - spatial.slack)
    similarity = np.minimum(alike[subject, roi, region], 1)
    shape = _carried_covariance(regions.covariance_mm2[asked], matrices)
    overlap = ellipses.overlap(
        block.centroid_mm[subject, roi, 1:],
        block.covariance_mm2[subject, roi],
        place[subject, region, 1:],
        shape[subject, region],
    )
    if spatial.depth:
        sigma = spatial.depth * np.maximum(block.height_mm, 1e-3)[subject]
        overlap *= np.exp(-0.5 * ((block.centroid_mm[subject, roi, 0] - place[subject, region, 0]) / sigma) ** 2)
    share = np.asarray(overlap, np.float32)
    found = Answers(subject, roi, region, similarity, share, confidence(similarity, share, spatial))
    sure = np.flatnonzero((share > spatial.min_overlap) & (found.confidence >= config.min_confidence))
    return _best_of_each_slice(found, sure, block)


def mean_of_passes(
    row: Index, roi_slice: npt.NDArray[np.integer], subject: Index, confidence: Float, weight: Array, total: float
) -> tuple[Index, Float]:
    """Several answers to one question in one: the ROI of every slice with the best mean confidence.

    Args:
        row: [n] ROI of each answer of all passes, a number that no two ROIs share.
        roi_slice, subject: [n] of the ROI.
        confidence: [n]. weight: [n], of its pass; total: sum over the passes, also those in which a ROI is no answer.

    Returns:
        Positions of the chosen ROIs' surest answers, by subject and slice, and their mean confidences.
    """
    unique, inverse = np.unique(row, return_inverse=True)
    mean = np.bincount(inverse, weight * confidence, minlength=len(unique)) / total
    surest = np.lexsort((-weight * confidence, row))
    first = np.concatenate([[True], np.diff(row[surest]) > 0])[: len(surest)]
    each = surest[first]
    order = np.lexsort((unique, -mean, roi_slice[each], subject[each]))
    same = (np.diff(subject[each][order]) == 0) & (np.diff(roi_slice[each][order]) == 0)
    best = order[np.concatenate([[True], ~same])[: len(order)]]
    return each[best], mean[best].astype(np.float32)


def subject_confidence(subject: Index, area: Array, value: Float, count: int) -> Array:
    """Mean confidence of each subject's answers [n], weighted by their area: [count], 0 where there is none."""
    total, weighted = (np.bincount(subject, w, minlength=count) for w in (area, area * value))
    return np.asarray(weighted / np.maximum(total, 1e-9))


def _expect(
    regions: Regions,
    block: Block,
    alike: Float,
    apart: Float,
    epsilon: float,
    spatial: SpatialConfig,
    config: QueryConfig,
) -> tuple[Array, Array]:
    """The affine of every subject, [B, 4, 4], and where its partners of the regions are expected, [B, M, 3] mm."""
    here, spread = regions.centroid_mm, _spread(regions.centroid_mm)
    best, weight = mutual_best(alike * (apart <= config.slice_range + 1e-6))
    there = np.take_along_axis(block.centroid_mm, best[..., None], axis=1)
    seeds = np.where(weight > epsilon, weight, 0)
    matrices = consensus_affines(here, there, seeds, spatial.prior_mm, config.trials)
    place = here @ np.swapaxes(matrices[:, :3, :3], 1, 2) + matrices[:, None, :3, 3]
    close = _closeness(block.centroid_mm, place, spread * config.near)
    close *= np.float32(spatial.weight)
    close += np.float32(1 - spatial.weight) * alike
    close *= alike > epsilon - spatial.slack
    best, weight = mutual_best(close)
    there = np.take_along_axis(block.centroid_mm, best[..., None], axis=1)
    matrices = robust(here, there, weight**2, spatial.prior_mm, iterations=2)
    return matrices, expected_places(here, there, weight, matrices, spread * spatial.reach)


def _closeness(centroid_mm: Array, place: Array, scale: Array) -> Float:
    """exp(-d^2 / 2) of every ROI [B, N, 3] and every expected place [B, M, 3], mm over `scale` [3]: [B, N, M]."""
    middle = place.mean(axis=1, keepdims=True)
    x, y = (((values - middle) / scale).astype(np.float32) for values in (centroid_mm, place))
    exponent = x @ np.swapaxes(y, 1, 2)
    exponent -= 0.5 * (x * x).sum(axis=-1)[..., None]
    exponent -= 0.5 * (y * y).sum(axis=-1)[:, None]
    return np.asarray(np.exp(exponent, out=exponent))


def _carried_covariance(covariance: Array, matrices: Array) -> Array:
    """Covariances [q, 3] (yy, yx, xx) under the in-plane part of maps [B, 4, 4]: [B, q, 3]."""
    return np.stack([ellipses.transform(covariance, matrix[1:3, 1:3]) for matrix in matrices])


def _best_of_each_slice(found: Answers, sure: Index, block: Block) -> Answers:
    """Of the answers at `sure`, the surest in each slice of each subject, by subject and ROI."""
    depth = block.depth[found.subject[sure], found.roi[sure]]
    order = sure[np.lexsort((found.roi[sure], -found.confidence[sure], depth, found.subject[sure]))]
    subject, depth = found.subject[order], block.depth[found.subject[order], found.roi[order]]
    first = np.ones(len(order), bool)
    first[1:] = (subject[1:] != subject[:-1]) | (depth[1:] != depth[:-1])
    kept = order[first]
    return Answers(**{name: values[kept] for name, values in vars(found).items()})


def _spread(centroid_mm: Array) -> Array:
    """Standard deviation of positions [N, 3] along z and in plane: [3] mm, above 0."""
    spread = np.maximum(centroid_mm.std(axis=0), 1e-3)
    spread[1:] = np.sqrt((spread[1:] ** 2).mean())
    return np.asarray(spread)
