"""The displacement convention: pull-back, millimetres, fixed grid."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.algorithms import warp

SPACING = (5.0, 1.5, 2.0)


def test_zero_field_is_the_identity() -> None:
    image = np.random.default_rng(0).random((4, 9, 7)).astype(np.float32)
    index = warp.moving_indices(np.zeros((3, 4, 9, 7)), SPACING, np.eye(4), SPACING)
    np.testing.assert_allclose(warp.warp_image(image, index), image, atol=1e-6)
    labels = (image * 5).astype(np.int32)
    np.testing.assert_array_equal(warp.warp_labels(labels, index), labels)


def test_field_pulls_from_where_it_points() -> None:
    moving = np.zeros((3, 8, 8), np.float32)
    moving[1, 5, 3] = 1
    ddf = np.zeros((3, 3, 8, 8), np.float32)
    ddf[1], ddf[2] = 3 * SPACING[1], -1 * SPACING[2]
    moved = warp.warp_image(moving, warp.moving_indices(ddf, SPACING, np.eye(4), SPACING))
    assert moved[1, 2, 4] == pytest.approx(1.0)
    assert moved.sum() == pytest.approx(1.0)


def test_other_grid_enters_through_its_affine() -> None:
    moving_to_fixed = np.eye(4)
    moving_to_fixed[:3, 3] = (5.0, 3.0, -2.0)
    index = warp.moving_indices(np.zeros((3, 2, 3, 3)), SPACING, moving_to_fixed, (5.0, 3.0, 1.0))
    np.testing.assert_allclose(index[:, 1, 2, 0], [0.0, 0.0, 2.0])


def test_outside_is_background_and_the_border_voxel_is_inside() -> None:
    labels = np.ones((1, 4, 4), np.int32)
    index = np.zeros((3, 1, 1, 4))
    index[2] = [-0.51, -0.5, 3.49, 3.51]
    assert warp.warp_labels(labels, index).ravel().tolist() == [0, 1, 1, 0]


def test_points_follow_an_affine_field() -> None:
    matrix = np.eye(4)
    matrix[:3, :3] += [[0.05, 0.0, 0.02], [0.0, -0.1, 0.03], [0.01, 0.0, 0.1]]
    matrix[:3, 3] = (2.0, -1.0, 3.0)
    ddf = warp.affine_ddf(matrix, (4, 9, 7), SPACING)
    points = np.array([[3.0, 4.1, 5.2], [14.0, 0.0, 11.9]])
    np.testing.assert_allclose(warp.warp_points(points, ddf, SPACING), warp.apply_affine(matrix, points), atol=1e-5)
