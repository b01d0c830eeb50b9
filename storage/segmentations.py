"""Class segmentations of an image: integer labels, or the class probabilities that they are derived from (Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.geometry import Geometry, from_file_axes
from storage.images import label_map, read_on_grid
from storage.integrity import not_finite
from storage.sources import PICTURE_SUFFIXES, ImageError

_ROUNDING = 1e-3


@dataclass(frozen=True)
class Segmentation:
    """The class of every voxel.

    Attributes:
        labels: int32 [D, H, W], 0 is background.
        probability: float32 [D, H, W], 0..1, of the voxel's class; 1 everywhere for plain labels.
    """

    labels: npt.NDArray[np.int32]
    probability: npt.NDArray[np.float32]


def from_probabilities(values: npt.NDArray[np.floating], source: str) -> Segmentation:
    """The most probable class of every voxel; ties go to the lower class.

    Args:
        values: [D, H, W, C] probabilities 0..1; channel 0 is background, channel c is class c.
        source: what to name in an error.

    Raises:
        ImageError: for fewer than two classes, NaN, or values outside 0..1.
    """
    if values.shape[3] < 2:
        raise ImageError(f"{source}: one class; expected background first, then one channel per class")
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise not_finite(source, bad, values.size)
    low, high = float(values.min()), float(values.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ImageError(
            f"{source}: class probabilities must lie in 0 to 1, found {low:.4g} to {high:.4g}; "
            "apply the softmax to logits, divide scaled integers by their maximum"
        )
    labels = values.argmax(axis=3).astype(np.int32)
    return Segmentation(labels, np.asarray(values.max(axis=3), dtype=np.float32))


def read_segmentation(path: str | Path, like: Geometry) -> Segmentation:
    """Read the segmentation of an image onto its grid.

    A single-channel file, or a grey picture, holds integer labels. A 4D or vector-valued file holds class
    probabilities, the classes along its last axis.

    Raises:
        ImageError: naming the file, as `read_labels` and `from_probabilities`.
    """
    array, own = read_on_grid(path, like, frames=True)
    if array.ndim == 4 and not str(path).lower().endswith(PICTURE_SUFFIXES):
        return from_probabilities(np.ascontiguousarray(from_file_axes(array, own)), str(path))
    labels = label_map(array, own, path)
    return Segmentation(labels, np.ones(labels.shape, np.float32))
