"""The displacement fit on phantoms with known maps, on degenerate input and on random ROIs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.ndimage import map_coordinates

from pipeline.algorithms import gauss_newton, metrics, roi_fields, warp
from pipeline.algorithms.ddf import FitConfig, FitResult, fit_ddf, fit_ddfs
from pipeline.algorithms.distance_map import signed_distance
from pipeline.algorithms.fit_config import DEFAULT_LEVELS, Eq10Config
from pipeline.algorithms.fit_problem import Problem, Roi, RoiPair
from pipeline.algorithms.stray_points import differing

SHAPE = (8, 72, 80)
SPACING = (6.0, 1.5, 1.5)
IDENTITY = np.eye(4)


def crop(mask: np.ndarray) -> Roi:
    index = np.argwhere(mask)
    low, high = index.min(0), index.max(0) + 1
    return Roi(mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], tuple(int(v) for v in low))


def discs(seed: int = 0, per_slice: int = 6, shape: tuple[int, int, int] = SHAPE) -> list[np.ndarray]:
    """One-slice discs away from the border."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(shape)
    out = []
    for plane in range(shape[0]):
        for _ in range(per_slice):
            radius = rng.uniform(5, 11)
            cy, cx = rng.uniform(16, shape[1] - 16), rng.uniform(16, shape[2] - 16)
            out.append((z == plane) & ((y - cy) ** 2 + (x - cx) ** 2 < radius**2))
    return out


def moved_back(mask: np.ndarray, field: np.ndarray) -> np.ndarray:
    """The fixed mask whose moving counterpart is `mask` under the true pull-back field."""
    index = warp.moving_indices(field, SPACING, IDENTITY, SPACING)
    return warp.warp_image(mask.astype(np.float32), index) >= 0.5


def fit(pairs: list[RoiPair], shape: tuple[int, int, int] = SHAPE, config: FitConfig | None = None) -> FitResult:
    spacing = SPACING if shape[0] > 1 else (1.0, 1.0, 1.0)
    return fit_ddf(pairs, shape, spacing, spacing, IDENTITY, config or FitConfig())


def smooth_field(amplitude_mm: float) -> np.ndarray:
    _, y, x = np.indices(SHAPE, dtype=np.float64)
    field = np.zeros((3, *SHAPE))
    field[1] = amplitude_mm * np.sin(2 * np.pi * x / 70) * np.cos(2 * np.pi * y / 90)
    field[2] = amplitude_mm * np.cos(2 * np.pi * x / 80 + 1) * np.sin(2 * np.pi * y / 75)
    return field


def recovered(field: np.ndarray, per_slice: int) -> tuple[FitResult, float]:
    """Fit discs moved by a true field; mean error near them, voxels."""
    pairs, near = [], np.zeros(SHAPE, bool)
    for mask in discs(1, per_slice):
        fixed = moved_back(mask, field)
        if fixed.any():
            pairs.append(RoiPair(crop(fixed), crop(mask)))
            near |= fixed
    result = fit(pairs)
    error = np.linalg.norm((result.ddf - field)[1:, near], axis=0) / SPACING[1]
    return result, float(error.mean())


def test_identity_stays_identity() -> None:
    result = fit([RoiPair(crop(m), crop(m)) for m in discs()])
    assert np.abs(result.ddf).max() < 0.05
    assert result.fallback == "none"
    assert result.roi_overlap.min() > 0.99


def test_known_smooth_deformation_is_recovered() -> None:
    result, error = recovered(smooth_field(4.0), per_slice=6)
    assert error < 0.6
    assert metrics.jacobian_stats(result.ddf, SPACING).fold_fraction == 0


@pytest.mark.parametrize("count", [0, 30])
def test_the_affine_part_and_the_lattice_are_the_field(count: int) -> None:
    field = smooth_field(4.0)
    pairs = [RoiPair(crop(moved_back(mask, field)), crop(mask), 0.9) for mask in discs(2)[:count]]
    result = fit(pairs)
    points = warp.grid_points(SHAPE, SPACING)
    index = points / np.reshape(result.step_mm, (3, 1, 1, 1))
    added = np.stack([map_coordinates(component, index, order=1) for component in result.lattice])
    assert result.lattice.size < result.ddf.size
    np.testing.assert_allclose(warp.affine_ddf(result.affine, SHAPE, SPACING) + added, result.ddf, atol=1e-3)


def test_known_affine_is_recovered() -> None:
    matrix = np.eye(4)
    matrix[1:3, 1:3] = [[1.08, 0.06], [-0.05, 0.94]]
    matrix[1:3, 3] = (-6.0, 8.0)
    field = warp.affine_ddf(matrix, SHAPE, SPACING).astype(np.float64)
    result, error = recovered(field, per_slice=4)
    assert error < 0.6
    points = np.array([[20.0, 50, 50], [20.0, 60, 70]])
    moved, truth = warp.apply_affine(result.affine, points), warp.apply_affine(matrix, points)
    np.testing.assert_allclose(moved[:, 1:], truth[:, 1:], atol=1.5)


def test_matched_slices_move_along_the_through_plane_axis() -> None:
    rois = [crop(m) for m in discs() if not m[-1].any()]
    result = fit([RoiPair(r, Roi(r.mask, (r.offset[0] + 1, *r.offset[1:]))) for r in rois])
    assert result.ddf[0, 3:5, 20:50, 20:50].mean() == pytest.approx(SPACING[0], abs=0.5)


def test_volumetric_rois_are_fitted_too() -> None:
    z, y, x = np.indices((32, 48, 48))
    fixed = ((z - 15) / 8.0) ** 2 + ((y - 24) / 11.0) ** 2 + ((x - 22) / 10.0) ** 2 < 1
    moving = ((z - 17) / 10.0) ** 2 + ((y - 27) / 9.0) ** 2 + ((x - 22) / 12.0) ** 2 < 1
    unit = (1.0, 1.0, 1.0)
    result = fit_ddf([RoiPair(crop(fixed), crop(moving))], (32, 48, 48), unit, unit, IDENTITY, FitConfig())
    index = warp.moving_indices(result.ddf, unit, IDENTITY, unit)
    moved = warp.warp_image(moving.astype(np.float32), index) >= 0.5
    assert metrics.dice(fixed, fixed & moving | moving) < 0.85
    assert metrics.dice(fixed, moved) > 0.93
    assert metrics.jacobian_stats(result.ddf, unit).fold_fraction == 0


def test_moving_grid_of_other_spacing_and_origin() -> None:
    fixed = discs(2, 5)
    pairs = []
    for mask in fixed:
        roi = crop(mask)
        fine = np.repeat(np.repeat(roi.mask, 2, axis=1), 2, axis=2)
        pairs.append(RoiPair(roi, Roi(fine, (roi.offset[0], 2 * roi.offset[1], 2 * roi.offset[2])), 0.9))
    to_fixed = np.eye(4)
    to_fixed[1:3, 3] = -SPACING[1] / 4
    result = fit_ddf(pairs, SHAPE, SPACING, (6.0, 0.75, 0.75), to_fixed, FitConfig())
    assert np.abs(result.ddf).max() < SPACING[1] / 4


def test_no_pair_is_the_identity() -> None:
    result = fit([])
    assert result.fallback == "identity"
    assert not result.ddf.any()


@pytest.mark.parametrize("count", [1, 2])
def test_few_pairs_fall_back_to_a_translation(count: int) -> None:
    pairs = []
    for mask in discs(3, 1)[:count]:
        roi = crop(mask)
        pairs.append(RoiPair(roi, Roi(roi.mask, (roi.offset[0], roi.offset[1] + 4, roi.offset[2]))))
    result = fit(pairs)
    assert result.fallback == "translation"
    np.testing.assert_allclose(result.affine[:3, :3], np.eye(3), atol=1e-3)
    assert result.affine[1, 3] == pytest.approx(6.0, abs=0.3)


def test_two_dimensional_images() -> None:
    shape = (1, 96, 96)
    pairs = []
    for mask in discs(4, 12, shape):
        roi = crop(mask)
        pairs.append(RoiPair(roi, Roi(roi.mask, (0, roi.offset[1] - 3, roi.offset[2] + 5))))
    result = fit(pairs, shape)
    assert np.abs(result.ddf[0]).max() == 0
    assert result.ddf[1, 0, 30:60, 30:60].mean() == pytest.approx(-3.0, abs=0.2)
    assert result.ddf[2, 0, 30:60, 30:60].mean() == pytest.approx(5.0, abs=0.2)


def test_contradictory_pairs_stay_finite_and_one_to_one() -> None:
    masks = discs(5, 6)
    rng = np.random.default_rng(5)
    order = rng.permutation(len(masks))
    result = fit([RoiPair(crop(a), crop(masks[b])) for a, b in zip(masks, order, strict=True)])
    assert np.isfinite(result.ddf).all()
    assert metrics.jacobian_stats(result.ddf, SPACING).fold_fraction == 0


@pytest.mark.parametrize("box", [np.s_[0, :, :], np.s_[0, :5, :7], np.s_[0, 30, 30]])
def test_full_border_and_single_voxel_masks(box: tuple[slice, ...]) -> None:
    mask = np.zeros(SHAPE, bool)
    mask[box] = True
    others = [RoiPair(crop(m), crop(m)) for m in discs(6, 1)]
    result = fit([RoiPair(crop(mask), crop(mask)), *others])
    assert np.abs(result.ddf).max() < 0.3


def crosses() -> list[RoiPair]:
    """Three balls that are crosses of three bars in the moving image."""
    grid = np.indices((36, 48, 48))
    pairs = []
    for center in ((11, 11, 11), (13, 35, 15), (24, 18, 34)):
        away = np.abs(grid - np.array(center)[:, None, None, None])
        fixed = (away**2).sum(0) < 30
        moving = (np.sort(away, axis=0)[:2] < 3).all(0) & (away < 8).all(0)
        pairs.append(RoiPair(crop(fixed), crop(moving)))
    return pairs


def mean_dice(pairs: list[RoiPair], config: FitConfig) -> float:
    shape, unit = (36, 48, 48), (1.0, 1.0, 1.0)
    result = fit_ddf(pairs, shape, unit, unit, IDENTITY, config)
    index = warp.moving_indices(result.ddf, unit, IDENTITY, unit)
    found = []
    for pair in pairs:
        fixed, moving = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for whole, roi in ((fixed, pair.fixed), (moving, pair.moving)):
            whole[tuple(slice(o, o + n) for o, n in zip(roi.offset, roi.mask.shape, strict=True))] = roi.mask
        found.append(metrics.dice(fixed > 0, warp.warp_image(moving, index) >= 0.5))
    return float(np.mean(found))


def test_only_trusted_pairs_take_the_fine_levels() -> None:
    pairs = crosses()
    unsure = [RoiPair(p.fixed, p.moving, 0.9) for p in pairs]
    coarse = FitConfig(levels=tuple(level for level in DEFAULT_LEVELS if not level.trust))
    assert mean_dice(pairs, FitConfig()) > mean_dice(pairs, coarse) + 0.01
    assert mean_dice(unsure, FitConfig()) == mean_dice(unsure, coarse)


def test_a_part_of_a_sure_roi_far_from_the_fixed_one_is_drawn_in() -> None:
    shape, unit = (1, 90, 100), (1.0, 1.0, 1.0)
    _, y, x = np.indices(shape)
    fixed = (y - 30) ** 2 + (x - 24) ** 2 < 100
    moving = fixed | (abs(y - 30) < 3) & (x > 24) & (x < 58)
    found = fit([RoiPair(crop(fixed), crop(moving))], shape)
    moved = warp.warp_image(moving.astype(np.float32), warp.moving_indices(found.ddf, unit, IDENTITY, unit))
    assert metrics.dice(fixed, moving) < 0.85
    assert metrics.dice(fixed, moved >= 0.5) > 0.95


def test_voxels_away_from_the_boundary_that_differ_are_counted() -> None:
    shape, unit = (12, 40, 60), (1.0, 1.0, 1.0)
    fixed, moving = np.zeros(shape, bool), np.zeros(shape, bool)
    fixed[4:8, 10:20, 5:40] = True
    moving[4:8, 10:20, 20:55] = True
    problem = Problem([RoiPair(crop(fixed), crop(moving))], shape, unit, unit, IDENTITY)
    rois = roi_fields.build([problem], "cpu", 1.0)
    still = gauss_newton.still([problem], "cpu")
    distance = ndimage.distance_transform_edt(fixed) - ndimage.distance_transform_edt(~fixed)
    away = abs(distance - np.sign(distance) / 2) >= 2
    only_moved, only_fixed = differing(rois, [problem], torch.eye(4)[None], still, 2.0)
    assert only_moved[0] == pytest.approx((moving & ~fixed & away).sum(), rel=0.2)
    assert only_fixed[0] == pytest.approx((fixed & ~moving & away).sum(), rel=0.2)


def test_other_slices_say_nothing_of_a_roi_of_one_slice() -> None:
    shift = np.eye(4)
    shift[0, 3] = SPACING[0]
    problem = Problem([RoiPair(crop(mask), crop(mask)) for mask in discs(3)], SHAPE, SPACING, SPACING, shift)
    rois = roi_fields.build([problem], "cpu", 1.0)
    only_moved, _ = differing(rois, [problem], torch.eye(4)[None], gauss_newton.still([problem], "cpu"), 2.0)
    assert not only_moved.any()


def test_eq10_comes_closer_to_the_rois_also_without_levels() -> None:
    pairs = crosses()
    start = mean_dice(pairs, FitConfig(levels=()))
    alone = mean_dice(pairs, FitConfig(levels=(), objective="eq10", eq10=Eq10Config(smoothness=0.8)))
    polished = mean_dice(pairs, FitConfig(objective="eq10"))
    assert alone > start + 0.02
    assert polished > mean_dice(pairs, FitConfig())
    assert polished > 0.96


def test_pairs_on_a_line_fall_back_to_a_rigid_affine_part() -> None:
    pairs = []
    for x in (12, 34, 60):
        fixed, moving = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
        fixed[4, 30:38, x : x + 8], moving[4, 34:42, x : x + 8] = True, True
        pairs.append(RoiPair(crop(fixed), crop(moving)))
    result = fit(pairs)
    assert result.fallback == "rigid"
    np.testing.assert_allclose(result.affine[:3, :3] @ result.affine[:3, :3].T, np.eye(3), atol=1e-6)
    assert result.ddf[1, 4, 34, 30:50].mean() == pytest.approx(4 * SPACING[1], abs=0.5)


def test_empty_masks_are_no_pairs() -> None:
    empty = Roi(np.zeros((1, 4, 4), bool), (2, 10, 10))
    whole = crop(discs(3, 1)[2])
    result = fit([RoiPair(empty, whole), RoiPair(whole, empty)])
    assert result.fallback == "identity"
    assert not result.ddf.any()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_random_rois_never_fold_and_never_give_nan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing = tuple(float(v) for v in rng.uniform(0.5, 3.0, 3) * (rng.integers(1, 4), 1, 1))
    shape = (int(rng.integers(1, 6)), 40, 44)
    masks = [m for m in discs(int(seed % 1000), 3, shape) if m.any()]
    pairs = []
    for mask in masks:
        roi = crop(mask)
        shift = rng.integers(-6, 7, 2)
        grown = np.pad(roi.mask, [(0, 0), (0, int(rng.integers(0, 4))), (0, 0)], mode="edge")
        offset = (roi.offset[0], roi.offset[1] + int(shift[0]), roi.offset[2] + int(shift[1]))
        pairs.append(RoiPair(roi, Roi(grown, offset), float(rng.uniform(0.1, 1))))
    result = fit_ddf(pairs, shape, spacing, spacing, IDENTITY, FitConfig())
    assert np.isfinite(result.ddf).all()
    assert metrics.jacobian_stats(result.ddf, spacing).fold_fraction == 0


def test_fit_is_deterministic() -> None:
    pairs = [RoiPair(crop(m), crop(np.roll(m, 2, axis=1))) for m in discs(7, 4)]
    np.testing.assert_array_equal(fit(pairs).ddf, fit(pairs).ddf)


def test_signed_distance_is_zero_on_the_voxel_edge() -> None:
    mask = np.ones((1, 4, 6), bool)
    distance = signed_distance(mask, (9.0, 2.0, 2.0), (0, 3, 3))
    assert distance.shape == (1, 10, 12)
    assert distance[0, 3, 5] == 1.0
    assert distance[0, 2, 5] == -1.0
    assert distance[0, 4, 5] == 3.0


def test_a_batch_gives_what_each_fit_gives_alone() -> None:
    problems = []
    for seed, shape, spacing in (
        (0, (1, 60, 64), (1.0, 0.8, 0.8)),
        (1, (1, 61, 70), (1.0, 0.5, 0.5)),
        (2, (5, 48, 50), (6.0, 1.0, 1.2)),
        (3, (5, 48, 50), (6.0, 1.0, 1.2)),
        (4, (1, 60, 64), (1.0, 0.8, 0.8)),
    ):
        fixed = discs(seed, 5, shape)
        pairs = [RoiPair(crop(mask), crop(np.roll(mask, (2, -1), (1, 2)))) for mask in fixed]
        problems.append(Problem(pairs, shape, spacing, spacing, IDENTITY))
    problems.append(Problem([], (1, 20, 20), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), IDENTITY))
    alone = [fit_ddfs([problem], FitConfig())[0] for problem in problems]
    together = fit_ddfs(problems, FitConfig())
    pieces = fit_ddfs(problems, FitConfig(), nodes_at_once=1)
    for one, other, piece, problem in zip(alone, together, pieces, problems, strict=True):
        assert one.ddf.shape == (3, *problem.shape)
        for field in ("ddf", "affine", "lattice", "roi_overlap"):
            for again in (other, piece):
                np.testing.assert_allclose(getattr(again, field), getattr(one, field), rtol=0, atol=1e-12)
    assert [result.fallback for result in together] == ["none"] * 5 + ["identity"]
