"""Evaluate a fitted field against labels and landmarks: before, centre-aligned, affine part alone, final, refined.

Label rows are those of the union of labels of the two maps; a label that one map lacks has Dice 0 and no
distance. Label 0 is the mean over the labels that both maps hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import metrics, warp
from pipeline.algorithms.roi_overlap import near_rois, roi_dice
from storage.geometry import Geometry, center_alignment, moving_to_fixed

if TYPE_CHECKING:
    from pipeline.algorithms.fit_problem import RoiPair

Row = dict[str, Any]
Field = npt.NDArray[np.float32]
Fields = dict[str, Field]  # by the ending of their columns
Places = dict[str, warp.Array]  # where the fields carry each fixed voxel, moving voxels; by the same endings
WORSE_THAN_AFFINE = 0.05


class Registration(Protocol):
    """What is evaluated: a field [3, D, H, W] mm and its affine part, 4x4 in fixed-local mm."""

    @property
    def ddf(self) -> Field: ...

    @property
    def affine(self) -> Any: ...


@dataclass(frozen=True)
class Reference:
    """What a subject is evaluated by.

    Attributes:
        geometry: grid of its image.
        labels: int32 [D, H, W] or None.
        landmarks: float64 [N, 3] local mm (z, y, x), or None.
    """

    geometry: Geometry
    labels: npt.NDArray[np.int32] | None = None
    landmarks: npt.NDArray[np.float64] | None = None


def evaluate(
    fixed: Reference,
    moving: Reference,
    fit: Registration,
    refined: Field | None = None,
    rois: Sequence[RoiPair] = (),
) -> list[Row]:
    """Metric rows of one pair without its names: label 0 first, then the labels in order.

    Args:
        rois: what was matched.
        refined: the field [3, D, H, W] mm after intensity refinement, where there was one.

    Raises:
        ValueError: for landmark files of different length.
    """
    fields = {"": fit.ddf} if refined is None else {"": fit.ddf, "_refined": refined}
    places = {ending: _moving_indices(ddf, fixed.geometry, moving.geometry) for ending, ddf in fields.items()}
    shared = {
        **_field_columns(fields, places, fixed.geometry, rois),
        **_landmark_columns(fixed, moving, fit, fields),
    }
    if fixed.labels is None or moving.labels is None:
        return [{"label": 0, **shared}]
    rows = _label_rows(fixed, moving, fit, places)
    mean = _mean_row([row for row in rows if row.pop("in_both")])
    return [{**row, **shared} for row in [mean, *rows]]


def _label_rows(fixed: Reference, moving: Reference, fit: Registration, places: Places) -> list[Row]:
    assert fixed.labels is not None
    assert moving.labels is not None
    values = sorted((set(np.unique(fixed.labels)) | set(np.unique(moving.labels))) - {0})
    rows: list[Row] = [
        {"label": int(v), "in_both": bool((fixed.labels == v).any() and (moving.labels == v).any())} for v in values
    ]
    spacing = fixed.geometry.spacing_mm
    for ending in ("_before", "_centered", "_affine", *places):
        moved = _moved_labels(fixed, moving, fit, places.get(ending), ending)
        for row in rows:
            here, there = fixed.labels == row["label"], moved == row["label"]
            row[f"dice{ending}"] = metrics.dice(here, there)
            if ending == "_centered" or not here.any() or not there.any():
                continue
            row[f"tre_vox{ending}"] = metrics.centroid_distance(here, there, (1.0, 1.0, 1.0))
            if fixed.geometry.has_spacing:
                row[f"tre_mm{ending}"] = metrics.centroid_distance(here, there, spacing)
            if ending == "_affine":
                continue
            if fixed.geometry.has_spacing:
                row[f"hd95_mm{ending}"] = metrics.hd95(here, there, spacing)
            if ending in places:
                row[f"hd95_vox{ending}"] = metrics.hd95(here, there, (1.0, 1.0, 1.0))
    return rows


def _moved_labels(
    fixed: Reference, moving: Reference, fit: Registration, indices: warp.Array | None, ending: str
) -> npt.NDArray[np.int32]:
    """Moving labels on the fixed grid under a field, or under the affine map of that ending."""
    assert moving.labels is not None
    here, there = fixed.geometry, moving.geometry
    if indices is None:
        affine = {"_before": np.eye(4), "_centered": center_alignment(here, there), "_affine": fit.affine}
        indices = _moving_indices(warp.affine_ddf(affine[ending], here.shape, here.spacing_mm), here, there)
    return warp.warp_labels(moving.labels, indices)


def _moving_indices(ddf: Field, fixed: Geometry, moving: Geometry) -> warp.Array:
    return warp.moving_indices(ddf, fixed.spacing_mm, moving_to_fixed(fixed, moving), moving.spacing_mm)


def _mean_row(rows: list[Row]) -> Row:
    """Label 0: the mean of every column over the given rows; a column that no row has is left out."""
    names = {name for row in rows for name in row} - {"label"}
    means = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return {"label": 0, **{name: float(np.mean(values)) for name, values in means.items() if values}}


def _landmark_columns(fixed: Reference, moving: Reference, fit: Registration, fields: Fields) -> Row:
    """Mean landmark distances; a fixed landmark is carried into the moving image by the pull-back field."""
    if fixed.landmarks is None or moving.landmarks is None:
        return {}
    if len(fixed.landmarks) != len(moving.landmarks):
        raise ValueError(
            f"{len(fixed.landmarks)} fixed but {len(moving.landmarks)} moving landmarks; rows must correspond"
        )
    spacing = np.asarray(fixed.geometry.spacing_mm)
    target = warp.apply_affine(moving_to_fixed(fixed.geometry, moving.geometry), moving.landmarks)
    carried = {
        "_before": fixed.landmarks,
        "_affine": warp.apply_affine(fit.affine, fixed.landmarks),
        **{ending: warp.warp_points(fixed.landmarks, ddf, fixed.geometry.spacing_mm) for ending, ddf in fields.items()},
    }
    columns: Row = {}
    for ending, points in carried.items():
        columns[f"landmark_tre_vox{ending}"] = _mean_distance((points - target) / spacing)
        if fixed.geometry.has_spacing:
            columns[f"landmark_tre_mm{ending}"] = _mean_distance(points - target)
    return columns


def _mean_distance(differences: npt.NDArray[np.float64]) -> float:
    return float(np.linalg.norm(differences, axis=1).mean())


def _field_columns(fields: Fields, places: Places, fixed: Geometry, rois: Sequence[RoiPair]) -> Row:
    """Regularity of the fields, and what they make of the ROIs that they were fitted to."""
    columns: Row = {}
    near = near_rois([pair.fixed for pair in rois], fixed.shape, fixed.spacing_mm)
    for ending, ddf in fields.items():
        found = metrics.jacobian_stats(ddf, fixed.spacing_mm, near)
        columns |= {f"sdlogj{ending}": found.sdlogj, f"fold_fraction{ending}": found.fold_fraction}
        if rois:
            dice = roi_dice(rois, places[ending])
            columns |= {
                f"fold_fraction_rois{ending}": found.fold_fraction_near,
                f"roi_dice{ending}": float(dice.mean()),
                f"roi_dice_min{ending}": float(dice.min()),
            }
    return columns
