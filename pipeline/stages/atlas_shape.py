"""Shape: what the map of one subject onto the template says of its shape, written for all subjects to be averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from actors.input_config import InputConfig
from pipeline.algorithms import template
from pipeline.algorithms.mean_shape import FieldMap, Mask, between, node_lattice, without_pose
from pipeline.algorithms.warp import Array
from pipeline.atlas_folder import IterationFolder
from pipeline.dispatch import Task
from storage.cohort import Subject
from storage.geometry import Geometry
from storage.images import Image, read_image, read_labels
from storage.transforms import read_transform, stored_field

_FORGOTTEN = 1  # iterations at the start whose maps are not averaged


@dataclass(frozen=True)
class AtlasUnit:
    """A subject that is registered to the template.

    Attributes:
        index: where it lies in the arrays of all subjects.
        pair: of the subject and the template.
    """

    index: int
    subject: Subject
    pair: str

    @property
    def unit(self) -> str:
        """Name in failure rows."""
        return self.subject.subject


@dataclass(frozen=True)
class Place:
    """Where an iteration is made.

    Attributes:
        template: name of the template before, in the study of the iteration.
        input: how images are read.
    """

    folder: IterationFolder
    template: str
    input: InputConfig

    def grid(self, subject: str | None = None) -> Geometry:
        """Grid of a subject, or of the template."""
        return self.folder.study.store.geometry(subject or self.template)

    def mapped(self, unit: AtlasUnit) -> FieldMap:
        """Template to subject: the mean of the fits of all iterations from the second on, each carried along since.

        The template that the first registers to is but another subject. Of the others every fit has ROIs of its own,
        and so errors of its own, which the mean has less of.

        Raises:
            ValueError: for a fit that mirrors or flattens.
        """
        fitted = self._stored(self.folder.study.transform(unit.pair), unit)
        before = self.folder.before().composed("transforms", unit.unit)
        if self.folder.number <= _FORGOTTEN + 1 or not before.exists():  # or it has just come in
            return fitted
        return between(self._stored(before, unit), fitted, 1 / (self.folder.number - _FORGOTTEN))

    def _stored(self, path: Path, unit: AtlasUnit) -> FieldMap:
        return FieldMap(*stored_field(read_transform(path), self.grid(), self.grid(unit.unit)))


@dataclass(frozen=True)
class Shape:
    """Of one subject.

    Attributes:
        log_stretch: [3, 3], see `pipeline.algorithms.mean_shape`; what is left lies in the array `left`.
        labels: that its label map holds, () without one.
    """

    log_stretch: Array
    labels: tuple[int, ...]


def task(place: Place) -> Task:
    """The task of measuring shapes, for `pipeline.dispatch`."""
    return Task("shape", partial(_build, place))


def _build(place: Place, device: str) -> Callable[[AtlasUnit], Shape]:
    lattice, inside = nodes_of(place)
    return partial(run_unit, place, lattice, inside)


def nodes_of(place: Place) -> tuple[FieldMap, Mask]:
    """A lattice over the template, and which of its nodes lie in the foreground."""
    grid = place.grid()
    lattice = node_lattice(grid.shape, grid.spacing_mm)
    bright = template.foreground(grey(read_image(place.folder.before().template, place.input.slice_axis)))
    index = np.rint(lattice.nodes() / grid.spacing_mm).astype(int)
    return lattice, bright[tuple(np.minimum(index, np.array(grid.shape) - 1).T)]


def run_unit(place: Place, lattice: FieldMap, inside: Mask, unit: AtlasUnit) -> Shape:
    """Take the pose out of a subject's map.

    Raises:
        ImageError: for labels that cannot be used.
        ValueError: for a map that mirrors or flattens.
    """
    points = lattice.nodes()
    log_stretch, left = without_pose(points, place.mapped(unit).at(points), inside)
    place.folder.put("left", unit.index, left.T.reshape(lattice.values.shape).astype(np.float32))
    if not unit.subject.label:
        return Shape(log_stretch, ())
    found = np.unique(read_labels(unit.subject.label, place.grid(unit.unit)))
    return Shape(log_stretch, tuple(int(value) for value in found if value))


def grey(image: Image) -> template.Volume:
    """Intensities [D, H, W], of RGB the mean channel."""
    return image.array.mean(axis=3, dtype=np.float32) if image.is_rgb else image.array
