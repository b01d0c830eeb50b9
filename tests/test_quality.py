"""Robust scores: they find what was made bad, and little else."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.algorithms import quality
from pipeline.report_quality import LOST, Measure, alarms, assess


def test_badness_is_the_distance_from_the_median_in_robust_spreads() -> None:
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 100, np.nan])
    z = quality.badness(values, 0.1)
    np.testing.assert_allclose(z[:9], (values[:9] - 5) / (1.4826 * 2))
    assert np.isnan(z[9])


def test_equal_values_and_differences_that_do_not_matter_are_no_worse() -> None:
    np.testing.assert_array_equal(quality.badness(np.full(9, 0.3), 0.1), 0)
    values = np.append(np.zeros(20), 0.001)  # one fold in a thousand voxels, and a spread of 0
    assert quality.badness(values, 0.002).max() == 0.5


def test_few_results_have_no_scores() -> None:
    z = quality.badness(np.arange(float(quality.FEWEST - 1)), 0.1)
    assert np.isnan(z).all()
    assert np.isnan(quality.combine(z[None])).all()


def test_a_score_is_the_mean_of_the_worst_cut_at_the_largest() -> None:
    z = np.array([[4.0, -5, 99, np.nan], [1, -1, 0, np.nan], [1, 0, np.nan, np.nan], [0.5, 0, 0, np.nan]])
    np.testing.assert_allclose(quality.combine(z), [2, 0, quality.LARGEST / 3, np.nan])


@pytest.mark.parametrize("measures", [4, 9])
def test_chance_alone_rarely_stands_out(measures: int) -> None:
    rng = np.random.default_rng(0)
    z = np.stack([quality.badness(rng.normal(size=5000), 1e-3) for _ in range(measures)])
    assert (quality.combine(z) >= quality.LIMIT).mean() < 0.02


def test_group_medians_are_those_of_each_group() -> None:
    rng = np.random.default_rng(0)
    sizes = [1, 4, 7, 2]
    values, starts = rng.normal(size=14), np.array([0, 1, 5, 12])
    expected = [np.median(part) for part in np.split(values, np.cumsum(sizes)[:-1])]
    np.testing.assert_allclose(quality.group_medians(values, starts), expected)


def test_residuals_see_noise_and_not_the_affine_map_or_a_third_of_wrong_matches() -> None:
    rng = np.random.default_rng(0)
    size, noise = 90, (0.0, 1.0, 4.0)
    fixed = rng.normal(0, 40, (size * 3, 3))
    fixed[:size, 0] = 7.0  # a single slice, which leaves one direction undetermined
    moving = fixed @ rng.normal(0, 1, (3, 3)) + 30
    moving += rng.normal(size=moving.shape) * np.repeat(noise, size)[:, None]
    wrong = np.arange(len(fixed)) % 3 == 0
    moving[wrong] += rng.normal(0, 60, (wrong.sum(), 3))
    found = quality.affine_residuals(fixed, moving, np.arange(3) * size)
    assert found[0] < 0.2
    assert 1 < found[1] < 3 < found[2] < 10


def test_too_few_matches_have_no_residual() -> None:
    points = np.random.default_rng(0).normal(size=(quality.FEWEST_MATCHES - 1, 3))
    assert np.isnan(quality.affine_residuals(points, points, np.array([0]))).all()


def test_the_reasons_name_what_is_worst_and_labels_are_scored_apart() -> None:
    rng = np.random.default_rng(0)
    columns = {"a": rng.normal(1, 0.1, 40), "b": np.exp(rng.normal(0, 0.1, 40)), "c": rng.normal(0.8, 0.05, 40)}
    columns["b"][3] = 5.0
    columns["c"][5] = 0.0
    measures = (
        Measure("a", "a is low", -1, 0.01),
        Measure("b", "b is high", 1, 0.01, ratio=True),
        Measure("c", "c is low", -1, 0.01, labelled=True),
        Measure("absent", "never", 1, 1.0),
    )
    found = assess(columns, measures)
    assert found.reasons[3].startswith("b is high +")
    assert "c is low" in found.reasons[5]
    assert found.check.argmax() == 3
    assert found.accuracy.argmax() == 5
    assert set(np.flatnonzero(found.score >= quality.LIMIT)) == {3, 5}


def test_alarms_need_no_others_to_compare_with() -> None:
    flags = ["", "fallback_affine labels_in_fit", "worse_than_affine", "damped"]
    folded, before = np.array([0.02, 0, np.nan, 0]), np.array([np.nan, 0.5, 0.5, 0.5])
    found = alarms(flags, folded, before, np.array([np.nan, 0.6, 0.5 - 2 * LOST, 0.5]))
    assert found == ["folds", "affine only", "worse than its affine part, Dice fell", ""]
