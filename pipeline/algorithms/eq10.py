"""Eq. 10 to the letter: half the squared error and half the soft Dice loss per ROI, and lambda times ||grad u||^2.

Masks are 0 or 1 and sampled linearly, as in the paper's implementation, and the field moves by Adam on a cubic B-spline
grid, so that nothing but the smoothness term holds it back: it may fold. The squared error of a ROI is a mean over as
many voxels as the ROI has; over the whole image it would vanish for a small ROI. What the penalty holds back is what is
added to the field to start from: of the affine map alone that is the whole displacement, as the equation has it; of a
field of Gauss-Newton steps, held back already, it is the change, so that the ROIs never move apart again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.algorithms.bspline import ControlGrid, control_counts
from pipeline.algorithms.fit_config import Eq10Config
from pipeline.algorithms.lattices import Lattices, Shape
from pipeline.algorithms.roi_fields import Points, RoiFields

_PATIENCE = 15


def polish(rois: RoiFields, matrix: Tensor, u: Lattices, config: Eq10Config) -> Lattices:
    """Lower Eq. 10 from the map A x + u(x) of one fit.

    Args:
        rois: distance maps, whose signs are the masks.
        matrix: [1, 4, 4] affine A.
        u: on every voxel.
        config: settings.

    Returns:
        The field with the lowest loss met, on the same lattice.
    """
    masks, h0 = replace(rois, moving=(rois.moving > 0).float()), float(rois.h0)
    points = rois.points(config.band, 1, config.points_per_roi)
    core = _core(rois, config.band * h0)
    cell = u.nearest(points.fit, points.x)
    affine = points.x @ matrix[0, :3, :3].T + matrix[0, :3, 3]
    grid = ControlGrid.over(u, config.control * rois.h0, _controls(u, config.control * h0))
    coefficients = torch.zeros((1, 3, *(b.shape[2] for b in grid.basis)), device=u.values.device, requires_grad=True)
    adam = torch.optim.Adam([coefficients], lr=config.learning_rate * h0)
    best, kept, waited = torch.inf, u, 0
    for _ in range(config.iterations):
        adam.zero_grad()
        added = grid.expand(coefficients)
        field = u.values + added
        loss = roi_loss(masks, points, core, affine + field[0].flatten(1)[:, cell].T)
        loss = loss + config.smoothness * squared_gradient(added[0], u.step_mm[0])
        if float(loss.detach()) < best - config.settled:
            best, waited = float(loss.detach()), 0
            kept = replace(u, values=field.detach())
        elif (waited := waited + 1) > _PATIENCE:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return kept


def _controls(u: Lattices, control_mm: float) -> Shape:
    steps = u.step_mm[0].tolist()
    z, y, x = u.values.shape[2:]
    return control_counts((z, y, x), [step / max(control_mm, step) for step in steps])


def roi_loss(masks: RoiFields, points: Points, core: Tensor, y: Tensor) -> Tensor:
    """Mean over ROIs, by weight, of half the squared error and half the soft Dice loss (first term of Eq. 10).

    Args:
        masks: whose `moving` maps are the masks themselves, 0 or 1.
        points: voxels near the boundaries.
        core: [K] voxels further inside than any point, taken to be inside both masks.
        y: [P, 3] where the points go, mm.
    """
    moved, _ = masks.sample(points, y)
    fixed = (points.fixed > 0).float()
    voxels = points.share * masks.count[points.roi]
    both, a, b, error = (
        masks.sum_per_roi(points, voxels * v) for v in (moved * fixed, moved, fixed, (moved - fixed).square())
    )
    dice = 2 * (both + core) / (a + b + 2 * core).clamp_min(1e-6)
    return (masks.weight * (0.5 * error / masks.count + 0.5 * (1 - dice))).sum() / masks.weight.sum()


def squared_gradient(values: Tensor, step_mm: Tensor) -> Tensor:
    """Mean over the lattice of ||grad u||^2 for values [3, nz, ny, nx] mm, dimensionless (second term of Eq. 10)."""
    total = values.new_zeros(())
    for axis in range(3):
        if values.shape[axis + 1] > 1:
            total = total + (values.diff(dim=axis + 1) / step_mm[axis]).square().sum(0).mean()
    return total


def _core(rois: RoiFields, band_mm: float) -> Tensor:
    """Voxels of each fixed ROI at least a band from its boundary: [K]."""
    counts = [float((distance >= band_mm).sum()) for distance in rois.fixed]
    return torch.tensor(counts, device=rois.weight.device)
