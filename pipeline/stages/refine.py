# mypy: disable-error-code="no-untyped-call"
"""Refine a fitted field on the intensities: demons between the fixed image and the moving one carried onto it.

The filter is SimpleITK's diffeomorphic demons (Vercauteren et al., NeuroImage 45, 2009). At each level, coarse to
fine, the moving image is carried anew by the field so far, so that nothing is interpolated twice, and the update
found is composed with the field (`pipeline.algorithms.warp` states the convention). Intensities are measured by
their local mean and contrast, which takes out bias fields and most of what differs between two scans. All lengths are
physical, so that thick slices are hardly smoothed across, and not coarsened until voxels are as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)
from scipy import ndimage

from pipeline.algorithms import metrics, warp
from pipeline.algorithms.fit_config import RefineConfig
from pipeline.algorithms.spacing import shortest_edge_mm

Volume = npt.NDArray[np.float32]
Triple = tuple[float, float, float]
_NOISE = 16.0  # local contrast, of 255, that counts as none
_HALVINGS = 4


def refine(
    fixed: Volume,
    moving: Volume,
    ddf: npt.NDArray[np.float32],
    spacing_mm: Triple,
    moving_spacing_mm: Triple,
    moving_to_fixed: warp.Affine,
    config: RefineConfig,
) -> npt.NDArray[np.float32]:
    """The field, float32 [3, D, H, W] mm, that also aligns the intensities; not folded where `ddf` is not.

    Args:
        fixed: [D, H, W] intensities, 0..255.
        moving: [Dm, Hm, Wm] intensities, 0..255.
        ddf: [3, D, H, W] mm, pull-back on the fixed grid.
        spacing_mm: fixed spacing (z, y, x).
        moving_spacing_mm: moving spacing (z, y, x).
        moving_to_fixed: 4x4, moving-local mm to fixed-local mm.
        config: settings.
    """
    h0 = shortest_edge_mm(fixed.shape, spacing_mm)
    for level, iterations in enumerate(config.iterations):
        voxel_mm = h0 * 2 ** (len(config.iterations) - 1 - level)
        moved = warp.warp_image(
            moving, warp.moving_indices(ddf, spacing_mm, moving_to_fixed, moving_spacing_mm), fill=np.nan
        )
        moved = np.where(np.isnan(moved), fixed, moved)  # no force where the moving image has ended
        here, there = (
            _reduced(_normalised(image, spacing_mm, config.window * h0), spacing_mm, voxel_mm)
            for image in (fixed, moved)
        )
        coarse_mm = [step * n / k for step, n, k in zip(spacing_mm, fixed.shape, here.shape, strict=True)]
        update = _demons(here, there, coarse_mm, iterations, config.smoothing)
        ddf = _guarded(ddf, np.stack([_resampled(component, fixed.shape) for component in update]), spacing_mm)
    return ddf


def _guarded(
    ddf: npt.NDArray[np.float32], update: npt.NDArray[np.float32], spacing_mm: Triple
) -> npt.NDArray[np.float32]:
    """The field with the largest of update, update / 2, update / 4 ... that folds no voxel anew, or as it was."""
    whole = metrics.jacobian_determinant(ddf, spacing_mm) > 0
    for halvings in range(_HALVINGS):
        refined = warp.compose(ddf, update / 2**halvings, spacing_mm)
        if (metrics.jacobian_determinant(refined, spacing_mm)[whole] > 0).all():
            return refined
    return ddf


def _normalised(image: Volume, spacing_mm: Triple, window_mm: float) -> Volume:
    """Intensities minus their local mean, over their local standard deviation and the noise."""
    sigma = [window_mm / step for step in spacing_mm]
    mean = ndimage.gaussian_filter(image, sigma)
    variance = ndimage.gaussian_filter(image * image, sigma) - mean * mean
    return np.asarray((image - mean) / np.sqrt(np.maximum(variance, 0) + _NOISE**2), dtype=np.float32)


def _reduced(image: Volume, spacing_mm: Triple, voxel_mm: float) -> Volume:
    """The image smoothed and sampled at about `voxel_mm` along each axis that is finer."""
    factor = [max(1.0, voxel_mm / step) for step in spacing_mm]
    smooth = ndimage.gaussian_filter(image, [f / 2 if f > 1 else 0.0 for f in factor])
    return _resampled(smooth, tuple(max(1, round(n / f)) for n, f in zip(image.shape, factor, strict=True)))


def _resampled(image: npt.NDArray[np.floating[Any]], shape: tuple[int, ...]) -> Volume:
    """Linear resampling onto `shape` voxels of the same whole extent."""
    if image.shape == shape:
        return np.asarray(image, dtype=np.float32)
    axes = [(np.arange(n) + 0.5) * old / n - 0.5 for n, old in zip(shape, image.shape, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    return np.asarray(ndimage.map_coordinates(image, grid, order=1, mode="nearest"), dtype=np.float32)


def _demons(
    fixed: Volume, moved: Volume, spacing_mm: Sequence[float], iterations: int, smoothing: float
) -> npt.NDArray[np.float32]:
    """Update [3, d, h, w] mm that carries `moved` onto `fixed`, both [d, h, w]."""
    update = np.zeros((3, *fixed.shape), np.float32)
    if len(fixed) == 1:  # ITK finds slopes across a lone slice
        update[1:, 0] = _filter(fixed[0], moved[0], spacing_mm[1:], iterations, smoothing)
    else:
        update[:] = _filter(fixed, moved, spacing_mm, iterations, smoothing)
    return update


def _filter(
    fixed: Volume, moved: Volume, spacing_mm: Sequence[float], iterations: int, smoothing: float
) -> npt.NDArray[np.float64]:
    """SimpleITK's diffeomorphic demons of two planes or volumes: [2 or 3, ...] mm along their axes."""
    demons = sitk.DiffeomorphicDemonsRegistrationFilter()
    demons.SetNumberOfThreads(1)  # a worker has one core
    demons.SetNumberOfIterations(iterations)
    mean_edge = np.sqrt(np.mean(np.square(spacing_mm)))  # what ITK measures the step by
    demons.SetMaximumUpdateStepLength(float(min(spacing_mm) / mean_edge))
    demons.SetMaximumRMSError(0.0)  # no early stop: it would depend on how much of the image moves
    demons.SetStandardDeviations([smoothing * min(spacing_mm) / step for step in spacing_mm[::-1]])
    images = [sitk.GetImageFromArray(image) for image in (fixed, moved)]
    for image in images:
        image.SetSpacing(spacing_mm[::-1])
    field = sitk.GetArrayFromImage(demons.Execute(*images))
    return np.asarray(np.moveaxis(field, -1, 0)[::-1])
