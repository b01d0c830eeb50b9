"""Matched ROIs as signed distance maps at ragged point lists, ready for the fit in `pipeline.algorithms.ddf`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor


@dataclass(frozen=True)
class Roi:
    """A binary mask as a crop of its image grid.

    Attributes:
        mask: bool [d, h, w]; d = 1 is a slab of one slice, whose shape along z is unknown.
        offset: index (z, y, x) of the crop's first voxel in the image.
    """

    mask: npt.NDArray[np.bool_]
    offset: tuple[int, int, int]


@dataclass(frozen=True)
class RoiPair:
    """One matched pair and its weight (> 0) in the fit."""

    fixed: Roi
    moving: Roi
    weight: float = 1.0


@dataclass(frozen=True)
class RoiFields:
    """K ROI pairs as P fixed points and K moving distance maps.

    Attributes:
        x: [P, 3] fixed-local points, mm. phase: [P, 2] their row and column in the fixed grid. fixed: [P] signed distance to the fixed ROI, mm. index: [P] ROI of a point.
        weight: [K]. count: [K] voxels of the fixed ROI, which normalise the ROI's mean error.
        fixed_centroid, moving_centroid: [K, 3] mm, both in the fixed frame.
        moving: flat signed distance maps, mm. base, dims, origin: [K] start, [K, 3] size, [K, 3] first index of each.
        to_index: [3, 4] fixed-frame mm to moving index. slab: [K] whether z is unknown.
    """

    x: Tensor
    phase: Tensor
    fixed: Tensor
    index: Tensor
    weight: Tensor
    count: Tensor
    fixed_centroid: Tensor
    moving_centroid: Tensor
    moving: Tensor
    base: Tensor
    dims: Tensor
    origin: Tensor
    to_index: Tensor
    slab: Tensor

    def near(self, distance_mm: float, stride: int) -> RoiFields:
        """Only the points within a distance of their fixed boundary, every `stride`-th row and column of them."""
        keep = (self.fixed.abs() < distance_mm) & (self.phase % stride == 0).all(1)
        return replace(
            self, x=self.x[keep], fixed=self.fixed[keep], index=self.index[keep], count=self.count / stride**2
        )

    def sum_per_roi(self, values: Tensor) -> Tensor:
        """Sum a point quantity [P] over each ROI: [K]."""
        return torch.zeros_like(self.weight).index_add_(0, self.index, values)

    def residual(self, y: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        """Residual [P] in mm, its gradient [P, 3] with respect to y, and the soft moved mask [P] at y [P, 3] mm."""
        distance, gradient = self._sample(y)
        moved = torch.sigmoid(distance / tau)
        residual = 4 * tau * (moved - torch.sigmoid(self.fixed / tau))
        return residual, gradient * (4 * moved * (1 - moved))[:, None], moved

    def normal_equations(
        self, jacobian: Tensor, residual: Tensor, weight: Tensor, y: Tensor, slice_weight: float, matrix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Per point: gradient [P, 3] and curvature [P, 6] (zz, zy, zx, yy, yx, xx), slice anchors included."""
        z = self.moving_centroid[self.index, 0] - y[:, 0]
        anchor = slice_weight * self.slab[self.index] * weight
        gain = jacobian * (residual * weight)[:, None]
        gain = gain - (anchor * z)[:, None] * matrix[0, :3]
        rows, cols = torch.triu_indices(3, 3)
        curvature = jacobian[:, rows] * jacobian[:, cols] * weight[:, None]
        row = matrix[0, :3]
        return gain, curvature + anchor[:, None] * (row[rows] * row[cols])

    def _sample(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Linear interpolation of the moving distance map of each point's ROI, and its gradient in mm."""
        position = y @ self.to_index[:, :3].T + self.to_index[:, 3] - self.origin[self.index]
        dims = self.dims[self.index]
        low = torch.minimum(position.clamp_min(0).floor(), (dims - 2).clamp_min(0))
        fraction = torch.minimum((position - low).clamp(0, 1), (dims - 1))
        base = self.base[self.index]
        i = low.long()
        size = dims.long()
        value = torch.zeros_like(y[:, 0])
        gradient = torch.zeros_like(y)
        for corner in range(8):
            bits = [(corner >> k) & 1 for k in (2, 1, 0)]
            factors = [fraction[:, k] if bits[k] else 1 - fraction[:, k] for k in range(3)]
            index = [torch.minimum(i[:, k] + bits[k], size[:, k] - 1) for k in range(3)]
            v = self.moving[base + (index[0] * size[:, 1] + index[1]) * size[:, 2] + index[2]]
            value += v * factors[0] * factors[1] * factors[2]
            for k in range(3):
                others = factors[(k + 1) % 3] * factors[(k + 2) % 3]
                gradient[:, k] += v * others * (1 if bits[k] else -1)
        gradient[:, 0] *= (dims[:, 0] > 1).to(gradient.dtype)
        return value, gradient @ self.to_index[:, :3]


def signed_distance(
    mask: npt.NDArray[np.bool_], spacing_mm: tuple[float, float, float], margin: tuple[int, int, int]
) -> npt.NDArray[np.float32]:
    """Signed distance in mm (positive inside, zero on the voxel edges) of a mask padded by `margin` voxels."""
    padded = np.pad(mask, [(m, m) for m in margin])
    if padded.shape[0] == 1:
        flat = padded[0]
        half = 0.5 * min(spacing_mm[1:])
        inside = ndimage.distance_transform_edt(flat, spacing_mm[1:])
        outside = ndimage.distance_transform_edt(~flat, spacing_mm[1:])
        distance = np.where(flat, inside - half, half - outside)[None]
    else:
        half = 0.5 * min(spacing_mm)
        inside = ndimage.distance_transform_edt(padded, spacing_mm)
        outside = ndimage.distance_transform_edt(~padded, spacing_mm)
        distance = np.where(padded, inside - half, half - outside)
    return distance.astype(np.float32)


def build(
    pairs: Sequence[RoiPair],
    spacing_mm: tuple[float, float, float],
    moving_spacing_mm: tuple[float, float, float],
    moving_to_fixed: npt.NDArray[np.float64],
    h0: float,
    device: str,
    margin: float = 12.0,
) -> RoiFields:
    """Distance maps and points of all pairs; `margin` (in h0) is how far around each ROI the fit can see."""
    points, phase, fixed, index, moving, dims, origin, centroids = ([] for _ in range(8))
    for k, pair in enumerate(pairs):
        slab = pair.fixed.mask.shape[0] == 1
        pad = _margin(spacing_mm, margin * h0, slab)
        distance = signed_distance(pair.fixed.mask, spacing_mm, pad)
        grid = np.indices(distance.shape).reshape(3, -1).T + np.subtract(pair.fixed.offset, pad)
        points.append(grid * np.asarray(spacing_mm))
        phase.append(grid[:, 1:])
        fixed.append(distance.ravel())
        index.append(np.full(distance.size, k))
        pad = _margin(moving_spacing_mm, margin * h0, pair.moving.mask.shape[0] == 1)
        distance = signed_distance(pair.moving.mask, moving_spacing_mm, pad)
        moving.append(distance.ravel())
        dims.append(distance.shape)
        origin.append(np.subtract(pair.moving.offset, pad))
        centroids.append((_centroid(pair.fixed, spacing_mm), _centroid(pair.moving, moving_spacing_mm)))
    to_index = np.linalg.inv(moving_to_fixed)[:3] / np.asarray(moving_spacing_mm)[:, None]
    fixed_centroid, moving_centroid = (np.array(c) for c in zip(*centroids, strict=True))
    moving_centroid = moving_centroid @ moving_to_fixed[:3, :3].T + moving_to_fixed[:3, 3]
    sizes = np.array([m.size for m in moving])

    def real(values: npt.ArrayLike) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float32), device=device)

    def whole(values: npt.ArrayLike) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

    return RoiFields(
        x=real(np.concatenate(points)),
        phase=whole(np.concatenate(phase)),
        fixed=real(np.concatenate(fixed)),
        index=whole(np.concatenate(index)),
        weight=real([p.weight for p in pairs]),
        count=real([p.fixed.mask.sum() for p in pairs]),
        fixed_centroid=real(fixed_centroid),
        moving_centroid=real(moving_centroid),
        moving=real(np.concatenate(moving)),
        base=whole(np.cumsum(sizes) - sizes),
        dims=real(np.array(dims)),
        origin=real(np.array(origin)),
        to_index=real(to_index),
        slab=real([p.moving.mask.shape[0] == 1 for p in pairs]),
    )


def _margin(spacing_mm: tuple[float, float, float], margin_mm: float, slab: bool) -> tuple[int, int, int]:
    z, y, x = (int(np.ceil(margin_mm / s)) for s in spacing_mm)
    return (0 if slab else z, y, x)


def _centroid(roi: Roi, spacing_mm: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    return (np.argwhere(roi.mask).mean(0) + roi.offset) * np.asarray(spacing_mm)
