"""Fitting displacement fields to matched ROI pairs (section 3.2.2, Eq. 10) by sparse Gauss-Newton steps.

Each ROI is a signed distance map in millimetres, positive inside. With T the current map of fixed positions into
the moving image, every voxel p near a ROI boundary contributes the residual

    r(p) = 4 tau (sigmoid(S_moving(T(p)) / tau) - sigmoid(S_fixed(p) / tau)),

a soft-mask difference whose unit is millimetres at the boundary. The field is refined coarse to fine on cubic
B-spline grids; each step is clamped to a fraction of the control spacing and composed with the field, which keeps
the map one-to-one. This minimises the soft-mask squared error of Eq. 10 and its gradient penalty; the Dice term of
Eq. 10 is not part of the objective and is reported instead. DDF convention: `pipeline.algorithms.warp`.

Fits are computed in batches, which a graphics card needs to be busy and which spare a processor most of the calls.
A fit shares a batch with those whose lattices take the same room, and its result does not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from pipeline.algorithms import roi_fields
from pipeline.algorithms.affine import Affine, nearest_rigid, robust_affine
from pipeline.algorithms.bspline import (
    ControlGrid,
    Lattices,
    Shape,
    Spacing,
    compose,
    control_counts,
    jacobian,
    node_counts,
    resample,
    solve,
)
from pipeline.algorithms.eq10 import polish
from pipeline.algorithms.fit_config import FitConfig, Level
from pipeline.algorithms.lattice import Lattice
from pipeline.algorithms.regularity import SMALLEST_JACOBIAN, orientation_preserving, stays_above, unfolded
from pipeline.algorithms.roi_fields import Points, Problem, Roi, RoiFields, RoiPair

_FEWEST_FOR_AFFINE = 3
_NO_LINEAR_PART_MM = 1e6
_LOSS, _APART = 0.01, 0.05
_SEEN = 16.0  # h0
_ROUNDING = 1e-4  # of a determinant
_REACHES = (1, 2, 3, 4, 6, 8, 12)
_NODES_AT_ONCE = 1 << 18  # of a batch: more no longer fit the cache of a processor


@dataclass(frozen=True)
class FitResult:
    """A fitted field.

    Attributes:
        ddf: float32 [3, D, H, W], mm, pull-back on the fixed grid.
        affine: float64 4x4, the affine part alone: fixed-local to fixed-frame moving position, mm.
        lattice: float32 [3, nz, ny, nx], mm, what the field adds to the affine part at the nodes, linear between them.
        step_mm: distance of the nodes (z, y, x); the first lies on voxel 0, the last on the last voxel or beyond.
        fallback: "none", or the simpler map that was fitted for lack of information: "identity" (no pair);
            "translation" (fewer than three) or "rigid" (centroids on a line) as the affine part; "affine" alone where
            local displacements move the ROIs apart on average or no pair meets, as with contradictory pairs.
        roi_overlap: float32 [K], soft Dice of each pair after the fit, 0..1; 0 for an empty mask.
        damped: whether the affine part, or with `diffeomorphic` the field, had to be drawn back so as not to fold.
    """

    ddf: npt.NDArray[np.float32]
    affine: Affine
    lattice: npt.NDArray[np.float32]
    step_mm: Spacing
    fallback: str
    roi_overlap: npt.NDArray[np.float32]
    damped: bool = False


def fit_ddf(
    pairs: Sequence[RoiPair],
    shape: Shape,
    spacing_mm: Spacing,
    moving_spacing_mm: Spacing,
    moving_to_fixed: Affine,
    config: FitConfig,
    device: str = "cpu",
) -> FitResult:
    """Fit the pull-back DDF that carries the moving ROIs onto the fixed ones; see `fit_ddfs`."""
    problem = Problem(pairs, shape, spacing_mm, moving_spacing_mm, moving_to_fixed)
    return fit_ddfs([problem], config, device)[0]


def fit_ddfs(
    problems: Sequence[Problem], config: FitConfig, device: str = "cpu", nodes_at_once: int = _NODES_AT_ONCE
) -> list[FitResult]:
    """Fit the pull-back DDFs that carry the moving ROIs onto the fixed ones.

    Args:
        problems: ROI pairs and grids, of any sizes.
        config: settings.
        device: torch device of the computation.
        nodes_at_once: lattice nodes that a batch may hold, which bounds its memory to about 300 bytes each.

    Returns:
        For each problem the field, its affine part and what the fit fell back to; never NaN.
    """
    torch.set_flush_denormal(True)  # values that die out away from the ROIs would slow every step tenfold
    results: dict[int, FitResult] = {}
    plans: dict[_Plan, list[int]] = {}
    usable = [_usable(problem) for problem in problems]
    boxes = [_cropped(problem, config.levels) for problem in usable]
    for k, problem in enumerate(usable):
        if problem.pairs:
            plans.setdefault(_plan(boxes[k].problem, config.levels), []).append(k)
        else:
            results[k] = _identity(problem)
    for plan, members in plans.items():
        size = max(1, nodes_at_once // max((math.prod(room.nodes) for _, room in plan), default=1))
        for batch in (members[start : start + size] for start in range(0, len(members), size)):
            results.update(zip(batch, _fit([boxes[k] for k in batch], plan, config, device), strict=True))
    return [_with_empty(results[k], problem) for k, problem in enumerate(problems)]


def _usable(problem: Problem) -> Problem:
    return replace(problem, pairs=[pair for pair in problem.pairs if _holds_something(pair)])


def _holds_something(pair: RoiPair) -> bool:
    return bool(pair.fixed.mask.any() and pair.moving.mask.any())


def _with_empty(result: FitResult, problem: Problem) -> FitResult:
    """The overlap of all pairs, also of those that had to be left out."""
    overlap = np.zeros(len(problem.pairs), np.float32)
    overlap[[_holds_something(pair) for pair in problem.pairs]] = result.roi_overlap
    return replace(result, roi_overlap=overlap)


@dataclass(frozen=True)
class _Box:
    """A problem on the part of the fixed grid that its ROIs see; beyond it the field goes on as at its border.

    Attributes:
        problem: in the frame of the box. whole: as it was given.
        first: voxel (z, y, x) of the fixed grid that is the first of the box.
    """

    problem: Problem
    whole: Problem
    first: Shape


def _cropped(problem: Problem, levels: Sequence[Level]) -> _Box:
    """The box of the fixed ROIs and `_SEEN` h0 around them, beginning on a node of every level."""
    if not problem.pairs:
        return _Box(problem, problem, (0, 0, 0))
    offsets = np.array([pair.fixed.offset for pair in problem.pairs])
    ends = offsets + [pair.fixed.mask.shape for pair in problem.pairs]
    reach = np.ceil(_SEEN * problem.h0 / np.array(problem.spacing_mm)).astype(int)
    steps = [_voxels_per_step(problem, level) for level in levels]
    multiple = np.lcm.reduce(np.array(steps or [(1, 1, 1)]), axis=0)
    first = (offsets.min(0) - reach).clip(min=0) // multiple * multiple
    shape = np.minimum(ends.max(0) + reach, problem.shape) - first
    shift = np.eye(4)
    shift[:3, 3] = -first * problem.spacing_mm
    pairs = [
        replace(pair, fixed=Roi(pair.fixed.mask, _triple(np.subtract(pair.fixed.offset, first))))
        for pair in problem.pairs
    ]
    inside = replace(problem, pairs=pairs, shape=_triple(shape), moving_to_fixed=shift @ problem.moving_to_fixed)
    return _Box(inside, problem, _triple(first))


def _voxels_per_step(problem: Problem, level: Level) -> Shape:
    step_mm = node_counts(problem.shape, problem.spacing_mm, level.stride, problem.h0)[1]
    return _triple(np.rint(np.array(step_mm) / problem.spacing_mm))


def _triple(values: npt.NDArray[Any]) -> Shape:
    z, y, x = (int(value) for value in values)
    return z, y, x


def _uncropped(u: Lattice, affine: Affine, box: _Box) -> tuple[Lattice, Affine]:
    """The field of a box on the whole grid, its values continued, and the affine part in its frame."""
    origin = box.first * np.array(box.whole.spacing_mm)
    matrix = affine.copy()
    matrix[:3, 3] += origin - affine[:3, :3] @ origin
    steps = [round(float(step) / s) for step, s in zip(u.step_mm, box.whole.spacing_mm, strict=True)]
    pads = []
    for n, k, start, size in zip(u.values.shape[1:], steps, box.first, box.whole.shape, strict=True):
        pads.append((start // k, math.ceil((size - 1) / k) + 1 - start // k - n))
    z, y, x = pads
    padded = pad(u.values[None], (*x, *y, *z), mode="replicate")[0]
    return replace(u, values=padded), matrix


@dataclass(frozen=True)
class _Room:
    """Nodes and control points of a level, rounded up so that fits of nearly the same size have the same."""

    nodes: Shape
    controls: Shape


_Plan: TypeAlias = tuple[tuple[Level, _Room], ...]


def _plan(problem: Problem, levels: Sequence[Level]) -> _Plan:
    """The levels for which a pair of the problem votes, and their room."""
    surest = max(pair.confidence for pair in problem.pairs)
    return tuple((level, _room(problem, level)) for level in levels if surest >= level.trust)


def _room(problem: Problem, level: Level) -> _Room:
    counts, step_mm = node_counts(problem.shape, problem.spacing_mm, level.stride, problem.h0)
    nodes = _rounded(counts)
    gaps = [max(level.control * problem.h0, step) for step in step_mm]
    return _Room(nodes, _rounded(control_counts(nodes, [s / g for s, g in zip(step_mm, gaps, strict=True)])))


def _rounded(counts: Shape) -> Shape:
    z, y, x = (n if n == 1 else n + -n % (8 if n > 32 else 4 if n > 8 else 2) for n in counts)
    return z, y, x


def _fit(boxes: Sequence[_Box], plan: _Plan, config: FitConfig, device: str) -> Iterator[FitResult]:
    """Fit problems of the same plan."""
    problems = [box.problem for box in boxes]
    rois = roi_fields.build(problems, device, config.confidence_power)
    simpler = [_determined(part, p.h0) for part, p in zip(_by_fit(rois, rois.fixed_centroid), problems, strict=True)]
    centers = [part.mean(0).cpu().numpy() for part in _by_fit(rois, rois.fixed_centroid)]
    fitted = _fit_affines(rois, config, [problem.shape[0] == 1 for problem in problems], simpler)
    affines, drawn_back = zip(*map(orientation_preserving, fitted, centers), strict=True)
    matrix = torch.as_tensor(np.stack(affines), dtype=torch.float32, device=device)
    still = Lattices.zero((1, 1, 1), [problem.spacing_mm for problem in problems], device)
    u = _fit_levels(rois, problems, matrix, still, plan, config)
    points = rois.points(4, 1, config.points_per_roi)
    overlaps = (_by_fit(rois, _overlap(rois, points, matrix, field, 1.0)) for field in (still, u))
    for k, (before, overlap) in enumerate(zip(*overlaps, strict=True)):
        problem, affine, damped, fallback = problems[k], affines[k], drawn_back[k], simpler[k]
        field = _within(u, k, problem, plan[-1][0] if plan else None)
        if config.objective == "eq10":
            field, overlap = _polished(problem, matrix[k : k + 1], field, config)
        weight = _by_fit(rois, rois.weight)[k]
        gain = (weight * (overlap - before)).sum() / weight.sum()
        if fallback == "none" and (float(gain) < -_LOSS or float(overlap.max()) < _APART):
            field, overlap, fallback = replace(field, values=torch.zeros_like(field.values)), before, "affine"
        if config.diffeomorphic:
            field, changed = unfolded(field, affine, SMALLEST_JACOBIAN)
            damped |= changed
        field, affine = _uncropped(field, affine, boxes[k])
        z, y, x = field.step_mm.tolist()
        nodes, dice = field.values.cpu().numpy(), overlap.cpu().numpy()
        yield FitResult(_dense(field, affine, boxes[k].whole), affine, nodes, (z, y, x), fallback, dice, damped)


def _by_fit(rois: RoiFields, values: Tensor) -> list[Tensor]:
    """A quantity of each ROI [K, ...] by fit."""
    return list(torch.split(values, list(rois.size)))


def _determined(centroids: Tensor, h0: float) -> str:
    """Which map the centroids [K, 3] determine if not an affine: "translation" (too few) or "rigid" (on a line)."""
    if len(centroids) < _FEWEST_FOR_AFFINE:
        return "translation"
    spread = torch.linalg.svdvals(centroids - centroids.mean(0)) / len(centroids) ** 0.5
    return "rigid" if float(spread[1]) < h0 else "none"


def _fit_levels(
    rois: RoiFields, problems: Sequence[Problem], matrix: Tensor, u: Lattices, plan: _Plan, config: FitConfig
) -> Lattices:
    """The fields of all levels, on the lattices of the last one."""
    for level, room in plan:
        steps = [node_counts(p.shape, p.spacing_mm, level.stride, p.h0)[1] for p in problems]
        u = resample(u, Lattices.zero(room.nodes, steps, u.values.device))
        limit = level.points_per_roi or config.points_per_roi
        points = rois.points(level.band or 3 * level.tau + 1, level.points, limit)
        weights = (rois.confidence >= level.trust) * _reweighted(rois, points, matrix, u, level.tau, config.robust)
        u = _fit_level(rois, points, weights, matrix, u, level, room.controls, config)
    return u


def _polished(problem: Problem, matrix: Tensor, u: Lattice, config: FitConfig) -> tuple[Lattice, Tensor]:
    """The field on every voxel after Eq. 10, and the soft Dice of the ROIs."""
    rois = roi_fields.build([problem], matrix.device, config.confidence_power)
    start = u.resampled(_voxels(problem, matrix.device))
    field = polish(rois, matrix, Lattices(start.values[None], start.step_mm[None]), config.eq10)
    overlap = _overlap(rois, rois.points(4, 1, config.points_per_roi), matrix, field, 1.0)
    return Lattice(field.values[0], field.step_mm[0]), overlap


def _within(u: Lattices, k: int, problem: Problem, level: Level | None) -> Lattice:
    """The field of one fit without the nodes that only fill up; of no level, on every voxel."""
    if level is None:
        return _voxels(problem, u.values.device)
    z, y, x = node_counts(problem.shape, problem.spacing_mm, level.stride, problem.h0)[0]
    return Lattice(u.values[k, :, :z, :y, :x], u.step_mm[k])


def _voxels(problem: Problem, device: torch.device) -> Lattice:
    zero = Lattice.voxels(problem.shape, problem.spacing_mm)
    return Lattice(zero.values.to(device), zero.step_mm.to(device))


def _identity(problem: Problem) -> FitResult:
    """The field that moves nothing, on a lattice of the corners."""
    z, y, x = (max(n - 1, 1) * s for n, s in zip(problem.shape, problem.spacing_mm, strict=True))
    corners = np.zeros((3, *(min(n, 2) for n in problem.shape)), np.float32)
    nothing = np.zeros((3, *problem.shape), np.float32)
    return FitResult(nothing, np.eye(4), corners, (z, y, x), "identity", np.zeros(0, np.float32))


def _dense(u: Lattice, affine: Affine, problem: Problem) -> npt.NDArray[np.float32]:
    """The field on every voxel, [3, D, H, W] mm."""
    full = u.resampled(_voxels(problem, u.values.device))
    matrix = torch.as_tensor(affine, dtype=torch.float32, device=u.values.device)
    x = full.points()
    shift = torch.einsum("ij,j...->i...", matrix[:3, :3] - torch.eye(3, device=x.device), x)
    ddf: npt.NDArray[np.float32] = (full.values + shift + matrix[:3, 3, None, None, None]).cpu().numpy()
    return ddf


def _transform(matrix: Tensor, u: Lattices, points: Points) -> Tensor:
    """T(x) = A x + u(x) at the points: [P, 3] mm."""
    return _affine_map(matrix, points) + u.at(points.fit, points.x)


def _affine_map(matrix: Tensor, points: Points) -> Tensor:
    m = matrix[points.fit]
    return (m[:, :3, :3] @ points.x[:, :, None])[:, :, 0] + m[:, :3, 3]


def _fit_affines(rois: RoiFields, config: FitConfig, flat: Sequence[bool], simpler: Sequence[str]) -> list[Affine]:
    """Robust affines of the centroids, refined on the soft masks by damped Gauss-Newton steps."""
    ends = np.cumsum(rois.size)[:-1]
    columns = (t.cpu().numpy().astype(np.float64) for t in (rois.fixed_centroid, rois.moving_centroid, rois.weight))
    fixed, moving, weight = (np.split(values, ends) for values in columns)
    priors = [_NO_LINEAR_PART_MM if name == "translation" else config.affine_prior_mm for name in simpler]
    starts = [robust_affine(*each) for each in zip(fixed, moving, weight, priors, strict=True)]
    for k in (k for k, name in enumerate(simpler) if name == "rigid"):
        starts[k] = nearest_rigid(starts[k], np.average(fixed[k], axis=0, weights=weight[k]))
    if config.affine_iterations == 0:
        return starts
    matrix = torch.as_tensor(np.stack(starts), dtype=torch.float32, device=rois.moving.device)
    points = rois.points(12, 3, config.points_per_roi)
    h0, tau = rois.h0, 4 * rois.h0[points.fit]
    real = (points.share > 0).float()[:, None]
    number = _sum_per_fit(points, real, len(h0))
    center = _sum_per_fit(points, real * points.x, len(h0)) / number
    offset = points.x - center[points.fit]
    scale = (_sum_per_fit(points, real * offset.square(), len(h0)).mean(1) / number[:, 0]).sqrt() + h0
    basis = torch.cat([offset / scale[points.fit, None], torch.ones_like(offset[:, :1])], 1)
    weight_p = rois.weight[points.roi] * points.share
    ridge = torch.stack(
        [
            _affine_ridge(float(w.sum()), prior / float(s), f)
            for w, prior, s, f in zip(weight, priors, scale, flat, strict=True)
        ]
    ).to(matrix)
    for _ in range(config.affine_iterations):
        residual, gradient, _ = rois.residual(points, _affine_map(matrix, points), tau)
        jacobians = (gradient[:, :, None] * basis[:, None, :]).reshape(len(basis), 12)
        weighted = torch.split(jacobians * weight_p[:, None], list(points.count))
        both = torch.split(torch.cat([jacobians, residual[:, None]], 1), list(points.count))
        normal = torch.stack([a.T @ b for a, b in zip(weighted, both, strict=True)])
        step = -torch.linalg.solve(normal[:, :, :12] + ridge, normal[:, :, 12:]).reshape(-1, 3, 4)
        size = step.flatten(1).norm(dim=1).clamp_min(1e-6)
        step = step * torch.clamp(2 * h0 / size, max=1.0)[:, None, None]
        linear = step[:, :, :3] / scale[:, None, None]
        matrix = matrix.clone()
        matrix[:, :3, :3] += linear
        matrix[:, :3, 3] += step[:, :, 3] - (linear @ center[:, :, None])[:, :, 0]
    found = matrix.cpu().numpy().astype(np.float64)
    return [start if name == "rigid" else a for start, name, a in zip(starts, simpler, found, strict=True)]


def _sum_per_fit(points: Points, values: Tensor, fits: int) -> Tensor:
    """Sum a point quantity [P, c] over each fit: [B, c]."""
    return torch.zeros((fits, values.shape[1]), device=values.device).index_add_(0, points.fit, values)


def _affine_ridge(total: float, prior: float, flat: bool) -> Tensor:
    """Damping [12, 12] of the affine step: the linear part by the prior, z not at all moved in a 2D image."""
    ridge = torch.full((3, 4), 1e-2 * total * prior**2)
    ridge[:, 3] = 1e-6 * total
    if flat:
        ridge[0] = 1e9
    return torch.diag(ridge.reshape(12))


def _overlap(rois: RoiFields, points: Points, matrix: Tensor, u: Lattices, tau: float) -> Tensor:
    """Soft Dice of each ROI pair under the current maps, near the boundary: [K], 0..1; tau in h0."""
    softness = tau * rois.h0[points.fit]
    _, _, moved = rois.residual(points, _transform(matrix, u, points), softness)
    fixed = torch.sigmoid(points.fixed / softness)
    products = (moved * fixed, moved * moved, fixed * fixed)
    both, a, b = (rois.sum_per_roi(points, points.share * values) for values in products)
    return 2 * both / (a + b).clamp_min(1e-9)


def _reweighted(rois: RoiFields, points: Points, matrix: Tensor, u: Lattices, tau: float, power: float) -> Tensor:
    """ROI weights lowered where a pair stays apart compared with the better part of the pairs of its fit."""
    if not power:
        return rois.weight
    overlap = _overlap(rois, points, matrix, u, tau)
    typical = torch.stack([part.quantile(0.75) for part in _by_fit(rois, overlap)]).clamp_min(1e-3)
    return rois.weight * torch.clamp(overlap / typical[rois.fit], max=1.0) ** power


def _fit_level(
    rois: RoiFields,
    points: Points,
    weights: Tensor,
    matrix: Tensor,
    u: Lattices,
    level: Level,
    controls: Shape,
    config: FitConfig,
) -> Lattices:
    """Gauss-Newton steps of one level; returns the refined fields on the same lattices."""
    grid = ControlGrid.over(u, level.control * rois.h0, controls)
    tau = level.tau * rois.h0[points.fit]
    cell = u.nearest(points.fit, points.x)
    weight = weights[points.roi] * points.share
    limit = config.step * grid.spacing_mm[:, :, None, None, None]
    linear = matrix[points.fit, :3, :3]
    across = linear[:, 0]
    rows, cols = torch.triu_indices(3, 3)
    moving = torch.ones(len(u.values), dtype=torch.bool, device=matrix.device)
    for _ in range(level.iterations):
        y = _transform(matrix, u, points)
        residual, gradient, _ = rois.residual(points, y, tau)
        slope = (gradient[:, None] @ linear)[:, 0]
        offset, anchor = rois.slice_anchor(points, y, config.slice_weight * weight)
        gain = slope * (residual * weight)[:, None] + across * (offset * anchor)[:, None]
        curvature = slope[:, rows] * slope[:, cols] * weight[:, None]
        curvature = curvature + anchor[:, None] * (across[:, rows] * across[:, cols])
        dense = grid.scatter(cell, torch.cat([gain, curvature], 1))
        d = solve(grid, dense[:, :3], dense[:, 3:], level.smoothness * config.smoothness * rois.h0**2, level.lumped)
        delta = grid.expand(torch.maximum(torch.minimum(d, limit), -limit))
        u = _guarded_step(u, delta, matrix, moving, config.diffeomorphic)
        moving = moving & (delta.abs().flatten(1).amax(1) >= config.settled * rois.h0)
        if not bool(moving.any()):
            break
    return u


def _guarded_step(u: Lattices, delta: Tensor, matrix: Tensor, moving: Tensor, everywhere: bool) -> Lattices:
    """Compose the fits `moving` [B] with delta, damped around the nodes where a field would stop being one-to-one.

    With `everywhere` no position of any cell may fold, either.
    """
    values = u.values
    left = torch.nonzero(moving)[:, 0]
    allowed = (jacobian(u, matrix) - _ROUNDING).clamp(max=SMALLEST_JACOBIAN)
    for reach in _REACHES:
        moved = compose(Lattices(u.values[left], u.step_mm[left]), delta[left], matrix[left])
        bad = jacobian(moved, matrix[left]) < allowed[left]
        damped = bad.flatten(1).any(1)
        good = ~damped
        if everywhere:
            good &= _none_folds(moved, matrix[left])
        values = values.index_copy(0, left[good], moved.values[good])
        left, bad, damped = left[~good], bad[~good], damped[~good]
        if not len(left):
            break
        share = torch.where(damped[:, None, None, None], 1 - _softened(bad, reach), 0.5)
        delta = delta.index_copy(0, left, delta[left] * share[:, None])
    return Lattices(values, u.step_mm)


def _softened(bad: Tensor, reach: int) -> Tensor:
    """One within `reach` nodes of a marked node, falling to zero over as many more: [B, nz, ny, nx]."""
    near = bad.float()
    for axis, n in enumerate(bad.shape[1:]):
        if n > 1:
            near = _along(near, axis, lambda rows: max_pool1d(rows, 4 * reach + 1, 1, 2 * reach))
            near = _along(
                near, axis, lambda rows: avg_pool1d(pad(rows, (reach, reach), mode="replicate"), 2 * reach + 1, 1)
            )
    return near


def _along(values: Tensor, axis: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of rows [N, 1, n] along an axis, 0 to 2, of [B, nz, ny, nx]."""
    moved = values.movedim(axis + 1, -1)
    rows = function(moved.reshape(-1, 1, moved.shape[-1]))
    return rows.reshape(moved.shape).movedim(-1, axis + 1)


def _none_folds(u: Lattices, matrix: Tensor) -> Tensor:
    """Whether the field of each fit keeps its cells from folding anywhere: bool [B]."""
    fields = (Lattice(*each) for each in zip(u.values, u.step_mm, strict=True))
    kept = [stays_above(field, affine, SMALLEST_JACOBIAN) for field, affine in zip(fields, matrix, strict=True)]
    return torch.tensor(kept, device=matrix.device)
