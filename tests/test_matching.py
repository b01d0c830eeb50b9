"""Algorithm 1 by its letter, and the spatially consistent selection on subjects with known partners."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.algorithms import ellipses
from pipeline.algorithms.affine import consensus_affine, ridge_affine, robust_affine
from pipeline.algorithms.consistency import SpatialConfig
from pipeline.algorithms.matching import MatchConfig, RoiSet, match
from pipeline.algorithms.similarity import Similarities

PAPER = MatchConfig(
    epsilon=0.8, scope="window", slice_range=11, slice_unit="slices", spatial=SpatialConfig(enabled=False)
)


def rois(prototypes: list[list[float]], slices: list[int], n_slices: int = 5) -> RoiSet:
    values = np.array(prototypes, np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    index = np.array(slices, np.int32)
    centroid = np.column_stack([index * 5.0, np.zeros((len(index), 2))])
    covariance = np.tile([10.0, 0.0, 10.0], (len(index), 1))
    return RoiSet(values, index, centroid, np.full(len(index), 100.0), covariance, n_slices)


def pairs(moving: RoiSet, fixed: RoiSet, config: MatchConfig) -> list[tuple[int, int]]:
    found = match(moving, fixed, np.eye(4), config)
    return list(zip(found.moving_index.tolist(), found.fixed_index.tolist(), strict=True))


def angle(degrees: float) -> list[float]:
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]


def test_greedy_takes_the_best_pair_first() -> None:
    moving, fixed = rois([angle(0), angle(20)], [0, 0]), rois([angle(5), angle(12)], [0, 0])
    assert pairs(moving, fixed, PAPER) == [(0, 0), (1, 1)]


def test_epsilon_is_strict_and_similarity_is_the_cosine() -> None:
    moving, fixed = rois([angle(0)], [0]), rois([angle(60)], [0])
    assert pairs(moving, fixed, dataclasses.replace(PAPER, epsilon=0.5001)) == []
    found = match(moving, fixed, np.eye(4), dataclasses.replace(PAPER, epsilon=0.4999))
    assert found.similarity.tolist() == pytest.approx([0.5], abs=1e-6)


def test_window_scope_reuses_a_fixed_roi_for_another_moving_slice() -> None:
    moving, fixed = rois([angle(0), angle(1)], [0, 1]), rois([angle(0)], [0])
    assert pairs(moving, fixed, PAPER) == [(0, 0), (1, 0)]
    assert pairs(moving, fixed, dataclasses.replace(PAPER, scope="volume")) == [(0, 0)]


def test_one_to_many_takes_every_pair_above_epsilon() -> None:
    moving, fixed = rois([angle(0), angle(10)], [0, 0]), rois([angle(0), angle(80)], [0, 0])
    assert pairs(moving, fixed, dataclasses.replace(PAPER, one_to_one=False)) == [(0, 0), (1, 0)]


@pytest.mark.parametrize(("reach", "expected"), [(0, [(0, 0)]), (1, [(0, 0), (1, 1)]), (4, [(0, 0), (1, 1)])])
def test_slice_range_is_inclusive(reach: int, expected: list[tuple[int, int]]) -> None:
    moving, fixed = rois([angle(0), angle(90)], [2, 2]), rois([angle(0), angle(90)], [2, 3])
    assert pairs(moving, fixed, dataclasses.replace(PAPER, slice_range=reach)) == expected


def test_relative_and_world_windows_see_different_depths() -> None:
    moving, fixed = rois([angle(0)], [9], n_slices=10), rois([angle(0)], [4], n_slices=5)
    relative = dataclasses.replace(PAPER, slice_unit="relative", slice_range=0.1)
    assert pairs(moving, fixed, relative) == [(0, 0)]
    world = dataclasses.replace(PAPER, slice_unit="mm", slice_range=24.9)
    assert pairs(moving, fixed, world) == []
    assert pairs(moving, fixed, dataclasses.replace(world, slice_range=25.0)) == [(0, 0)]


def test_caps_keep_the_best() -> None:
    moving = rois([angle(0), angle(40), angle(80)], [0, 0, 1])
    fixed = rois([angle(1), angle(43), angle(82)], [0, 0, 1])
    assert pairs(moving, fixed, dataclasses.replace(PAPER, max_pairs=1)) == [(0, 0)]
    per_slice = dataclasses.replace(PAPER, max_pairs=1, max_pairs_per="slice")
    assert pairs(moving, fixed, per_slice) == [(0, 0), (2, 2)]


def test_margin_is_against_the_best_other_candidate() -> None:
    found = match(rois([angle(0)], [0]), rois([angle(0), angle(60)], [0, 0]), np.eye(4), PAPER)
    assert found.margin.tolist() == pytest.approx([0.5], abs=1e-6)


def test_no_roi_on_one_side() -> None:
    nothing = RoiSet(
        np.zeros((0, 2), np.float32), np.zeros(0, np.int32), np.zeros((0, 3)), np.zeros(0), np.zeros((0, 3)), 5
    )
    assert pairs(nothing, rois([angle(0)], [0]), PAPER) == []
    assert pairs(rois([angle(0)], [0]), nothing, MatchConfig()) == []


def scattered(seed: int, moved: np.ndarray, confusable: float, noise: float = 0.5) -> tuple[RoiSet, RoiSet]:
    """60 ROIs with weak prototypes at random places, and the same under an affine map of the fixed frame."""
    rng = np.random.default_rng(seed)
    shared = np.abs(rng.normal(size=(1, 24))) * confusable + rng.normal(size=(60, 24))
    place = np.column_stack([np.repeat(np.arange(6), 10) * 8.0, rng.uniform(30, 200, (60, 2))])
    covariance = np.tile([30.0, 0.0, 30.0], (60, 1))
    index = np.repeat(np.arange(6), 10).astype(np.int32)

    def make(where: np.ndarray) -> RoiSet:
        noisy = shared + noise * rng.normal(size=shared.shape)
        unit = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
        return RoiSet(unit, index, where, np.full(60, 300.0), covariance, 6)

    return make(place @ moved[:3, :3].T + moved[:3, 3]), make(place)


def test_consistency_corrects_what_similarity_confuses() -> None:
    moved = np.eye(4)
    moved[1:3, 1:3] = [[0.9, 0.1], [-0.1, 1.05]]
    moved[1:3, 3] = (25.0, -12.0)
    moving, fixed = scattered(1, moved, confusable=2.0, noise=1.2)
    spatial = MatchConfig(epsilon=0.6)
    alone = dataclasses.replace(spatial, spatial=SpatialConfig(enabled=False))
    rate = {
        name: np.mean([i == j for i, j in pairs(moving, fixed, config)])
        for name, config in (("spatial", spatial), ("alone", alone))
    }
    assert rate["spatial"] > 0.97
    assert rate["spatial"] > rate["alone"] + 0.02


def test_one_to_many_holds_under_consistency_too() -> None:
    moving, fixed = scattered(4, np.eye(4), confusable=2.0)
    doubled = RoiSet(
        *(np.repeat(getattr(fixed, n), 2, axis=0) for n in ("prototypes", "slice", "centroid_mm", "area_mm2")),
        covariance_mm2=np.repeat(fixed.covariance_mm2, 2, axis=0),
        n_slices=fixed.n_slices,
    )
    once = pairs(moving, doubled, MatchConfig())
    many = pairs(moving, doubled, MatchConfig(one_to_one=False))
    assert len({i for i, _ in once}) == len(once)
    assert len(many) > len(once) * 1.5


def stacked(first: int, count: int) -> RoiSet:
    """Slices of one anatomy: six structures in each, alike from slice to slice but for a slow drift of one feature."""
    rng = np.random.default_rng(0)
    structure, place = rng.normal(size=(6, 12)), rng.uniform(30, 200, (6, 2))
    level = np.repeat(np.arange(first, first + count), 6)
    drift = np.column_stack([np.sin(level / 4), np.cos(level / 4)])
    values = np.column_stack([np.tile(structure, (count, 1)), 3 * drift])
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    index = np.repeat(np.arange(count), 6).astype(np.int32)
    centroid = np.column_stack([index * 8.0, np.tile(place, (count, 1))])
    return RoiSet(values, index, centroid, np.full(len(index), 300.0), np.tile([30.0, 0, 30.0], (len(index), 1)), count)


def test_partners_lie_in_the_expected_slice_of_a_stack_that_begins_elsewhere() -> None:
    moving, fixed = stacked(2, 10), stacked(0, 10)

    def apart(config: SpatialConfig) -> float:
        found = match(moving, fixed, np.eye(4), MatchConfig(spatial=config))
        return float(np.abs(moving.slice[found.moving_index] + 2 - fixed.slice[found.fixed_index]).mean())

    assert apart(SpatialConfig()) < 0.2
    assert apart(SpatialConfig(depth=0, widening=1)) > apart(SpatialConfig()) + 0.3


def test_hybrid_gives_the_surplus_slices_of_one_stack_a_partner() -> None:
    fine, coarse = stacked(0, 12), stacked(0, 12)
    rows = np.flatnonzero(coarse.slice % 2 == 0)
    arrays = {n: getattr(coarse, n)[rows] for n in ("prototypes", "centroid_mm", "area_mm2", "covariance_mm2")}
    coarse = RoiSet(slice=coarse.slice[rows] // 2, n_slices=6, **arrays)
    once, more = (pairs(coarse, fine, MatchConfig(one_to_one=kind)) for kind in (True, "hybrid"))
    assert len({j for _, j in once}) == 36
    assert set(once) < set(more)
    assert len({j for _, j in more}) > 60
    assert all(i % 6 == j % 6 for i, j in more)


def test_hybrid_leaves_nested_rois_of_a_slice_alone() -> None:
    coarse, fine = stacked(0, 6), stacked(0, 6)
    arrays = {n: np.repeat(getattr(fine, n), 3, axis=0) for n in ("prototypes", "slice", "centroid_mm", "area_mm2")}
    scale = np.tile([1.0, 0.9, 0.8], len(fine.slice))[:, None]
    nested = RoiSet(
        covariance_mm2=np.repeat(fine.covariance_mm2, 3, axis=0) * scale,
        n_slices=6,
        **arrays,  # type: ignore[arg-type]
    )
    for moving, fixed in ((coarse, nested), (nested, coarse)):
        found = match(moving, fixed, np.eye(4), MatchConfig(one_to_one="hybrid"))
        i, j = found.moving_index, found.fixed_index
        for roi, slices in ((i, fixed.slice[j]), (j, moving.slice[i])):
            assert len(set(zip(roi.tolist(), slices.tolist(), strict=True))) == len(roi)
            assert np.bincount(roi).max() <= 2


@pytest.mark.parametrize("spatial", [True, False])
def test_two_rois_that_look_alike_are_not_trusted_as_labels_are(spatial: bool) -> None:
    moving, fixed = rois([angle(0), angle(90)], [0, 1]), rois([angle(5), angle(95)], [0, 1])
    found = match(moving, fixed, np.eye(4), MatchConfig(spatial=SpatialConfig(enabled=spatial)))
    assert len(found.similarity) == 2
    assert found.similarity.min() > 0.99
    assert found.confidence.max() < (0.5 if spatial else 0.99)


def test_rois_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="order of their slices"):
        pairs(rois([angle(0), angle(1)], [1, 0]), rois([angle(0)], [0]), PAPER)


def test_hybrid_needs_the_consistent_selection() -> None:
    with pytest.raises(ValueError, match=r"one_to_one is hybrid, which needs match\.spatial\.enabled"):
        MatchConfig(one_to_one="hybrid", spatial=SpatialConfig(enabled=False))


def test_the_affine_comes_first() -> None:
    with pytest.raises(ValueError, match="affine_rounds and local_rounds are 0 and 2"):
        SpatialConfig(affine_rounds=0, local_rounds=2)


@pytest.mark.parametrize("change", [{"similarity": "centred"}, {"similarity": "minmax"}, {"false_discovery": 0.2}])
def test_every_similarity_finds_the_partners(change: dict[str, object]) -> None:
    moving, fixed = scattered(5, np.eye(4), confusable=0.5)
    found = pairs(moving, fixed, dataclasses.replace(MatchConfig(epsilon=0.4), **change))  # type: ignore[arg-type]
    assert len(found) > 40
    assert np.mean([i == j for i, j in found]) > 0.95


@pytest.mark.parametrize("rule", ["greedy", "mutual", "optimal"])
def test_every_rule_of_selection_finds_the_partners(rule: str) -> None:
    moving, fixed = scattered(6, np.eye(4), confusable=0.5)
    found = pairs(moving, fixed, MatchConfig(epsilon=0.4, selection=rule))  # type: ignore[arg-type]
    assert len(found) > 40
    assert len({i for i, _ in found}) == len({j for _, j in found}) == len(found)
    assert np.mean([i == j for i, j in found]) > 0.95


def test_confidence_grows_with_agreement() -> None:
    moving, fixed = scattered(7, np.eye(4), confusable=0.5)
    found = match(moving, fixed, np.eye(4), MatchConfig(epsilon=0.4))
    shifted = dataclasses.replace(moving, centroid_mm=moving.centroid_mm + [0, 0, 1.0] * np.arange(60)[:, None] % 9)
    worse = match(shifted, fixed, np.eye(4), MatchConfig(epsilon=0.4))
    assert 0 < worse.confidence.mean() < found.confidence.mean() < 1


def test_matching_is_deterministic() -> None:
    moving, fixed = scattered(2, np.eye(4), confusable=1.0)
    first, second = (match(moving, fixed, np.eye(4), MatchConfig()) for _ in range(2))
    for name in ("moving_index", "fixed_index", "similarity", "margin", "confidence"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_affines_recover_a_map_despite_outliers() -> None:
    rng = np.random.default_rng(3)
    truth = np.eye(4)
    truth[:3, :3] += 0.1 * rng.normal(size=(3, 3))
    truth[:3, 3] = (5, -30, 20)
    fixed = rng.uniform(0, 200, (80, 3))
    moving = fixed @ truth[:3, :3].T + truth[:3, 3]
    moving[:16] += rng.uniform(-80, 80, (16, 3))
    found = consensus_affine(fixed, moving, np.ones(80), prior_mm=1e-3)
    np.testing.assert_allclose(found, truth, atol=0.05)
    np.testing.assert_allclose(robust_affine(fixed[16:], moving[16:], np.ones(64), 1e-3), truth, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_points_give_a_translation_like_map(count: int) -> None:
    fixed = np.array([[0.0, 0, 0], [0, 10, 0], [0, 0, 10]])[:count]
    found = ridge_affine(fixed, fixed + np.array([1.0, 2, 3]), np.ones(count), prior_mm=20.0)
    np.testing.assert_allclose(found[:3, 3], [1, 2, 3], atol=1e-9)
    np.testing.assert_allclose(found[:3, :3], np.eye(3), atol=1e-9)


def test_ellipse_overlap() -> None:
    here, spread = np.zeros((1, 2)), np.array([[4.0, 1.0, 9.0]])
    assert ellipses.overlap(here, spread, here, spread).tolist() == pytest.approx([1.0])
    apart = ellipses.overlap(here, spread, here + 8.0, spread)
    assert 0 < apart[0] < 0.1
    for shift, near in ((30.0, False), (1.0, True)):
        gate = ellipses.Gate.between(here, spread, here + shift, spread, 0.2)
        alone = Similarities([(slice(0, 1), slice(0, 1))], [np.ones((1, 1), np.float32)])
        assert len(alone.above(0.5, gate)[0]) == near
