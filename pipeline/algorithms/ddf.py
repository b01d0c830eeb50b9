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
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.algorithms import roi_fields
from pipeline.algorithms.affine import Affine, robust_affine
from pipeline.algorithms.bspline import ControlGrid, Lattice, compose, resample, solve
from pipeline.algorithms.roi_fields import RoiFields, RoiPair


@dataclass(frozen=True)
class Level:
    """One resolution of the fit; lengths in units of the smallest fixed spacing h0.

    Attributes:
        stride: lattice step of the stored field.
        control: control point spacing of the update.
        tau: softness of the masks.
        points: row and column step of the points that vote.
        iterations: Gauss-Newton steps.
    """

    stride: int
    control: float
    tau: float
    iterations: int
    points: int = 1


DEFAULT_LEVELS = (
    Level(4, 16.0, 4.0, 4),
    Level(2, 8.0, 2.0, 6),
    Level(2, 4.0, 1.5, 6),
    Level(1, 3.0, 0.8, 6),
)


@dataclass(frozen=True)
class FitConfig:
    """Settings of the displacement fit.

    Attributes:
        smoothness: weight of the gradient penalty on each update (the lambda of Eq. 10 for the update).
        elastic: weight of the gradient penalty on the whole field.
        step: largest update per iteration, as a fraction of the control spacing.
        affine_iterations: Gauss-Newton steps of the affine part.
        affine_prior_mm: how strongly few or clustered ROIs pull the affine towards a translation.
        robust: exponent by which ROIs that stay apart lose weight from level to level; 0 switches it off.
        slice_weight: weight of the matched slice's position along the through-plane axis.
        levels: coarse to fine.
    """

    smoothness: float = 0.02
    elastic: float = 0.0
    step: float = 0.4
    affine_iterations: int = 12
    affine_prior_mm: float = 20.0
    robust: float = 1.0
    slice_weight: float = 0.05
    levels: tuple[Level, ...] = field(default=DEFAULT_LEVELS)


@dataclass(frozen=True)
class FitResult:
    """A fitted field.

    Attributes:
        ddf: float32 [3, D, H, W], mm, pull-back on the fixed grid.
        affine: float64 4x4, the affine part alone: fixed-local to fixed-frame moving position, mm.
        fallback: "none", or what was fitted instead for lack of ROI pairs: "identity" (no pair), "translation"
            (fewer than three).
        roi_overlap: float32 [K], soft Dice of each pair after the fit, 0..1.
    """

    ddf: npt.NDArray[np.float32]
    affine: Affine
    fallback: str
    roi_overlap: npt.NDArray[np.float32]


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
        pairs: matched ROIs with weights; masks are crops of the fixed and of the moving grid.
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
        return FitResult(np.zeros((3, *shape), np.float32), np.eye(4), "identity", np.zeros(0, np.float32))
    h0 = min(spacing_mm[1:]) if shape[0] == 1 else min(spacing_mm)
    rois = roi_fields.build(pairs, spacing_mm, moving_spacing_mm, moving_to_fixed, h0, device)
    affine = _fit_affine(rois.near(12 * h0, 3), pairs, config, h0, flat=shape[0] == 1)
    u = None
    weights = rois.weight
    for level in config.levels:
        lattice = Lattice.over(shape, spacing_mm, level.stride, h0, device)
        u = lattice.zeros() if u is None else resample(u, lattice)
        weights = _reweighted(rois.near(4 * level.tau * h0, 2), affine, u, level.tau * h0, config.robust)
        u = _fit_level(rois, weights, affine, u, level, config, h0)
    assert u is not None
    overlap = _overlap(rois.near(4 * h0, 2), affine, u, h0)
    full = Lattice.over(shape, spacing_mm, 1, 0.0, device)
    total = resample(u, full).values
    matrix = torch.as_tensor(affine, dtype=torch.float32, device=total.device)
    x = full.points()
    shift = torch.einsum("ij,j...->i...", matrix[:3, :3] - torch.eye(3, device=x.device), x)
    ddf = total + shift + matrix[:3, 3, None, None, None]
    fallback = "none" if len(pairs) >= 3 else "translation"
    return FitResult(ddf.cpu().numpy(), affine, fallback, overlap.cpu().numpy())


def _transform(affine: Tensor, u: Lattice, x: Tensor) -> Tensor:
    """T(x) = A x + u(x) at fixed-local points [P, 3] mm."""
    return x @ affine[:3, :3].T + affine[:3, 3] + u.at(x)


def _fit_affine(
    rois: RoiFields, pairs: Sequence[RoiPair], config: FitConfig, h0: float, flat: bool
) -> Affine:
    """Robust affine of the centroids, refined on the soft masks with the same prior."""
    fixed = rois.fixed_centroid.cpu().numpy().astype(np.float64)
    moving = rois.moving_centroid.cpu().numpy().astype(np.float64)
    weight = rois.weight.cpu().numpy().astype(np.float64)
    prior = 1e6 if len(pairs) < 3 else config.affine_prior_mm
    start = robust_affine(fixed, moving, weight, prior)
    if config.affine_iterations == 0:
        return start
    matrix = torch.as_tensor(start, dtype=torch.float32, device=rois.x.device)
    tau = 4.0 * h0
    center = rois.x.mean(0)
    scale = (rois.x - center).square().mean().sqrt() + h0
    for _ in range(config.affine_iterations):
        y = rois.x @ matrix[:3, :3].T + matrix[:3, 3]
        residual, gradient, _ = rois.residual(y, tau)
        weight_p = (rois.weight / rois.count)[rois.index]
        basis = torch.cat([(rois.x - center) / scale, torch.ones_like(rois.x[:, :1])], 1)
        jacobian = (gradient[:, :, None] * basis[:, None, :]).reshape(len(basis), 12)
        normal = jacobian.T @ (jacobian * weight_p[:, None])
        rhs = jacobian.T @ (residual * weight_p)
        ridge = torch.full((12,), float(rois.weight.sum()) * 1e-3, device=normal.device)
        ridge[[3, 7, 11]] = 1e-6 * float(rois.weight.sum())
        ridge[[0, 1, 2, 4, 5, 6, 8, 9, 10]] *= (prior / float(scale)) ** 2 * 10
        if flat:
            ridge[:4] += 1e9
        step = -torch.linalg.solve(normal + torch.diag(ridge), rhs).reshape(3, 4)
        step = step * torch.clamp(2 * h0 / step.norm().clamp_min(1e-6), max=1.0)
        matrix = matrix.clone()
        matrix[:3, :3] += step[:, :3] / scale
        matrix[:3, 3] += step[:, 3] - step[:, :3] @ center / scale
    return matrix.cpu().numpy().astype(np.float64)


def _overlap(rois: RoiFields, affine: Affine, u: Lattice, tau: float) -> Tensor:
    """Soft Dice of each ROI pair under the current map: [K], 0..1."""
    matrix = torch.as_tensor(affine, dtype=torch.float32, device=rois.x.device)
    _, _, moved = rois.residual(_transform(matrix, u, rois.x), tau)
    fixed = torch.sigmoid(rois.fixed / tau)
    both = rois.sum_per_roi(moved * fixed)
    return 2 * both / (rois.sum_per_roi(moved * moved) + rois.sum_per_roi(fixed * fixed)).clamp_min(1e-6)


def _reweighted(rois: RoiFields, affine: Affine, u: Lattice, tau: float, power: float) -> Tensor:
    """ROI weights lowered where a pair stays apart compared with the better half of the pairs."""
    overlap = _overlap(rois, affine, u, tau)
    typical = overlap.quantile(0.75).clamp_min(1e-3)
    return rois.weight * torch.clamp(overlap / typical, max=1.0) ** power if power else rois.weight


def _fit_level(
    rois: RoiFields, weights: Tensor, affine: Affine, u: Lattice, level: Level, config: FitConfig, h0: float
) -> Lattice:
    """Gauss-Newton steps of one level; returns the refined field on the same lattice."""
    tau = level.tau * h0
    near = rois.near(3 * tau + h0, level.points)
    grid = ControlGrid.over(u, level.control * h0)
    matrix = torch.as_tensor(affine, dtype=torch.float32, device=near.x.device)
    cell = u.nearest(near.x)
    point_weight = (weights / near.count)[near.index]
    for _ in range(level.iterations):
        y = _transform(matrix, u, near.x)
        residual, gradient, _ = near.residual(y, tau)
        jacobian = gradient @ matrix[:3, :3]
        gain, curvature = near.normal_equations(jacobian, residual, point_weight, y, config.slice_weight, matrix)
        g, h = grid.gather(cell, gain, curvature)
        if config.elastic:
            g = g + config.elastic * h0**2 * grid.laplacian_of(u)
        d = solve(grid, g, h, (config.smoothness + config.elastic) * h0**2)
        limit = config.step * grid.spacing_mm[:, None, None, None]
        u = compose(u, grid.expand(torch.clamp(d, -limit, limit)), matrix)
    return u
