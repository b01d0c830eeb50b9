"""Matched ROIs as signed distance maps at ragged point lists, ready for the fit in `pipeline.algorithms.ddf`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """One matched pair and its confidence, above 0 to 1, which weights it in the fit."""

    fixed: Roi
    moving: Roi
    confidence: float = 1.0


@dataclass(frozen=True)
class Points:
    """Voxels near the fixed ROIs' boundaries, the samples of the fit.

    Attributes:
        x: [P, 3] fixed-local mm. fixed: [P] signed distance to the fixed ROI, mm. index: [P] ROI of a point.
        share: [P] voxels that a point stands for over the voxels of its ROI.
    """

    x: Tensor
    fixed: Tensor
    index: Tensor
    share: Tensor


@dataclass(frozen=True)
class RoiFields:
    """The distance maps of K ROI pairs.

    Attributes:
        fixed: K signed distance maps on crops of the fixed grid, mm. corner: [K, 3] first fixed index of each.
        spacing_mm: (z, y, x) of the fixed grid.
        weight: [K]. count: [K] voxels of the fixed ROI, which normalise the ROI's mean error.
        fixed_centroid, moving_centroid: [K, 3] mm, both in the fixed frame.
        moving: flat signed distance maps, mm. base, dims, origin: [K] start, [K, 3] size, [K, 3] first index of each.
        to_index: [3, 4] fixed-frame mm to moving index. slab: [K] whether z is unknown.
        flat: whether all moving ROIs are slabs, so that nothing is interpolated along z.
    """

    fixed: tuple[npt.NDArray[np.float32], ...]
    corner: npt.NDArray[np.int64]
    spacing_mm: tuple[float, float, float]
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
    flat: bool

    def points(self, distance_mm: float, stride: int, limit: int) -> Points:
        """Voxels within a distance of their fixed boundary, on every `stride`-th row and column.

        A ROI with more than about `limit` of them per slice is sampled more coarsely.
        """
        x, fixed, index, share = [], [], [], []
        spacing = np.asarray(self.spacing_mm)
        for k, distance in enumerate(self.fixed):
            step = stride
            near = np.abs(distance[:, ::step, ::step]) < distance_mm
            excess = near.sum() / (limit * len(distance))
            if excess > 1:
                step *= int(np.ceil(np.sqrt(excess)))
                near = np.abs(distance[:, ::step, ::step]) < distance_mm
            place = np.argwhere(near) * (1, step, step)
            x.append((place + self.corner[k]) * spacing)
            fixed.append(distance[:, ::step, ::step][near])
            index.append(np.full(len(place), k))
            share.append(np.full(len(place), step**2))
        device = self.moving.device
        flat_index = torch.as_tensor(np.concatenate(index), device=device)
        return Points(
            torch.as_tensor(np.concatenate(x), dtype=torch.float32, device=device),
            torch.as_tensor(np.concatenate(fixed), device=device),
            flat_index,
            torch.as_tensor(np.concatenate(share), dtype=torch.float32, device=device) / self.count[flat_index],
        )

    def sum_per_roi(self, points: Points, values: Tensor) -> Tensor:
        """Sum a point quantity [P] over each ROI: [K]."""
        return torch.zeros_like(self.weight).index_add_(0, points.index, values)

    def residual(self, points: Points, y: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        """Residual [P] in mm, its gradient [P, 3] with respect to y, and the soft moved mask [P] at y [P, 3] mm."""
        distance, gradient = self._sample(points.index, y)
        moved = torch.sigmoid(distance / tau)
        residual = 4 * tau * (moved - torch.sigmoid(points.fixed / tau))
        return residual, gradient * (4 * moved * (1 - moved))[:, None], moved

    def slice_anchor(self, points: Points, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Residual [P] (mm) that pulls slabs to their matched slice, and its weight [P], zero for 3D ROIs."""
        return y[:, 0] - self.moving_centroid[points.index, 0], self.slab[points.index] * weight

    def _sample(self, roi: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Linear interpolation of the moving distance map of each point's ROI, and its gradient per mm of y."""
        position = y @ self.to_index[:, :3].T + self.to_index[:, 3] - self.origin[roi]
        dims = self.dims[roi]
        last = dims - 1
        low = torch.minimum(position.clamp_min(0).floor(), (last - 1).clamp_min(0))
        fraction = torch.minimum((position - low).clamp(0, 1), last)
        size, i = dims.long(), low.long()
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
        return plane, torch.stack([slope_z, slope_y, slope_x], 1) @ self.to_index[:, :3]

    def _bilinear(
        self, row: Tensor, down: Tensor, right: Tensor, fy: Tensor, fx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value and slopes along y and x of one plane of the flat maps."""
        a, b = self.moving[row], self.moving[row + right]
        c, d = self.moving[row + down], self.moving[row + down + right]
        top, bottom = a + fx * (b - a), c + fx * (d - c)
        return top + fy * (bottom - top), bottom - top, (b - a) + fy * (d - c - b + a)


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
    confidence_power: float,
    margin: float = 12.0,
) -> RoiFields:
    """Distance maps and points of all pairs; `margin` (in h0) is how far around each ROI the fit can see."""
    fixed, corner, moving, dims, origin, centroids = ([] for _ in range(6))
    for pair in pairs:
        pad = _margin(spacing_mm, margin * h0, pair.fixed.mask.shape[0] == 1)
        fixed.append(signed_distance(pair.fixed.mask, spacing_mm, pad))
        corner.append(np.subtract(pair.fixed.offset, pad))
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
        fixed=tuple(fixed),
        corner=np.array(corner),
        spacing_mm=spacing_mm,
        weight=real([p.confidence**confidence_power for p in pairs]),
        count=real([p.fixed.mask.sum() for p in pairs]),
        fixed_centroid=real(fixed_centroid),
        moving_centroid=real(moving_centroid),
        moving=real(np.concatenate(moving)),
        base=whole(np.cumsum(sizes) - sizes),
        dims=real(np.array(dims)),
        origin=real(np.array(origin)),
        to_index=real(to_index),
        slab=real([p.moving.mask.shape[0] == 1 for p in pairs]),
        flat=all(p.moving.mask.shape[0] == 1 for p in pairs),
    )


def _margin(spacing_mm: tuple[float, float, float], margin_mm: float, slab: bool) -> tuple[int, int, int]:
    z, y, x = (int(np.ceil(margin_mm / s)) for s in spacing_mm)
    return (0 if slab else z, y, x)


def _centroid(roi: Roi, spacing_mm: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    return np.asarray((np.argwhere(roi.mask).mean(0) + roi.offset) * np.asarray(spacing_mm))
