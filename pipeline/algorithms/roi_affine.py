"""The affine part of a fit: robust on the centroids of the ROIs, then refined on their soft masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.algorithms import fit_loops
from pipeline.algorithms.affine import Affine, nearest_rigid, robust_affine
from pipeline.algorithms.compiled import runs_compiled
from pipeline.algorithms.fit_config import FitConfig
from pipeline.algorithms.roi_fields import Points, RoiFields

_FEWEST_FOR_AFFINE = 3
_TOGETHER = 4000  # points of a fit, which are plenty for an affine
_NO_LINEAR_PART_MM = 1e6


def simpler_map(centroids: Tensor, h0: float) -> str:
    """Which map the centroids [K, 3] determine if not an affine: "translation" (too few) or "rigid" (on a line)."""
    if len(centroids) < _FEWEST_FOR_AFFINE:
        return "translation"
    spread = torch.linalg.svdvals(centroids - centroids.mean(0)) / len(centroids) ** 0.5
    return "rigid" if float(spread[1]) < h0 else "none"


def affine_map(matrix: Tensor, points: Points) -> Tensor:
    """A x at the points, with the affine [B, 4, 4] of their fit: [P, 3] mm."""
    if runs_compiled(points.x):
        nothing = torch.zeros((len(matrix), 3, 1, 1, 1))
        arrays = (points.x, points.fit, matrix, nothing, torch.ones((len(matrix), 3)))
        return torch.from_numpy(fit_loops.carry(*(t.numpy() for t in arrays)))
    m = matrix[points.fit]
    return (m[:, :3, :3] @ points.x[:, :, None])[:, :, 0] + m[:, :3, 3]


def fit_affines(rois: RoiFields, config: FitConfig, flat: Sequence[bool], simpler: Sequence[str]) -> list[Affine]:
    """Robust affines of the centroids, refined on the soft masks by damped Gauss-Newton steps.

    Args:
        rois: of B fits.
        config: settings.
        flat: [B], whether the fixed image is a single slice, where nothing moves along z.
        simpler: [B], see `simpler_map`.

    Returns:
        B affines 4x4, fixed-local to fixed-frame moving position, mm.
    """
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
    points = rois.points(12, 3, config.points_per_roi, together=_TOGETHER)
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
        residual, gradient, _ = rois.residual(points, affine_map(matrix, points), tau)
        normal = _normal(points, basis, residual, gradient, weight_p, len(h0))
        step = -torch.linalg.solve(normal[:, :, :12] + ridge, normal[:, :, 12:]).reshape(-1, 3, 4)
        size = step.flatten(1).norm(dim=1).clamp_min(1e-6)
        step = step * torch.clamp(2 * h0 / size, max=1.0)[:, None, None]
        linear = step[:, :, :3] / scale[:, None, None]
        matrix = matrix.clone()
        matrix[:, :3, :3] += linear
        matrix[:, :3, 3] += step[:, :, 3] - (linear @ center[:, :, None])[:, :, 0]
    found = matrix.cpu().numpy().astype(np.float64)
    return [start if name == "rigid" else a for start, name, a in zip(starts, simpler, found, strict=True)]


def _normal(points: Points, basis: Tensor, residual: Tensor, gradient: Tensor, weight: Tensor, fits: int) -> Tensor:
    """Normal matrix and gradient of the 12 entries of each fit's affine, row by row: [B, 12, 13]."""
    if runs_compiled(residual):
        arrays = (t.numpy() for t in (basis, residual, gradient, weight, points.fit))
        return torch.from_numpy(fit_loops.affine_votes(*arrays, fits))
    jacobians = (gradient[:, :, None] * basis[:, None, :]).reshape(len(basis), 12)
    weighted = torch.split(jacobians * weight[:, None], list(points.count))
    both = torch.split(torch.cat([jacobians, residual[:, None]], 1), list(points.count))
    return torch.stack([a.T @ b for a, b in zip(weighted, both, strict=True)])


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
