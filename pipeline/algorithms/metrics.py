"""Overlap, distance and regularity measures of a registration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Triple = tuple[float, float, float]
_SMALLEST_LOGGED = 1e-3


def dice(a: Mask, b: Mask) -> float:
    """Dice overlap of two masks, 0..1; 1 when both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def centroid_distance(a: Mask, b: Mask, spacing: Triple) -> float:
    """Distance of the centroids of two masks that are not empty, in the unit of `spacing` (TRE of section 4.2)."""
    gap = np.subtract(_centroid(a), _centroid(b)) * np.asarray(spacing)
    return float(np.linalg.norm(gap))


def hd95(a: Mask, b: Mask, spacing: Triple) -> float:
    """95th percentile of the symmetric surface distances of two masks that are not empty, unit of `spacing`."""
    box = _common_box(a, b)
    a, b = np.pad(a[box], 1), np.pad(b[box], 1)
    edge_a, edge_b = _surface(a), _surface(b)
    to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]
    to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)[edge_b]
    return float(np.percentile(np.concatenate([to_a, to_b]), 95))


@dataclass(frozen=True)
class JacobianStats:
    """Regularity of a field.

    Attributes:
        sdlogj: standard deviation of the natural logarithm of det J, values below 0.001 raised to it.
        fold_fraction: share of voxels with det J <= 0, 0..1.
        fold_fraction_near: the same among the voxels that were asked for; NaN where there are none.
    """

    sdlogj: float
    fold_fraction: float
    fold_fraction_near: float


def jacobian_determinant(ddf: npt.NDArray[np.floating], spacing: Triple) -> npt.NDArray[np.float64]:
    """det of the derivative of q + u(q), [D, H, W]; central differences, one-sided at the border.

    Along an axis of one voxel the map is the identity.
    """
    rows = []
    for component in range(3):
        row = [
            np.gradient(ddf[component].astype(np.float64), spacing[axis], axis=axis)
            if ddf.shape[axis + 1] > 1
            else np.zeros(ddf.shape[1:])
            for axis in range(3)
        ]
        row[component] = row[component] + 1.0
        rows.append(row)
    (a, b, c), (d, e, f), (g, h, i) = rows
    return np.asarray(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))


def log_jacobian(ddf: npt.NDArray[np.floating], spacing: Triple) -> npt.NDArray[np.float64]:
    """Natural logarithm of det J, [D, H, W], values below 0.001 raised to it; above 0 the moving image is larger."""
    return np.asarray(np.log(np.maximum(jacobian_determinant(ddf, spacing), _SMALLEST_LOGGED)))


def jacobian_stats(ddf: npt.NDArray[np.floating], spacing: Triple, near: Mask | None = None) -> JacobianStats:
    """Regularity of a DDF [3, D, H, W] in the unit of `spacing`, over the whole volume and `near` [D, H, W] of it."""
    determinant = jacobian_determinant(ddf, spacing)
    logarithm = np.log(np.maximum(determinant, _SMALLEST_LOGGED))
    folded = determinant <= 0
    close = folded[near] if near is not None and near.any() else np.full(1, np.nan)
    return JacobianStats(float(logarithm.std()), float(folded.mean()), float(close.mean()))


def _centroid(mask: Mask) -> list[float]:
    total = mask.sum()
    sums = [mask.sum(axis=tuple(k for k in range(3) if k != axis)) for axis in range(3)]
    return [float(s @ np.arange(len(s)) / total) for s in sums]


def _common_box(a: Mask, b: Mask) -> tuple[slice, ...]:
    either = a | b
    spans = [np.flatnonzero(either.any(axis=tuple(k for k in range(3) if k != axis))) for axis in range(3)]
    return tuple(slice(int(s[0]), int(s[-1]) + 1) for s in spans)


def _surface(mask: Mask) -> Mask:
    """Voxels of the mask with a neighbour outside it; a mask one slice thick is all surface only in plane."""
    structure = ndimage.generate_binary_structure(3, 1)
    if mask.any(axis=(1, 2)).sum() == 1:
        structure[[0, 2]] = False
    return np.asarray(mask & ~ndimage.binary_erosion(mask, structure))
