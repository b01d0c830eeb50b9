# mypy: disable-error-code="no-untyped-call"
"""The demo: a phantom cohort through the whole study, compared with the deformations that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.table import Table

from pipeline import phantom
from pipeline.folder import StudyFolder
from pipeline.progress import Reporter
from pipeline.report import write_report
from pipeline.report_page import table
from pipeline.request import read_request
from pipeline.study import StudySummary, run_study
from storage import tables
from storage.cohort import read_cohort
from storage.images import read_image
from storage.transforms import itk_to_ddf, read_transform

COLUMNS = {
    "dice_before": "Dice before",
    "dice_affine": "affine",
    "dice": "after",
    "tre_mm_before": "TRE (mm) before",
    "tre_mm_affine": "affine",
    "tre_mm": "after",
    "landmark_tre_mm_before": "landmarks (mm) before",
    "landmark_tre_mm": "after",
}


@dataclass(frozen=True)
class FieldError:
    """Distance of a fitted field from the true one, over the body of the fixed subject.

    Attributes:
        before_mm: mean length of the true displacement, the error of doing nothing.
        mean_mm: mean error of the fitted field.
        p95_mm: its 95th percentile.
    """

    before_mm: float
    mean_mm: float
    p95_mm: float


@dataclass(frozen=True)
class Demo:
    """What a demo made."""

    study: Path
    report: Path
    summary: StudySummary
    errors: dict[str, FieldError]


def run_demo(
    out: Path,
    subjects: int,
    shape: tuple[int, int, int],
    seed: int,
    overrides: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Demo:
    """Make `out/cohort`, register all its pairs into `out/study`, and write the report there.

    Raises:
        ValueError: for a cohort that cannot be made.
        UsageError, StudyError: as `run_study`.
    """
    cohort = phantom.make_cohort(out / "cohort", subjects, shape, seed)
    request = read_request(None, cohort, "all", overrides)
    study = out / "study"
    summary = run_study(
        request.config, request.cohort, study, request.pairs, request.unknown, reporter=reporter
    )
    errors = field_errors(study, cohort)
    header = ("pair", "doing nothing", "fitted, mean", "fitted, 95th percentile")
    rows = [(pair, e.before_mm, e.mean_mm, e.p95_mm) for pair, e in errors.items()]
    caption = "Distance from the true displacement over the body of the fixed subject (mm; px in 2D)"
    extra = [("Known truth", table("truth", caption, header, rows))]
    return Demo(study, write_report(study, cohort, extra), summary, errors)


def field_errors(study: Path, cohort: Path) -> dict[str, FieldError]:
    """Error of every fitted field of a study of a phantom cohort, by pair."""
    subjects, folder = read_cohort(cohort).by_name(), StudyFolder(study)
    errors = {}
    for row in _mean_rows(study):
        grids = {role: read_image(subjects[row[role]].image).geometry for role in ("fixed", "moving")}
        truth = {role: phantom.read_warp(cohort, row[role]) for role in ("fixed", "moving")}
        transform = read_transform(folder.transform(row["pair"]))
        fitted = itk_to_ddf(transform.GetDisplacementField(), grids["fixed"], grids["moving"])
        true = phantom.true_ddf(truth["moving"], truth["fixed"], grids["fixed"])
        body = phantom.body_mask(truth["fixed"], grids["fixed"])
        error = np.linalg.norm(fitted - true, axis=0)[body]
        before = np.linalg.norm(true, axis=0)[body]
        errors[row["pair"]] = FieldError(
            float(before.mean()), float(error.mean()), float(np.percentile(error, 95))
        )
    return errors


def result_table(demo: Demo) -> Table:
    """One line per pair and their mean, for the terminal."""
    shown = Table(title="Result per pair", title_justify="left")
    shown.add_column("pair", overflow="fold")
    for title in (*COLUMNS.values(), "error to truth before", "after"):
        shown.add_column(title, justify="right")
    rows = _mean_rows(demo.study)
    values = [[row[column] for column in COLUMNS] for row in rows]
    for line, row in zip(values, rows, strict=True):
        found = demo.errors[row["pair"]]
        line += [found.before_mm, found.mean_mm]
        shown.add_row(row["pair"], *map(_shown, line))
    if rows:
        shown.add_section()
        columns = [[v for v in column if v is not None] for column in zip(*values, strict=True)]
        shown.add_row("mean", *(_shown(float(np.mean(column)) if column else None) for column in columns))
    return shown


def _mean_rows(study: Path) -> list[dict[str, Any]]:
    """Metrics rows that average over labels, by pair."""
    metrics = tables.read_table(study, "metrics")
    rows: list[dict[str, Any]] = (
        metrics.filter(pc.equal(metrics.column("label"), 0)).sort_by("pair").to_pylist()
    )
    return rows


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
