"""Warp: one subject onto the corrected template, its transforms there and back, its volumes for the averages.

The map to the mean shape is composed with the fitted one, so that every image is interpolated once only. What is
warped is warped by the transform as it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.algorithms import template
from pipeline.algorithms.label_votes import label_shares
from pipeline.algorithms.mean_shape import (
    FieldMap,
    Mask,
    exp_symmetric,
    inverse_map,
    node_lattice,
    unfolded_map,
    without_pose,
)
from pipeline.algorithms.metrics import log_jacobian
from pipeline.algorithms.warp import Array, moving_indices, warp_image
from pipeline.atlas_folder import read_map
from pipeline.dispatch import Task
from pipeline.stages.atlas_shape import AtlasUnit, Place, grey, nodes_of
from storage.geometry import moving_to_fixed
from storage.images import read_image, read_labels
from storage.transforms import make_ddf, read_transform, stored_field, write_transform


@dataclass(frozen=True)
class Means:
    """Of all subjects, see `pipeline.algorithms.mean_shape`.

    Attributes:
        forward: m, template to mean shape.
        back: its inverse.
        points: [P, 3] mm, nodes of the lattice; inside: [P], those in the foreground.
    """

    forward: FieldMap
    back: FieldMap
    points: Array
    inside: Mask


def task(place: Place, labels: Sequence[int]) -> Task:
    """The task of warping, for `pipeline.dispatch`.

    Args:
        labels: of all subjects.
    """
    return Task("warp", partial(_build, place, labels))


def _build(place: Place, labels: Sequence[int], device: str) -> Callable[[AtlasUnit], dict[str, Any]]:
    lattice, inside = nodes_of(place)
    forward, back = (read_map(place.folder.shapes, name) for name in ("forward", "back"))
    return partial(run_unit, place, Means(forward, back, lattice.nodes(), inside), labels)


def run_unit(place: Place, means: Means, labels: Sequence[int], unit: AtlasUnit) -> dict[str, Any]:
    """Warp a subject; columns of its row.

    Raises:
        ImageError: for an image or labels that cannot be used.
        ValueError: when nothing of the image lies in the template.
    """
    found = place.mapped(unit)
    _write_composed(place, means, found, unit)
    here, there = place.grid(), place.grid(unit.unit)
    ddf = make_ddf(read_transform(place.folder.composed("transforms", unit.unit)), here, there)
    indices = moving_indices(ddf, here.spacing_mm, moving_to_fixed(here, there), there.spacing_mm)
    image = warp_image(grey(read_image(unit.subject.image, place.input.slice_axis)), indices, np.nan)
    if place.input.window is None:
        image = template.normalised(image)
    logarithm = log_jacobian(ddf, here.spacing_mm).astype(np.float32)
    place.folder.put("images", unit.index, image)
    place.folder.put("log_jacobians", unit.index, logarithm)
    if unit.subject.label and labels:
        shares = label_shares(read_labels(unit.subject.label, there), labels, indices)
        place.folder.put("shares", unit.index, shares)
    return {
        "shape_distance": _distance(means, found),
        "log_jacobian": float(logarithm[np.isfinite(image)].mean()),
    }


def _write_composed(place: Place, means: Means, found: FieldMap, unit: AtlasUnit) -> None:
    """Write corrected template -> subject and subject -> corrected template."""
    here, there = place.grid(), place.grid(unit.unit)
    names = unit.unit, place.template
    moved = found.at(means.back.at(found.nodes()))
    onto = unfolded_map(found.on_nodes(found.affine @ means.back.affine, moved))
    signature = {"pair": unit.pair, "moving": names[0], "fixed": names[1], "iteration": place.folder.number}
    path = place.folder.composed("transforms", unit.unit)
    write_transform(path, onto.affine, onto.values, onto.step_mm, here, signature, there)

    onto = FieldMap(*stored_field(read_transform(path), here, there))
    back = inverse_map(onto, node_lattice(there.shape, there.spacing_mm), moving_to_fixed(here, there))
    path = place.folder.composed("inverses", unit.unit)
    exchanged = {**signature, "moving": names[1], "fixed": names[0]}
    write_transform(path, back.affine, back.values, back.step_mm, there, exchanged, here)


def _distance(means: Means, found: FieldMap) -> float:
    """Root mean square distance of a subject's shape from the mean shape over the foreground."""
    x = means.points[means.inside]
    log_stretch, left = without_pose(x, found.at(x), np.ones(len(x), dtype=bool))
    shape = (x - x.mean(axis=0)) @ exp_symmetric(log_stretch) + left
    mean = means.forward.at(x)
    gap = shape - (mean - mean.mean(axis=0))
    return float(np.sqrt((gap**2).sum(axis=1).mean()))
