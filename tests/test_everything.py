"""Everything mode against segment_anything.SamAutomaticMaskGenerator, and its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.utils.amg import batched_mask_to_box, build_point_grid, calculate_stability_score
from skimage.filters import threshold_otsu

from actors.everything import (
    PassSize,
    foreground_points,
    mask_boxes,
    otsu_threshold,
    point_grid,
    segment_everything,
    stability_score,
)
from actors.preprocess import SliceGeometry, prepare, slice_geometry
from actors.sam_attention import ImageContext
from actors.sam_config import EverythingConfig
from actors.sam_decoder import Decoded, PromptDecoder
from actors.sam_model import build_from_state_dict
from actors.segmenter import Candidates
from tests.recipe_weights import load_recipe, official_slimsam_77, recipe_state_dict, seeded_slimsam_77

GRID = 16


class SmoothDecoder:
    """Stands in for a prompt decoder: every point gets three smooth blobs of seeded size and score."""

    grid = GRID
    high_quality = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def embed_points(self, xy: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return xy / (16 * GRID)

    def decode(self, context: Any, images: list[int], prompts: torch.Tensor) -> Decoded:
        iou = torch.stack([self._of(point)[0] for point in prompts[:, 0]])
        return Decoded(tuple(images), prompts, prompts, iou)

    def choose(self, iou: torch.Tensor, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return iou[:, 1:], torch.arange(1, 4).expand(len(iou), -1)

    def logits(self, context: Any, decoded: Decoded, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._of(decoded.tokens[r, 0])[1][t] for r, t in zip(rows, tokens, strict=True)])

    def _of(self, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted IoU [4] and logits [4, 4 * grid, 4 * grid] of a point in 0..1."""
        key = self.seed + int((point * 997).round().long() @ torch.tensor([1, 1009]))
        draw = torch.from_numpy(np.random.default_rng(key).random((4, 4)).astype(np.float32))
        at = (torch.arange(4 * GRID) + 0.5) / (4 * GRID)
        radius = 0.05 + 0.25 * draw[:, 0, None, None]
        stretch = 0.5 + draw[:, 1, None, None]
        distance = ((at - point[0]) / stretch).square() + (at - point[1]).square()[:, None]
        return draw[:, 3], (2 + 30 * draw[:, 2, None, None]) * (1 - distance.sqrt() / radius)


class SmoothPredictor:
    """SmoothDecoder behind the interface that SamAutomaticMaskGenerator expects of a SamPredictor."""

    def __init__(self, decoder: SmoothDecoder, geometry: SliceGeometry) -> None:
        self.decoder = decoder
        self.geometry = geometry
        self.device = "cpu"
        self.transform = self
        self.model = official_slimsam_77()
        self.model.image_encoder.img_size = geometry.model_size

    def set_image(self, image: npt.NDArray[np.uint8]) -> None: ...

    def reset_image(self) -> None: ...

    def apply_coords(self, points: npt.NDArray[np.float64], size: Any) -> npt.NDArray[np.float64]:
        return self.geometry.to_model(points)

    def predict_torch(self, points: torch.Tensor, labels: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        decoded = self.decoder.decode(None, [0] * len(points), self.decoder.embed_points(points, labels))
        rows, tokens = (
            torch.arange(len(points)).repeat_interleave(3),
            torch.tensor([1, 2, 3]).repeat(len(points)),
        )
        low = self.decoder.logits(None, decoded, rows, tokens).view(-1, 3, 4 * GRID, 4 * GRID)
        inside = (self.geometry.input_height, self.geometry.input_width)
        masks = self.model.postprocess_masks(low, inside, (self.geometry.height, self.geometry.width))
        return masks, decoded.iou[:, 1:], None


def official_generator(model: Sam, config: EverythingConfig) -> SamAutomaticMaskGenerator:
    return SamAutomaticMaskGenerator(
        model,
        points_per_side=config.points_per_side,
        pred_iou_thresh=config.pred_iou_threshold,
        stability_score_thresh=config.stability_threshold,
        box_nms_thresh=config.box_nms,
    )


def assert_same_masks(ours: Candidates, official: list[dict[str, Any]]) -> None:
    """The same masks in the same order, up to nearly equal scores changing places."""
    assert len(ours.masks) == len(official)
    theirs = np.array([mask["segmentation"] for mask in official])
    inner = np.einsum("nhw,mhw->nm", ours.masks.astype(np.float32), theirs.astype(np.float32))
    area = ours.masks.sum(axis=(1, 2)), theirs.sum(axis=(1, 2))
    iou = inner / (area[0][:, None] + area[1] - inner)
    partner = iou.argmax(axis=1)
    assert sorted(partner) == list(range(len(official)))
    assert iou.max(axis=1).min() >= 0.999
    quality = np.array([mask["predicted_iou"] for mask in official])[partner]
    stability = np.array([mask["stability_score"] for mask in official])[partner]
    np.testing.assert_allclose(ours.quality, quality, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.stability, stability, rtol=0, atol=1e-4)
    assert (np.diff(ours.quality) <= 0).all()


def encoded(
    weights: dict[str, torch.Tensor], slices: npt.NDArray[np.uint8]
) -> tuple[PromptDecoder, ImageContext, SliceGeometry]:
    model = build_from_state_dict(weights, "slimsam_77")
    pixels, geometry = prepare(slices, 1024, "sam")
    decoder = model.prompt_decoder()
    with torch.inference_mode():
        return decoder, decoder.context(*model.encode(pixels)), geometry


def test_parity_with_the_official_generator_on_recipe_weights() -> None:
    image = load_recipe().test_image()
    weights = recipe_state_dict("slimsam_77_uniform")
    official = official_slimsam_77()
    official.load_state_dict(weights)
    config = EverythingConfig(points_per_side=5, pred_iou_threshold=0.3, stability_threshold=2.6e-4, box_nms=1.0)
    expected = official_generator(official, config).generate(image)
    assert 24 <= len(expected) < 75
    decoder, context, geometry = encoded(weights, image[None])
    (ours,) = segment_everything(decoder, context, image[None], geometry, config)
    assert_same_masks(ours, expected)


@pytest.mark.parametrize("shape", [(48, 64), (50, 31), (200, 200)])
@pytest.mark.parametrize("box_nms", [0.7, 0.4])
def test_post_processing_parity_on_smooth_logits(shape: tuple[int, int], box_nms: float) -> None:
    geometry = slice_geometry(*shape, 16 * GRID, "sam")
    config = EverythingConfig(points_per_side=10, pred_iou_threshold=0.3, stability_threshold=0.7, box_nms=box_nms)
    decoder: Any = SmoothDecoder()
    image = np.zeros((*shape, 3), np.uint8)
    official = official_generator(official_slimsam_77(), config)
    official.predictor = SmoothPredictor(decoder, geometry)
    expected = official.generate(image)
    assert len(expected) >= 24
    context: Any = replace_cells()
    (ours,) = segment_everything(decoder, context, image[None], geometry, config)
    assert_same_masks(ours, expected)


def replace_cells() -> ImageContext:
    nothing = torch.zeros(1)
    return ImageContext(nothing, nothing, nothing, nothing, None)


@pytest.mark.parametrize("size", [PassSize(1, 1), PassSize(7, 3), PassSize(64, 64)])
def test_slices_share_passes_without_mixing(size: PassSize) -> None:
    geometry = slice_geometry(48, 64, 16 * GRID, "sam")
    config = EverythingConfig(points_per_side=5, pred_iou_threshold=0.3, stability_threshold=0.5)
    decoder: Any = SmoothDecoder()
    slices = np.zeros((3, 48, 64, 3), np.uint8)
    together = segment_everything(decoder, replace_cells(), slices, geometry, config, size)
    (alone,) = segment_everything(decoder, replace_cells(), slices[:1], geometry, config)
    assert len(together) == 3
    for candidates in together:
        np.testing.assert_array_equal(candidates.masks, alone.masks)
        np.testing.assert_array_equal(candidates.quality, alone.quality)


def test_prompts_of_several_images_decode_as_alone() -> None:
    decoder = build_from_state_dict(seeded_slimsam_77(), "slimsam_77").prompt_decoder()
    points = torch.tensor([[[50.0, 60.0]], [[300.0, 200.0]], [[900.0, 330.0]]])
    prompts = decoder.embed_points(points, torch.ones(3, 1))
    embeddings = torch.randn(2, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mixed = decoder.decode(decoder.context(embeddings), [0, 0, 1], prompts)
        single = decoder.decode(decoder.context(embeddings[1:]), [0], prompts[2:])
    torch.testing.assert_close(mixed.iou[2:], single.iou, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.cells[2:], single.cells, rtol=0, atol=1e-4)


def test_nothing_found_is_an_empty_set() -> None:
    geometry = slice_geometry(48, 64, 16 * GRID, "sam")
    config = EverythingConfig(points_per_side=3, pred_iou_threshold=2.0)
    decoder: Any = SmoothDecoder()
    (found,) = segment_everything(decoder, replace_cells(), np.zeros((1, 48, 64, 3), np.uint8), geometry, config)
    assert found.masks.shape == (0, 48, 64)
    assert found.quality.shape == found.stability.shape == (0,)


def test_skipping_background_keeps_the_masks_of_the_other_points() -> None:
    image = np.zeros((1, 48, 64, 3), np.uint8)
    image[:, 10:40, 20:50] = 200
    geometry = slice_geometry(48, 64, 16 * GRID, "sam")
    everywhere = EverythingConfig(points_per_side=8, pred_iou_threshold=0.3, stability_threshold=0.5, box_nms=1.0)
    decoder: Any = SmoothDecoder()
    (full,) = segment_everything(decoder, replace_cells(), image, geometry, everywhere)
    skipping = replace(everywhere, skip_background=0.5)
    (inside,) = segment_everything(decoder, replace_cells(), image, geometry, skipping)
    assert 0 < len(inside.masks) < len(full.masks)
    known = {mask.tobytes() for mask in full.masks}
    assert all(mask.tobytes() in known for mask in inside.masks)
    points = point_grid(8, 48, 64)
    chosen = points[foreground_points(image[0], points, 0.5)]
    assert ((chosen >= [19, 9]) & (chosen <= [51, 41])).all()


def test_the_prefilter_with_enough_slack_changes_nothing() -> None:
    geometry = slice_geometry(48, 64, 16 * GRID, "sam")
    config = EverythingConfig(points_per_side=8, pred_iou_threshold=0.3, stability_threshold=0.7)
    decoder: Any = SmoothDecoder()
    slices = np.zeros((1, 48, 64, 3), np.uint8)
    (exact,) = segment_everything(decoder, replace_cells(), slices, geometry, config)
    (fast,) = segment_everything(decoder, replace_cells(), slices, geometry, replace(config, prefilter_slack=0.1))
    np.testing.assert_array_equal(exact.masks, fast.masks)


@pytest.mark.parametrize("points_per_side", [1, 5, 32])
def test_the_grid_is_the_official_one(points_per_side: int) -> None:
    expected = build_point_grid(points_per_side) * (64, 48)
    np.testing.assert_allclose(point_grid(points_per_side, 48, 64), expected)


def test_boxes_and_stability_are_the_official_ones() -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(9, 20, 30)).astype(np.float32)) * 2 - 3
    logits[0] = -9
    torch.testing.assert_close(mask_boxes(logits > 0), batched_mask_to_box(logits > 0).float())
    official = calculate_stability_score(logits, 0.0, 1.0)
    torch.testing.assert_close(stability_score(logits, 1.0), official, equal_nan=True)
    assert torch.isnan(official[0])


def test_otsu_agrees_with_scikit_image() -> None:
    generator = np.random.default_rng(2)
    grey = np.concatenate([generator.normal(40, 8, 3000), generator.normal(150, 20, 2000)]).clip(0, 255)
    values = grey.astype(np.uint8).astype(np.float32).reshape(50, 100)
    assert abs(otsu_threshold(values) - threshold_otsu(values.astype(np.uint8))) <= 2
    assert otsu_threshold(np.full((4, 4), 9, np.float32)) == 0


@pytest.mark.parametrize("wrong", [{"points_per_side": 0}, {"box_nms": 0.0}, {"box_nms": 1.5}])
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EverythingConfig(**wrong)
