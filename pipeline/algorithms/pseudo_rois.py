"""Pseudo-ROI evaluation (Table 2): how well a field carries matched ROIs that it was not fitted to.

The matched pairs are split into folds. For each fold the field is fitted again without its pairs, and without every
pair whose fixed or moving ROI nearly coincides with one of them (same slices: IoU above 0.5, or one inside the other),
and then carries their moving ROIs onto the fixed image. Nothing that is evaluated has entered its fit, but the same
organ in a neighbouring slice may have: the measure is of the field between the ROIs, not of unseen organs.

A pair of slabs is compared in plane: its fixed slice against the moving mask of the matched slice, carried by the
in-plane part of the map at the fixed slice. The matched slices need not lie at the same height, and what becomes of
a slab along z is not known. Pairs of 3D ROIs are compared in 3D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import csgraph

from pipeline.algorithms import metrics, warp
from pipeline.algorithms.ddf import FitResult
from pipeline.algorithms.fit_problem import Problem, Roi, RoiPair, Spacing
from pipeline.algorithms.roi_overlap import Bounds, carried_onto, index_bounds

SAME = 0.5  # IoU above which two ROIs are one found twice
INSIDE = 0.8  # share of the smaller ROI above which it lies in the other
STAGES = ("_before", "_affine", "")


def folds(pairs: Sequence[RoiPair], count: int) -> Iterator[tuple[list[int], list[int]]]:
    """(pairs of the fit, held-out pairs) of each fold; ROIs found twice are held out together.

    Every pair is held out once. Folds whose fit would have no pair are left out.

    Args:
        pairs: matched ROIs.
        count: of folds; as many as there are different ROIs at most.
    """
    sides = [[pair.fixed for pair in pairs], [pair.moving for pair in pairs]]
    fixed, moving = (overlaps(rois) for rois in sides)
    same = (fixed[0] > SAME) | (moving[0] > SAME)
    related = same | (fixed[1] > INSIDE) | (moving[1] > INSIDE)
    _, cluster = csgraph.connected_components(same, directed=False)
    fold = cluster % count
    for number in np.unique(fold):
        held = fold == number
        free = ~related[:, held].any(axis=1)
        if free.any():
            yield np.flatnonzero(free).tolist(), np.flatnonzero(held).tolist()


def overlaps(rois: Sequence[Roi]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """IoU, and share of the smaller ROI that lies in the other, of every two ROIs: float64 [K, K] each."""
    start = np.array([roi.offset for roi in rois]).reshape(-1, 3)
    stop = start + np.array([roi.mask.shape for roi in rois]).reshape(-1, 3)
    size = np.array([roi.mask.sum() for roi in rois], np.float64)
    touching = (np.minimum(stop[:, None], stop) > np.maximum(start[:, None], start)).all(axis=2)
    both = np.diag(size)
    for a, b in np.argwhere(np.triu(touching, 1)):
        both[a, b] = both[b, a] = _shared(rois[a], rois[b])
    return both / (size[:, None] + size - both), both / np.minimum(size[:, None], size)


def _shared(a: Roi, b: Roi) -> int:
    """Voxels that two ROIs of one grid have in common."""
    low = np.maximum(a.offset, b.offset)
    high = np.minimum(np.add(a.offset, a.mask.shape), np.add(b.offset, b.mask.shape))
    parts = [
        roi.mask[tuple(slice(int(s), int(e)) for s, e in zip(low - roi.offset, high - roi.offset, strict=True))]
        for roi in (a, b)
    ]
    return int((parts[0] & parts[1]).sum())


def held_out_columns(
    problem: Problem, fit: Callable[[Problem], FitResult], count: int, has_spacing: bool
) -> dict[str, float]:
    """Columns of the metrics table, see `evaluate_held_out` and `summarise`; none for no folds."""
    return summarise(evaluate_held_out(problem, fit, count), has_spacing) if count else {}


def evaluate_held_out(problem: Problem, fit: Callable[[Problem], FitResult], count: int) -> list[dict[str, float]]:
    """One row per held-out pair: its index as `pair`, `dice{stage}`, `tre_mm{stage}` and `tre_vox{stage}`.

    The stages are `STAGES`. A ROI that a map carries out of the fixed image has Dice 0 and no distance.

    Args:
        problem: of all matched ROIs.
        fit: fits a field to some of them.
        count: of folds, see `folds`.
    """
    rows = []
    for kept, held in folds(problem.pairs, count):
        result = fit(replace(problem, pairs=[problem.pairs[k] for k in kept]))
        fields = (
            np.zeros_like(result.ddf),
            warp.affine_ddf(result.affine, problem.shape, problem.spacing_mm),
            result.ddf,
        )
        grids = problem.spacing_mm, problem.moving_to_fixed, problem.moving_spacing_mm
        maps = [warp.moving_indices(ddf, *grids) for ddf in fields]
        bounded = [(indices, index_bounds(indices)) for indices in maps]
        rows += [{"pair": float(k), **_measure(problem.pairs[k], bounded, problem.spacing_mm)} for k in held]
    return rows


def _measure(pair: RoiPair, maps: Sequence[tuple[warp.Array, Bounds]], spacing_mm: Spacing) -> dict[str, float]:
    row = {}
    for ending, (indices, bounds) in zip(STAGES, maps, strict=True):
        here, there = carried_onto(pair, indices, bounds)
        row[f"dice{ending}"] = metrics.dice(here, there)
        if there.any():
            row[f"tre_mm{ending}"] = metrics.centroid_distance(here, there, spacing_mm)
            row[f"tre_vox{ending}"] = metrics.centroid_distance(here, there, (1.0, 1.0, 1.0))
    return row


def summarise(rows: Sequence[dict[str, float]], has_spacing: bool) -> dict[str, float]:
    """Columns of the metrics table: means over the held-out ROIs, and how many there were."""
    columns: dict[str, float] = {"n_pseudo": len(rows)}
    units = ("tre_mm", "tre_vox") if has_spacing else ("tre_vox",)
    for name in (f"{measure}{ending}" for measure in ("dice", *units) for ending in STAGES):
        values = [row[name] for row in rows if name in row]
        if values:
            columns[f"pseudo_{name}"] = float(np.mean(values))
    return columns
