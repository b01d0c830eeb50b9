"""The report of a study: one HTML page that opens anywhere, its figures as PNG and its scores as tables beside it.

study/report/
  index.html                         everything, without a network
  *.png                              its figures
  pairs.parquet, subjects.parquet    scores, alarms and the measures behind them
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.report_album import Album
from pipeline.report_check import pairs_section, quality_section, subjects_section, write_scores
from pipeline.report_data import ReportData, read_report_data
from pipeline.report_page import Html, element, page, section
from pipeline.report_record import failures_section, provenance_section
from pipeline.report_results import accuracy_section, atlas_section, fits_section, pictures_section, sweeps_section
from pipeline.report_subjects import read_subjects
from pipeline.report_verdict import actions, key_numbers, to_do, verdict
from storage.atomic import replace_file


def write_report(study: str | Path, cohort: str | Path | None = None, extra: Sequence[tuple[str, Html]] = ()) -> Path:
    """Write `study/report/index.html`, its figures and its scores.

    Args:
        study: a study folder, finished or not.
        cohort: its manifest, for the pictures; without it, what the study remembers of its manifest is used.
        extra: more sections, (title, body), after the metrics.

    Returns:
        Path of the page.

    Raises:
        UsageError: for a folder that is not a study.
        CohortError, TableError, FileNotFoundError: naming the file.
    """
    data = read_report_data(study, cohort)
    subjects = read_subjects(data)
    album = Album(data.root / "report")
    album.folder.mkdir(exist_ok=True)
    album.clear()
    found = actions(data, subjects)
    sections = [
        ("What to do", section("What to do", to_do(found))),
        ("Accuracy", accuracy_section(data, album)),
        *((title, section(title, body)) for title, body in extra),
        ("Pictures", pictures_section(data, album)),
        ("Quality control", quality_section(data, subjects, album)),
        ("Pairs", pairs_section(data)),
        ("Subjects", subjects_section(data, subjects)),
        ("Failures", failures_section(data)),
        ("Matches and fields", fits_section(data, album)),
        *atlas_section(data.root, album),
        *sweeps_section(data.root, album),
        ("How it was made", provenance_section(data)),
    ]
    write_scores(album.folder, data, subjects)
    name = data.root.resolve().name
    path = album.folder / "index.html"
    intro = [_meta(data), verdict(data, found), key_numbers(data, subjects)]
    with replace_file(path) as temporary:
        text = page(f"Registration report: {name}", intro, sections)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _meta(data: ReportData) -> Html:
    """When and with what the study was made, in a line."""
    runs = data.runs.to_pylist()
    times = [row["finished"] or row["started"] for row in runs if row["finished"] or row["started"]]
    seconds = sum(row["seconds"] or 0 for row in runs)
    digest = data.run.get("digests", {}).get("config", "")
    parts = [
        f"Last run {max(times):%Y-%m-%d %H:%M} UTC" if times else "",
        f"{_duration(seconds)} in all runs" if runs else "",
        f"samreg {data.run.get('versions', {}).get('samreg', '')}".strip(),
        f"configuration {digest[:12]}" if digest else "",
    ]
    return element("p", " · ".join(filter(None, parts)), class_="meta")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
