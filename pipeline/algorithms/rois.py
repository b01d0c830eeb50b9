"""Which candidate ROIs are kept (section 4.2), and their moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

_REFERENCE_SIDE = 200


@dataclass(frozen=True)
class RoiConfig:
    """Filters of candidate ROIs.

    Attributes:
        min_area, max_area: smallest and largest area, in `area_unit`.
        area_unit: "fraction" of the slice, "px", "ref200" (px of the slice resized to 200 x 200, in which the
            public code states the paper's 200..7000), or "mm2".
        max_overlap: intersection over the smaller ROI above which the smaller one is dropped; 1 keeps nested ROIs.
        min_quality, min_stability: candidates below are dropped.
        max_per_slice: best candidates kept per slice; 0 is no limit.
    """

    min_area: float = 0.0015
    max_area: float = 0.2
    area_unit: Literal["fraction", "px", "ref200", "mm2"] = "fraction"
    max_overlap: float = 1.0
    min_quality: float = 0.0
    min_stability: float = 0.0
    max_per_slice: int = 0

    def __post_init__(self) -> None:
        if self.max_per_slice < 0:
            raise ValueError(f"rois.max_per_slice is {self.max_per_slice}; expected a number of 0 or more")


def filter_rois(
    masks: npt.NDArray[np.bool_],
    quality: npt.NDArray[np.float32],
    stability: npt.NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    config: RoiConfig,
) -> npt.NDArray[np.int64]:
    """Indices of the candidates of one slice that pass the filters, in their given order.

    Overlap is resolved by decreasing area; a dropped ROI does not drop others.

    Args:
        masks: bool [n, H, W].
        quality, stability: float32 [n].
        spacing_mm: (z, y, x).
        config: filters.
    """
    area = masks.sum(axis=(1, 2)) * _area_scale(masks.shape[1:], spacing_mm, config.area_unit)
    keep = (area >= config.min_area) & (area <= config.max_area) & (area > 0)
    keep &= (quality >= config.min_quality) & (stability >= config.min_stability)
    chosen = np.flatnonzero(keep)
    if config.max_overlap < 1:
        chosen = chosen[_without_overlap(masks[chosen], config.max_overlap)]
    if config.max_per_slice and len(chosen) > config.max_per_slice:
        best = np.argsort(-quality[chosen], kind="stable")[: config.max_per_slice]
        chosen = chosen[np.sort(best)]
    return chosen


def _area_scale(shape: tuple[int, ...], spacing_mm: tuple[float, float, float], unit: str) -> float:
    pixels = float(np.prod(shape))
    return {
        "fraction": 1 / pixels,
        "px": 1.0,
        "ref200": _REFERENCE_SIDE**2 / pixels,
        "mm2": spacing_mm[1] * spacing_mm[2],
    }[unit]


def _without_overlap(masks: npt.NDArray[np.bool_], limit: float) -> npt.NDArray[np.int64]:
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).astype(np.float32)
    both, area = flat @ flat.T, flat.sum(axis=1)
    kept: list[int] = []
    for n in np.argsort(-area, kind="stable"):
        if all(both[n, k] <= limit * area[n] for k in kept):
            kept.append(int(n))
    return np.sort(np.array(kept, dtype=np.int64))


def moments(
    masks: npt.NDArray[np.bool_], roi_slice: npt.NDArray[np.integer], spacing_mm: tuple[float, float, float]
) -> dict[str, npt.NDArray[Any]]:
    """Size, place and spread of ROIs.

    Args:
        masks: bool [N, H, W], none empty.
        roi_slice: [N] slice of each.
        spacing_mm: (z, y, x).

    Returns:
        area_px int64 [N]; area_mm2 [N]; centroid_vox, centroid_mm [N, 3] (z, y, x), local; bbox int64 [N, 4]
        (y0, x0, y1, x1), upper ends exclusive; covariance_mm2 [N, 3] (yy, yx, xx) of the pixel area.
    """
    rows, cols = masks.sum(axis=2, dtype=np.int64), masks.sum(axis=1, dtype=np.int64)
    area = rows.sum(axis=1)
    y, x = np.arange(masks.shape[1], dtype=np.float64), np.arange(masks.shape[2], dtype=np.float64)
    cy, cx = rows @ y / area, cols @ x / area
    yy, xx = rows @ y**2 / area - cy**2 + 1 / 12, cols @ x**2 / area - cx**2 + 1 / 12
    weighted = masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).astype(np.float64) @ np.outer(y, x).ravel()
    yx = weighted / area - cy * cx
    centroid = np.stack([np.asarray(roi_slice, dtype=np.float64), cy, cx], axis=1)
    sy, sx = spacing_mm[1], spacing_mm[2]
    return {
        "area_px": area,
        "area_mm2": area * sy * sx,
        "centroid_vox": centroid,
        "centroid_mm": centroid * np.asarray(spacing_mm),
        "bbox": np.stack([*_extent(rows > 0), *_extent(cols > 0)], axis=1)[:, [0, 2, 1, 3]],
        "covariance_mm2": np.stack([yy * sy**2, yx * sy * sx, xx * sx**2], axis=1),
    }


def _extent(occupied: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and one past the last true entry of each row."""
    first = occupied.argmax(axis=1)
    last = occupied.shape[1] - occupied[:, ::-1].argmax(axis=1)
    return first.astype(np.int64), last.astype(np.int64)
