"""What a report shows, read from the tables of a study: no pictures, no HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.algorithms.quality import LIMIT
from pipeline.folder import StudyFolder
from pipeline.record import planned_subjects
from pipeline.report_matches import Matches, read_matches, read_roi_counts
from pipeline.report_quality import PAIR_MEASURES, Quality, alarms, assess
from pipeline.status import Status, read_status
from storage import tables
from storage.cohort import Subject, read_cohort

Row = dict[str, Any]
Values = npt.NDArray[np.float64]

DICE = {
    "before": "dice_before",
    "centred": "dice_centered",
    "affine": "dice_affine",
    "after": "dice",
    "refined": "dice_refined",
}
TRE_STAGES = {"before": "_before", "affine": "_affine", "after": "", "refined": "_refined"}
DISTANCES = {
    "landmark_tre_mm": ("landmark distance", "mm"),
    "tre_mm": ("label centroid distance", "mm"),
    "landmark_tre_vox": ("landmark distance", "voxel"),
    "tre_vox": ("label centroid distance", "voxel"),
}
_REFINABLE = (
    "dice",
    "sdlogj",
    "fold_fraction",
    "fold_fraction_rois",
    "roi_dice",
    "roi_dice_min",
    "hd95_mm",
    "hd95_vox",
)
_SECONDS = ("seconds_match", "seconds_fit", "seconds_refine", "seconds_inverse")
COLUMNS = (
    *("pair", "moving", "fixed", "label", "n_rois", "fallback", "flag", "hd95_mm_before"),
    *("pseudo_dice_before", "pseudo_dice_affine", "pseudo_dice"),
    *("jacobian_min", "dice_before", "dice_centered", "dice_affine", *_SECONDS),
    *(name + end for name in _REFINABLE for end in ("", "_refined")),
    *(name + end for name in DISTANCES for end in TRE_STAGES.values()),
)


@dataclass(frozen=True)
class ReportData:
    """The tables of one study.

    Attributes:
        root: the study folder.
        run: `run.yaml`.
        status: done, failed and missing units.
        metrics: `COLUMNS` of the table, all labels.
        matches: the correspondences, summarised by pair.
        rois: number of ROIs and median of their quality by subject.
        failures, runs: the tables as they are stored.
        subjects: manifest rows by name; empty when the manifest is not known.
    """

    root: Path
    run: Row
    status: Status
    metrics: pa.Table
    matches: Matches
    rois: dict[str, tuple[int, float]]
    failures: pa.Table
    runs: pa.Table
    subjects: dict[str, Subject]

    @cached_property
    def of_label(self) -> dict[int, pa.ChunkedArray]:
        """Which metrics rows are of a label; bool."""
        labels = self.metrics.column("label")
        return {label: pc.equal(labels, label) for label in (0, *self.labels)}

    @cached_property
    def means(self) -> pa.Table:
        """The metrics rows that average over labels, one per pair."""
        return self.metrics.filter(self.of_label[0])

    @cached_property
    def pairs(self) -> list[str]:
        """Names of the pairs that were fitted, in the order of `means`."""
        names: list[str] = self.means.column("pair").to_pylist()
        return names

    @cached_property
    def labels(self) -> list[int]:
        """Label values, sorted; 0 (the mean) is not one."""
        return sorted(set(self.metrics.column("label").unique().to_pylist()) - {0})

    @cached_property
    def distance(self) -> tuple[str, str, str]:
        """(column prefix, unit, meaning) of the target registration error that most pairs have."""
        prefix = max(DISTANCES, key=self.count)
        meaning, unit = DISTANCES[prefix]
        return prefix, unit, meaning

    @cached_property
    def unit(self) -> str:
        """Unit of areas, HD95 and label distances: voxels only where nothing has a spacing."""
        return "voxel" if self.count("tre_vox") and not self.count("tre_mm") else "mm"

    def count(self, column: str) -> int:
        """How many pairs have a value."""
        return int(self.means.num_rows - self.means.column(column).null_count)

    def values(self, column: str, label: int = 0) -> Values:
        """The values of a metrics column over pairs, empty ones left out: float64 [n]."""
        found = self.metrics.column(column).filter(self.of_label[label])
        return np.asarray(found.drop_null().to_numpy(), dtype=np.float64)

    def final(self, column: str) -> Values:
        """A measure of the transform that was written: refined, where that was asked for; float64 [pairs]."""
        values = _floats(self.means, column)
        refined = f"{column}_refined"
        if refined not in self.means.column_names:
            return values
        found = _floats(self.means, refined)
        return np.where(np.isfinite(found), found, values)

    @cached_property
    def columns(self) -> dict[str, Values]:
        """Figures of every pair, in the order of `means`: float64 [pairs], NaN where unknown."""
        prefix, _, _ = self.distance
        found = {name: self.final(name) for name in (*_REFINABLE[:-2], "n_rois", "jacobian_min", "pseudo_dice")}
        found |= {name: _floats(self.means, name) for name in ("dice_before", "dice_affine")}
        found |= {"distance_before": _floats(self.means, f"{prefix}_before"), "distance": self.final(prefix)}
        found["hd95"] = self.final("hd95_vox" if self.unit == "voxel" else "hd95_mm")
        found["gain"] = found["dice"] - found["dice_affine"]
        found["seconds"] = np.nansum([_floats(self.means, name) for name in _SECONDS], axis=0)
        place = pc.index_in(self.means.column("pair"), value_set=self.matches.pairs.column("pair").combine_chunks())
        matched = self.matches.pairs.take(place)
        return found | {name: _floats(matched, name) for name in ("similarity", "confidence", "residual")}

    @cached_property
    def quality(self) -> Quality:
        """Scores of the pairs, in the order of `means`."""
        return assess(self.columns, PAIR_MEASURES)

    @cached_property
    def alarms(self) -> list[str]:
        """What is wrong with each pair whatever the others are like."""
        flags = [flag or "" for flag in self.means.column("flag").to_pylist()]
        columns = self.columns
        return alarms(flags, columns["fold_fraction"], columns["dice_before"], columns["dice"])

    @cached_property
    def suspect(self) -> npt.NDArray[np.bool_]:
        """Pairs to look at: an alarm, or a score of `LIMIT` or more; bool [pairs]."""
        return np.array([bool(alarm) for alarm in self.alarms], dtype=bool) | (self.quality.score >= LIMIT)

    @cached_property
    def worst_first(self) -> npt.NDArray[np.int64]:
        """Rows of `means`: those to look at by their scores, then the others, each by the ranking measure."""
        score = np.nan_to_num(self.quality.score, nan=0.0)
        _, accuracy = self.ranking
        return np.lexsort((np.array(self.pairs), accuracy, -score, ~self.suspect))

    @cached_property
    def ranking(self) -> tuple[str, Values]:
        """(measure, its values, larger is better): Dice, else less distance, else similarity; of `means`."""
        if self.count("dice"):
            return "Dice", np.nan_to_num(self.columns["dice"], nan=-1.0)
        prefix, unit, meaning = self.distance
        if self.count(prefix):
            return f"{meaning} ({unit})", -np.nan_to_num(self.columns["distance"], nan=np.inf)
        return "median similarity of the matched ROIs", np.nan_to_num(self.columns["similarity"], nan=-1.0)


def read_report_data(study: str | Path, cohort: str | Path | None = None) -> ReportData:
    """Read the tables of a study.

    Args:
        study: the study folder.
        cohort: its manifest; without it, what the study remembers of its manifest is used.

    Raises:
        UsageError: for a folder that is not a study.
        CohortError, TableError, FileNotFoundError: naming the file.
    """
    root = Path(study)
    folder = StudyFolder(root)
    return ReportData(
        root=root,
        status=read_status(root),
        run=folder.read_run() or {},
        metrics=tables.read_table(root, "metrics", list(COLUMNS)),
        matches=read_matches(root),
        rois=read_roi_counts(root),
        failures=tables.read_table(root, "failures"),
        runs=tables.read_table(root, "runs"),
        subjects=_read_subjects(folder, cohort),
    )


def summarise(values: Values) -> tuple[float, float, float, float] | None:
    """(mean, median, smallest, largest), None without values."""
    if not len(values):
        return None
    return float(values.mean()), float(np.median(values)), float(values.min()), float(values.max())


def best_median_worst(ranked: Sequence[str]) -> list[tuple[str, str]]:
    """(role, pair) of up to three different pairs, of pairs from best to worst."""
    if not ranked:
        return []
    roles = {"best": ranked[0], "worst": ranked[-1], "median": ranked[len(ranked) // 2]}
    chosen = {pair: role for role, pair in reversed(roles.items())}
    order = ("best", "median", "worst")
    return sorted(((role, pair) for pair, role in chosen.items()), key=lambda item: order.index(item[0]))


def _read_subjects(folder: StudyFolder, cohort: str | Path | None) -> dict[str, Subject]:
    if cohort is not None:
        return read_cohort(cohort).by_name()
    return {subject.subject: subject for subject in planned_subjects(folder.read_plan() or {})}


def _floats(table: pa.Table, column: str) -> Values:
    """A column as float64, NaN where it is null."""
    return np.asarray(table.column(column).to_numpy(), dtype=np.float64)
