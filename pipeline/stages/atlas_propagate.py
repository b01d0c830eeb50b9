"""Propagate: labels of others brought to one subject through the template, and compared with its own.

`dice_propagated` is what most of the others say: its own labels are taken out of the votes, though its image took part
in the template. Beside it, the labels of single subjects go the same way, by the composition of both maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import template
from pipeline.algorithms.label_votes import WHOLE, Labels, mean_dice, numbered, winner
from pipeline.algorithms.warp import apply_affine, grid_points, moving_indices, warp_image, warp_labels
from pipeline.dispatch import Task
from pipeline.stages.atlas_shape import AtlasUnit, Place
from storage.cohort import Subject
from storage.geometry import Geometry, moving_to_fixed
from storage.images import read_image, read_labels
from storage.transforms import Transform, from_itk, make_ddf, read_transform, to_itk

LONE = "dice_from"  # of the labels of one subject; by its name


@dataclass(frozen=True)
class Lone:
    """A single subject whose labels are brought to all others."""

    name: str
    labels: Labels
    grid: Geometry
    transform: Transform


def task(place: Place, labels: Sequence[int], voters: int, lone: Sequence[Subject]) -> Task:
    """The task of propagating, for `pipeline.dispatch`.

    Args:
        labels: of all subjects; () where there is none.
        voters: how many subjects have one.
        lone: subjects whose labels are propagated alone.
    """
    return Task("propagate", partial(_build, place, labels, voters, lone))


def _build(
    place: Place, labels: Sequence[int], voters: int, lone: Sequence[Subject], device: str
) -> Callable[[AtlasUnit], dict[str, Any]]:
    return partial(run_unit, place, labels, voters, [_read_lone(place, subject) for subject in lone])


def _read_lone(place: Place, subject: Subject) -> Lone:
    grid = place.grid(subject.subject)
    transform = read_transform(place.folder.composed("transforms", subject.subject))
    return Lone(subject.subject, read_labels(subject.label, grid), grid, transform)


def run_unit(place: Place, labels: Sequence[int], voters: int, lone: Sequence[Lone], unit: AtlasUnit) -> dict[str, Any]:
    """Columns of a subject's row; those of labels only where it has some."""
    made = read_image(place.folder.template, place.input.slice_axis).array
    image = place.folder.volumes("images")[unit.index]
    row: dict[str, Any] = {"correlation": template.correlation(np.asarray(image), made)}
    if not (unit.subject.label and labels):
        return row
    own = np.asarray(place.folder.volumes("shares")[unit.index])
    majority = np.asarray(place.folder.volumes("majority")[:])
    row["dice_majority"] = mean_dice(numbered(winner(own.astype(np.int32), WHOLE), labels), majority)
    truth = read_labels(unit.subject.label, place.grid(unit.unit))
    ddf = _field_back(place, unit)
    here, there = place.grid(unit.unit), place.grid()
    if voters > 1:
        votes = np.asarray(place.folder.volumes("votes")[:]) - own / np.float32(WHOLE)
        indices = moving_indices(ddf, here.spacing_mm, moving_to_fixed(here, there), there.spacing_mm)
        carried = np.stack([warp_image(vote, indices) for vote in votes])
        row["dice_propagated"] = mean_dice(numbered(winner(carried, voters - 1), labels), truth)
    row[LONE] = {one.name: _alone(one, ddf, here, there, truth) for one in lone if one.name != unit.unit}
    return row


def _field_back(place: Place, unit: AtlasUnit) -> npt.NDArray[np.float32]:
    """Subject to template on the subject's grid, as `pipeline.algorithms.warp` has it."""
    transform = read_transform(place.folder.composed("inverses", unit.unit))
    return make_ddf(transform, place.grid(unit.unit), place.grid())


def _alone(one: Lone, ddf: npt.NDArray[np.float32], here: Geometry, there: Geometry, truth: Labels) -> float:
    """Mean Dice of the labels of one subject, by the nearest voxel of where the two maps lead."""
    points = (grid_points(here.shape, here.spacing_mm) + ddf).reshape(3, -1).T
    into = np.asarray(np.linalg.inv(moving_to_fixed(here, there)), np.float64)
    found = from_itk(one.transform.at(to_itk(apply_affine(into, points), there)), one.grid)
    indices = (found / one.grid.spacing_mm).T.reshape(ddf.shape)
    return mean_dice(warp_labels(one.labels, indices), truth)
