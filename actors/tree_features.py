"""Hand-made features of a slice, on a grid of about 64 cells along its longer side.

Each pixel is described by its soft-binned intensity rank at three scales, its gradient rank and its position in the
body, so that a mask average is a histogram of what the ROI holds and where it lies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

_SCALES = (1.0, 4.0, 12.0)
_GRADIENT_SCALE = 1.5
_INTENSITY_BINS = 8
_GRADIENT_BINS = 4
_POSITION_BINS = 8
_FINE_GRID = 64
_RANK_STEPS = 1024

Float = npt.NDArray[np.float32]


def layout() -> dict[str, Any]:
    """Blocks of channels and weights, as `actors.segmenter.Segmenter.layout`."""
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
    return {"blocks": blocks, "context": 0.3, "surround": 1.5, "area": 0.03, "shape": 0.1}


def grid_stride(height: int, width: int) -> int:
    """Pixels along the side of a cell."""
    return max(1, round(max(height, width) / _FINE_GRID))


def describe(grey: Float, stride: int) -> Float:
    """Features of a slice.

    Args:
        grey: float32 [H, W], 0..1.
        stride: pixels along the side of a cell.

    Returns:
        float32 [C, h, w], 0..1, in the order of the layout: means over cells.
    """
    coarse = _cells(grey, stride)
    parts = []
    for scale in _SCALES:
        if scale < stride:
            parts.append(_cells(_soft_bins(_rank(ndimage.gaussian_filter(grey, scale)), _INTENSITY_BINS), stride))
        else:
            parts.append(_soft_bins(_rank(ndimage.gaussian_filter(coarse, scale / stride)), _INTENSITY_BINS))
    gradient = ndimage.gaussian_gradient_magnitude(grey, _GRADIENT_SCALE)
    parts.append(_cells(_soft_bins(_rank(gradient), _GRADIENT_BINS), stride))
    return np.concatenate([*parts, _position(grey, stride)])


def _rank(image: Float) -> Float:
    """Share of pixels darker than each pixel, 0..1, to a step of the range of intensities."""
    low, high = float(image.min()), float(image.max())
    step = ((image - low) * np.float32((_RANK_STEPS - 1) / max(high - low, 1e-6))).astype(np.int16)
    counts = np.bincount(step.ravel(), minlength=_RANK_STEPS)
    darker = (np.cumsum(counts) - counts) / np.float32(image.size)
    return darker.astype(np.float32)[step]


def _soft_bins(values: Float, bins: int) -> Float:
    """Linear soft assignment of values 0..1 to `bins` centres: [bins, H, W], sums to 1."""
    scaled = values * np.float32(bins - 1)
    centres = np.arange(bins, dtype=np.float32)[:, None, None]
    return np.asarray(np.maximum(1 - np.abs(scaled - centres), 0), dtype=np.float32)


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


def _cells(values: Float, stride: int) -> Float:
    """Means over the cells of the last two axes."""
    return _shrink(_shrink(values, stride, values.ndim - 2), stride, values.ndim - 1)


def _shrink(values: Float, stride: int, axis: int) -> Float:
    """Mean over runs of `stride` entries along an axis, the last entry repeated where a run is incomplete."""
    if stride == 1:
        return values
    size = values.shape[axis]
    if size % stride:
        pad = [(0, 0)] * values.ndim
        pad[axis] = (0, -size % stride)
        values = np.pad(values, pad, mode="edge")
    shape = (*values.shape[:axis], -(-size // stride), stride, *values.shape[axis + 1 :])
    return np.asarray(np.add.reduce(values.reshape(shape), axis=axis + 1) / np.float32(stride), dtype=np.float32)
