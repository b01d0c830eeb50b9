"""The bound of det J over whole cells, and the repair of fields that fold."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.algorithms import metrics, warp
from pipeline.algorithms.lattice import Lattice
from pipeline.algorithms.lattices import Lattices, jacobian
from pipeline.algorithms.regularity import orientation_preserving, smallest_determinant, stays_above, unfolded


def lattice(values: np.ndarray, step: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Lattice:
    return Lattice(torch.tensor(values, dtype=torch.float32), torch.tensor(step))


def sampled_determinants(u: Lattice, affine: np.ndarray, seed: int, count: int = 4000) -> np.ndarray:
    """det J at random positions, by differences so small that they stay in a cell."""
    step = u.step_mm.double().numpy()
    nodes = np.array(u.values.shape[1:])
    rng = np.random.default_rng(seed)
    x = (rng.integers(0, np.maximum(nodes - 1, 1), (count, 3)) + rng.uniform(0.01, 0.99, (count, 3))) * step
    x[:, nodes == 1] = 0
    values = u.values.double().numpy()
    columns = []
    for axis in range(3):
        ahead, behind = x.copy(), x.copy()
        ahead[:, axis] += 1e-4 * step[axis]
        behind[:, axis] -= 1e-4 * step[axis]
        moved = [warp.apply_affine(affine, p) + warp.warp_points(p, values, tuple(step)) - p for p in (ahead, behind)]
        columns.append((moved[0] - moved[1]) / (2e-4 * step[axis]))
    return np.asarray(np.linalg.det(np.stack(columns, -1)))


@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7)),
    size=st.floats(0.01, 0.6),
)
@settings(max_examples=30, deadline=None)
def test_no_position_lies_under_the_bound(seed: int, shape: tuple[int, int, int], size: float) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] += 0.1 * rng.normal(size=(3, 3))
    u = lattice(size * rng.normal(size=(3, *shape)), (2.0, 1.0, 1.5))
    bound = smallest_determinant(u, affine)
    assert sampled_determinants(u, affine, seed).min() >= bound - 1e-4
    assert stays_above(u, affine, bound - 1e-3)
    assert not stays_above(u, affine, bound + 1e-3)


def test_a_fold_that_no_voxel_shows_is_seen() -> None:
    u = np.zeros((3, 1, 4, 4), np.float32)
    u[2, 0, 1, 2], u[2, 0, 1, 1] = -0.6, 0.6
    assert (metrics.jacobian_determinant(u, (1.0, 1.0, 1.0)) > 0).all()
    assert smallest_determinant(lattice(u), np.eye(4)) == pytest.approx(-0.2)


def test_a_plane_is_decided_by_its_corners() -> None:
    u = lattice(0.4 * np.random.default_rng(0).normal(size=(3, 1, 6, 7)) * np.array([0, 1, 1])[:, None, None, None])
    values = np.pad(u.values[1:, 0].numpy(), ((0, 0), (1, 1), (1, 1)), "edge")
    found = []
    for dy, dx in product((0, 1), repeat=2):
        down, right = np.diff(values, axis=1), np.diff(values, axis=2)
        a, b = down[:, :, dx : dx + down.shape[2] - 1], right[:, dy : dy + right.shape[1] - 1]
        found.append(((1 + a[0]) * (1 + b[1]) - a[1] * b[0]).min())
    assert smallest_determinant(u, np.eye(4)) == pytest.approx(min(found), abs=1e-5)


def test_what_does_not_fold_is_left_alone() -> None:
    u = lattice(0.05 * np.random.default_rng(0).normal(size=(3, 4, 6, 6)))
    found, damped = unfolded(u, np.eye(4), 0.05)
    assert found is u
    assert not damped


@pytest.mark.parametrize("shape", [(1, 40, 40), (12, 30, 30)])
def test_a_folded_field_is_repaired_where_it_folds(shape: tuple[int, int, int]) -> None:
    values = np.zeros((3, *shape), np.float32)
    values[2, :, 10:16, 12:] = -4.0
    values[2, :, 10:16, 18:] = 0.0
    values[1] = 0.5
    u = lattice(values, (3.0, 1.0, 1.0))
    assert jacobian(Lattices(u.values[None], u.step_mm[None]), torch.eye(4)[None]).min() < 0
    repaired, damped = unfolded(u, np.eye(4), 0.05)
    assert damped
    assert smallest_determinant(repaired, np.eye(4)) > 0.05
    assert sampled_determinants(repaired, np.eye(4), 1).min() > 0.05
    np.testing.assert_array_equal(repaired.values[:, :, -3:], u.values[:, :, -3:])


@given(seed=st.integers(0, 10_000), size=st.floats(0.1, 30.0))
@settings(max_examples=10, deadline=None)
def test_any_field_is_repaired(seed: int, size: float) -> None:
    u = lattice(size * np.random.default_rng(seed).normal(size=(3, 3, 7, 8)))
    repaired, _ = unfolded(u, np.eye(4), 0.05)
    assert smallest_determinant(repaired, np.eye(4)) > 0.05


def test_an_affine_part_that_mirrors_cannot_be_repaired_by_damping_the_rest() -> None:
    with pytest.raises(ValueError, match="determinant -1, not above"):
        unfolded(lattice(np.zeros((3, 2, 3, 3))), np.diag([1.0, -1.0, 1.0, 1.0]), 0.05)


@pytest.mark.parametrize("scales", [(1.0, -1.0, 1.0), (1.0, 0.01, 1.0), (30.0, 3.0, 1.0), (-1.0, -1.0, -1.0)])
def test_an_affine_that_mirrors_flattens_or_inflates_is_drawn_back(scales: tuple[float, float, float]) -> None:
    affine = np.diag([*scales, 1.0])
    affine[:3, 3] = 4.0, -2.0, 7.0
    center = np.array([10.0, 20.0, 30.0])
    found, changed = orientation_preserving(affine, center)
    assert changed
    assert 0.1 < np.linalg.det(found[:3, :3]) < 10
    np.testing.assert_allclose(warp.apply_affine(found, center), warp.apply_affine(affine, center))


def test_an_affine_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        orientation_preserving(np.full((4, 4), np.nan), np.ones(3))


def test_a_sound_affine_stays_as_it_is() -> None:
    affine = np.diag([0.8, 1.1, 1.2, 1.0])
    found, changed = orientation_preserving(affine, np.ones(3))
    assert not changed
    np.testing.assert_array_equal(found, affine)
