"""The inverse of a field: known maps, random smooth fields, other grids, and what cannot be inverted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.algorithms import warp
from pipeline.algorithms.inverse import TOLERANCE, NotInvertedError, invert, lattice_over, preimages, round_trip
from pipeline.algorithms.lattice import Lattice
from pipeline.algorithms.regularity import smallest_determinant, unfolded

IDENTITY = np.eye(4)


def lattice(values: np.ndarray, step: tuple[float, float, float]) -> Lattice:
    return Lattice(torch.tensor(values, dtype=torch.float32), torch.tensor(step))


def smooth(shape: tuple[int, int, int], amplitude: float, seed: int) -> np.ndarray:
    """Random smooth displacements [3, ...] of at most `amplitude`, none along an axis of one node."""
    rng = np.random.default_rng(seed)
    field = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(3)])
    field *= amplitude / np.abs(field).max()
    field[[axis for axis in range(3) if shape[axis] == 1]] = 0
    return field


def contraction(points: np.ndarray, center: np.ndarray, width: float, size: float) -> np.ndarray:
    """x -> c + r (1 - size exp(-|r|^2 / 2 w^2)), r = x - c: one-to-one, radial, [3, ...]."""
    r = points - center[:, None, None, None]
    return points - size * r * np.exp(-0.5 * (r**2).sum(0) / width**2)


def radial_inverse(points: np.ndarray, center: np.ndarray, width: float, size: float) -> np.ndarray:
    """Inverse of `contraction` by bisection along the ray."""
    r = points - center[:, None, None, None]
    goal = np.sqrt((r**2).sum(0))
    low, high = np.zeros_like(goal), goal / (1 - size) + 1
    for _ in range(60):
        middle = (low + high) / 2
        under = middle * (1 - size * np.exp(-0.5 * middle**2 / width**2)) < goal
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return center[:, None, None, None] + r * np.where(goal > 0, low / np.maximum(goal, 1e-12), 1.0)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((48, 52, 50), (1.0, 1.0, 1.0)), ((1, 90, 100), (1.0, 0.7, 0.7)), ((26, 60, 64), (2.0, 1.0, 1.0))],
    ids=["isotropic", "plane", "anisotropic"],
)
def test_the_inverse_of_a_known_map_is_found(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    points = warp.grid_points(shape, spacing)
    center = points[:, shape[0] // 2, shape[1] // 2, shape[2] // 2]
    width = 0.22 * min((n - 1) * s for n, s in zip(shape[1:], spacing[1:], strict=True))
    u = lattice(contraction(points, center, width, 0.25) - points, spacing)
    _, found = invert(u, IDENTITY, u, IDENTITY)
    truth = radial_inverse(points, center, width, 0.25) - points
    error = np.abs(found.values.numpy() - truth) / np.reshape(spacing, (3, 1, 1, 1))
    inner = tuple(slice(n // 8, n - n // 8) for n in shape)
    assert np.abs(truth).max() > 1.5 * spacing[2]
    assert error[(slice(None), *inner)].max() < 0.01


def test_the_inverse_of_a_stored_field_is_exact_at_the_nodes() -> None:
    u = lattice(smooth((9, 14, 12), 3.0, 1), (3.0, 2.0, 2.5))
    affine = np.array([[1.05, 0.02, 0, 1], [-0.1, 0.95, 0.1, -3], [0, -0.05, 1.1, 2], [0, 0, 0, 1]])
    u, _ = unfolded(u, affine, 0.05)
    linear, v = invert(u, affine, u, IDENTITY)
    q = v.points().double().reshape(3, -1).T.numpy()
    back = warp.apply_affine(linear, q) + v.values.numpy().reshape(3, -1).T
    there = warp.apply_affine(affine, back) + warp.warp_points(back, u.values.numpy(), (3.0, 2.0, 2.5)) - back
    np.testing.assert_allclose(there, q, atol=2 * TOLERANCE * 2.0)


def test_fixed_and_moving_grids_differ() -> None:
    u = lattice(smooth((12, 20, 18), 2.0, 2), (2.0, 1.5, 1.5))
    turn = np.deg2rad(20)
    between = np.eye(4)
    between[1:3, 1:3] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    between[:3, 3] = 1.0, 8.0, -4.0
    affine = np.eye(4)
    affine[:3, 3] = 0.5, -2.0, 1.0
    moving = Lattice.voxels((14, 30, 28), (1.7, 1.1, 1.2))
    linear, v = invert(u, affine, moving, between)
    error = np.linalg.norm(round_trip((affine, u), (linear, v), u, moving, between), axis=1)
    assert 1000 < len(error) < 12 * 20 * 18
    assert error.mean() < 0.05
    assert np.percentile(error, 95) < 0.15


def test_nothing_comes_back_from_outside_the_moving_image() -> None:
    u = lattice(np.zeros((3, 4, 5, 5)), (1.0, 1.0, 1.0))
    affine = np.eye(4)
    affine[2, 3] = 100.0
    assert len(round_trip((affine, u), invert(u, affine, u, IDENTITY), u, u, IDENTITY)) == 0


def test_a_slice_meets_one_that_lies_within_half_a_voxel() -> None:
    u = lattice(smooth((1, 20, 22), 1.5, 3), (1.0, 1.0, 1.0))
    between = np.eye(4)
    between[0, 3] = 0.3
    inverse = invert(u, IDENTITY, u, between)
    error = round_trip((IDENTITY, u), inverse, u, u, between)
    assert len(error) > 300
    assert np.linalg.norm(error, axis=1).mean() < 0.05


@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 8), st.integers(4, 14), st.integers(4, 14)),
    step=st.tuples(*[st.floats(0.4, 6.0)] * 3),
    share=st.floats(0.1, 4.0),
)
@settings(max_examples=25, deadline=None)
def test_whatever_does_not_fold_can_be_inverted(
    seed: int, shape: tuple[int, int, int], step: tuple[float, float, float], share: float
) -> None:
    affine = np.eye(4)
    affine[:3] += 0.1 * np.random.default_rng(seed).normal(size=(3, 4))
    u, _ = unfolded(lattice(smooth(shape, share * min(step), seed), step), affine, 0.05)
    assert smallest_determinant(u, affine) > 0.05
    x = torch.tensor(np.random.default_rng(seed).uniform(-0.3, 1.3, (200, 3)) * shape * step)
    moved = x.numpy()
    targets = warp.apply_affine(affine, moved) + warp.warp_points(moved, u.values.numpy(), step) - moved
    found = preimages(u, affine, torch.tensor(targets), torch.tensor(targets))
    np.testing.assert_allclose(found.numpy(), moved, atol=TOLERANCE * min(step) * 20 + 1e-4)


def test_a_position_that_the_map_does_not_reach_is_refused() -> None:
    values = np.zeros((3, 1, 6, 6))
    values[2, :, :, 3:] = -30.0
    flattened = np.diag([1.0, 1.0, 0.0, 1.0])
    targets = torch.tensor([[0.0, 2.0, 500.0]], dtype=torch.float64)
    with pytest.raises(NotInvertedError, match="1 of 1 positions have no preimage"):
        preimages(lattice(values, (1.0, 1.0, 1.0)), flattened, targets, targets)


def test_thick_slices_are_divided() -> None:
    found = lattice_over((5, 40, 41), (10.0, 1.5, 1.5))
    assert found.step_mm.tolist() == pytest.approx([2.5, 3.0, 3.0])
    assert list(found.values.shape) == [3, 17, 21, 21]
    assert list(lattice_over((1, 10, 11), (1.0, 1.0, 1.0)).values.shape) == [3, 1, 6, 6]
