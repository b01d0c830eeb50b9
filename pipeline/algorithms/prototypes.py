"""Prototypes: the feature of a ROI is the average of the feature map over its mask (Eq. 5).

The mask is brought to the feature grid by area averaging over the part of the grid that the image covers; the paper
resizes to the whole grid by nearest neighbour, which misplaces masks of images that are not square. Where the
features come in blocks (see `actors.segmenter`), each block is normalised by itself, so that the cosine of two
prototypes (Eq. 6) is the weighted mean of their blocks' cosines. Four more blocks describe the ROI itself and are
weighted by the backend, zero for SAM: what borders it, what lies around it in every direction, its size and its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.algorithms.rois import moments

Float = npt.NDArray[np.float32]

_AREA_OCTAVES = np.linspace(-10.0, -2.0, 17)
_RADII = (0.04, 0.08, 0.16, 0.25)  # of the longer side of the slice
_DIRECTIONS = 8


@dataclass(frozen=True)
class PrototypeConfig:
    """Weights of the ROI's own blocks; None takes what the backend recommends.

    Attributes:
        context: first feature block over a ring around the ROI, as wide as half its radius.
        surround: mean bin of the first feature block, less one half, in eight directions at four distances.
        area: logarithm of its share of the slice.
        shape: elongation, orientation and compactness.
        min_cells: a ROI that covers fewer feature cells is dropped.
    """

    context: float | None = None
    surround: float | None = None
    area: float | None = None
    shape: float | None = None
    min_cells: float = 1.0


def pool(
    features: Float,
    masks: npt.NDArray[np.bool_],
    extent: tuple[float, float],
    layout: Mapping[str, Any],
    config: PrototypeConfig,
) -> tuple[Float, npt.NDArray[np.bool_]]:
    """Prototypes of the ROIs of one slice.

    Args:
        features: float32 [C, h, w].
        masks: bool [n, H, W].
        extent: rows and columns of the feature grid that the image covers, cells.
        layout: blocks of the backend.
        config: weights of the ROI's own blocks.

    Returns:
        float32 [n, C'], unit norm, and bool [n], false where the ROI is under `min_cells`.
    """
    weights = resize_to_grid(masks, features.shape[1:], extent)
    cells = weights.sum(axis=(1, 2))
    flat = features.reshape(len(features), -1)
    means = _mean(weights, flat)
    parts = [(weight, means[:, start:stop]) for _, start, stop, weight in layout["blocks"]]
    own = {name: _own_weight(name, layout, config) for name in ("context", "surround", "area", "shape")}
    if own["context"]:
        _, start, stop, _ = layout["blocks"][0]
        ring = resize_to_grid(_rings(masks), features.shape[1:], extent)
        parts.append((own["context"], _mean(ring, flat[start:stop])))
    if own["surround"]:
        _, start, stop, _ = layout["blocks"][0]
        parts.append((own["surround"], _surround(features[start:stop], masks, extent)))
    if own["area"]:
        parts.append((own["area"], _area_code(masks)))
    if own["shape"]:
        parts.append((own["shape"], _shape_code(masks)))
    scaled = [np.sqrt(weight) * unit_norm(values) for weight, values in parts if weight]
    return unit_norm(np.concatenate(scaled, axis=1)), cells >= config.min_cells


def resize_to_grid(masks: npt.NDArray[np.bool_], grid: tuple[int, ...], extent: tuple[float, float]) -> Float:
    """Share of each feature cell that a mask covers: float32 [n, h, w], 0..1."""
    rows = _coverage(grid[0], masks.shape[1], extent[0])
    cols = _coverage(grid[1], masks.shape[2], extent[1])
    return np.asarray(rows @ masks.astype(np.float32) @ cols.T, dtype=np.float32)


def _coverage(cells: int, pixels: int, extent: float) -> Float:
    """Length of each pixel's interval inside each cell: [cells, pixels]."""
    edges = np.arange(pixels + 1) * extent / pixels
    low = np.maximum(edges[:-1], np.arange(cells)[:, None])
    high = np.minimum(edges[1:], np.arange(1, cells + 1)[:, None])
    return np.asarray(np.clip(high - low, 0, None), dtype=np.float32)


def _mean(weights: Float, flat: Float) -> Float:
    """Weighted mean of features [C, h*w] under weights [n, h, w]: [n, C]."""
    total = weights.sum(axis=(1, 2))
    summed = weights.reshape(len(weights), flat.shape[1]) @ flat.T
    return np.asarray(summed / np.maximum(total, 1e-6)[:, None], dtype=np.float32)


def unit_norm(values: npt.NDArray[np.floating]) -> Float:
    """Rows [n, C] divided by their length."""
    norm = np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-8)
    return np.asarray(values / norm, dtype=np.float32)


def _own_weight(name: str, layout: Mapping[str, Any], config: PrototypeConfig) -> float:
    chosen = getattr(config, name)
    return float(layout.get(name, 0.0) if chosen is None else chosen)


def _rings(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels outside each ROI within half its equivalent radius, at least 2 px."""
    rings = np.zeros_like(masks)
    height, width = masks.shape[1:]
    for mask, ring in zip(masks, rings, strict=True):
        reach = max(2, round(0.5 * float(np.sqrt(mask.sum() / np.pi))))
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (
            slice(max(ys[0] - reach, 0), min(ys[-1] + reach + 1, height)),
            slice(max(xs[0] - reach, 0), min(xs[-1] + reach + 1, width)),
        )
        distance = ndimage.distance_transform_edt(~mask[box])
        ring[box] = (distance > 0) & (distance <= reach)
    return rings


def _surround(block: Float, masks: npt.NDArray[np.bool_], extent: tuple[float, float]) -> Float:
    """Where on the scale of bins the features around each ROI's centroid lie: [n, radii * directions], -0.5..0.5.

    Unlike a histogram of everything near, this tells a bright neighbour on the left from one on the right. Distances
    are shares of the slice, since what lies around a ROI does not scale with the ROI.
    """
    scale = np.linspace(-0.5, 0.5, len(block), dtype=np.float32) if len(block) > 1 else np.ones(1, np.float32)
    level = np.tensordot(scale, block, axes=1) / np.maximum(block.sum(axis=0), 1e-6)
    height, width = masks.shape[1:]
    rows, cols = masks.sum(axis=2), masks.sum(axis=1)
    area = np.maximum(rows.sum(axis=1), 1)
    centre = np.stack([rows @ np.arange(height) / area, cols @ np.arange(width) / area], axis=1)
    angle = np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS)
    ring = np.multiply.outer(np.array(_RADII) * max(height, width), np.stack([np.sin(angle), np.cos(angle)], axis=1))
    place = (centre[:, None] + ring.reshape(-1, 2) + 0.5) * (np.asarray(extent) / (height, width)) - 0.5
    sampled = ndimage.map_coordinates(level, place.reshape(-1, 2).T, order=1, mode="nearest")
    return np.asarray(sampled, dtype=np.float32).reshape(len(masks), ring.shape[0] * _DIRECTIONS)


def _area_code(masks: npt.NDArray[np.bool_]) -> Float:
    share = np.log2(np.maximum(masks.mean(axis=(1, 2)), 1e-5))
    return np.asarray(np.exp(-0.5 * (share[:, None] - _AREA_OCTAVES) ** 2), dtype=np.float32)


def _shape_code(masks: npt.NDArray[np.bool_]) -> Float:
    """Elongation along the axes and the diagonals, compactness against an ellipse, and a constant."""
    found = moments(masks, np.zeros(len(masks), np.int64), (1.0, 1.0, 1.0))
    area, (yy, yx, xx) = found["area_px"], found["covariance_mm2"].T
    compact = area / (4 * np.pi * np.sqrt(np.maximum(yy * xx - yx**2, 1e-3)))
    trace = yy + xx
    code = np.stack([(yy - xx) / trace, 2 * yx / trace, np.clip(compact, 0, 1.5), np.full(len(area), 0.5)], axis=1)
    return code.astype(np.float32)
