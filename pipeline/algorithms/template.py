"""What is made of many images that lie on one grid: robust averages, and how sharp they are.

A stack is float32 [N, ...] with NaN where a subject has no data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.algorithms.atlas_config import Average
from pipeline.algorithms.spacing import shortest_edge_mm

Volume = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Triple = tuple[float, float, float]
_RANGE = (2.0, 98.0)  # percentiles that count as the darkest and the brightest
_COVERED = 0.25  # share of the subjects that an average needs
_DARK = 0.1  # of that range, below which a voxel is background


def average(stack: Volume, how: Average, trim: float) -> Volume:
    """Average over the subjects that have data, NaN where less than a quarter has: float32 [...].

    Args:
        how: `trimmed` leaves out the lowest and the highest `trim` of them, rounded down; `median` all but the middle.
    """
    count = np.isfinite(stack).sum(axis=0)
    cut = {"mean": np.zeros_like(count), "median": (count - 1) // 2, "trimmed": np.floor(trim * count).astype(int)}[how]
    ordered = stack if how == "mean" else np.sort(stack, axis=0)
    total, used = np.zeros(count.shape), np.where(count >= max(1, _COVERED * len(stack)), count - 2 * cut, 0)
    for rank, plane in enumerate(ordered):
        kept = np.isfinite(plane) if how == "mean" else (rank >= cut) & (rank < count - cut)
        total += np.where(kept, plane, 0)
    return np.asarray(np.divide(total, used, out=np.full(count.shape, np.nan), where=used > 0), np.float32)


def variance(stack: Volume) -> Volume:
    """Variance over the subjects that have data, 0 where fewer than two have: float32 [...]."""
    have = np.isfinite(stack)
    count = have.sum(axis=0)
    mean = np.where(have, stack, 0).sum(axis=0, dtype=np.float64) / np.maximum(count, 1)
    squares = np.zeros(count.shape)
    for plane, here in zip(stack, have, strict=True):
        squares += np.where(here, plane - mean, 0) ** 2
    return np.asarray(np.divide(squares, count - 1, out=np.zeros(count.shape), where=count > 1), np.float32)


def normalised(image: Volume) -> Volume:
    """Intensities with the robust range at 0..1; NaN stays."""
    low, high = robust_range(image)
    return np.asarray((image - low) / (high - low), dtype=np.float32)


def robust_range(image: Volume) -> tuple[float, float]:
    """Darkest and brightest intensity but for 2 % at either end, the extremes where these are equal.

    Raises:
        ValueError: for an image without data, or of one intensity.
    """
    values = image[np.isfinite(image)]
    if not len(values):
        raise ValueError("nothing of the image lies in the template")
    low, high = np.percentile(values, _RANGE)
    if low == high:
        low, high = values.min(), values.max()
    if low == high:
        raise ValueError(f"all of the image that lies in the template is {low:.4g}")
    return float(low), float(high)


def filled(image: Volume) -> Volume:
    """Voxels without data take the value of the nearest that has."""
    missing = ~np.isfinite(image)
    if not missing.any():
        return image
    nearest = ndimage.distance_transform_edt(missing, return_distances=False, return_indices=True)
    return np.asarray(image[tuple(nearest)])


def sharpened(image: Volume, spacing_mm: Triple, amount: float) -> Volume:
    """The image plus `amount` of what a Gaussian of one shortest voxel edge takes away, [D, H, W] without NaN."""
    edge = shortest_edge_mm(image.shape, spacing_mm)
    sigma = [edge / step if n > 1 else 0 for n, step in zip(image.shape, spacing_mm, strict=True)]
    blurred = ndimage.gaussian_filter(image, sigma)
    return np.asarray(image + np.float32(amount) * (image - blurred), dtype=np.float32)


def foreground(image: Volume) -> Mask:
    """Voxels [D, H, W] that are not background: brighter than a tenth of the robust range, and holes in them."""
    low, high = robust_range(image)
    bright = image > low + _DARK * (high - low)
    if len(image) == 1:
        return np.asarray(ndimage.binary_fill_holes(bright[0])[None])
    return np.asarray(ndimage.binary_fill_holes(bright))


def sharpness(image: Volume, spacing_mm: Triple, inside: Mask) -> float:
    """Mean length of the gradient per mm over `inside`, intensities in units of the robust range there."""
    low, high = robust_range(image[inside])
    axes = [axis for axis in range(3) if image.shape[axis] > 1]
    slopes = [np.gradient(image.astype(np.float64), spacing_mm[axis], axis=axis) for axis in axes]
    return float(np.sqrt(sum(slope**2 for slope in slopes))[inside].mean() / (high - low))


def correlation(a: Volume, b: Volume) -> float:
    """Pearson's correlation over the voxels where both have data; NaN where one of them is constant."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return float("nan")
    return float(np.corrcoef(a[both], b[both])[0, 1])
