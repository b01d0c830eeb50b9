"""The masks of matched ROIs, as the fit wants them, and whether they are labels that are evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.stages.evaluate import Reference
from storage.embeddings import SubjectEmbedding

if TYPE_CHECKING:  # loads torch
    from pipeline.algorithms.fit_problem import Roi, RoiPair


def roi_pairs(fixed: SubjectEmbedding, moving: SubjectEmbedding, matches: list[dict[str, Any]]) -> list[RoiPair]:
    """Matched ROIs as crops of their slices, or of all slices of a class, weighted by confidence."""
    from pipeline.algorithms.fit_problem import RoiPair

    here = _rois(fixed, [row["fixed_roi"] for row in matches])
    there = _rois(moving, [row["moving_roi"] for row in matches])
    return [RoiPair(here[row["fixed_roi"]], there[row["moving_roi"]], float(row["confidence"])) for row in matches]


def _rois(embedding: SubjectEmbedding, rows: list[int]) -> dict[int, Roi]:
    wanted = sorted(set(rows))
    if embedding.roi_class.any():
        return {row: _class_roi(embedding, int(embedding.roi_class[row])) for row in wanted}
    masks = embedding.masks(wanted)
    return {row: _crop(mask[None], int(embedding.roi_slice[row])) for row, mask in zip(wanted, masks, strict=True)}


def _class_roi(embedding: SubjectEmbedding, value: int) -> Roi:
    """All slices of a class as one ROI."""
    rows = np.flatnonzero(embedding.roi_class == value)
    slices = embedding.roi_slice[rows]
    volume = np.zeros((slices.max() - slices.min() + 1, *embedding.mask_shape), bool)
    volume[slices - slices.min()] = embedding.masks(rows)
    return _crop(volume, int(slices.min()))


def _crop(mask: npt.NDArray[np.bool_], z: int) -> Roi:
    """The mask [d, H, W] from slice z on, cut to its bounding box in plane."""
    from pipeline.algorithms.fit_problem import Roi

    ys, xs = np.flatnonzero(mask.any(axis=(0, 2))), np.flatnonzero(mask.any(axis=(0, 1)))
    box = mask[:, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return Roi(box.copy(), (z, int(ys[0]), int(xs[0])))  # a view would keep every whole mask in memory


def slices(roi: Roi) -> npt.NDArray[np.int64]:
    """Slices that a ROI occupies."""
    return np.flatnonzero(roi.mask.any(axis=(1, 2))) + roi.offset[0]


def labels_in_fit(matches: list[dict[str, Any]], pairs: Sequence[RoiPair], fixed: Reference, moving: Reference) -> bool:
    """Whether a class ROI of the fit is a label that is evaluated, voxel for voxel, in either image."""
    classes = [row["roi_class"] for row in matches]
    sides = [(pair.fixed, fixed.labels) for pair in pairs] + [(pair.moving, moving.labels) for pair in pairs]
    return any(
        labels is not None and value != 0 and _is_label(roi, labels == value)
        for value, (roi, labels) in zip(classes * 2, sides, strict=True)
    )


def _is_label(roi: Roi, label: npt.NDArray[np.bool_]) -> bool:
    box = tuple(slice(o, o + n) for o, n in zip(roi.offset, roi.mask.shape, strict=True))
    return bool(label.sum() == roi.mask.sum() and np.array_equal(label[box], roi.mask))
