"""The levels of a fit: clamped Gauss-Newton steps on cubic B-spline grids, see `pipeline.algorithms.ddf`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.algorithms import fit_loops
from pipeline.algorithms.bspline import ControlGrid, control_counts, solve
from pipeline.algorithms.compiled import runs_compiled
from pipeline.algorithms.damping import guarded_step
from pipeline.algorithms.fit_config import TRUSTED, FitConfig, Level
from pipeline.algorithms.fit_problem import Problem
from pipeline.algorithms.lattices import Lattices, Shape, jacobian, node_counts, resample
from pipeline.algorithms.roi_affine import affine_map
from pipeline.algorithms.roi_fields import MARGIN, Points, RoiFields
from pipeline.algorithms.stray_points import differing, strays

_TOGETHER = 320  # ROIs of one slice that have all their points; one of many slices counts for up to 16
_BAND = 6.0  # h0 around the fixed boundary where masks are compared
_BAND_POINTS = 300


@dataclass(frozen=True)
class Room:
    """Nodes and control points of a level, rounded up so that fits of nearly the same size have the same.

    `parts` of the displacement change: those along y and x, or all three.
    """

    nodes: Shape
    controls: Shape
    parts: int


Plan: TypeAlias = tuple[tuple[Level, Room], ...]


def plan_levels(problem: Problem, levels: Sequence[Level]) -> Plan:
    """The levels for which a pair of the problem votes, and their room."""
    surest = max(pair.confidence for pair in problem.pairs)
    return tuple((level, _room(problem, level)) for level in levels if surest >= level.trust)


def _room(problem: Problem, level: Level) -> Room:
    counts, step_mm = node_counts(problem.shape, problem.spacing_mm, level.stride, problem.h0)
    nodes = _rounded(counts)
    gaps = [max(level.control * problem.h0, step) for step in step_mm]
    controls = control_counts(nodes, [s / g for s, g in zip(step_mm, gaps, strict=True)])
    return Room(nodes, _rounded(controls), 2 if problem.in_plane else 3)


def _rounded(counts: Shape) -> Shape:
    fine = 4 if counts[0] == 1 else 1  # empty nodes cost less than another batch in two dimensions
    z, y, x = (n if n == 1 else n + -n % (fine * (8 if n > 32 else 4 if n > 8 else 2)) for n in counts)
    return z, y, x


@dataclass(frozen=True)
class Fitted:
    """Fits that ended at the same level, by their place among the problems; None before the first level."""

    members: list[int]
    field: Lattices
    level: Level | None


def fit_levels(
    rois: RoiFields, problems: Sequence[Problem], matrix: Tensor, plan: Plan, config: FitConfig
) -> list[Fitted]:
    """The fields of all levels.

    Args:
        rois: of the problems.
        problems: B that have the same plan.
        matrix: [B, 4, 4] affines.
        plan: see `plan_levels`.
        config: settings.
    """
    left = Fitted(list(range(len(problems))), still(problems, matrix.device), None)
    done: list[Fitted] = []
    surest = float(rois.confidence.max())
    for level, room in plan:
        if level.below < 1:
            apart = _apart(rois, [problems[k] for k in left.members], matrix, left.field, level)
            met = [k for k in range(len(left.members)) if k not in set(apart)]
            if met:
                done.append(_some(left, met))
            if not apart:
                return done
            if met:
                left, rois, matrix = _some(left, apart), rois.only(apart), matrix[apart]
        members = [problems[k] for k in left.members]
        steps = [node_counts(p.shape, p.spacing_mm, level.stride, p.h0)[1] for p in members]
        u = resample(left.field, Lattices.zero(room.nodes, steps, matrix.device))
        limit = level.points_per_roi or config.points_per_roi
        band = min(3 * level.tau + 1, MARGIN - 1)
        away = strays(rois, members, matrix, u, band, level.points) if surest >= TRUSTED else ()
        points = rois.points(band, level.points, limit, _TOGETHER * limit, max(1, limit // 4), away)
        weights = (rois.confidence >= level.trust) * _reweighted(rois, points, matrix, u, level.tau, config.robust)
        left = Fitted(left.members, _fit_level(rois, points, weights, matrix, u, level, room, config), level)
    return [*done, left]


def still(problems: Sequence[Problem], device: str | torch.device) -> Lattices:
    """Fields that move nothing."""
    return Lattices.zero((1, 1, 1), [problem.spacing_mm for problem in problems], device)


def _some(fits: Fitted, chosen: list[int]) -> Fitted:
    field = Lattices(fits.field.values[chosen], fits.field.step_mm[chosen])
    return Fitted([fits.members[k] for k in chosen], field, fits.level)


def _apart(rois: RoiFields, problems: Sequence[Problem], matrix: Tensor, u: Lattices, level: Level) -> list[int]:
    """The fits that a level is for: those of which a voting ROI has a Dice below `level.below`."""
    points = rois.points(_BAND, 1, _BAND_POINTS)
    distance, _ = rois.sample(points, _transform(matrix, u, points))
    moved, fixed = distance > 0, points.fixed > 0
    voxels = points.share * rois.count[points.roi]
    both, a, b = (rois.sum_per_roi(points, voxels * each) for each in (moved & fixed, moved, fixed))
    more, less = (torch.as_tensor(n, device=a.device) for n in differing(rois, problems, matrix, u, _BAND))
    core = (rois.count - b).clamp_min(0)  # further inside than any point
    dice = 2 * (both + core - less) / (a + more + core - less + rois.count)
    flat = problems[0].shape[0] == 1
    low = (dice < (level.below_flat if flat and level.below_flat else level.below)) & (rois.confidence >= level.trust)
    return [k for k, each in enumerate(rois.by_fit(low)) if bool(each.any())]


def _transform(matrix: Tensor, u: Lattices, points: Points) -> Tensor:
    """T(x) = A x + u(x) at the points: [P, 3] mm."""
    if runs_compiled(u.values):
        arrays = (t.numpy() for t in (points.x, points.fit, matrix, u.values, u.step_mm))
        return torch.from_numpy(fit_loops.carry(*arrays))
    return affine_map(matrix, points) + u.at(points.fit, points.x)


def soft_dice(rois: RoiFields, points: Points, matrix: Tensor, u: Lattices, tau: float) -> Tensor:
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
    overlap = soft_dice(rois, points, matrix, u, tau)
    typical = torch.stack([_upper_quartile(part) for part in rois.by_fit(overlap)]).clamp_min(1e-3)
    return rois.weight * torch.clamp(overlap / typical[rois.fit], max=1.0) ** power


def _upper_quartile(values: Tensor) -> Tensor:
    """As torch.quantile has it, which takes ten times as long for so few."""
    place = 0.75 * (len(values) - 1)
    ordered = values.sort().values
    return torch.lerp(ordered[int(place)], ordered[math.ceil(place)], place - int(place))


def _fit_level(
    rois: RoiFields,
    points: Points,
    weights: Tensor,
    matrix: Tensor,
    u: Lattices,
    level: Level,
    room: Room,
    config: FitConfig,
) -> Lattices:
    """Gauss-Newton steps of one level; returns the refined fields on the same lattices."""
    grid = ControlGrid.over(u, level.control * rois.h0, room.controls)
    tau = level.tau * rois.h0[points.fit]
    weight = weights[points.roi] * points.share
    limit = config.step * grid.spacing_mm[:, -room.parts :, None, None, None]
    moving = torch.ones(len(u.values), dtype=torch.bool, device=matrix.device)
    determinants = jacobian(u, matrix)
    for _ in range(level.iterations):
        votes = _votes(rois, points, matrix, u, grid, tau, weight, config.slice_weight, room.parts)
        d = solve(grid, votes, level.smoothness * config.smoothness * rois.h0**2, level.lumped)
        delta = grid.expand(torch.maximum(torch.minimum(d, limit), -limit))
        delta = pad(delta, (*(0,) * 6, 3 - room.parts, 0))
        u, determinants = guarded_step(u, determinants, delta, matrix, moving, config.diffeomorphic)
        moving = moving & (delta.abs().flatten(1).amax(1) >= config.settled * rois.h0)
        if not bool(moving.any()):
            break
    return u


def _votes(
    rois: RoiFields,
    points: Points,
    matrix: Tensor,
    u: Lattices,
    grid: ControlGrid,
    tau: Tensor,
    weight: Tensor,
    slice_weight: float,
    parts: int,
) -> Tensor:
    """Gradient and curvature of half the weighted squared residuals at the nodes, see `fit_loops.votes`."""
    y = _transform(matrix, u, points)
    if runs_compiled(y):
        distance, slope = rois.sample(points, y)
        anchor, centre_z = rois.slab[points.roi] * slice_weight * weight, rois.moving_centroid[points.roi, 0]
        arrays = (points.x, y, distance, slope, points.fixed, tau, weight, anchor, centre_z, points.fit, matrix)
        return torch.from_numpy(fit_loops.votes(*(t.numpy() for t in (*arrays, u.step_mm)), *u.values.shape[2:], parts))
    linear = matrix[points.fit, :3, 3 - parts : 3]
    across = linear[:, 0]
    rows, cols = torch.triu_indices(parts, parts)
    residual, gradient, _ = rois.residual(points, y, tau)
    slope = (gradient[:, None] @ linear)[:, 0]
    offset, anchor = rois.slice_anchor(points, y, slice_weight * weight)
    gain = slope * (residual * weight)[:, None] + across * (offset * anchor)[:, None]
    curvature = slope[:, rows] * slope[:, cols] * weight[:, None]
    curvature = curvature + anchor[:, None] * (across[:, rows] * across[:, cols])
    return grid.scatter(u.nearest(points.fit, points.x), torch.cat([gain, curvature], 1))
