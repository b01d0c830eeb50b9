"""Everything mode: every object of a slice from a grid of point prompts (Eq. 4).

Same masks as segment_anything.SamAutomaticMaskGenerator without crops or small-region clean-up, computed in
another order: predicted IoU filters before any mask exists, logits reach the original size by two small
matrices, stability is scored at full resolution, surviving masks wait bit-packed for box suppression, and
nothing is run-length encoded. Prompts of all slices of a batch share one queue, so memory does not depend on
their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torchvision.ops import batched_nms

from actors.preprocess import SliceGeometry
from actors.sam_attention import ImageContext
from actors.sam_config import EverythingConfig
from actors.sam_decoder import Decoded, PromptDecoder
from actors.segmenter import Candidates


@dataclass(frozen=True)
class PassSize:
    """How many prompts go through the decoder at once; changes memory and speed, not masks."""

    prompts: int
    masks: int


# On a CPU small passes keep freed blocks in the allocator and the working set near the cache: twice as fast.
CPU_PASS = PassSize(prompts=4, masks=2)
CUDA_PASS = PassSize(prompts=256, masks=64)


@dataclass
class _Found:
    """Masks of one slice before suppression."""

    packed: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    boxes: list[torch.Tensor] = field(default_factory=list)
    quality: list[torch.Tensor] = field(default_factory=list)
    stability: list[torch.Tensor] = field(default_factory=list)


def point_grid(points_per_side: int, height: int, width: int) -> npt.NDArray[np.float64]:
    """Evenly spaced points [n * n, 2] as (x, y) in original pixels, row by row."""
    at = (np.arange(points_per_side) + 0.5) / points_per_side
    return np.stack(np.meshgrid(at * width, at * height), axis=-1).reshape(-1, 2)


def otsu_threshold(grey: npt.NDArray[np.float32]) -> float:
    """Otsu's threshold of values 0..255 on 256 bins, the middle of a plateau; 0 for a constant image."""
    counts = np.histogram(grey, bins=256, range=(0, 256))[0].astype(np.float64)
    levels = np.arange(256)
    below, total = np.cumsum(counts), counts.sum()
    mass = np.cumsum(counts * levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below / total - mass) ** 2 / (below * (total - below))
    between[~np.isfinite(between)] = 0
    if between.max() <= 0:
        return 0.0
    return float(np.flatnonzero(between >= between.max() * (1 - 1e-9)).mean())


def foreground_points(
    image: npt.NDArray[np.uint8], points: npt.NDArray[np.float64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Which points [N, 2] of an RGB slice have a pixel of at least fraction * Otsu in their 3 x 3."""
    grey = image.mean(axis=2, dtype=np.float32)
    brightest = ndimage.maximum_filter(grey, size=3)
    x, y = np.minimum(points.astype(int), (image.shape[1] - 1, image.shape[0] - 1)).T
    foreground: npt.NDArray[np.bool_] = brightest[y, x] >= fraction * otsu_threshold(grey)
    return foreground


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes float32 [n, 4] (x0, y0, x1, y1 of the outermost pixels) of bool [n, H, W]; zeros if empty."""
    spans = []
    for occupied in (masks.any(dim=1), masks.any(dim=2)):
        first = occupied.to(torch.uint8).argmax(dim=1)
        last = occupied.shape[1] - 1 - occupied.flip(1).to(torch.uint8).argmax(dim=1)
        spans.append((first, torch.where(occupied.any(dim=1), last, 0)))
    (left, right), (top, bottom) = spans
    return torch.stack([left, top, right, bottom], dim=1).float()


def stability_score(logits: torch.Tensor, offset: float) -> torch.Tensor:
    """Area above +offset over area above -offset of logits [n, H, W]; NaN where the latter is empty."""
    inner = (logits > offset).sum(dim=(1, 2), dtype=torch.int32)
    outer = (logits > -offset).sum(dim=(1, 2), dtype=torch.int32)
    return inner / outer


def score_masks(
    logits: torch.Tensor,
    geometry: SliceGeometry,
    maps: tuple[torch.Tensor, torch.Tensor],
    config: EverythingConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Low-resolution logits to masks at original size that pass the stability threshold.

    Args:
        logits: float32 [n, h, h] of the decoder.
        geometry: of the slice.
        maps: `geometry.mask_maps(h)`.
        config: thresholds.

    Returns:
        Indices int64 [k] of the masks kept, bool masks [k, H, W], stability float32 [k].
    """
    kept = torch.arange(len(logits), device=logits.device)
    if config.prefilter_slack is not None and config.stability_threshold > 0:
        rows, columns = (int(np.ceil(cells)) for cells in geometry.extent(logits.shape[-1]))
        coarse = stability_score(logits[:, :rows, :columns], config.stability_offset)
        kept = kept[coarse >= config.stability_threshold - config.prefilter_slack]
    full = maps[0] @ logits[kept] @ maps[1].T
    stability = stability_score(full, config.stability_offset)
    if config.stability_threshold > 0:
        stable = stability >= config.stability_threshold
        kept, full, stability = kept[stable], full[stable], stability[stable]
    return kept, full > 0, stability


@torch.inference_mode()
def segment_everything(
    decoder: PromptDecoder,
    context: ImageContext,
    slices: npt.NDArray[np.uint8],
    geometry: SliceGeometry,
    config: EverythingConfig,
    size: PassSize = CPU_PASS,
) -> list[Candidates]:
    """Candidate masks of every slice of a batch.

    Args:
        decoder: of the variant.
        context: shared decoder state of the slices' embeddings.
        slices: uint8 [B, H, W, 3], only looked at to skip background.
        geometry: common to the slices.
        config: grid and thresholds.
        size: prompts per decoder pass.

    Returns:
        For each slice its masks by decreasing predicted IoU.
    """
    found = [_Found() for _ in slices]
    maps = geometry.mask_maps(4 * decoder.grid, context.cells.device)
    images, points = _queue(slices, geometry, config)
    labels = torch.ones(size.prompts, 1, device=context.cells.device)
    for start in range(0, len(images), size.prompts):
        part = images[start : start + size.prompts]
        xy = torch.from_numpy(points[start : start + size.prompts, None]).to(context.cells.device)
        decoded = decoder.decode(context, part.tolist(), decoder.embed_points(xy, labels[: len(part)]))
        for pairs, logits, quality in _promising(decoder, context, decoded, config, size.masks):
            kept, masks, stability = score_masks(logits, geometry, maps, config)
            _collect(found, part[pairs[kept.cpu()]], masks, quality[kept], stability)
    return [_suppress(slice_found, geometry, config.box_nms) for slice_found in found]


def prompted_masks(
    decoder: PromptDecoder, context: ImageContext, prompts: torch.Tensor, geometry: SliceGeometry, multimask: bool
) -> list[Candidates]:
    """Masks of one prompt per image, none filtered out: prompt tokens [I, t, C], as many as the context has images."""
    decoded = decoder.decode(context, list(range(len(prompts))), prompts)
    quality, token = decoder.choose(decoded.iou, multimask)
    rows = torch.arange(len(prompts), device=token.device).repeat_interleave(token.shape[1])
    logits = decoder.logits(context, decoded, rows, token.flatten())
    everything = EverythingConfig(pred_iou_threshold=0.0, stability_threshold=0.0)
    _, masks, stability = score_masks(logits, geometry, geometry.mask_maps(4 * decoder.grid, logits.device), everything)
    shape = (len(prompts), token.shape[1])
    return [
        Candidates(*(values.cpu().numpy() for values in found))
        for found in zip(masks.view(*shape, *masks.shape[1:]), quality.float(), stability.view(shape), strict=True)
    ]


def _queue(
    slices: npt.NDArray[np.uint8], geometry: SliceGeometry, config: EverythingConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """All prompts of a batch: slice index [N] and model pixels [N, 2]."""
    grid = point_grid(config.points_per_side, geometry.height, geometry.width)
    images, points = [], []
    for index, image in enumerate(slices):
        chosen = grid
        if config.skip_background > 0:
            chosen = grid[foreground_points(image, grid, config.skip_background)]
        images.append(np.full(len(chosen), index, dtype=np.int64))
        points.append(geometry.to_model(chosen))
    return np.concatenate(images), np.concatenate(points)


def _promising(
    decoder: PromptDecoder,
    context: ImageContext,
    decoded: Decoded,
    config: EverythingConfig,
    prompts_at_once: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Masks past the predicted IoU: their prompt rows [n] (on the CPU), logits [n, h, h], quality [n]."""
    quality, token = decoder.choose(decoded.iou, multimask=True)
    passing = (quality > config.pred_iou_threshold) | (config.pred_iou_threshold <= 0)
    rows, columns = passing.nonzero(as_tuple=True)
    for first in range(0, len(quality), prompts_at_once):
        part = (rows >= first) & (rows < first + prompts_at_once)
        row, column = rows[part], columns[part]
        if len(row):
            logits = decoder.logits(context, decoded, row, token[row, column])
            yield row.cpu(), logits, quality[row, column]


def _collect(
    found: list[_Found],
    images: npt.NDArray[np.int64],
    masks: torch.Tensor,
    quality: torch.Tensor,
    stability: torch.Tensor,
) -> None:
    """File masks [n, H, W] under their slices, bit-packed."""
    boxes, packed = mask_boxes(masks).cpu(), np.packbits(masks.flatten(1).cpu().numpy(), axis=1)
    quality, stability = quality.float().cpu(), stability.float().cpu()
    for image in np.unique(images):
        mine = np.flatnonzero(images == image)
        found[image].packed.append(packed[mine])
        found[image].boxes.append(boxes[mine])
        found[image].quality.append(quality[mine])
        found[image].stability.append(stability[mine])


def _suppress(found: _Found, geometry: SliceGeometry, box_nms: float) -> Candidates:
    """Box non-maximum suppression by predicted IoU, in its order."""
    shape = (geometry.height, geometry.width)
    if not found.packed:
        empty = np.zeros(0, dtype=np.float32)
        return Candidates(np.zeros((0, *shape), dtype=bool), empty, empty)
    boxes, quality, stability = torch.cat(found.boxes), torch.cat(found.quality), torch.cat(found.stability)
    kept = batched_nms(boxes, quality, torch.zeros(len(boxes)), box_nms)
    packed = np.concatenate(found.packed)[kept.numpy()]
    masks = np.unpackbits(packed, axis=1, count=shape[0] * shape[1]).view(bool).reshape(-1, *shape)
    return Candidates(masks, quality[kept].numpy(), stability[kept].numpy())
