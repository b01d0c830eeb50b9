"""The weight-free default backend: stable bright and dark components as ROIs, hand-made features as embedding.

Candidates come from the component trees (max-tree and min-tree) of each smoothed slice, cut at quantile levels; a
component's stability is the analogue of SAM's stability score, the area two levels further in over the area two
levels further out (the maximally-stable-region idea of Matas et al., BMVC 2002). Features describe each pixel by its
soft-binned intensity rank at three scales, its gradient rank and its position in the body, so that a mask average
is a histogram of what the ROI holds and where it lies. Nothing is learned, downloaded or random.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from actors.segmenter import Candidates, Features

VERSION = 1
_SMOOTHING = 1.0
_SCALES = (1.0, 4.0, 12.0)
_GRADIENT_SCALE = 1.5
_INTENSITY_BINS = 8
_GRADIENT_BINS = 4
_POSITION_BINS = 8
_FINE_GRID = 64
_MOST_CANDIDATES = 3000  # of one tree of one slice; bounds memory on large noisy slices

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ComponentTreeConfig:
    """Settings of the component-tree backend.

    Attributes:
        levels: quantile levels of each tree.
        even_levels: further levels at even steps of intensity, which separate small objects of strong contrast.
        delta: levels between a component and the two areas that its stability compares.
        min_stability: components at or below are dropped, 0..1.
        min_contrast: least intensity between the two areas that stability compares, as a share of the slice's
            range; noise in a flat region has none.
        min_area, max_area: share of the slice that a component may cover; never under `min_pixels`.
        min_pixels: smallest component, px.
        max_overlap: intersection over union above which the less stable of two components is dropped.
        max_rois: components kept per slice, shared evenly over sizes (octaves of area).
    """

    name: Literal["component_tree"] = "component_tree"
    levels: int = 48
    even_levels: int = 16
    delta: int = 2
    min_stability: float = 0.2
    min_contrast: float = 0.01
    min_area: float = 0.0015
    max_area: float = 0.2
    min_pixels: int = 12
    max_overlap: float = 0.75
    max_rois: int = 40


class ComponentTree:
    """The component-tree segmenter (`actors.segmenter.Segmenter`)."""

    name = "component_tree"

    def __init__(self, config: ComponentTreeConfig) -> None:
        self.config = config
        self.layout: dict[str, Any] = _layout()
        self.signature: dict[str, Any] = {**asdict(config), "version": VERSION}

    def encode(self, slices: npt.NDArray[np.uint8]) -> Features:
        """Features of uint8 [B, H, W, 3] slices on a grid of about 64 cells along the longer side."""
        height, width = slices.shape[1:3]
        stride = max(1, round(max(height, width) / _FINE_GRID))
        values = np.stack([_features(grey, stride) for grey in _grey(slices)])
        return Features(values, (height / stride, width / stride))

    def everything(self, slices: npt.NDArray[np.uint8], features: Features) -> list[Candidates]:
        """Stable components of each slice, most stable of each size first; none in a constant slice."""
        return [self._slice_candidates(grey) for grey in _grey(slices)]

    def _slice_candidates(self, grey: Float) -> Candidates:
        smooth = ndimage.gaussian_filter(grey, _SMOOTHING)
        bright, dark = (_components(sign * smooth, self.config) for sign in (1.0, -1.0))
        masks = np.concatenate([bright[0], dark[0]])
        stability = np.concatenate([bright[1], dark[1]])
        order = np.argsort(-stability, kind="stable")
        masks, stability = masks[order], stability[order]
        keep = _suppress(_mask_overlap(masks), self.config.max_overlap)
        keep = keep[_spread_over_sizes(masks[keep].sum(axis=(1, 2)))[: self.config.max_rois]]
        return Candidates(masks[keep], stability[keep], stability[keep])


def _layout() -> dict[str, Any]:
    sizes = [
        *((f"intensity_{scale:g}", _INTENSITY_BINS) for scale in _SCALES),
        ("gradient", _GRADIENT_BINS),
        ("position", _POSITION_BINS**2),
    ]
    weights = (0.3, 0.1, 0.1, 0.05, 0.25)
    blocks, start = [], 0
    for (name, size), weight in zip(sizes, weights, strict=True):
        blocks.append([name, start, start + size, weight])
        start += size
    return {"blocks": blocks, "context": 0.3, "area": 0.03, "shape": 0.1}


def _grey(slices: npt.NDArray[np.uint8]) -> Float:
    """Luminance 0..1, float32 [B, H, W]."""
    return (slices.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)) / np.float32(255)


def _components(image: Float, config: ComponentTreeConfig) -> tuple[npt.NDArray[np.bool_], Float]:
    """Stable components {image >= t} of one slice, most stable first: bool [n, H, W] and stability [n]."""
    flat = image.ravel()
    levels = _levels(flat, config)
    labelled = [ndimage.label(image >= level) for level in levels]
    labels = np.stack([label.ravel() for label, _ in labelled])
    areas = [np.bincount(label, minlength=count + 1) for label, (_, count) in zip(labels, labelled, strict=True)]
    anchors = [_first_pixel(label, count) for label, (_, count) in zip(labels, labelled, strict=True)]
    smallest = max(config.min_area * flat.size, config.min_pixels)
    found = [np.zeros((0, 5))]
    for n, area in enumerate(areas):
        outer, inner = max(n - config.delta, 0), min(n + config.delta, len(levels) - 1)
        if levels[inner] - levels[outer] < config.min_contrast * (levels[-1] - levels[0]):
            continue
        core = np.bincount(labels[n][flat >= levels[inner]], minlength=len(area))
        stability = core / np.maximum(areas[outer][labels[outer][anchors[n]]], 1)
        good = (area >= smallest) & (area <= config.max_area * flat.size) & (stability > config.min_stability)
        good[0] = False
        chosen = np.flatnonzero(good)
        columns = [np.full(len(chosen), n), chosen, anchors[n][chosen], area[chosen], stability[chosen]]
        found.append(np.stack(columns, axis=1))
    table = np.concatenate(found)
    table = table[np.argsort(-table[:, 4], kind="stable")[:_MOST_CANDIDATES]]
    level, component, anchor, area = table[:, :4].astype(np.int64).T
    keep = _suppress(_nested_overlap(labels, level, component, anchor, area), config.max_overlap)
    masks = np.empty((len(keep), flat.size), bool)
    for mask, n in zip(masks, keep, strict=True):
        np.equal(labels[level[n]], component[n], out=mask)
    return masks.reshape(len(keep), *image.shape), table[keep, 4].astype(np.float32)


def _levels(flat: Float, config: ComponentTreeConfig) -> npt.NDArray[np.float64]:
    """Quantiles of the intensities, and even steps between the extreme ones, ascending."""
    by_rank = np.quantile(flat, np.linspace(0, 1, config.levels + 2)[1:-1])
    by_value = np.linspace(by_rank[0], by_rank[-1], config.even_levels + 2)[1:-1]
    return np.unique(np.concatenate([by_rank, by_value]))


def _first_pixel(label: npt.NDArray[np.signedinteger[Any]], count: int) -> npt.NDArray[np.int64]:
    """Flat index of the first pixel of each component, [count + 1]."""
    first = np.zeros(count + 1, np.int64)
    first[label[::-1]] = np.arange(label.size - 1, -1, -1)
    return first


def _nested_overlap(
    labels: npt.NDArray[np.signedinteger[Any]],
    level: npt.NDArray[np.int64],
    component: npt.NDArray[np.int64],
    anchor: npt.NDArray[np.int64],
    area: npt.NDArray[np.int64],
) -> Float:
    """Intersection over union of components of one tree, [n, n]: they are nested or disjoint."""
    inside = (component == labels[level, anchor[:, None]]) & (level[:, None] >= level)
    ratio = (area[:, None] / area).astype(np.float32)
    return np.where(inside, ratio, np.where(inside.T, 1 / ratio, 0)).astype(np.float32)


def _mask_overlap(masks: npt.NDArray[np.bool_]) -> Float:
    """Intersection over union of masks [n, H, W], [n, n]."""
    flat = masks.reshape(len(masks), masks[0].size if len(masks) else 0).astype(np.float32)
    both = flat @ flat.T
    area = flat.sum(1)
    return np.asarray(both / np.maximum(area[:, None] + area - both, 1), np.float32)


def _suppress(overlap: Float, limit: float) -> npt.NDArray[np.int64]:
    """Greedy non-maximum suppression of candidates given best first: indices kept."""
    alive = np.ones(len(overlap), bool)
    for n in range(len(overlap)):
        if alive[n]:
            alive[n + 1 :] &= overlap[n, n + 1 :] <= limit
    return np.flatnonzero(alive)


def _spread_over_sizes(areas: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Order that takes the best of each octave of area, then the second of each, and so on."""
    octave = np.floor(np.log2(np.maximum(areas, 1)))
    rank = np.zeros(len(areas), np.int64)
    for value in np.unique(octave):
        members = np.flatnonzero(octave == value)
        rank[members] = np.arange(len(members))
    return np.argsort(rank, kind="stable")


def _features(grey: Float, stride: int) -> Float:
    """float32 [C, h, w] in 0..1, in the order of the layout: means over stride x stride cells."""
    images = [(ndimage.gaussian_filter(grey, scale), _INTENSITY_BINS) for scale in _SCALES]
    images.append((ndimage.gaussian_gradient_magnitude(grey, _GRADIENT_SCALE), _GRADIENT_BINS))
    parts = [_soft_bins(_rank(image), bins) for image, bins in images]
    for axis in (1, 2):
        parts = [_shrink(part, stride, axis) for part in parts]
    return np.concatenate([*parts, _position(grey, stride)])


def _rank(image: Float) -> Float:
    """Share of pixels darker than each pixel, 0..1."""
    ordered = np.sort(image, axis=None)
    return (np.searchsorted(ordered, image) / np.float32(image.size)).astype(np.float32)


def _soft_bins(values: Float, bins: int) -> Float:
    """Linear soft assignment of values 0..1 to `bins` centres: [bins, H, W], sums to 1."""
    centres = np.arange(bins, dtype=np.float32)[:, None, None]
    return np.asarray(np.clip(1 - np.abs(values * (bins - 1) - centres), 0, None), dtype=np.float32)


def _position(grey: Float, stride: int) -> Float:
    """Gaussian bumps on a square grid over the body's bounding box: [bins^2, h, w]."""
    body = grey > 0.15 * np.quantile(grey, 0.99)
    bumps = []
    for axis in (0, 1):
        occupied = np.flatnonzero(body.mean(axis=1 - axis) > 0.05)
        low, high = (occupied[0], occupied[-1]) if len(occupied) > 1 else (0, grey.shape[axis] - 1)
        place = (np.arange(grey.shape[axis]) - low) / max(high - low, 1) * (_POSITION_BINS - 1)
        bump = np.exp(-0.5 * (place - np.arange(_POSITION_BINS)[:, None]) ** 2)
        bumps.append(_shrink(bump.astype(np.float32), stride, 1))
    rows, cols = bumps
    return (rows[:, None, :, None] * cols[None, :, None, :]).reshape(-1, rows.shape[1], cols.shape[1])


def _shrink(values: Float, stride: int, axis: int) -> Float:
    """Mean over runs of `stride` entries along an axis, the last entry repeated where a run is incomplete."""
    if stride == 1:
        return values
    size = values.shape[axis]
    pad = [(0, 0)] * values.ndim
    pad[axis] = (0, -size % stride)
    padded = np.pad(values, pad, mode="edge")
    shape = (*values.shape[:axis], -(-size // stride), stride, *values.shape[axis + 1 :])
    return np.asarray(np.add.reduce(padded.reshape(shape), axis=axis + 1) / np.float32(stride), dtype=np.float32)
