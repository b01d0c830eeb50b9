"""One iteration of an atlas: register all subjects to the template before, take the mean, make the next template."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline import atlas_reduce, atlas_rois, atlas_tables
from pipeline.algorithms import template
from pipeline.algorithms.atlas_config import AtlasConfig
from pipeline.algorithms.mean_shape import inverse_map, mean_map, node_lattice
from pipeline.algorithms.spacing import shortest_edge_mm
from pipeline.algorithms.warp import Array
from pipeline.atlas_folder import IterationFolder, write_maps, write_volume
from pipeline.config import StudyConfig
from pipeline.dispatch import Failure, RayExecutor, SerialExecutor, Task
from pipeline.errors import StudyError
from pipeline.failures import FailureLog
from pipeline.folder import StudyFolder
from pipeline.progress import Reporter
from pipeline.stages import atlas_propagate, atlas_shape, atlas_warp
from pipeline.stages import atlas_rois as rois_stage
from pipeline.stages.atlas_shape import AtlasUnit, Place, Shape
from pipeline.study import Study
from storage.cohort import Cohort, Pair, Subject
from storage.geometry import Geometry
from storage.images import read_image
from storage.signature import digest

LOG = logging.getLogger("samreg")
VERSION = 2
_LONE = 2  # single subjects besides the reference whose labels are propagated
TEMPLATE = "template"


@dataclass(frozen=True)
class Outcome:
    """What an iteration came to.

    Attributes:
        rows: of `atlas.parquet`.
        h0: smallest voxel edge of the template, mm.
    """

    rows: tuple[dict[str, Any], ...]
    h0: float

    def settled(self, config: AtlasConfig) -> bool:
        """Whether the template moved and changed little."""
        row = self.rows[0]
        return bool(row["mean_displacement"] < config.settled * self.h0 and row["image_change"] < config.settled_image)


@dataclass
class Iteration:
    """One iteration.

    Attributes:
        reference: name of the subject that the atlas started from.
        study: the main study.
        failures: of this iteration.
    """

    config: StudyConfig
    subjects: tuple[Subject, ...]
    reference: str
    study: StudyFolder
    folder: IterationFolder
    executor: RayExecutor | SerialExecutor
    reporter: Reporter
    failures: FailureLog = field(init=False)

    def __post_init__(self) -> None:
        self.failures = FailureLog(self.folder.root)
        name = TEMPLATE
        while name in {subject.subject for subject in self.subjects}:
            name += "-"
        self.place = Place(self.folder, name, self.config.input)

    def run(self, anew: bool = False) -> Outcome:
        """Do what is not done.

        Args:
            anew: make everything from the fields again, even if it is done.

        Raises:
            StudyError: when fewer than two subjects can be registered.
        """
        registered, fit_keys = self._register()
        self._enough(registered)
        key = digest({"fits": fit_keys, "atlas": self._settings(), "reference": self.reference, "version": VERSION})
        done = atlas_tables.read_rows(self.folder, key, [unit.unit for unit in registered])
        if done is None or anew:
            shutil.rmtree(self.folder.root / "atlas", ignore_errors=True)
            rows = [{**row, "key": key} for row in self._make(registered)]
            atlas_tables.write_rows(self.folder, rows)
            done = rows
        self.folder.drop_volumes()
        if self.folder.number > 1:
            self.folder.before().drop_inverses()
        grid = self.place.grid()
        return Outcome(tuple(done), shortest_edge_mm(grid.shape, grid.spacing_mm))

    def map_rois(self, subjects: Sequence[str]) -> None:
        """Carry the cohort ROIs of the study, if it has any, onto the template and write where they lie."""
        numbers, members = atlas_rois.carried_rois(self.study.root)
        if not numbers:
            for name in (atlas_rois.FREQUENCY, atlas_rois.IDENTITY):
                (self.folder.maps / name).unlink(missing_ok=True)
            return
        by_name = {subject.subject: subject for subject in self.subjects}
        units = [AtlasUnit(index, by_name[name], "") for index, name in enumerate(subjects)]
        self.folder.create("rois", (len(units), *self.place.grid().shape), "uint32", 0, len(units))
        good, _ = self._outcomes(rois_stage.task(self.place, members), units)
        atlas_rois.write_roi_maps(self.place, good, numbers)
        self.folder.drop_volumes()

    def _register(self) -> tuple[list[AtlasUnit], dict[str, str]]:
        """The study onto the template before; who was registered, and the keys of their fits by pair."""
        names = [subject.subject for subject in self.subjects]
        study_folder = self.folder.study
        with study_folder.lock():
            study_folder.clear_abandoned()
            self.folder.link_subjects(self.study, names)
            template_subject = Subject(self.place.template, str(self.folder.before().template))
            cohort = Cohort((*self.subjects, template_subject))
            pairs = [Pair(f"{name}__{self.place.template}", name, self.place.template) for name in names]
            study = Study(self.config, cohort, study_folder, self.executor, self.reporter)
            try:
                study.run(pairs, (), overwrite=True)
            finally:
                self.failures.rows.update({stage: list(rows) for stage, rows in study.failures.rows.items()})
        by_name = {subject.subject: subject for subject in self.subjects}
        good = [pair for pair in pairs if pair.pair not in study.failures.pairs]
        plan = study_folder.latest_plan()
        planned = dict(zip(plan["pairs"]["pair"], plan["pairs"]["fit"], strict=True))
        units = [AtlasUnit(index, by_name[pair.moving], pair.pair) for index, pair in enumerate(good)]
        return units, {pair.pair: planned[pair.pair] for pair in good}

    def _settings(self) -> dict[str, Any]:
        config = self.config.atlas
        return {name: getattr(config, name) for name in ("average", "trim", "sharpening")}

    def _make(self, units: Sequence[AtlasUnit]) -> list[dict[str, Any]]:
        """The rows of the subjects, and everything else of the iteration on disk."""
        self.folder.drop_composed()
        grid = self.place.grid()
        lattice, inside = atlas_shape.nodes_of(self.place)
        self.folder.create("left", (len(units), *lattice.values.shape), "float32", 0.0, len(units))
        units, shapes = self._outcomes(atlas_shape.task(self.place), units)
        displacement = self._write_mean_shape(units, shapes, lattice.nodes()[inside])

        labels = sorted({value for shape in shapes for value in shape.labels})
        everybody = len(self.subjects)
        for name, kind, fill in (("images", "float32", np.nan), ("log_jacobians", "float32", np.nan)):
            self.folder.create(name, (everybody, *grid.shape), kind, fill, everybody)
        if labels:
            self.folder.create("shares", (everybody, len(labels), *grid.shape), "uint8", 0, everybody)
        units, warped = self._outcomes(atlas_warp.task(self.place, labels), units)
        shared = {"mean_displacement": displacement, **self._write_images(units, grid)}
        voters = [unit for unit in units if unit.subject.label and labels]
        dice = self._write_labels(voters, labels, grid) if voters else np.zeros((0, 0))

        lone = self._lone(voters, dice)
        task = atlas_propagate.task(self.place, labels, len(voters), lone)
        kept, columns = self._outcomes(task, units)
        of_unit = {unit.unit: row for unit, row in zip(units, warped, strict=True)}
        rows = [
            {
                "iteration": self.folder.number,
                "subject": unit.unit,
                "n_subjects": len(units),
                **shared,
                **of_unit[unit.unit],
                **row,
            }
            for unit, row in zip(kept, columns, strict=True)
        ]
        return atlas_tables.with_agreement(rows, [unit.unit for unit in voters], dice, self.reference)

    def _write_mean_shape(self, units: Sequence[AtlasUnit], shapes: Sequence[Shape], foreground: Array) -> float:
        """Write the mean map and its inverse; root mean square displacement of the foreground [P, 3] by it, mm."""
        grid = self.place.grid()
        left = atlas_reduce.mean_left(self.folder, [unit.index for unit in units])
        stretch = np.mean([shape.log_stretch for shape in shapes], axis=0)
        lattice = node_lattice(grid.shape, grid.spacing_mm)
        forward = mean_map(lattice, foreground.mean(axis=0), stretch, left)
        write_maps(self.folder.shapes, forward=forward, back=inverse_map(forward, lattice, np.eye(4)))
        return float(np.sqrt(((forward.at(foreground) - foreground) ** 2).sum(axis=1).mean()))

    def _write_images(self, units: Sequence[AtlasUnit], grid: Geometry) -> dict[str, float]:
        """Write template, variance and log-Jacobians; columns that all rows share."""
        members = [unit.index for unit in units]
        mean, spread = atlas_reduce.images(self.folder, members, self.config.atlas)
        made = template.filled(mean)
        if self.config.atlas.sharpening:
            made = template.sharpened(made, grid.spacing_mm, self.config.atlas.sharpening)
        write_volume(made, grid, self.folder.template)
        maps = self.folder.maps
        shutil.rmtree(maps, ignore_errors=True)
        write_volume(spread, grid, maps / "variance.nii.gz")
        for name, volume in zip(("mean", "variance"), atlas_reduce.log_jacobians(self.folder, members), strict=True):
            write_volume(volume, grid, maps / f"log_jacobian_{name}.nii.gz")
        old = atlas_shape.grey(read_image(self.folder.before().template, self.config.input.slice_axis))
        inside = template.foreground(made) & np.isfinite(mean)
        return {
            "image_change": 1 - template.correlation(old, made),
            "sharpness": template.sharpness(made, grid.spacing_mm, inside),
        }

    def _write_labels(self, voters: Sequence[AtlasUnit], labels: Sequence[int], grid: Geometry) -> Array:
        """Write probabilities and the majority; pairwise Dice of the subjects with labels, [N, N]."""
        found = atlas_reduce.agreement(self.folder, [unit.index for unit in voters], labels)
        for label, votes in zip(labels, found.votes, strict=True):
            write_volume(votes / np.float32(len(voters)), grid, self.folder.maps / f"label_{label}_probability.nii.gz")
        write_volume(found.majority, grid, self.folder.maps / "majority.nii.gz")
        for name, volume in (("votes", found.votes), ("majority", found.majority)):
            self.folder.create(name, volume.shape, str(volume.dtype), 0)
            self.folder.volumes(name, "r+")[:] = volume
        return found.dice

    def _lone(self, voters: Sequence[AtlasUnit], dice: Array) -> list[Subject]:
        """Subjects whose labels are propagated alone: the reference, and those that agree best with the others."""
        if not len(dice):
            return []
        others = np.nanmean(np.where(np.eye(len(dice), dtype=bool), np.nan, dice), axis=1) if len(dice) > 1 else dice[0]
        best = [voters[i].subject for i in np.argsort(-others, kind="stable")[:_LONE]]
        known = [unit.subject for unit in voters if unit.unit == self.reference]
        return [*known, *(subject for subject in best if subject.subject != self.reference)]

    def _outcomes(self, task: Task, units: Sequence[AtlasUnit]) -> tuple[list[AtlasUnit], list[Any]]:
        """Units of a task that succeeded, in their order, and their results; the others are recorded as failures.

        Raises:
            StudyError: when fewer than two succeed.
            OSError: when the disk is full.
        """
        found: dict[str, Any] = {}
        with self.reporter.stage(task.name, len(units), "subjects") as advance:
            for unit, outcome in self.executor.map_units(task, units):
                advance(1)
                if not isinstance(outcome, Failure):
                    found[unit.unit] = outcome
                elif outcome.disk_full:
                    raise OSError(outcome.errno, outcome.message)
                else:
                    self.failures.add_subject(task.name, unit.unit, outcome)
                    LOG.warning("%s: %s failed: %s", task.name, unit.unit, outcome.message)
        self.executor.ledger.clear()  # what a study records of its units; these are of none
        good = [unit for unit in units if unit.unit in found]
        self._enough(good)
        return good, [found[unit.unit] for unit in good]

    def _enough(self, units: Sequence[AtlasUnit]) -> None:
        if len(units) < 2:
            raise StudyError(
                f"{len(units)} of {len(self.subjects)} subjects could be registered to the template; an atlas needs "
                f"two. {self.folder.root.parent}/failures says why"
            )
