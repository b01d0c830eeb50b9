"""`samreg atlas`: an unbiased population template, made from the fitted fields of a study.

Every iteration registers all subjects to the template before, takes the mean of their shapes, and averages the images
carried onto that mean (`pipeline.algorithms.mean_shape`). The registration is an ordinary study in the folder of the
iteration, which reads the embeddings of the main study; only the template is encoded. So an atlas resumes as a study
does: finished pairs are kept, and an iteration whose rows are written and still hold is not made again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from actors.build import finds_classes
from pipeline import atlas_tables, record
from pipeline.algorithms import cohort_graph
from pipeline.atlas_folder import IterationFolder, write_volume
from pipeline.atlas_iteration import Iteration, Outcome
from pipeline.atlas_montage import draw_montage
from pipeline.config import StudyConfig, make_config, parse_setting, with_settings
from pipeline.dispatch import RayExecutor, SerialExecutor, open_executor
from pipeline.errors import UsageError
from pipeline.failures import FailureLog
from pipeline.folder import StudyFolder
from pipeline.pairs import MEDOID
from pipeline.progress import Reporter
from pipeline.stages import prototypes
from pipeline.stages.atlas_shape import grey
from pipeline.study import stopped_by_full_disk
from storage.atomic import clear_abandoned, replace_file
from storage.cohort import Subject
from storage.images import read_image

Result = TypeVar("Result")
LOG = logging.getLogger("samreg")
MAY_CHANGE = ("atlas", "match", "fit")
"""Sections whose settings may differ from those of the study."""


@dataclass(frozen=True)
class AtlasSummary:
    """What was made.

    Attributes:
        root: STUDY/atlas.
        reference: the subject that it started from.
        iterations: outcomes, from the first.
        settled: whether the last changed little enough to stop.
    """

    root: Path
    reference: str
    iterations: tuple[Outcome, ...]
    settled: bool
    n_failures: int
    seconds: float


def run_atlas(
    root: str | Path,
    settings: Sequence[str] = (),
    *,
    execution: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> AtlasSummary:
    """Make or resume the atlas of a study.

    Args:
        root: the study folder, whose subjects are encoded.
        settings: `KEY=VALUE` of `atlas`, `match` or `fit`, in place of those of the study.
        execution: settings of `execution` likewise.

    Raises:
        UsageError: for a folder that is no encoded study, or settings that cannot be carried out.
        StudyError: when the disk is full, or fewer than two subjects can be registered.
    """
    start = time.time()
    folder = StudyFolder(Path(root).absolute())
    run, plan = folder.latest_run()
    config = atlas_config(make_config(run["config"]), settings, execution or {})
    with (
        stopped_by_full_disk(folder),
        folder.lock() as lock,
        open_executor(config.execution, lock.check, rounds=config.atlas.iterations) as executor,
    ):
        atlas = Atlas(config, record.planned_subjects(plan), folder, executor, reporter or Reporter())
        outcomes, settled = atlas.run()
    failures = atlas.failures.total
    return AtlasSummary(atlas.root, atlas.reference.subject, outcomes, settled, failures, time.time() - start)


def atlas_config(config: StudyConfig, settings: Sequence[str], execution: Mapping[str, Any]) -> StudyConfig:
    """The settings of a study with others for the atlas, whose fields have inverses.

    Raises:
        UsageError: for a setting of another section, or one that is unknown or out of range.
    """
    changes = dict(parse_setting(text) for text in settings)
    for path in changes:
        if path.split(".")[0] not in MAY_CHANGE:
            raise UsageError(
                f"--set {path}: an atlas takes the study as it is encoded; settings of {', '.join(MAY_CHANGE)} can be "
                "changed"
            )
    if config.segmenter.name == "labels":
        raise UsageError(
            "the ROIs of this study come from the segmentations of its manifest, which a template has none of; "
            "an atlas needs a segmenter that finds ROIs in an image"
        )
    fixed = {"fit.diffeomorphic": True, "execution.keep": "features"}
    return with_settings(config, {**changes, **{f"execution.{k}": v for k, v in execution.items()}, **fixed})


@dataclass
class Atlas:
    """One run of an atlas.

    Attributes:
        subjects: of the study.
        study: its folder.
    """

    config: StudyConfig
    subjects: tuple[Subject, ...]
    study: StudyFolder
    executor: RayExecutor | SerialExecutor
    reporter: Reporter
    failures: FailureLog = field(init=False)
    reference: Subject = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.study.root / "atlas"
        self.failures = FailureLog(self.root)
        self.reference = self._choose_reference()

    def run(self) -> tuple[tuple[Outcome, ...], bool]:
        """Every iteration until little changes, then the results."""
        clear_abandoned([self.root])
        folder = self._write_reference()
        outcomes: list[Outcome] = []
        settled = False
        try:
            while not settled and len(outcomes) < self.config.atlas.iterations:
                folder = replace(folder, number=folder.number + 1)
                LOG.info("iteration %d of at most %d", folder.number, self.config.atlas.iterations)
                iteration = self._iteration(folder)
                outcomes.append(self._collecting(iteration, iteration.run))
                settled = outcomes[-1].settled(self.config.atlas)
            if not folder.has_inverses():
                outcomes[-1] = self._collecting(iteration, partial(iteration.run, anew=True))
            subjects = [row["subject"] for row in outcomes[-1].rows]
            self._collecting(iteration, partial(iteration.map_rois, subjects))
            self._publish(folder, subjects)
        finally:
            self.failures.write()
        return tuple(outcomes), settled

    def _iteration(self, folder: IterationFolder) -> Iteration:
        name = self.reference.subject
        return Iteration(self.config, self.subjects, name, self.study, folder, self.executor, self.reporter)

    def _collecting(self, iteration: Iteration, work: Callable[[], Result]) -> Result:
        """Do some work of an iteration; what failed in it counts as failed once, however often it did."""
        try:
            return work()
        finally:
            for stage, rows in iteration.failures.rows.items():
                known = {row["unit"] for row in self.failures.rows.get(stage, ())}
                self.failures.rows.setdefault(stage, []).extend(row for row in rows if row["unit"] not in known)

    def _choose_reference(self) -> Subject:
        """The subject to start from.

        Raises:
            UsageError: for a name that the study does not have, or no subject to choose from.
        """
        wanted, by_name = self.config.atlas.reference, {s.subject: s for s in self.subjects}
        if wanted in by_name:
            return by_name[wanted]
        if wanted != MEDOID:
            raise UsageError(
                f"atlas.reference is {wanted!r}, which is no subject of the study; give one, or {MEDOID!r}"
            )
        if finds_classes(self.config.segmenter):
            raise UsageError("the medoid compares prototypes, which class ROIs do not have; name a reference")
        store = self.study.store
        good = [name for name in by_name if store.prototypes_signature(name) is not None]
        if len(good) < 2:
            raise UsageError(f"{self.study.root} has {len(good)} encoded subjects; finish it with samreg run")
        return by_name[good[cohort_graph.medoid(prototypes.similarity(store, good))]]

    def _write_reference(self) -> IterationFolder:
        """Iteration 0: the image of the reference as the first template.

        Raises:
            ImageError: when it cannot be read.
        """
        image = read_image(self.reference.image, self.config.input.slice_axis)
        folder = IterationFolder(self.root, 0, ".nii.gz" if image.geometry.has_spacing else ".png")
        write_volume(grey(image), image.geometry, folder.template)
        return folder

    def _publish(self, last: IterationFolder, subjects: Sequence[str]) -> None:
        """The results of the last iteration as those of the atlas; later iterations of an earlier run go.

        Args:
            subjects: that are in the atlas.
        """
        for path in self.root.glob("iteration_*"):
            if path.name > last.root.name:
                shutil.rmtree(path)
        for path in (last.template, *sorted(last.maps.glob("*.nii.gz"))):
            with replace_file(self.root / path.name) as temporary:
                shutil.copyfile(path, temporary)
        stale = {path.name for path in self.root.glob("*.nii.gz")} - {p.name for p in last.maps.iterdir()}
        for name in stale - {last.template.name}:
            (self.root / name).unlink()
        for name in ("transforms", "inverses"):
            shutil.rmtree(self.root / name, ignore_errors=True)
            (self.root / name).mkdir()
            for subject in subjects:
                shutil.copy(last.composed(name, subject), self.root / name)
        folders = [replace(last, number=number) for number in range(last.number + 1)]
        atlas_tables.write_atlas(self.study.root, folders[1:])
        draw_montage(self.root / "montage.png", folders, self.config.input.slice_axis)
        self._write_record()

    def _write_record(self) -> None:
        """Write `atlas.yaml`: no times, so that equal atlases have equal records."""
        settings = {name: value for name, value in self.config.resolved().items() if name != "execution"}
        text = yaml.safe_dump(
            {"reference": self.reference.subject, "config": settings, "versions": record.versions()},
            sort_keys=False,
            allow_unicode=True,
        )
        with replace_file(self.root / "atlas.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")
