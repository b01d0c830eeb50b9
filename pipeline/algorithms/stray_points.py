"""Voxels away from a fixed boundary where the moved ROI is not as the fixed one.

The fit compares masks near the fixed boundary. A part of a moved ROI that lies further off, or one that reaches too
little far into the fixed ROI, would pull on nothing; these voxels are where it does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.algorithms import fit_loops
from pipeline.algorithms.fit_config import TRUSTED
from pipeline.algorithms.fit_problem import Problem, Triple
from pipeline.algorithms.lattices import Lattices
from pipeline.algorithms.roi_fields import RoiFields, Strays

_LOOKED_AT = 15_000  # voxels of a fit, at most about, when such parts are looked for
_WORTH = 0.005  # of the fixed ROI's voxels, from which a part counts


def differing(
    rois: RoiFields, problems: Sequence[Problem], matrix: Tensor, u: Lattices, band: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Voxels [K] that only the moved ROI has, and that only the fixed one has, `band` h0 from its boundary or more."""
    strides = [_coarse(problem) for problem in problems]
    found = _sampled(rois, problems, matrix, u, strides, band, 0.0, range(len(rois.fit)))
    moved = [each.voxels * float((each.fixed < 0).sum()) for each in found]
    fixed = [each.voxels * float((each.fixed > 0).sum()) for each in found]
    return np.array(moved, np.float32), np.array(fixed, np.float32)


def strays(
    rois: RoiFields, problems: Sequence[Problem], matrix: Tensor, u: Lattices, band: float, stride: int
) -> list[Strays | None]:
    """Where the moved ROI is not as the fixed one or its boundary is near, `band` h0 from the fixed boundary or more.

    Args:
        rois: K.
        problems: B fits.
        matrix, u: the maps.
        band: h0; what is nearer to the fixed boundary is left out.
        stride: of rows and columns.

    Returns:
        For each ROI the samples; None where there is next to nothing.
    """
    sums = np.add(*differing(rois, problems, matrix, u, band))
    sure = rois.confidence.cpu().numpy() >= TRUSTED
    chosen = np.flatnonzero(sure & (sums > _WORTH * rois.count.cpu().numpy()))
    strides = [(1, stride, stride)] * len(problems)
    found: list[Strays | None] = [None] * len(rois.fit)
    for k, each in zip(chosen, _sampled(rois, problems, matrix, u, strides, band, band, chosen), strict=True):
        found[k] = each
    return found


def _coarse(problem: Problem) -> Triple:
    """Strides (z, y, x) of about equal length that leave no more than `_LOOKED_AT` voxels."""
    voxels, axes = np.prod(problem.shape), sum(n > 1 for n in problem.shape)
    length = problem.h0 * max(1.0, voxels / _LOOKED_AT) ** (1 / max(axes, 1))
    z, y, x = (max(1, round(length / step)) for step in problem.spacing_mm)
    return z, y, x


def _sampled(
    rois: RoiFields,
    problems: Sequence[Problem],
    matrix: Tensor,
    u: Lattices,
    strides: Sequence[Triple],
    band: float,
    reach: float,
    chosen: Sequence[int] | npt.NDArray[np.intp] | range,
) -> list[Strays]:
    fit = rois.fit.cpu().numpy()
    moving, base, dims, origin = (t.cpu().numpy() for t in (rois.moving, rois.base, rois.dims, rois.origin))
    places = {b: _positions(problems[b], rois, matrix, u, b, strides[b]) for b in {int(fit[k]) for k in chosen}}
    found = []
    for k in chosen:
        b = int(fit[k])
        place, x, index = places[b]
        distances = moving[base[k] : base[k] + np.prod(dims[k])].reshape(dims[k])
        limits = (np.float32(length * problems[b].h0) for length in (band, reach))
        which, fixed = fit_loops.unlike(place, index, rois.fixed[k], rois.corner[k], distances, origin[k], *limits)
        found.append(Strays(x[which], fixed, float(np.prod(strides[b]))))
    return found


def _positions(
    problem: Problem, rois: RoiFields, matrix: Tensor, u: Lattices, b: int, stride: Triple
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Voxels [P, 3] on a coarse grid, their positions mm, and the moving indices to which they are carried."""
    axes = [np.arange(0, n, step) for n, step in zip(problem.shape, stride, strict=True)]
    place = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    x = np.asarray(place * problem.spacing_mm, np.float32)
    at = (torch.zeros(len(x), dtype=torch.int64), matrix[b : b + 1], u.values[b : b + 1], u.step_mm[b : b + 1])
    y = fit_loops.carry(x, *(np.ascontiguousarray(t.cpu().numpy()) for t in at))
    to_index = rois.to_index[b].cpu().numpy()
    return place, x, np.asarray(y @ to_index[:, :3].T + to_index[:, 3], np.float32)
