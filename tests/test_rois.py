"""ROI filters, moments and prototypes on small exact arrays."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.algorithms.prototypes import PrototypeConfig, pool, resize_to_grid
from pipeline.algorithms.rois import RoiConfig, filter_rois, moments

SPACING = (8.0, 2.0, 1.0)
ONE_BLOCK = {"blocks": [["sam", 0, 3, 1.0]]}


def masks(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    out = np.zeros((len(boxes), *shape), bool)
    for mask, (y0, x0, y1, x1) in zip(out, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return out


def kept(stack: np.ndarray, **settings: object) -> list[int]:
    quality = np.linspace(0.9, 0.5, len(stack)).astype(np.float32)
    config = RoiConfig(**{"min_area": 0.0, "max_area": 1e9, **settings})  # type: ignore[arg-type]
    return filter_rois(stack, quality, quality, SPACING, config).tolist()


@pytest.mark.parametrize(
    ("unit", "low", "high"),
    [("px", 10, 50), ("fraction", 10 / 400, 50 / 400), ("mm2", 20, 100), ("ref200", 1000, 5000)],
)
def test_area_units(unit: str, low: float, high: float) -> None:
    stack = masks((0, 0, 3, 3), (0, 0, 5, 5), (0, 0, 10, 10))
    assert kept(stack, area_unit=unit, min_area=low, max_area=high) == [1]


def test_overlap_keeps_the_larger_and_a_dropped_roi_drops_nothing() -> None:
    nested = masks((0, 0, 10, 10), (0, 0, 10, 8), (0, 7, 10, 12))
    assert kept(nested, max_overlap=0.8) == [0, 2]
    assert kept(nested, max_overlap=1.0) == [0, 1, 2]


def test_quality_and_count() -> None:
    stack = masks((0, 0, 4, 4), (5, 5, 9, 9), (10, 10, 14, 14))
    assert kept(stack, min_quality=0.7) == [0, 1]
    assert kept(stack, max_per_slice=1) == [0]


def test_empty_input() -> None:
    assert kept(np.zeros((0, 8, 8), bool), max_overlap=0.8) == []


def test_moments_of_a_rectangle() -> None:
    found = moments(masks((2, 4, 6, 14)), np.array([3]), SPACING)
    assert found["area_px"].tolist() == [40]
    assert found["area_mm2"].tolist() == [80]
    np.testing.assert_allclose(found["centroid_vox"], [[3, 3.5, 8.5]])
    np.testing.assert_allclose(found["centroid_mm"], [[24, 7, 8.5]])
    assert found["bbox"].tolist() == [[2, 4, 6, 14]]
    np.testing.assert_allclose(found["covariance_mm2"], [[4 * 16 / 12, 0, 100 / 12]])


def test_pooling_a_constant_over_each_half() -> None:
    features = np.zeros((3, 4, 4), np.float32)
    features[0, :, :2], features[1, :, 2:] = 2, 3
    stack = masks((0, 0, 20, 10), (0, 10, 20, 20), (0, 0, 20, 20))
    values, valid = pool(features, stack, (4.0, 4.0), ONE_BLOCK, PrototypeConfig())
    assert valid.all()
    np.testing.assert_allclose(values[:2], [[1, 0, 0], [0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(values[2], np.array([2, 3, 0]) / np.sqrt(13), atol=1e-6)


def test_padded_grid_uses_its_valid_part_only() -> None:
    features = np.full((3, 4, 4), 9, np.float32)
    features[:, :2] = 0
    features[0, :2] = 1
    values, _ = pool(features, masks((0, 0, 20, 20)), (2.0, 4.0), ONE_BLOCK, PrototypeConfig())
    np.testing.assert_allclose(values, [[1, 0, 0]], atol=1e-6)


def test_area_average_weights_sum_to_the_area_in_cells() -> None:
    stack = masks((3, 5, 11, 18))
    weights = resize_to_grid(stack, (8, 8), (6.5, 7.25))
    assert weights.sum() == pytest.approx(8 * 13 / 400 * 6.5 * 7.25, rel=1e-5)


def test_roi_under_one_cell_is_reported() -> None:
    stack = masks((0, 0, 2, 2), (0, 0, 9, 9))
    _, valid = pool(np.ones((3, 4, 4), np.float32), stack, (4, 4), ONE_BLOCK, PrototypeConfig())
    assert valid.tolist() == [False, True]


def test_cosine_of_blocks_is_their_weighted_mean() -> None:
    features = np.zeros((4, 2, 2), np.float32)
    features[0, :, 0] = features[1, :, 1] = 1
    features[2] = 5
    layout = {"blocks": [["a", 0, 2, 0.3], ["b", 2, 4, 0.7]]}
    values, _ = pool(features, masks((0, 0, 20, 10), (0, 10, 20, 20)), (2, 2), layout, PrototypeConfig())
    assert values[0] @ values[1] == pytest.approx(0.7, abs=1e-6)


def test_context_tells_equal_rois_apart() -> None:
    features = np.zeros((2, 20, 20), np.float32)
    features[0] = 1
    features[:, :, 10:] = [[[0.0]], [[1.0]]]
    features[0, 5:9, 13:17], features[1, 5:9, 13:17] = 1, 0
    stack = masks((5, 3, 9, 7), (5, 13, 9, 17))
    layout = {"blocks": [["intensity", 0, 2, 1.0]], "context": 1.0}
    with_context, _ = pool(features, stack, (20, 20), layout, PrototypeConfig())
    without, _ = pool(features, stack, (20, 20), layout, PrototypeConfig(context=0.0))
    assert without[0] @ without[1] == pytest.approx(1.0, abs=1e-5)
    assert with_context[0] @ with_context[1] == pytest.approx(0.5, abs=1e-5)


def test_a_slice_without_rois() -> None:
    nothing = np.zeros((0, 20, 20), bool)
    layout = {"blocks": [["a", 0, 3, 1.0]], "context": 0.3, "area": 0.1, "shape": 0.1}
    values, valid = pool(np.ones((3, 4, 4), np.float32), nothing, (4, 4), layout, PrototypeConfig())
    assert values.shape[0] == valid.shape[0] == 0
    assert moments(nothing, np.zeros(0, np.int32), SPACING)["centroid_mm"].shape == (0, 3)


def test_surroundings_tell_apart_what_looks_alike() -> None:
    bright = np.zeros((20, 20), np.float32)
    bright[:, 10:] = 1
    features = np.stack([1 - bright, bright])
    layout = {"blocks": [["intensity", 0, 2, 1.0]], "surround": 1.0}
    stack = masks((5, 1, 8, 4), (12, 1, 15, 4), (5, 7, 8, 10))
    near, _ = pool(features, stack, (20, 20), layout, PrototypeConfig())
    without, _ = pool(features, stack, (20, 20), layout, PrototypeConfig(surround=0.0))
    np.testing.assert_allclose(without @ without.T, 1, atol=1e-6)
    assert (near @ near.T)[0, 1] > 0.95
    assert (near @ near.T)[0, 2] < 0.9
