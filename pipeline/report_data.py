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

from pipeline.folder import StudyFolder
from pipeline.record import planned_subjects
from pipeline.status import Status, read_status
from storage import tables
from storage.cohort import Subject, read_cohort
from storage.embeddings import EmbeddingStore

Row = dict[str, Any]
Values = npt.NDArray[np.float64]

DICE = {
    "before": "dice_before",
    "centred": "dice_centered",
    "affine": "dice_affine",
    "after": "dice",
}
TABLES = ("metrics", "correspondences", "failures", "rois", "runs")
TRE_STAGES = {"before": "_before", "affine": "_affine", "after": ""}


@dataclass(frozen=True)
class ReportData:
    """The tables of one study.

    Attributes:
        root: the study folder.
        run: `run.yaml`.
        status: done, failed and missing units.
        metrics, correspondences, failures, rois, runs: the tables as they are stored.
        subjects: manifest rows by name; empty when the manifest is not known.
    """

    root: Path
    run: Row
    status: Status
    metrics: pa.Table
    correspondences: pa.Table
    failures: pa.Table
    rois: pa.Table
    runs: pa.Table
    subjects: dict[str, Subject]

    @cached_property
    def means(self) -> pa.Table:
        """The metrics rows that average over labels, one per pair."""
        return self.metrics.filter(pc.equal(self.metrics.column("label"), 0))

    @cached_property
    def labels(self) -> list[int]:
        """Label values, sorted; 0 (the mean) is not one."""
        return sorted(set(self.metrics.column("label").to_pylist()) - {0})

    @cached_property
    def distance(self) -> tuple[str, str, str]:
        """(column prefix, unit, meaning) of the target registration error that most pairs have."""
        choices = [
            ("landmark_tre_mm", "mm", "landmark distance"),
            ("tre_mm", "mm", "label centroid distance"),
            ("landmark_tre_vox", "voxel", "landmark distance"),
            ("tre_vox", "voxel", "label centroid distance"),
        ]
        return max(choices, key=lambda choice: self.count(choice[0]))

    def count(self, column: str) -> int:
        """How many pairs have a value."""
        return int(self.means.num_rows - self.means.column(column).null_count)

    def values(self, column: str, label: int = 0) -> Values:
        """The values of a metrics column over pairs, empty ones left out: float64 [n]."""
        rows = self.metrics.filter(pc.equal(self.metrics.column("label"), label))
        return np.asarray(rows.column(column).drop_null().to_numpy(), dtype=np.float64)

    @cached_property
    def ranking(self) -> tuple[str, list[str]]:
        """(measure, pairs from best to worst): by Dice, else distance, else mean similarity of matches."""
        if self.count("dice"):
            return "Dice", _ranked(self.means, "dice", best="largest")
        prefix, unit, meaning = self.distance
        if self.count(prefix):
            return f"{meaning} ({unit})", _ranked(self.means, prefix, best="smallest")
        mean = self.correspondences.group_by("pair").aggregate([("similarity", "mean")])
        fitted = self.means.column("pair").combine_chunks()
        mean = mean.filter(pc.is_in(mean.column("pair"), value_set=fitted))
        return "mean ROI similarity", _ranked(mean, "similarity_mean", best="largest")

    def pair_rows(self) -> list[Row]:
        """One row per pair, worst first."""
        by_pair = {row["pair"]: row for row in self.means.to_pylist()}
        ranked = [by_pair.pop(pair) for pair in reversed(self.ranking[1]) if pair in by_pair]
        return [*by_pair.values(), *ranked]

    def subject_rows(self) -> list[Row]:
        """One row per subject: manifest columns, grid and number of ROIs; empty where it was not encoded."""
        store = EmbeddingStore(StudyFolder(self.root).embeddings)
        encoded = set(store.subjects())
        counts = self.rois.group_by("subject").aggregate([("roi", "count")]).to_pylist()
        n_rois = {row["subject"]: row["roi_count"] for row in counts}
        failed = {row["subject"] for row in self.failures.to_pylist() if row["subject"] and not row["pair"]}
        names = self.subjects or dict.fromkeys(sorted(encoded | failed))
        rows = []
        for name in names:
            known = self.subjects.get(name)
            row: Row = {
                "subject": name,
                "group": known.group if known else "",
                "session": known.session if known else "",
            }
            row["grid"] = store.read(name).geometry.describe() if name in encoded else ""
            rows.append(row | {"rois": n_rois.get(name, 0), "state": _state(name, encoded, failed)})
        return rows


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
    status = read_status(root)
    folder = StudyFolder(root)
    stored = {name: tables.read_table(root, name) for name in TABLES}
    return ReportData(root, folder.read_run() or {}, status, subjects=_read_subjects(folder, cohort), **stored)


def summarise(values: Values) -> tuple[float, float, float, float] | None:
    """(mean, median, smallest, largest), None without values."""
    if not len(values):
        return None
    return float(values.mean()), float(np.median(values)), float(values.min()), float(values.max())


def best_median_worst(ranked: Sequence[str]) -> list[tuple[str, str]]:
    """(role, pair) of up to three different pairs."""
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


def _ranked(table: pa.Table, column: str, best: str) -> list[str]:
    order = "descending" if best == "largest" else "ascending"
    known = table.filter(pc.is_valid(table.column(column)))
    names: list[str] = known.sort_by([(column, order), ("pair", "ascending")]).column("pair").to_pylist()
    return names


def _state(name: str, encoded: set[str], failed: set[str]) -> str:
    if name in failed:
        return "failed"
    return "encoded" if name in encoded else "missing"
