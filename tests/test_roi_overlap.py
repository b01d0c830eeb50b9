"""Dice of the ROIs that a field was fitted to, and the voxels near them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pipeline.algorithms import metrics, warp
from pipeline.algorithms.fit_problem import Roi, RoiPair
from pipeline.algorithms.roi_overlap import carry, near_rois, roi_dice

SHAPE, SPACING = (6, 70, 80), (4.0, 1.0, 1.0)


def blob(rng: np.random.Generator, depth: int) -> Roi:
    mask = rng.random((depth, *rng.integers(3, 24, 2))) < 0.7
    place = [int(rng.integers(0, n - k + 1)) for n, k in zip(SHAPE, mask.shape, strict=True)]
    return Roi(mask, (place[0], place[1], place[2]))


def whole(roi: Roi) -> np.ndarray:
    full = np.zeros(SHAPE, bool)
    full[tuple(slice(o, o + n) for o, n in zip(roi.offset, roi.mask.shape, strict=True))] = roi.mask
    return full


@pytest.mark.parametrize("depth", [1, 3])
def test_looking_near_a_roi_only_gives_what_the_whole_image_gives(depth: int) -> None:
    rng = np.random.default_rng(depth)
    smooth = np.stack([ndimage.gaussian_filter(rng.normal(size=SHAPE), (1, 6, 6)) for _ in range(3)])
    ddf = 25 * smooth / np.abs(smooth).max()
    indices = warp.moving_indices(ddf, SPACING, np.eye(4), SPACING)
    pairs = [RoiPair(blob(rng, depth), blob(rng, depth)) for _ in range(40)]
    truth = []
    for pair in pairs:
        planes = slice(pair.fixed.offset[0], pair.fixed.offset[0] + 1) if depth == 1 else slice(None)
        moved = carry(pair.moving, indices[:, planes], in_plane=depth == 1)
        truth.append(metrics.dice(whole(pair.fixed)[planes], moved))
    found = roi_dice(pairs, indices)
    assert found.max() > 0
    np.testing.assert_array_equal(found, truth)


def test_rois_that_the_field_carries_home_have_dice_one() -> None:
    rng = np.random.default_rng(0)
    rois = [blob(rng, 1) for _ in range(5)]
    indices = warp.moving_indices(np.zeros((3, *SHAPE)), SPACING, np.eye(4), SPACING)
    assert roi_dice([RoiPair(roi, roi) for roi in rois], indices).tolist() == [1.0] * 5


def test_near_is_two_short_edges_along_each_axis() -> None:
    roi = Roi(np.ones((1, 3, 4), bool), (2, 10, 20))
    near = near_rois([roi], SHAPE, SPACING)
    assert np.argwhere(near).min(0).tolist() == [2, 8, 18]
    assert np.argwhere(near).max(0).tolist() == [2, 14, 25]
    assert near.sum() == 7 * 8


def test_folds_are_counted_near_the_rois_apart() -> None:
    ddf = np.zeros((3, *SHAPE), np.float32)
    ddf[2, :, :, 40:] = -5.0
    near = np.zeros(SHAPE, bool)
    near[:, :, 38:42] = True
    found = metrics.jacobian_stats(ddf, SPACING, near)
    assert found.fold_fraction_near == pytest.approx(0.5)
    assert found.fold_fraction == pytest.approx(2 / 80)
    assert np.isnan(metrics.jacobian_stats(ddf, SPACING).fold_fraction_near)
