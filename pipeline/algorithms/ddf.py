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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.algorithms import roi_fields
from pipeline.algorithms.affine import Affine
from pipeline.algorithms.eq10 import polish
from pipeline.algorithms.fit_box import Box, cropped, uncropped
from pipeline.algorithms.fit_config import FitConfig, Level
from pipeline.algorithms.fit_problem import Problem, RoiPair
from pipeline.algorithms.gauss_newton import Fitted, Plan, fit_levels, plan_levels, soft_dice, still
from pipeline.algorithms.lattice import Lattice
from pipeline.algorithms.lattices import Lattices, Shape, Spacing, node_counts
from pipeline.algorithms.regularity import SMALLEST_JACOBIAN, orientation_preserving, unfolded
from pipeline.algorithms.roi_affine import fit_affines, simpler_map
from pipeline.algorithms.roi_fields import RoiFields

_LOSS = 0.01  # of mean soft Dice, that local displacements may cost
_APART = 0.05  # soft Dice below which a pair does not meet
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
    plans: dict[Plan, list[int]] = {}
    usable = [_usable(problem) for problem in problems]
    boxes = [cropped(problem, config.levels) for problem in usable]
    for k, problem in enumerate(usable):
        if problem.pairs:
            plans.setdefault(plan_levels(boxes[k].problem, config.levels), []).append(k)
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


def _fit(boxes: Sequence[Box], plan: Plan, config: FitConfig, device: str) -> Iterator[FitResult]:
    """Fit problems of the same plan."""
    problems = [box.problem for box in boxes]
    rois = roi_fields.build(problems, device, config.confidence_power)
    centroids = rois.by_fit(rois.fixed_centroid)
    simpler = [simpler_map(part, problem.h0) for part, problem in zip(centroids, problems, strict=True)]
    centers = [part.mean(0).cpu().numpy() for part in centroids]
    fitted = fit_affines(rois, config, [problem.shape[0] == 1 for problem in problems], simpler)
    affines, drawn_back = zip(*map(orientation_preserving, fitted, centers), strict=True)
    matrix = torch.as_tensor(np.stack(affines), dtype=torch.float32, device=device)
    results: dict[int, FitResult] = {}
    for group in fit_levels(rois, problems, matrix, plan, config):
        chosen = group.members
        starts = [(boxes[k], simpler[k], affines[k], drawn_back[k]) for k in chosen]
        results.update(zip(chosen, _finished(rois.only(chosen), matrix[chosen], group, starts, config), strict=True))
    return (results[k] for k in range(len(boxes)))


def _finished(
    rois: RoiFields,
    matrix: Tensor,
    group: Fitted,
    starts: Sequence[tuple[Box, str, Affine, bool]],
    config: FitConfig,
) -> Iterator[FitResult]:
    """What becomes of the fields of fits that ended at the same level.

    `starts` has the box of each, what its affine part fell back to, that part, and whether it had to be drawn back.
    """
    points = rois.points(4, 1, config.points_per_roi)
    fields = (still([box.problem for box, *_ in starts], matrix.device), group.field)
    overlaps = (rois.by_fit(soft_dice(rois, points, matrix, field, 1.0)) for field in fields)
    for k, (weight, before, overlap) in enumerate(zip(rois.by_fit(rois.weight), *overlaps, strict=True)):
        box, fallback, affine, damped = starts[k]
        problem = box.problem
        field = _within(group.field, k, problem, group.level)
        if config.objective == "eq10":
            field, overlap = _polished(problem, matrix[k : k + 1], field, config)
        gain = (weight * (overlap - before)).sum() / weight.sum()
        if fallback == "none" and (float(gain) < -_LOSS or float(overlap.max()) < _APART):
            field, overlap, fallback = replace(field, values=torch.zeros_like(field.values)), before, "affine"
        if config.diffeomorphic:
            field, changed = unfolded(field, affine, SMALLEST_JACOBIAN)
            damped |= changed
        field, affine = uncropped(field, affine, box)
        z, y, x = field.step_mm.tolist()
        nodes, dice = field.values.cpu().numpy(), overlap.cpu().numpy()
        yield FitResult(_dense(field, affine, box.whole), affine, nodes, (z, y, x), fallback, dice, damped)


def _polished(problem: Problem, matrix: Tensor, u: Lattice, config: FitConfig) -> tuple[Lattice, Tensor]:
    """The field on every voxel after Eq. 10, and the soft Dice of the ROIs."""
    rois = roi_fields.build([problem], matrix.device, config.confidence_power)
    start = u.resampled(_voxels(problem, matrix.device))
    field = polish(rois, matrix, Lattices(start.values[None], start.step_mm[None]), config.eq10)
    overlap = soft_dice(rois, rois.points(4, 1, config.points_per_roi), matrix, field, 1.0)
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
    full = u.resampled(_voxels(problem, u.values.device)).values
    matrix = torch.as_tensor(affine, dtype=torch.float32, device=full.device)
    change = matrix[:3, :3] - torch.eye(3, device=full.device)
    for axis, (n, step) in enumerate(zip(problem.shape, problem.spacing_mm, strict=True)):
        shift = change[:, axis, None] * (step * torch.arange(n, device=full.device))
        full += shift.reshape(3, *(n if k == axis else 1 for k in range(3)))
    full += matrix[:3, 3, None, None, None]
    ddf: npt.NDArray[np.float32] = full.cpu().numpy()
    return ddf
