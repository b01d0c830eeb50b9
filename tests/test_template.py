"""Averages over subjects against numpy, with missing data; sharpness; votes and agreement of labels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage

from pipeline.algorithms import label_votes, template
from pipeline.algorithms.atlas_config import AtlasConfig, Average
from pipeline.algorithms.metrics import dice

SPACING = (2.0, 1.0, 1.0)


def stack(missing: bool = True) -> np.ndarray:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(11, 3, 6, 5)).astype(np.float32)
    if missing:
        values[generator.random(values.shape) < 0.3] = np.nan
    return values


@pytest.mark.parametrize(("how", "expected"), [("mean", np.nanmean), ("median", np.nanmedian)])
def test_mean_and_median_leave_out_missing_data(how: Average, expected: object) -> None:
    assert np.allclose(template.average(stack(), how, 0.1), expected(stack(), axis=0), atol=1e-6)  # type: ignore[operator]


def test_the_trimmed_mean_leaves_out_the_extremes() -> None:
    values = stack(missing=False)
    expected = np.sort(values, axis=0)[2:-2].mean(axis=0)
    assert np.allclose(template.average(values, "trimmed", 0.2), expected, atol=1e-6)
    values[0] = 1e6
    assert np.abs(template.average(values, "trimmed", 0.1)).max() < 10


def test_few_subjects_are_no_average() -> None:
    values = np.full((8, 1, 1, 2), np.nan, np.float32)
    values[0], values[1, 0, 0, 1] = 1.0, 3.0
    assert np.array_equal(template.average(values, "mean", 0.0), [[[np.nan, 2.0]]], equal_nan=True)


def test_the_variance_is_that_of_the_subjects_with_data() -> None:
    assert np.allclose(template.variance(stack()), np.nanvar(stack(), axis=0, ddof=1), atol=1e-5)
    assert not template.variance(stack()[:1]).any()


def test_normalising_undoes_another_scale() -> None:
    image = np.random.default_rng(1).normal(100, 20, (4, 30, 30)).astype(np.float32)
    image[0, 0] = np.nan
    assert np.allclose(template.normalised(image), template.normalised(3 * image - 50), atol=1e-4, equal_nan=True)
    with pytest.raises(ValueError, match="nothing of the image"):
        template.normalised(np.full((1, 2, 2), np.nan, np.float32))


def test_a_blurred_image_is_less_sharp_and_sharpening_goes_back() -> None:
    image = np.zeros((6, 40, 40), np.float32)
    image[2:5, 10:30, 10:30] = 1
    inside = np.ones(image.shape, bool)
    blurred = ndimage.gaussian_filter(image, 1.0)
    sharp, soft, again = (
        template.sharpness(i, SPACING, inside) for i in (image, blurred, template.sharpened(blurred, SPACING, 0.5))
    )
    assert soft < 0.9 * sharp
    assert soft < again < sharp
    assert np.isclose(template.sharpness(7 * blurred + 3, SPACING, inside), soft, rtol=1e-4)


def test_the_foreground_has_no_holes_and_no_background() -> None:
    image = np.zeros((5, 20, 20), np.float32)
    image[1:4, 5:15, 5:15] = 100
    image[2, 9:11, 9:11] = 0
    assert np.array_equal(template.foreground(image), ndimage.binary_fill_holes(image > 0))


def test_missing_voxels_take_the_nearest() -> None:
    assert np.array_equal(template.filled(np.array([[[1.0, np.nan, np.nan, 5.0]]], np.float32)), [[[1, 1, 5, 5]]])


def test_votes_are_counted_with_the_background() -> None:
    votes = np.array([[2.0, 1.0, 0.4], [0.5, 1.0, 0.4]])
    assert label_votes.winner(votes, 3.0).tolist() == [1, 0, 0]
    assert label_votes.numbered(np.array([0, 1, 2]), [5, 9]).tolist() == [0, 5, 9]


def test_the_dice_matrix_is_the_mean_over_shared_labels() -> None:
    generator = np.random.default_rng(2)
    maps = generator.integers(0, 3, (4, 50))
    maps[3][maps[3] == 2] = 0
    overlaps = np.array([[[((a == k) & (b == k)).sum() for b in maps] for a in maps] for k in (1, 2)], dtype=np.float64)
    found = label_votes.dice_matrix(overlaps)
    for i, j in itertools.product(range(4), repeat=2):
        held = [k for k in (1, 2) if (maps[i] == k).any() and (maps[j] == k).any()]
        assert np.isclose(found[i, j], np.mean([dice(maps[i] == k, maps[j] == k) for k in held]))


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"trim": 0.5}, {"sharpening": -1}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"atlas.{next(iter(settings))} is"):
        AtlasConfig(**settings)  # type: ignore[arg-type]
