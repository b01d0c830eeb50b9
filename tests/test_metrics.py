"""Metrics on small exact arrays."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.algorithms import metrics, warp

SPACING = (4.0, 2.0, 1.0)


def box(z: slice, y: slice, x: slice) -> np.ndarray:
    mask = np.zeros((4, 10, 12), bool)
    mask[z, y, x] = True
    return mask


def test_dice() -> None:
    a, b = box(slice(0, 2), slice(2, 4), slice(2, 4)), box(slice(1, 3), slice(2, 4), slice(2, 4))
    assert metrics.dice(a, a) == 1
    assert metrics.dice(a, b) == 0.5
    assert metrics.dice(a & False, b & False) == 1
    assert metrics.dice(a, b & False) == 0


def test_centroid_distance_is_in_the_unit_of_the_spacing() -> None:
    a, b = box(slice(0, 1), slice(2, 4), slice(2, 4)), box(slice(1, 2), slice(3, 5), slice(4, 6))
    assert metrics.centroid_distance(a, b, (1, 1, 1)) == pytest.approx(np.sqrt(1 + 1 + 4))
    assert metrics.centroid_distance(a, b, SPACING) == pytest.approx(np.sqrt(16 + 4 + 4))


def test_hd95_of_shifted_boxes() -> None:
    a, b = box(slice(0, 4), slice(2, 8), slice(2, 8)), box(slice(0, 4), slice(2, 8), slice(5, 11))
    assert metrics.hd95(a, a, SPACING) == 0
    assert metrics.hd95(a, b, SPACING) == pytest.approx(3.0)


def test_jacobian_of_an_affine_field_is_its_determinant() -> None:
    matrix = np.eye(4)
    matrix[:3, :3] = [[1.1, 0, 0.05], [0, 0.8, 0.1], [0.02, 0, 1.2]]
    ddf = warp.affine_ddf(matrix, (5, 8, 9), SPACING)
    determinant = metrics.jacobian_determinant(ddf, SPACING)
    np.testing.assert_allclose(determinant, np.linalg.det(matrix), rtol=1e-4)
    found = metrics.jacobian_stats(ddf, SPACING)
    assert found.sdlogj < 1e-4
    assert found.fold_fraction == 0


def test_a_folded_field_is_seen() -> None:
    ddf = np.zeros((3, 3, 6, 6), np.float32)
    ddf[2, :, :, 3:] = -5.0
    assert metrics.jacobian_stats(ddf, (1.0, 1.0, 1.0)).fold_fraction == pytest.approx(2 / 6)


def test_two_dimensional_images_need_no_special_case() -> None:
    ddf = np.zeros((3, 1, 6, 6), np.float32)
    assert metrics.jacobian_determinant(ddf, (1.0, 1.0, 1.0)).tolist() == np.ones((1, 6, 6)).tolist()
