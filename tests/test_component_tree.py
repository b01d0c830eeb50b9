"""The weight-free backend finds what is there, says nothing where nothing is, and always says the same."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from actors.component_tree import ComponentTree, ComponentTreeConfig
from actors.level_tree import build_tree
from actors.segmenter import Segmenter


def slices(shape: tuple[int, int] = (96, 112), seed: int = 0) -> np.ndarray:
    """Two slices with a bright and a dark disc inside a body, uint8 [2, H, W, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape)
    image = np.zeros((2, *shape))
    image[:, ((y - 48) / 40) ** 2 + ((x - 56) / 50) ** 2 < 1] = 100
    image[0, (y - 40) ** 2 + (x - 40) ** 2 < 81] = 220
    image[1, (y - 55) ** 2 + (x - 70) ** 2 < 144] = 30
    grey = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def best_overlap(masks: np.ndarray, truth: np.ndarray) -> float:
    both, either = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
    return float((both / either).max())


@pytest.fixture(scope="module")
def backend() -> ComponentTree:
    return ComponentTree(ComponentTreeConfig())


def test_finds_bright_and_dark_discs(backend: Segmenter) -> None:
    image = slices()
    found = backend.everything(image, backend.encode(image))
    y, x = np.indices(image.shape[1:3])
    assert best_overlap(found[0].masks, (y - 40) ** 2 + (x - 40) ** 2 < 81) > 0.85
    assert best_overlap(found[1].masks, (y - 55) ** 2 + (x - 70) ** 2 < 144) > 0.85


def test_candidates_keep_their_limits(backend: ComponentTree) -> None:
    image = slices()
    for found in backend.everything(image, backend.encode(image)):
        area = found.masks.sum((1, 2))
        assert len(area) <= backend.config.max_rois
        assert area.min() >= max(backend.config.min_pixels, backend.config.min_area * 96 * 112)
        assert area.max() <= backend.config.max_area * 96 * 112
        assert found.stability.min() > backend.config.min_stability
        assert found.stability.max() <= 1
        flat = found.masks.reshape(len(area), -1).astype(float)
        both = flat @ flat.T
        overlap = both / (area[:, None] + area - both)
        assert (overlap - np.eye(len(area))).max() <= backend.config.max_overlap


def test_a_constant_slice_has_no_roi(backend: Segmenter) -> None:
    image = np.full((1, 40, 30, 3), 77, np.uint8)
    features = backend.encode(image)
    assert len(backend.everything(image, features)[0].masks) == 0
    assert np.isfinite(features.values).all()


@pytest.mark.parametrize("shape", [(31, 47), (200, 130), (9, 9)])
def test_feature_grid_covers_the_image(backend: Segmenter, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 255, (1, *shape, 3), dtype=np.uint8)
    features = backend.encode(image)
    rows, cols = features.values.shape[2:]
    assert rows - 1 < features.extent[0] <= rows
    assert cols - 1 < features.extent[1] <= cols
    assert features.values.shape[1] == backend.layout["blocks"][-1][2]
    assert features.values.min() >= 0
    assert features.values.max() <= 1 + 1e-6


def test_intensity_bins_sum_to_one(backend: Segmenter) -> None:
    values = backend.encode(slices()).values
    for _, start, stop, _ in backend.layout["blocks"][:3]:
        np.testing.assert_allclose(values[:, start:stop].sum(axis=1), 1, atol=1e-5)


def test_slices_do_not_influence_each_other(backend: Segmenter) -> None:
    image = slices()
    together, alone = backend.encode(image), backend.encode(image[1:])
    np.testing.assert_array_equal(together.values[1:], alone.values)
    a, b = backend.everything(image, together)[1], backend.everything(image[1:], alone)[0]
    np.testing.assert_array_equal(a.masks, b.masks)
    np.testing.assert_array_equal(a.stability, b.stability)


def test_signature_tells_settings_apart(backend: ComponentTree) -> None:
    assert ComponentTree(ComponentTreeConfig(levels=32)).signature != backend.signature


def test_tree_holds_the_components_of_every_level() -> None:
    steps = np.random.default_rng(3).integers(0, 6, (2, 17, 23), dtype=np.uint8)
    tree = build_tree(steps)
    for plane in (0, 1):
        for level in range(1, 6):
            label, count = ndimage.label(steps[plane] >= level)
            inside = label > 0
            nodes = tree.component(tree.node[plane][inside], np.full(inside.sum(), level))
            pairs = np.unique(np.stack([nodes, label[inside]]), axis=1)
            assert pairs.shape[1] == count == len(np.unique(pairs[0]))
            np.testing.assert_array_equal(tree.area[pairs[0]], np.bincount(label[inside])[pairs[1]])
            assert (tree.plane[pairs[0]] == plane).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 40)])
def test_a_tiny_slice_has_no_roi(backend: Segmenter, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(4).integers(0, 255, (1, *shape, 3), dtype=np.uint8)
    assert len(backend.everything(image, backend.encode(image))[0].masks) <= shape[0] * shape[1] // 12


def test_a_large_noisy_slice_is_bounded_in_memory_and_time(backend: Segmenter) -> None:
    grey = np.random.default_rng(5).integers(0, 255, (1, 900, 900, 1), dtype=np.uint8)
    image = np.repeat(grey, 3, axis=3)
    features = backend.encode(image)
    begin = time.process_time()
    tracemalloc.start()
    found = backend.everything(image, features)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < len(found.masks) <= 40
    assert peak < 400 * 2**20
    assert time.process_time() - begin < 20
