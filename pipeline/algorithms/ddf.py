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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.algorithms import roi_fields
from pipeline.algorithms.affine import Affine, robust_affine
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
from pipeline.algorithms.fit_config import FitConfig, Level
from pipeline.algorithms.lattice import Lattice
from pipeline.algorithms.regularity import SMALLEST_JACOBIAN, orientation_preserving, stays_above, unfolded
from pipeline.algorithms.roi_fields import Points, Problem, RoiFields, RoiPair

_FEWEST_FOR_AFFINE = 3
_NO_LINEAR_PART_MM = 1e6
_HALVINGS = 4
_NODES_AT_ONCE = 1 << 18  # of a batch: more no longer fit the cache of a processor


@dataclass(frozen=True)
class FitResult:
    """A fitted field.

    Attributes:
        ddf: float32 [3, D, H, W], mm, pull-back on the fixed grid.
        affine: float64 4x4, the affine part alone: fixed-local to fixed-frame moving position, mm.
        lattice: float32 [3, nz, ny, nx], mm, what the field adds to the affine part at the nodes, linear between them.
        step_mm: distance of the nodes (z, y, x); the first lies on voxel 0, the last on the last voxel or beyond.
        fallback: "none", or what was fitted instead for lack of ROI pairs: "identity" (no pair), "translation"
            (fewer than three).
        roi_overlap: float32 [K], soft Dice of each pair after the fit, 0..1.
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
    results: dict[int, FitResult] = {}
    rooms: dict[tuple[_Room, ...], list[int]] = {}
    for k, problem in enumerate(problems):
        if problem.pairs:
            rooms.setdefault(tuple(_room(problem, level) for level in config.levels), []).append(k)
        else:
            results[k] = _identity(problem)
    for room, members in rooms.items():
        size = max(1, nodes_at_once // max(int(np.prod(level.nodes)) for level in room))
        for batch in (members[start : start + size] for start in range(0, len(members), size)):
            results.update(zip(batch, _fit([problems[k] for k in batch], room, config, device), strict=True))
    return [results[k] for k in range(len(problems))]


@dataclass(frozen=True)
class _Room:
    """Nodes and control points of a level, rounded up so that fits of nearly the same size have the same."""

    nodes: Shape
    controls: Shape


def _room(problem: Problem, level: Level) -> _Room:
    counts, step_mm = node_counts(problem.shape, problem.spacing_mm, level.stride, problem.h0)
    nodes = _rounded(counts)
    gaps = [max(level.control * problem.h0, step) for step in step_mm]
    return _Room(nodes, _rounded(control_counts(nodes, [s / g for s, g in zip(step_mm, gaps, strict=True)])))


def _rounded(counts: Shape) -> Shape:
    z, y, x = (n if n == 1 else n + -n % (8 if n > 32 else 4 if n > 8 else 2) for n in counts)
    return z, y, x


def _fit(problems: Sequence[Problem], room: Sequence[_Room], config: FitConfig, device: str) -> Iterator[FitResult]:
    """Fit problems whose lattices take the same room."""
    rois = roi_fields.build(problems, device, config.confidence_power)
    centers = (part.mean(0).cpu().numpy() for part in torch.split(rois.fixed_centroid, list(rois.size)))
    fitted = _fit_affines(rois, config, flat=[problem.shape[0] == 1 for problem in problems])
    affines, damped = zip(*map(orientation_preserving, fitted, centers), strict=True)
    matrix = torch.as_tensor(np.stack(affines), dtype=torch.float32, device=device)
    u: Lattices | None = None
    for level, space in zip(config.levels, room, strict=True):
        steps = [node_counts(p.shape, p.spacing_mm, level.stride, p.h0)[1] for p in problems]
        lattice = Lattices.zero(space.nodes, steps, device)
        u = lattice if u is None else resample(u, lattice)
        points = rois.points(3 * level.tau + 1, level.points, config.points_per_roi)
        weights = _reweighted(rois, points, matrix, u, level.tau, config.robust)
        u = _fit_level(rois, points, weights, matrix, u, level, space.controls, config)
    assert u is not None
    fields = [_within(u, k, problem, config.levels[-1]) for k, problem in enumerate(problems)]
    if config.diffeomorphic:
        kept = [unfolded(field, affine, SMALLEST_JACOBIAN) for field, affine in zip(fields, affines, strict=True)]
        fields, damped = [field for field, _ in kept], tuple(a or b for a, (_, b) in zip(damped, kept, strict=True))
    overlap = rois.split(_overlap(rois, rois.points(4, 1, config.points_per_roi), matrix, u, 1.0).tolist())
    for k, (problem, field, affine) in enumerate(zip(problems, fields, affines, strict=True)):
        fallback = "none" if len(problem.pairs) >= _FEWEST_FOR_AFFINE else "translation"
        z, y, x = field.step_mm.tolist()
        nodes, dice = field.values.cpu().numpy(), np.array(overlap[k], np.float32)
        yield FitResult(_dense(field, affine, problem), affine, nodes, (z, y, x), fallback, dice, damped[k])


def _within(u: Lattices, k: int, problem: Problem, level: Level) -> Lattice:
    """The field of one fit without the nodes that only fill up."""
    z, y, x = node_counts(problem.shape, problem.spacing_mm, level.stride, problem.h0)[0]
    return Lattice(u.values[k, :, :z, :y, :x], u.step_mm[k])


def _identity(problem: Problem) -> FitResult:
    """The field that moves nothing, on a lattice of the corners."""
    z, y, x = (max(n - 1, 1) * s for n, s in zip(problem.shape, problem.spacing_mm, strict=True))
    corners = np.zeros((3, *(min(n, 2) for n in problem.shape)), np.float32)
    nothing = np.zeros((3, *problem.shape), np.float32)
    return FitResult(nothing, np.eye(4), corners, (z, y, x), "identity", np.zeros(0, np.float32))


def _dense(u: Lattice, affine: Affine, problem: Problem) -> npt.NDArray[np.float32]:
    """The field on every voxel, [3, D, H, W] mm."""
    voxels = Lattice.voxels(problem.shape, problem.spacing_mm)
    full = u.resampled(Lattice(voxels.values.to(u.values), voxels.step_mm.to(u.values)))
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


def _fit_affines(rois: RoiFields, config: FitConfig, flat: Sequence[bool]) -> list[Affine]:
    """Robust affines of the centroids, refined on the soft masks by damped Gauss-Newton steps."""
    ends = np.cumsum(rois.size)[:-1]
    columns = (t.cpu().numpy().astype(np.float64) for t in (rois.fixed_centroid, rois.moving_centroid, rois.weight))
    fixed, moving, weight = (np.split(values, ends) for values in columns)
    priors = [config.affine_prior_mm if n >= _FEWEST_FOR_AFFINE else _NO_LINEAR_PART_MM for n in rois.size]
    starts = [robust_affine(*each) for each in zip(fixed, moving, weight, priors, strict=True)]
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
    return list(matrix.cpu().numpy().astype(np.float64))


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
    typical = torch.stack([part.quantile(0.75) for part in torch.split(overlap, list(rois.size))]).clamp_min(1e-3)
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
    for _ in range(level.iterations):
        y = _transform(matrix, u, points)
        residual, gradient, _ = rois.residual(points, y, tau)
        slope = (gradient[:, None] @ linear)[:, 0]
        offset, anchor = rois.slice_anchor(points, y, config.slice_weight * weight)
        gain = slope * (residual * weight)[:, None] + across * (offset * anchor)[:, None]
        curvature = slope[:, rows] * slope[:, cols] * weight[:, None]
        curvature = curvature + anchor[:, None] * (across[:, rows] * across[:, cols])
        g, h = grid.gather(cell, gain, curvature)
        d = solve(grid, g, h, config.smoothness * rois.h0**2)
        delta = grid.expand(torch.maximum(torch.minimum(d, limit), -limit))
        u = _guarded_step(u, delta, matrix, config.diffeomorphic)
    return u


def _guarded_step(u: Lattices, delta: Tensor, matrix: Tensor, everywhere: bool) -> Lattices:
    """Compose with the largest of delta, delta / 2, delta / 4 ... that folds no node, or no position of any cell."""
    values = u.values
    left = torch.arange(len(values), device=values.device)
    for _ in range(_HALVINGS):
        moved = compose(Lattices(u.values[left], u.step_mm[left]), delta[left], matrix[left])
        good = jacobian(moved, matrix[left]).flatten(1).amin(1) > SMALLEST_JACOBIAN
        if everywhere:
            good &= _none_folds(moved, matrix[left])
        values = values.index_copy(0, left[good], moved.values[good])
        left = left[~good]
        if not len(left):
            break
        delta = delta / 2
    return Lattices(values, u.step_mm)


def _none_folds(u: Lattices, matrix: Tensor) -> Tensor:
    """Whether the field of each fit keeps its cells from folding anywhere: bool [B]."""
    fields = (Lattice(*each) for each in zip(u.values, u.step_mm, strict=True))
    kept = [stays_above(field, affine, SMALLEST_JACOBIAN) for field, affine in zip(fields, matrix, strict=True)]
    return torch.tensor(kept, device=matrix.device)
