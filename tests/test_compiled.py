"""The compiled loops of the fit against the torch code for other devices and against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from pipeline.algorithms import bspline, damping, gauss_newton, lattices, roi_affine, roi_fields
from pipeline.algorithms.ddf import fit_ddfs
from pipeline.algorithms.distance_map import signed_distance
from pipeline.algorithms.fit_config import FitConfig
from pipeline.algorithms.fit_problem import Problem, Roi, RoiPair

FLAT, DEEP = ((1, 60, 64), (1.0, 0.8, 0.8)), ((24, 40, 44), (1.5, 1.0, 1.2))


def balls(seed: int, grid: tuple[tuple[int, int, int], tuple[float, float, float]], confidence: float) -> Problem:
    """Four ROIs apart from each other, round on the fixed and squeezed and shifted on the moving image."""
    shape, spacing = grid
    rng, pairs = np.random.default_rng(seed), []
    at, size = np.indices(shape) * np.array(spacing)[:, None, None, None], np.array(shape) * spacing
    for place in ((0.5, 0.28, 0.28), (0.5, 0.72, 0.28), (0.5, 0.28, 0.72), (0.5, 0.72, 0.72)):
        center = np.array(place) * size if shape[0] > 1 else np.array((0.0, *place[1:])) * size
        radius, shift = rng.uniform(5, 7), np.array((0.0, *rng.normal(0, 1.5, 2)))
        sides = [
            ((at - c[:, None, None, None]) ** 2 / s[:, None, None, None]).sum(0) < radius**2
            for c, s in ((center, np.ones(3)), (center + shift, np.array((1.0, 1.4, 0.7))))
        ]
        fixed, moving = (Roi(mask, (0, 0, 0)) for mask in sides)
        pairs.append(RoiPair(fixed, moving, confidence))
    return Problem(pairs, shape, spacing, spacing, np.eye(4))


@pytest.mark.parametrize("confidence", [0.7, 1.0])
@pytest.mark.parametrize("grid", [FLAT, DEEP])
def test_fits_are_the_same_with_torch(
    grid: tuple[tuple[int, int, int], tuple[float, float, float]], confidence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [balls(seed, grid, confidence) for seed in range(2)]
    compiled = fit_ddfs(problems, FitConfig())
    for module in (bspline, damping, gauss_newton, lattices, roi_affine, roi_fields):
        monkeypatch.setattr(module, "runs_compiled", lambda values: False)
    for ours, other in zip(compiled, fit_ddfs(problems, FitConfig()), strict=True):
        assert np.abs(ours.ddf).max() > 1
        assert ours.fallback == other.fallback
        np.testing.assert_allclose(ours.ddf, other.ddf, atol=0.02)
        np.testing.assert_allclose(ours.roi_overlap, other.roi_overlap, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((1, 30, 40), (8.0, 1.0, 1.3)), ((9, 20, 17), (5.0, 0.7, 1.1)), ((2, 1, 1), (1.0, 1.0, 1.0))]
)
def test_distance_maps_are_exact(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(3)
    mask = ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > 0
    mask[0, 0, 0] = True
    margin = (0 if shape[0] == 1 else 3, 4, 5)
    padded = np.pad(mask, [(m, m) for m in margin])
    half = min(spacing[1:] if shape[0] == 1 else spacing) / 2
    inside, outside = (ndimage.distance_transform_edt(side, spacing) for side in (padded, ~padded))
    expected = np.where(padded, inside - half, half - outside)
    np.testing.assert_allclose(signed_distance(mask, spacing, margin), expected, atol=1e-4)


@pytest.mark.parametrize("reach", [1, 3, 12])
@pytest.mark.parametrize("shape", [(3, 1, 40, 25), (2, 7, 16, 9)])
def test_steps_are_damped_around_the_same_nodes_with_torch(
    shape: tuple[int, ...], reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = torch.from_numpy(np.random.default_rng(0).random(shape) < 0.01)
    compiled = damping._softened(bad, reach)
    assert compiled[bad].min() > 0.99
    monkeypatch.setattr(damping, "runs_compiled", lambda values: False)
    torch.testing.assert_close(compiled, damping._softened(bad, reach), atol=1e-5, rtol=0)


@pytest.mark.parametrize("confidence", [0.7, 1.0])
def test_pictures_move_in_plane_as_a_volume_of_one_slice_does(
    confidence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = balls(0, FLAT, confidence)
    assert problem.in_plane
    picture = fit_ddfs([problem], FitConfig())[0]
    monkeypatch.setattr(Problem, "in_plane", False)
    np.testing.assert_allclose(picture.ddf, fit_ddfs([problem], FitConfig())[0].ddf, atol=0.02)
    assert not picture.ddf[0].any()


def test_slices_of_a_volume_move_to_their_slice() -> None:
    """A fixed image of one slice, matched with ROIs of two slices of a volume, is no picture."""
    problem = balls(0, FLAT, 0.9)
    pairs = [RoiPair(p.fixed, Roi(p.moving.mask, (k % 2, 0, 0)), 0.9) for k, p in enumerate(problem.pairs)]
    assert not Problem(pairs, *FLAT, FLAT[1], np.eye(4)).in_plane
    assert not Problem(problem.pairs, *FLAT, FLAT[1], np.eye(4)[[1, 0, 2, 3]]).in_plane


def test_only_fits_that_still_differ_take_the_finest_levels() -> None:
    same = balls(0, DEEP, 1.0)
    same = Problem([RoiPair(p.fixed, p.fixed) for p in same.pairs], *DEEP, DEEP[1], np.eye(4))
    moving = [RoiPair(p.fixed, Roi(p.fixed.mask & (np.indices(DEEP[0])[1] % 4 < 2), (0, 0, 0))) for p in same.pairs]
    apart = Problem(moving, *DEEP, DEEP[1], np.eye(4))
    met, fine = fit_ddfs([same, apart], FitConfig())
    assert met.step_mm[1] == 2.0
    assert fine.step_mm[1] == 1.0
    alone = fit_ddfs([apart], FitConfig())[0]
    np.testing.assert_array_equal(fine.lattice, alone.lattice)
