# mypy: disable-error-code="no-untyped-call"
"""Baselines of SimpleITK: from no registration at all to B-splines and demons.

`affine` and `bspline` maximise Mattes' mutual information of a fifth of the voxels (20,000 at most for B-splines),
drawn with a fixed seed, at each level of a pyramid that halves the fine axes only. All start from the moments of the
images.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from pipeline.algorithms import warp
from pipeline.algorithms.fit_config import RefineConfig
from pipeline.baseline_images import (
    PairImages,
    Registered,
    affine_matrix,
    ddf_of_transform,
    local_spacing,
    shrink_factors,
)
from pipeline.stages.refine import refine
from storage.geometry import center_alignment

_LEVELS = (4, 2, 1)
_SEED = 1
_GRADIENT_VOXELS = 4  # along each axis, which ITK's filter of gradients needs; without it, differences are taken
_BINS, _SAMPLED = 32, 0.2
_CONTROL, _MOST_CELLS = 8, 8  # of B-splines: least spacing in voxels of the finest axis, most cells along an axis
_SPLINE_SAMPLES = 20_000  # at most; each has the derivatives by all coefficients


def identity(images: PairImages) -> Registered:
    """The images as they lie in world space."""
    return _of_matrix(np.eye(4), images)


def centre(images: PairImages) -> Registered:
    """The middle of one volume on that of the other."""
    return _of_matrix(center_alignment(images.here, images.there), images)


def moments(images: PairImages) -> Registered:
    """The centre of mass of the intensities of one image on that of the other."""
    return _of_transform(_by_moments(images), images)


def affine(images: PairImages) -> Registered:
    """Twelve parameters, in 2D six."""
    return _of_transform(_affine(images), images)


def bspline(images: PairImages) -> Registered:
    """Cubic B-splines of at most 8 cells along an axis, as in ITK's own examples, after `affine`."""
    fixed, _ = images.itk
    first = _affine(images)
    reach = _CONTROL * min(fixed.GetSpacing())
    mesh = [
        max(1, min(round(n * step / reach), n // 2, _MOST_CELLS))
        for n, step in zip(fixed.GetSize(), fixed.GetSpacing(), strict=True)
    ]
    spline = sitk.BSplineTransformInitializer(fixed, mesh)
    for factor in _LEVELS:
        method, pair = _registration(images), [_coarser(image, factor) for image in images.itk]
        share = min(_SAMPLED, _SPLINE_SAMPLES / pair[0].GetNumberOfPixels())
        method.SetMetricSamplingPercentage(share, _SEED)
        method.SetMovingInitialTransform(first)
        method.SetInitialTransform(spline, inPlace=True)
        method.SetOptimizerAsLBFGSB(
            gradientConvergenceTolerance=1e-5, numberOfIterations=30, maximumNumberOfFunctionEvaluations=60
        )
        method.Execute(*pair)
    return Registered(ddf_of_transform(sitk.CompositeTransform([first, spline]), fixed), affine_matrix(first))


def demons(images: PairImages) -> Registered:
    """Diffeomorphic demons after `affine`: those of `fit.refine`, with its defaults."""
    first = affine(images)
    here, there = local_spacing(images)
    settings = RefineConfig(method="demons")
    ddf = refine(images.fixed, images.moving, first.ddf, here, there, images.moving_to_fixed, settings)
    return Registered(ddf, first.affine)


def _by_moments(images: PairImages) -> sitk.Transform:
    fixed, moving = images.itk
    shift = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(images.dimension), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    return sitk.AffineTransform(shift)


def _affine(images: PairImages) -> sitk.Transform:
    found = _by_moments(images)
    for factor in _LEVELS:
        method = _registration(images)
        method.SetInitialTransform(found, inPlace=True)
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=1.0, minStep=1e-3, numberOfIterations=100, gradientMagnitudeTolerance=1e-6
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.Execute(*(_coarser(image, factor) for image in images.itk))
    return found


def _registration(images: PairImages) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(_SAMPLED, _SEED)
    method.SetInterpolator(sitk.sitkLinear)
    if min(size for image in images.itk for size in image.GetSize()) < _GRADIENT_VOXELS:
        method.MetricUseFixedImageGradientFilterOff()
        method.MetricUseMovingImageGradientFilterOff()
    return method


def _coarser(image: sitk.Image, factor: int) -> sitk.Image:
    joined = shrink_factors(image.GetSpacing(), factor, image.GetSize())
    if max(joined) == 1:
        return image
    variance = [(k * step / 2) ** 2 if k > 1 else 0.0 for k, step in zip(joined, image.GetSpacing(), strict=True)]
    coarse: sitk.Image = sitk.Shrink(sitk.DiscreteGaussian(image, variance), joined)
    return coarse


def _of_transform(transform: sitk.Transform, images: PairImages) -> Registered:
    return Registered(ddf_of_transform(transform, images.itk[0]), affine_matrix(transform))


def _of_matrix(matrix: warp.Affine, images: PairImages) -> Registered:
    return Registered(warp.affine_ddf(matrix, images.here.shape, images.here.spacing_mm), matrix)
