"""The mean shape of known maps: pose does not count, stretches are averaged by their logarithm, m and its inverse."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial.transform import Rotation

from pipeline.algorithms.mean_shape import (
    FieldMap,
    between,
    exp_symmetric,
    inverse_map,
    mean_map,
    node_lattice,
    without_pose,
)

LATTICE = node_lattice((6, 20, 18), (3.0, 1.0, 1.0))
POINTS = LATTICE.nodes()
INSIDE = np.ones(len(POINTS), dtype=bool)
CENTRE = POINTS.mean(axis=0)


def turned(points: npt.NDArray[np.float64], degrees: float) -> npt.NDArray[np.float64]:
    return points @ Rotation.from_euler("zyx", [degrees, degrees / 2, -degrees], degrees=True).as_matrix().T


def test_turned_and_moved_copies_have_no_shape_of_their_own() -> None:
    for degrees in (-50.0, 10.0, 120.0):
        log_stretch, left = without_pose(POINTS, turned(POINTS, degrees) + np.array([100.0, -7.0, 3.0]), INSIDE)
        assert np.allclose(log_stretch, 0, atol=1e-9)
        assert np.allclose(left, 0, atol=1e-8)


def test_a_stretch_is_found_under_any_pose_and_what_bends_is_left() -> None:
    stretch = np.diag([1.2, 0.8, 1.1])
    bend = np.zeros_like(POINTS)
    bend[:, 1] = 0.4 * np.sin(POINTS[:, 2])
    moved = turned((POINTS - CENTRE) @ stretch + bend, 35.0)
    log_stretch, left = without_pose(POINTS, moved, INSIDE)
    assert np.allclose(exp_symmetric(log_stretch), stretch, atol=0.02)
    assert np.abs(left).max() > 0.3
    assert np.allclose(left.mean(axis=0), 0, atol=1e-9)


def test_a_picture_has_no_stretch_across_its_plane() -> None:
    flat = node_lattice((1, 20, 18), (1.0, 1.0, 1.0)).nodes()
    log_stretch, _ = without_pose(flat, flat * 1.5, np.ones(len(flat), dtype=bool))
    assert np.allclose(exp_symmetric(log_stretch), np.diag([1.0, 1.5, 1.5]))


def test_a_mirrored_map_is_refused() -> None:
    with pytest.raises(ValueError, match="mirrors or flattens"):
        without_pose(POINTS, POINTS * [-1.0, 1.0, 1.0], INSIDE)


def test_twice_and_half_as_large_have_the_template_as_their_mean() -> None:
    found = [without_pose(POINTS, turned(POINTS * size, 20.0 * size), INSIDE)[0] for size in (2.0, 0.5)]
    mean = mean_map(LATTICE, CENTRE, np.mean(found, axis=0), np.zeros(LATTICE.values.shape))
    assert np.allclose(mean.at(POINTS), POINTS, atol=1e-6)


def test_the_inverse_leads_back() -> None:
    generator = np.random.default_rng(3)
    left = 0.4 * generator.standard_normal(LATTICE.values.shape)
    forward = mean_map(LATTICE, CENTRE, np.diag([0.1, -0.1, 0.05]), left)
    inside = (np.abs(POINTS - CENTRE) < 0.3 * np.ptp(POINTS, axis=0)).all(axis=1)
    back = inverse_map(forward, LATTICE, np.eye(4)).at(POINTS[inside])
    assert np.abs(forward.at(back) - POINTS[inside]).max() < 0.01


def test_a_map_on_nodes_keeps_its_images_whatever_its_affine_part() -> None:
    images = turned(POINTS, 5.0)
    affine = np.diag([1.0, 2.0, 1.0, 1.0])
    assert np.allclose(LATTICE.on_nodes(affine, images).at(POINTS), images)
    beyond = FieldMap(np.eye(4), np.ones((3, 2, 2, 2)), (1.0, 1.0, 1.0)).at(np.array([[9.0, 9.0, 9.0]]))
    assert np.allclose(beyond, 10.0)


def test_a_map_between_two_lies_between_their_images_and_does_not_fold() -> None:
    affine = np.diag([1.0, 1.1, 0.9, 1.0])
    affine[:3, 3] = (2.0, -1.0, 0.5)
    moved = FieldMap(affine, np.zeros_like(LATTICE.values), LATTICE.step_mm)
    images = POINTS + np.sin(POINTS[:, ::-1] / 5)
    wavy = LATTICE.on_nodes(np.eye(4), images)
    found = between(moved, wavy, 0.25)
    assert np.allclose(found.at(POINTS), 0.75 * moved.at(POINTS) + 0.25 * images, atol=1e-5)

    mirrored = FieldMap(np.diag([1.0, 1.0, -1.0, 1.0]), np.zeros_like(LATTICE.values), LATTICE.step_mm)
    kept = between(mirrored, wavy, 0.3)
    rows = kept.at(POINTS).reshape(*LATTICE.values.shape[1:], 3)
    assert (np.diff(rows[..., 2], axis=2) > 0).all()
