"""Fitting a displacement field to matched ROI pairs (section 3.2.2, Eq. 10) by sparse Gauss-Newton steps.

Each ROI is a signed distance map in millimetres, positive inside. With T the current map of fixed positions into
the moving image, every voxel p near a ROI boundary contributes the residual

    r(p) = 4 tau (sigmoid(S_moving(T(p)) / tau) - sigmoid(S_fixed(p) / tau)),

a soft-mask difference whose unit is millimetres at the boundary. The field is refined coarse to fine on cubic
B-spline grids; each step is clamped to a fraction of the control spacing and composed with the field, which keeps
the map one-to-one. This minimises the soft-mask squared error of Eq. 10 and its gradient penalty; the Dice term of
Eq. 10 is not part of the objective and is reported instead. DDF convention: `pipeline.algorithms.warp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.algorithms import roi_fields
from pipeline.algorithms.affine import Affine, robust_affine
from pipeline.algorithms.bspline import ControlGrid, Lattice, compose, resample, smallest_jacobian, solve
from pipeline.algorithms.fit_config import FitConfig, Level
from pipeline.algorithms.regularity import SMALLEST_JACOBIAN, orientation_preserving, stays_above, unfolded
from pipeline.algorithms.roi_fields import Points, RoiFields, RoiPair

_FEWEST_FOR_AFFINE = 3
_NO_LINEAR_PART_MM = 1e6
_HALVINGS = 4


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
    step_mm: tuple[float, float, float]
    fallback: str
    roi_overlap: npt.NDArray[np.float32]
    damped: bool = False


def fit_ddf(
    pairs: Sequence[RoiPair],
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    moving_spacing_mm: tuple[float, float, float],
    moving_to_fixed: Affine,
    config: FitConfig,
    device: str = "cpu",
) -> FitResult:
    """Fit the pull-back DDF that carries the moving ROIs onto the fixed ones.

    Args:
        pairs: matched ROIs with their confidence; masks are crops of the fixed and of the moving grid.
        shape: fixed grid (D, H, W).
        spacing_mm: fixed spacing (z, y, x).
        moving_spacing_mm: moving spacing (z, y, x).
        moving_to_fixed: 4x4, moving-local mm to fixed-local mm.
        config: settings.
        device: torch device of the computation.

    Returns:
        The field, its affine part and what the fit fell back to; never NaN.
    """
    if not pairs:
        return _identity(shape, spacing_mm)
    h0 = min(spacing_mm[1:]) if shape[0] == 1 else min(spacing_mm)
    rois = roi_fields.build(pairs, spacing_mm, moving_spacing_mm, moving_to_fixed, h0, device, config.confidence_power)
    affine, damped = orientation_preserving(
        _fit_affine(rois, config, h0, flat=shape[0] == 1), rois.fixed_centroid.mean(0).cpu().numpy()
    )
    u = None
    weights = rois.weight
    for level in config.levels:
        lattice = Lattice.over(shape, spacing_mm, level.stride, h0, device)
        u = lattice.zeros() if u is None else resample(u, lattice)
        points = rois.points((3 * level.tau + 1) * h0, level.points, config.points_per_roi)
        weights = _reweighted(rois, points, affine, u, level.tau * h0, config.robust)
        u = _fit_level(rois, points, weights, affine, u, level, config, h0)
    assert u is not None
    if config.diffeomorphic:
        u, changed = unfolded(u, affine, SMALLEST_JACOBIAN)
        damped |= changed
    overlap = _overlap(rois, rois.points(4 * h0, 1, config.points_per_roi), affine, u, h0)
    full = Lattice.over(shape, spacing_mm, 1, 0.0, device)
    total = resample(u, full).values
    matrix = torch.as_tensor(affine, dtype=torch.float32, device=total.device)
    at = full.points()
    shift = torch.einsum("ij,j...->i...", matrix[:3, :3] - torch.eye(3, device=at.device), at)
    ddf = total + shift + matrix[:3, 3, None, None, None]
    fallback = "none" if len(pairs) >= _FEWEST_FOR_AFFINE else "translation"
    z, y, x = u.step_mm.tolist()
    nodes, dense, dice = (t.cpu().numpy() for t in (u.values, ddf, overlap))
    return FitResult(dense, affine, nodes, (z, y, x), fallback, dice, damped)


def _identity(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> FitResult:
    """The field that moves nothing, on a lattice of the corners."""
    z, y, x = (max(n - 1, 1) * s for n, s in zip(shape, spacing_mm, strict=True))
    corners = np.zeros((3, *(min(n, 2) for n in shape)), np.float32)
    nothing = np.zeros((3, *shape), np.float32)
    return FitResult(nothing, np.eye(4), corners, (z, y, x), "identity", np.zeros(0, np.float32))


def _transform(affine: Tensor, u: Lattice, x: Tensor) -> Tensor:
    """T(x) = A x + u(x) at fixed-local points [P, 3] mm."""
    return x @ affine[:3, :3].T + affine[:3, 3] + u.at(x)


def _fit_affine(rois: RoiFields, config: FitConfig, h0: float, flat: bool) -> Affine:
    """Robust affine of the centroids, refined on the soft masks by damped Gauss-Newton steps."""
    fixed, moving, weight = (
        t.cpu().numpy().astype(np.float64) for t in (rois.fixed_centroid, rois.moving_centroid, rois.weight)
    )
    few = len(weight) < _FEWEST_FOR_AFFINE
    prior = _NO_LINEAR_PART_MM if few else config.affine_prior_mm
    start = robust_affine(fixed, moving, weight, prior)
    if config.affine_iterations == 0:
        return start
    matrix = torch.as_tensor(start, dtype=torch.float32, device=rois.moving.device)
    tau = 4.0 * h0
    points = rois.points(12 * h0, 3, config.points_per_roi)
    center = points.x.mean(0)
    scale = (points.x - center).square().mean().sqrt() + h0
    basis = torch.cat([(points.x - center) / scale, torch.ones_like(points.x[:, :1])], 1)
    weight_p = rois.weight[points.index] * points.share
    ridge = _affine_ridge(float(rois.weight.sum()), prior / float(scale), flat, matrix)
    for _ in range(config.affine_iterations):
        y = points.x @ matrix[:3, :3].T + matrix[:3, 3]
        residual, gradient, _ = rois.residual(points, y, tau)
        jacobian = (gradient[:, :, None] * basis[:, None, :]).reshape(len(basis), 12)
        normal = jacobian.T @ (jacobian * weight_p[:, None])
        step = -torch.linalg.solve(normal + ridge, jacobian.T @ (residual * weight_p)).reshape(3, 4)
        step = step * torch.clamp(2 * h0 / step.norm().clamp_min(1e-6), max=1.0)
        matrix = matrix.clone()
        matrix[:3, :3] += step[:, :3] / scale
        matrix[:3, 3] += step[:, 3] - step[:, :3] @ center / scale
    return matrix.cpu().numpy().astype(np.float64)


def _affine_ridge(total: float, prior: float, flat: bool, like: Tensor) -> Tensor:
    """Damping [12, 12] of the affine step: the linear part by the prior, z not at all moved in a 2D image."""
    ridge = torch.full((3, 4), 1e-2 * total * prior**2)
    ridge[:, 3] = 1e-6 * total
    if flat:
        ridge[0] = 1e9
    return torch.diag(ridge.reshape(12)).to(like)


def _overlap(rois: RoiFields, points: Points, affine: Affine, u: Lattice, tau: float) -> Tensor:
    """Soft Dice of each ROI pair under the current map, near the boundary: [K], 0..1."""
    matrix = torch.as_tensor(affine, dtype=torch.float32, device=points.x.device)
    _, _, moved = rois.residual(points, _transform(matrix, u, points.x), tau)
    fixed = torch.sigmoid(points.fixed / tau)
    both, a, b = (rois.sum_per_roi(points, v) for v in (moved * fixed, moved * moved, fixed * fixed))
    return 2 * both / (a + b).clamp_min(1e-6)


def _reweighted(rois: RoiFields, points: Points, affine: Affine, u: Lattice, tau: float, power: float) -> Tensor:
    """ROI weights lowered where a pair stays apart compared with the better part of the pairs."""
    if not power:
        return rois.weight
    overlap = _overlap(rois, points, affine, u, tau)
    typical = overlap.quantile(0.75).clamp_min(1e-3)
    return rois.weight * torch.clamp(overlap / typical, max=1.0) ** power


def _fit_level(
    rois: RoiFields,
    points: Points,
    weights: Tensor,
    affine: Affine,
    u: Lattice,
    level: Level,
    config: FitConfig,
    h0: float,
) -> Lattice:
    """Gauss-Newton steps of one level; returns the refined field on the same lattice."""
    tau = level.tau * h0
    grid = ControlGrid.over(u, level.control * h0)
    matrix = torch.as_tensor(affine, dtype=torch.float32, device=points.x.device)
    cell = u.nearest(points.x)
    weight = weights[points.index] * points.share
    limit = config.step * grid.spacing_mm[:, None, None, None]
    rows, cols = torch.triu_indices(3, 3)
    for _ in range(level.iterations):
        y = _transform(matrix, u, points.x)
        residual, gradient, _ = rois.residual(points, y, tau)
        jacobian = gradient @ matrix[:3, :3]
        offset, anchor = rois.slice_anchor(points, y, config.slice_weight * weight)
        across = matrix[0, :3]
        gain = jacobian * (residual * weight)[:, None] + across * (offset * anchor)[:, None]
        curvature = jacobian[:, rows] * jacobian[:, cols] * weight[:, None]
        curvature = curvature + anchor[:, None] * (across[rows] * across[cols])
        g, h = grid.gather(cell, gain, curvature)
        d = solve(grid, g, h, config.smoothness * h0**2)
        u = _guarded_step(u, grid.expand(torch.clamp(d, -limit, limit)), matrix, config.diffeomorphic)
    return u


def _guarded_step(u: Lattice, delta: Tensor, matrix: Tensor, everywhere: bool) -> Lattice:
    """Compose with the largest of delta, delta / 2, delta / 4 ... that folds no node, or no position of any cell."""
    for _ in range(_HALVINGS):
        moved = compose(u, delta, matrix)
        if smallest_jacobian(moved, matrix) > SMALLEST_JACOBIAN and (
            not everywhere or stays_above(moved, matrix, SMALLEST_JACOBIAN)
        ):
            return moved
        delta = delta / 2
    return u
