# mypy: disable-error-code="no-untyped-call"
"""The demo: a phantom cohort through the whole study, compared with the deformations that are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline import phantom
from pipeline.folder import StudyFolder
from pipeline.progress import Reporter
from pipeline.report import write_report
from pipeline.report_tables import table
from pipeline.request import read_request
from pipeline.study import StudySummary, run_study
from storage import tables
from storage.cohort import read_cohort
from storage.images import read_image
from storage.transforms import read_ddf

STRIDE = 7  # of the voxels that the fields are compared at
DICE = ("dice_before", "dice_affine", "dice")
TRE = ("tre_mm_before", "tre_mm_affine", "tre_mm")
TRE_PIXELS = ("tre_vox_before", "tre_vox_affine", "tre_vox")


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
    summary = run_study(request.config, request.cohort, study, request.pairs, request.unknown, reporter=reporter)
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
        fitted = read_ddf(folder.transform(row["pair"]), grids["fixed"], grids["moving"])
        points = phantom.positions(grids["fixed"])[phantom.body_mask(truth["fixed"], grids["fixed"])][::STRIDE]
        true = truth["moving"].from_template(truth["fixed"].to_template(points)) - points
        index = (points / grids["fixed"].spacing_mm).round().astype(int).T
        error = np.linalg.norm(fitted[:, *index].T - true, axis=1)
        before = np.linalg.norm(true, axis=1)
        errors[row["pair"]] = FieldError(float(before.mean()), float(error.mean()), float(np.percentile(error, 95)))
    return errors


def result_table(demo: Demo) -> Table:
    """One line per pair and their mean, for the terminal; each cell is before → (affine) → after."""
    rows = _mean_rows(demo.study)
    physical = any(row["tre_mm"] is not None for row in rows)
    unit, tre = ("mm", TRE) if physical else ("px", TRE_PIXELS)
    shown = Table(title="before → affine → after; truth: error, before → after", title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("pair", overflow="fold")
    for title in ("Dice", f"TRE ({unit})", f"truth ({unit})"):
        shown.add_column(title, justify="right", no_wrap=True)
    groups = [
        (
            [row[column] for column in DICE],
            [row[column] for column in tre],
            [demo.errors[row["pair"]].before_mm, demo.errors[row["pair"]].mean_mm],
        )
        for row in rows
    ]
    for row, cells in zip(rows, groups, strict=True):
        shown.add_row(row["pair"], *_cells(cells))
    if rows:
        shown.add_section()
        means = ([_mean(column) for column in zip(*cells, strict=True)] for cells in zip(*groups, strict=True))
        shown.add_row("mean", *_cells(means))
    return shown


def _mean_rows(study: Path) -> list[dict[str, Any]]:
    """Metrics rows that average over labels, by pair."""
    metrics = tables.read_table(study, "metrics")
    rows: list[dict[str, Any]] = metrics.filter(pc.equal(metrics.column("label"), 0)).sort_by("pair").to_pylist()
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cells(groups: Iterable[Sequence[float | None]]) -> list[str]:
    """Dice with two decimals, distances with one."""
    return [
        " → ".join("?" if value is None else f"{value:.{digits}f}" for value in values)
        for digits, values in zip((2, 1, 1), groups, strict=True)
    ]
