"""Matched ROIs as signed distance maps at ragged point lists, ready for the fit in `pipeline.algorithms.ddf`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.algorithms import fit_loops
from pipeline.algorithms.compiled import runs_compiled
from pipeline.algorithms.distance_map import signed_distance
from pipeline.algorithms.fit_problem import Problem, Roi

T = TypeVar("T")

MARGIN = 12.0  # h0 around each ROI that its maps reach
_SLICES = 16  # of a volume count when its points are limited
_PER_FIT = 64  # points of a fit are a multiple of it: how a function rounds at the end of an array may differ


@dataclass(frozen=True)
class Points:
    """Voxels near the fixed ROIs' boundaries, the samples of the fits.

    Attributes:
        x: [P, 3] fixed-local mm. fixed: [P] signed distance to the fixed ROI, mm. roi, fit: [P] of each point.
        share: [P] voxels that a point stands for over the voxels of its ROI; 0 for points that only fill up.
        count: points of each fit, which come one fit after the other.
    """

    x: Tensor
    fixed: Tensor
    roi: Tensor
    fit: Tensor
    share: Tensor
    count: tuple[int, ...]


@dataclass(frozen=True)
class Strays:
    """Samples of one ROI away from its fixed boundary, see `pipeline.algorithms.stray_points`.

    Attributes:
        x: [S, 3] fixed-local mm. fixed: [S] signed distance to the fixed ROI, mm; -inf where its map does not reach.
        voxels: that each stands for.
    """

    x: npt.NDArray[np.float32]
    fixed: npt.NDArray[np.float32]
    voxels: float


@dataclass(frozen=True)
class RoiFields:
    """The distance maps of the K ROI pairs of B fits, one fit after the other.

    Attributes:
        fixed: K signed distance maps on crops of the fixed grid, mm. corner: [K, 3] first fixed index of each.
        spacing_mm: [K, 3] (z, y, x) of their fixed grids. unit_mm: [K] h0.
        fit: [K]. size: pairs of each fit. h0: [B] mm.
        weight, confidence: [K]. count: [K] voxels of the fixed ROI, which normalise the ROI's mean error.
        fixed_centroid, moving_centroid: [K, 3] mm, both in the fixed frame.
        moving: flat signed distance maps, mm. base, dims, origin: [K] start, [K, 3] size, [K, 3] first index of each.
        to_index: [B, 3, 4] fixed-frame mm to moving index. slab: [K] whether z is unknown.
        flat: whether all moving ROIs are slabs, so that nothing is interpolated along z.
    """

    fixed: tuple[npt.NDArray[np.float32], ...]
    corner: npt.NDArray[np.int64]
    spacing_mm: npt.NDArray[np.float64]
    unit_mm: npt.NDArray[np.float64]
    fit: Tensor
    size: tuple[int, ...]
    h0: Tensor
    weight: Tensor
    confidence: Tensor
    count: Tensor
    fixed_centroid: Tensor
    moving_centroid: Tensor
    moving: Tensor
    base: Tensor
    dims: Tensor
    origin: Tensor
    to_index: Tensor
    slab: Tensor
    flat: bool

    def points(
        self,
        distance: float,
        stride: int,
        limit: int,
        together: int = sys.maxsize,
        fewest: int = 1,
        strays: Sequence[Strays | None] = (),
    ) -> Points:
        """Voxels within a distance, in h0, of their fixed boundary, on every `stride`-th row and column, and `strays`.

        A ROI with more than about `limit` of them per slice, of `_SLICES` slices at most, is sampled more coarsely, and
        so is each of the many ROIs of a fit that would have more than about `together` of them, down to `fewest` of
        each per slice.
        """
        slices = [min(len(distances), _SLICES) for distances in self.fixed]
        limits = [min(limit, max(together // sum(members), fewest)) for members in self.split(slices) for _ in members]
        found = [self._near(k, distance, stride, each) for k, each in enumerate(limits)]
        for k, stray in enumerate(strays):
            if stray is not None:
                x, fixed, share = found[k]
                more = np.full(len(stray.x), stray.voxels, np.float32)
                found[k] = np.concatenate([x, stray.x]), np.append(fixed, stray.fixed), np.append(share, more)
        count = []
        for members in self.split(range(len(found))):
            total = sum(len(found[k][1]) for k in members)
            x, fixed, share = found[members[-1]]
            rest = np.zeros(-total % _PER_FIT, np.float32)
            found[members[-1]] = (np.pad(x, ((0, len(rest)), (0, 0))), np.append(fixed, rest), np.append(share, rest))
            count.append(total + len(rest))
        x, fixed, share = (np.concatenate(parts) for parts in zip(*found, strict=True))
        device, each = self.moving.device, torch.tensor([len(part) for part, _, _ in found])
        roi = torch.repeat_interleave(torch.arange(len(each)), each).to(device)
        return Points(
            torch.as_tensor(x, dtype=torch.float32, device=device),
            torch.as_tensor(fixed, device=device),
            roi,
            self.fit[roi],
            torch.as_tensor(share, device=device) / self.count[roi],
            tuple(count),
        )

    def _near(
        self, k: int, distance: float, stride: int, limit: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Position [P, 3] mm, signed distance mm and voxels stood for of the points of a ROI."""
        map_mm, reach = self.fixed[k], np.float32(distance * self.unit_mm[k])
        most = limit * min(len(map_mm), _SLICES)
        x, fixed, stride = fit_loops.near(map_mm, self.corner[k], self.spacing_mm[k], stride, reach, most)
        return x, fixed, np.full(len(fixed), stride**2, np.float32)

    def only(self, fits: Sequence[int]) -> RoiFields:
        """The ROIs of some of the fits, in the order given."""
        chosen = [k for members in (self.split(range(len(self.fit)))[fit] for fit in fits) for k in members]
        of_roi = (
            "fit",
            "weight",
            "confidence",
            "count",
            "fixed_centroid",
            "moving_centroid",
            "base",
            "dims",
            "origin",
            "slab",
        )
        parts = {name: getattr(self, name)[chosen] for name in of_roi}
        size = tuple(self.size[fit] for fit in fits)
        parts["fit"] = torch.repeat_interleave(torch.arange(len(fits)), torch.tensor(size)).to(self.fit)
        of_fit = {name: getattr(self, name)[list(fits)] for name in ("h0", "to_index")}
        rows = {name: getattr(self, name)[chosen] for name in ("corner", "spacing_mm", "unit_mm")}
        return replace(self, fixed=tuple(self.fixed[k] for k in chosen), size=size, **parts, **of_fit, **rows)

    def split(self, values: Sequence[T]) -> list[Sequence[T]]:
        """A value of each ROI [K] by fit."""
        ends = np.cumsum(self.size)
        return [values[end - size : end] for end, size in zip(ends, self.size, strict=True)]

    def by_fit(self, values: Tensor) -> list[Tensor]:
        """A quantity of each ROI [K, ...] by fit."""
        return list(torch.split(values, list(self.size)))

    def sum_per_roi(self, points: Points, values: Tensor) -> Tensor:
        """Sum a point quantity [P] over each ROI: [K]."""
        return torch.zeros_like(self.weight).index_add_(0, points.roi, values)

    def residual(self, points: Points, y: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual [P] in mm, its gradient [P, 3] with respect to y, and the soft moved mask [P] at y [P, 3] mm.

        `tau` is [P], mm.
        """
        distance, gradient = self.sample(points, y)
        moved = torch.sigmoid(distance / tau)
        residual = 4 * tau * (moved - torch.sigmoid(points.fixed / tau))
        return residual, gradient * (4 * moved * (1 - moved))[:, None], moved

    def slice_anchor(self, points: Points, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [P] (mm) that pulls slabs to their matched slice, and its weight [P], zero for 3D ROIs."""
        return y[:, 0] - self.moving_centroid[points.roi, 0], self.slab[points.roi] * weight

    def sample(self, points: Points, y: Tensor) -> tuple[Tensor, Tensor]:
        """Linear interpolation of the moving distance map of each point's ROI, and its gradient per mm of y."""
        if runs_compiled(y):
            place = (self.to_index, self.moving, self.base, self.dims, self.origin)
            value, gradient = fit_loops.sample(*(t.numpy() for t in (y, points.roi, points.fit, *place)))
            return torch.from_numpy(value), torch.from_numpy(gradient)
        roi, to_index = points.roi, self.to_index[points.fit]
        position = (to_index[:, :, :3] @ y[:, :, None])[:, :, 0] + to_index[:, :, 3] - self.origin[roi]
        size = self.dims[roi]
        last = (size - 1).to(y)
        low = torch.minimum(position.clamp_min(0).floor(), (last - 1).clamp_min(0))
        fraction = torch.minimum((position - low).clamp(0, 1), last)
        i = low.long()
        row = (self.base[roi] + i[:, 0] * size[:, 1] * size[:, 2]) + i[:, 1] * size[:, 2] + i[:, 2]
        jump = torch.stack([size[:, 1] * size[:, 2], size[:, 2], torch.ones_like(size[:, 2])]) * (size > 1).T
        fz, fy, fx = fraction.T
        plane, slope_y, slope_x = self._bilinear(row, jump[1], jump[2], fy, fx)
        slope_z = torch.zeros_like(plane)
        if not self.flat:
            above, above_y, above_x = self._bilinear(row + jump[0], jump[1], jump[2], fy, fx)
            slope_z = above - plane
            plane = plane + fz * slope_z
            slope_y, slope_x = slope_y + fz * (above_y - slope_y), slope_x + fz * (above_x - slope_x)
        slopes = torch.stack([slope_z, slope_y, slope_x], 1)
        return plane, (slopes[:, None] @ to_index[:, :, :3])[:, 0]

    def _bilinear(
        self, row: Tensor, down: Tensor, right: Tensor, fy: Tensor, fx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value and slopes along y and x of one plane of the flat maps."""
        a, b = self.moving[row], self.moving[row + right]
        c, d = self.moving[row + down], self.moving[row + down + right]
        top, bottom = a + fx * (b - a), c + fx * (d - c)
        return top + fy * (bottom - top), bottom - top, (b - a) + fy * (d - c - b + a)


def build(problems: Sequence[Problem], device: str | torch.device, confidence_power: float) -> RoiFields:
    """Distance maps of all pairs."""
    fixed, corner, moving, dims, origin, here, there, pairs = ([] for _ in range(8))
    for problem in problems:
        linear, shift = problem.moving_to_fixed[:3, :3], problem.moving_to_fixed[:3, 3]
        for pair in problem.pairs:
            pad = _margin(problem.spacing_mm, MARGIN * problem.h0, pair.fixed.mask.shape[0] == 1)
            fixed.append(signed_distance(pair.fixed.mask, problem.spacing_mm, pad))
            corner.append(np.subtract(pair.fixed.offset, pad))
            pad = _margin(problem.moving_spacing_mm, MARGIN * problem.h0, pair.moving.mask.shape[0] == 1)
            moving.append(signed_distance(pair.moving.mask, problem.moving_spacing_mm, pad))
            dims.append(moving[-1].shape)
            origin.append(np.subtract(pair.moving.offset, pad))
            here.append(_centroid(pair.fixed, problem.spacing_mm))
            there.append(linear @ _centroid(pair.moving, problem.moving_spacing_mm) + shift)
            pairs.append(pair)
    sizes = np.array([values.size for values in moving])
    of_fit = np.repeat(np.arange(len(problems)), [len(problem.pairs) for problem in problems])
    h0 = np.array([problem.h0 for problem in problems])

    def real(values: npt.ArrayLike) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float32), device=device)

    def whole(values: npt.ArrayLike) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

    return RoiFields(
        fixed=tuple(fixed),
        corner=np.array(corner),
        spacing_mm=np.array([problem.spacing_mm for problem in problems])[of_fit],
        unit_mm=h0[of_fit],
        fit=whole(of_fit),
        size=tuple(len(problem.pairs) for problem in problems),
        h0=real(h0),
        weight=real([pair.confidence**confidence_power for pair in pairs]),
        confidence=real([pair.confidence for pair in pairs]),
        count=real([pair.fixed.mask.sum() for pair in pairs]),
        fixed_centroid=real(here),
        moving_centroid=real(there),
        moving=real(np.concatenate([values.ravel() for values in moving])),
        base=whole(np.cumsum(sizes) - sizes),
        dims=whole(dims),
        origin=real(np.array(origin)),
        to_index=real([_to_index(problem) for problem in problems]),
        slab=real([pair.moving.mask.shape[0] == 1 for pair in pairs]),
        flat=all(pair.moving.mask.shape[0] == 1 for pair in pairs),
    )


def _to_index(problem: Problem) -> npt.NDArray[np.float64]:
    """[3, 4], fixed-frame mm to moving index."""
    inverse = np.linalg.inv(problem.moving_to_fixed)[:3]
    return np.asarray(inverse / np.asarray(problem.moving_spacing_mm)[:, None])


def _margin(spacing_mm: tuple[float, float, float], margin_mm: float, slab: bool) -> tuple[int, int, int]:
    z, y, x = (int(np.ceil(margin_mm / s)) for s in spacing_mm)
    return (0 if slab else z, y, x)


def _centroid(roi: Roi, spacing_mm: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    return np.asarray((fit_loops.centre(np.ascontiguousarray(roi.mask))[0] + roi.offset) * np.asarray(spacing_mm))
