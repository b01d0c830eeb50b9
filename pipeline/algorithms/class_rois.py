"""ROI pairs of networks that segment the same classes in both images (Case 1, Eq. 1).

Each class of an image is one ROI, through all its slices. Two images share a ROI pair for every class that both hold.
Eq. 1 multiplies, voxel by voxel, the two class probabilities of images that lie on each other; before registration
they do not, so the confidence of a pair is the product of the mean probabilities of its two ROIs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.matching import Matches


@dataclass(frozen=True)
class ClassRois:
    """The class ROIs of one image, by class.

    Attributes:
        value: int32 [K], ascending.
        probability: float64 [K], 0..1, mean over the ROI.
        centroid_mm: float64 [K, 3], local (z, y, x).
        largest: int64 [K], row of the slice in which the ROI has its largest area.
    """

    value: npt.NDArray[np.int32]
    probability: npt.NDArray[np.float64]
    centroid_mm: npt.NDArray[np.float64]
    largest: npt.NDArray[np.int64]


class NoSharedClassError(ValueError):
    """Two images have no class in common."""


def merge_slices(
    roi_class: npt.NDArray[np.int32],
    probability: npt.NDArray[np.floating],
    centroid_mm: npt.NDArray[np.float64],
    area: npt.NDArray[np.number],
) -> ClassRois:
    """Join the slices of each class.

    Args:
        roi_class: [N], class of each slice.
        probability: [N], 0..1, mean over the slice.
        centroid_mm: [N, 3], local (z, y, x).
        area: [N], > 0.
    """
    values, member = np.unique(roi_class, return_inverse=True)
    share = (member == np.arange(len(values))[:, None]) * np.asarray(area, np.float64)
    largest = share.argmax(axis=1)
    share /= share.sum(axis=1, keepdims=True)
    return ClassRois(values, share @ np.asarray(probability, np.float64), share @ centroid_mm, largest)


def match_classes(
    moving: npt.NDArray[np.int32],
    fixed: npt.NDArray[np.int32],
    moving_probability: npt.NDArray[np.float64],
    fixed_probability: npt.NDArray[np.float64],
) -> Matches:
    """Pair the ROIs of equal class, surest first; ties by class.

    Args:
        moving, fixed: [K], the classes of the two images, ascending.
        moving_probability, fixed_probability: [K], 0..1.

    Raises:
        NoSharedClassError: naming the classes of both.
    """
    shared, i, j = np.intersect1d(moving, fixed, assume_unique=True, return_indices=True)
    if not len(shared):
        raise NoSharedClassError(
            f"no class in common: the moving image has {_listed(moving)}, the fixed image {_listed(fixed)}"
        )
    confidence = moving_probability[i] * fixed_probability[j]
    order = np.argsort(-confidence, kind="stable")
    certain = np.ones(len(order), np.float32)
    return Matches(i[order], j[order], certain, certain, confidence[order].astype(np.float32))


def _listed(classes: npt.NDArray[np.int32]) -> str:
    return ", ".join(map(str, classes))
