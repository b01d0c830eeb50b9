"""Preprocessing rules against independent implementations, and the geometry they share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from segment_anything.utils.transforms import ResizeLongestSide
from skimage.transform import resize
from torch.nn.functional import interpolate

from actors.preprocess import PIXEL_MEAN, PIXEL_STD, PreprocessRule, prepare, slice_geometry

SHAPES = [(30, 40), (41, 29), (64, 64), (90, 150)]


def random_slices(shape: tuple[int, int], count: int = 2) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (count, *shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_sam_equals_the_official_transform(shape: tuple[int, int]) -> None:
    slices = random_slices(shape)
    pixels, geometry = prepare(slices, 128, "sam")
    for image, got in zip(slices, pixels, strict=True):
        resized = ResizeLongestSide(128).apply_image(image)
        assert resized.shape[:2] == (geometry.input_height, geometry.input_width)
        expected = np.zeros((128, 128, 3), np.float32)
        expected[: resized.shape[0], : resized.shape[1]] = (resized - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
        np.testing.assert_allclose(got.permute(1, 2, 0), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_medsam_equals_scikit_image(shape: tuple[int, int]) -> None:
    slices = random_slices(shape)
    pixels, _ = prepare(slices, 64, "medsam")
    for image, got in zip(slices, pixels, strict=True):
        stretched = resize(image, (64, 64), order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
        expected = (stretched - stretched.min()) / max(float(np.ptp(stretched)), 1e-8)
        np.testing.assert_allclose(got.permute(1, 2, 0), expected, atol=1e-6)


def test_sam_med2d_takes_the_nearest_pixel() -> None:
    slices = random_slices((30, 40), 1)
    pixels, _ = prepare(slices, 64, "sam_med2d")
    normalised = (slices[0] - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    rows, columns = np.arange(64) * 30 // 64, np.arange(64) * 40 // 64
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), normalised[np.ix_(rows, columns)], atol=1e-6)


def test_a_constant_slice_stays_finite() -> None:
    for rule in ("sam", "medsam", "sam_med2d"):
        assert torch.isfinite(prepare(np.full((1, 20, 30, 3), 7, np.uint8), 64, rule)[0]).all()


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(bad: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 3\]"):
        prepare(bad, 64, "sam")


@pytest.mark.parametrize("rule", ["sam", "medsam", "sam_med2d"])
@pytest.mark.parametrize("shape", SHAPES)
def test_points_and_extent(shape: tuple[int, int], rule: PreprocessRule) -> None:
    geometry = slice_geometry(*shape, 1024, rule)
    points = np.array([[0.0, 0.0], [shape[1], shape[0]], [3.5, 7.25]])
    model = geometry.to_model(points)
    np.testing.assert_allclose(model[1], [geometry.input_width, geometry.input_height])
    np.testing.assert_allclose(geometry.to_original(model), points, atol=1e-12)
    np.testing.assert_allclose(geometry.extent(64), model[1][::-1] / 16)
    if rule == "sam":
        np.testing.assert_allclose(model, ResizeLongestSide(1024).apply_coords(points, shape))
    else:
        assert geometry.extent(64) == (64, 64)


@pytest.mark.parametrize("shape", [(192, 256), (300, 200), (512, 512), (2, 3)])
def test_mask_maps_equal_the_official_resizes(shape: tuple[int, int]) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32))
    padded = slice_geometry(*shape, 256, "sam")
    large = interpolate(logits[None], (256, 256), mode="bilinear", align_corners=False)
    cropped = large[..., : padded.input_height, : padded.input_width]
    expected = interpolate(cropped, shape, mode="bilinear", align_corners=False)[0]
    rows, columns = padded.mask_maps(64)
    torch.testing.assert_close(rows @ logits @ columns.T, expected, rtol=0, atol=2e-6)
    rows, columns = slice_geometry(*shape, 256, "medsam").mask_maps(64)
    direct = interpolate(logits[None], shape, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(rows @ logits @ columns.T, direct, rtol=0, atol=2e-6)
