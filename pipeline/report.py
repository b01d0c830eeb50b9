"""The report of a study: one HTML page that opens anywhere, and its figures as PNG files beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline import report_figures as figures
from pipeline.report_data import (
    DICE,
    TRE_STAGES,
    ReportData,
    Row,
    best_median_worst,
    read_report_data,
    summarise,
)
from pipeline.report_page import Html, cards, element, folded, page, picture, section, table
from pipeline.report_pairs import NoPictureError, PairView, read_pair_view
from storage.atomic import replace_file

PAIRS_SHOWN = 1000
FAILURES_SHOWN = 500

_PAIR_COLUMNS = {
    "moving": "moving",
    "fixed": "fixed",
    "n_rois": "ROI pairs",
    "dice_before": "Dice before",
    "dice_affine": "Dice affine",
    "dice": "Dice after",
    "hd95_mm": "HD95 (mm)",
    "sdlogj": "SD log J",
    "fold_fraction": "folded part",
    "seconds_fit": "fit (s)",
    "fallback": "fallback",
    "flag": "flag",
}


def write_report(study: str | Path, cohort: str | Path | None = None, extra: Sequence[tuple[str, Html]] = ()) -> Path:
    """Write `study/report/index.html` and its figures.

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
    folder = data.root / "report"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    sections = [
        ("Summary", _summary(data)),
        ("Metrics", _metrics(data, folder)),
        *((title, section(title, body)) for title, body in extra),
        ("Pairs", _pairs(data, folder)),
        ("Cohort", _cohort(data)),
        ("Failures", _failures(data)),
        ("How it was made", _provenance(data)),
    ]
    name = data.root.resolve().name
    path = folder / "index.html"
    with replace_file(path) as temporary:
        text = page(f"Registration report: {name}", [_intro(data)], sections)
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _intro(data: ReportData) -> Html:
    state = "complete" if data.status.complete else "not complete: something failed or is missing, see Failures"
    return element("p", f"samreg study, {state}.", class_="soft")


def _summary(data: ReportData) -> Html:
    stages = {stage.stage: stage for stage in data.status.stages}
    subjects, pairs = stages["encode"], stages["fit"]
    numbers: list[tuple[str, object]] = [
        ("subjects encoded", f"{subjects.done} of {subjects.done + subjects.failed + subjects.missing}"),
        ("pairs registered", f"{pairs.done} of {pairs.done + pairs.failed + pairs.missing}"),
        ("failures", data.failures.num_rows),
        ("ROI pairs", data.correspondences.num_rows),
    ]
    if data.count("dice"):
        numbers.append(("Dice, mean: before, affine, after", _arrow(data, list(DICE.values()), skip="dice_centered")))
    prefix, unit, meaning = data.distance
    if data.count(prefix):
        columns = [prefix + ending for ending in TRE_STAGES.values()]
        numbers.append((f"{meaning}, {unit}: before, affine, after", _arrow(data, columns)))
    flagged = sum(1 for row in data.means.to_pylist() if row["flag"])
    numbers.append(("pairs flagged", flagged))
    rows = [(s.stage, s.done, s.failed, s.missing) for s in data.status.stages]
    counts = table("stages", "Units per stage", ("stage", "done", "failed", "missing"), rows)
    return section("Summary", cards(numbers), counts)


def _arrow(data: ReportData, columns: Sequence[str], skip: str = "") -> str:
    found = [data.values(column) for column in columns if column != skip]
    return " → ".join(f"{values.mean():.3g}" if len(values) else "?" for values in found)


def _metrics(data: ReportData, folder: Path) -> Html:
    columns = _metric_columns(data)
    rows: list[list[object]] = []
    for label in [0, *data.labels]:
        found = {name: summarise(data.values(column, label)) for name, column in columns.items()}
        means = [None if s is None or (label and "landmarks" in name) else s[0] for name, s in found.items()]
        lowest = summarise(data.values("dice", label))
        rows.append(["mean over labels" if label == 0 else str(label), *means, lowest and lowest[2]])
    caption = (
        f"Mean over {data.means.num_rows} pairs. TRE: distance of the label centroids. "
        "Empty: no labels, landmarks or spacing."
    )
    parts = [table("metrics-table", caption, ["label", *columns, "lowest Dice after"], rows)]
    drawn = figures.distributions(data)
    alt = f"Distributions over {data.means.num_rows} pairs. {_spoken(data)}"
    parts.append(_figure(folder, "distributions", drawn, alt, "Boxes: median and middle half. Points: pairs."))
    if data.labels:
        alt = f"Dice of labels {', '.join(map(str, data.labels))}: before, centred, affine and after."
        drawn = figures.dice_by_label(data)
        parts.append(_figure(folder, "dice_by_label", drawn, alt, "Median and middle half over the pairs."))
    return section("Metrics", *parts)


def _metric_columns(data: ReportData) -> dict[str, str]:
    """Title and column of the metrics table; voxels only where nothing has a spacing."""
    unit, ending = ("voxel", "vox") if data.count("tre_vox") and not data.count("tre_mm") else ("mm", "mm")
    columns = {f"Dice {stage}": column for stage, column in DICE.items()}
    columns |= {f"TRE {stage} ({unit})": f"tre_{ending}{suffix}" for stage, suffix in TRE_STAGES.items()}
    if data.count("landmark_tre_vox"):
        columns |= {
            f"landmarks {stage} ({unit})": f"landmark_tre_{ending}{suffix}" for stage, suffix in TRE_STAGES.items()
        }
    if ending == "vox":
        return columns | {"HD95 after (voxel)": "hd95_vox"}
    return columns | {"HD95 before (mm)": "hd95_mm_before", "HD95 after (mm)": "hd95_mm"}


def _spoken(data: ReportData) -> str:
    """The distributions in words."""
    found = {stage: summarise(data.values(column)) for stage, column in DICE.items()}
    return " ".join(
        f"Dice {stage}: median {s[1]:.2f}, from {s[2]:.2f} to {s[3]:.2f}." for stage, s in found.items() if s
    )


def _pairs(data: ReportData, folder: Path) -> Html:
    measure, ranked = data.ranking
    parts: list[object] = [element("p", f"Pairs are ranked by {measure}.")]
    rows = {row["pair"]: row for row in data.means.to_pylist()}
    for role, pair in best_median_worst(ranked):
        parts.append(element("h3", f"{role.capitalize()}: {pair}"))
        parts.append(_pair_figure(data, folder, role, rows[pair]))
    prefix, unit, _ = data.distance
    columns = _PAIR_COLUMNS | {f"{prefix}_before": f"TRE before ({unit})", prefix: f"TRE after ({unit})"}
    shown = [[row["pair"], *(row[column] for column in columns)] for row in data.pair_rows()[:PAIRS_SHOWN]]
    total = data.means.num_rows
    caption = f"{len(shown)} of {total} pairs, worst first" + ("; all are in metrics/" if len(shown) < total else "")
    parts.append(table("pairs-table", caption, ["pair", *columns.values()], shown))
    return section("Pairs", *parts)


def _pair_figure(data: ReportData, folder: Path, role: str, row: Row) -> Html:
    try:
        view = read_pair_view(data, row["pair"])
    except NoPictureError as error:
        return element("p", f"No picture: {error}")
    dice = f" Dice {_shown(row['dice_before'])} before, {_shown(row['dice'])} after." if row["dice"] is not None else ""
    lines = " Lines on the moved image: labels of the fixed (solid blue) and of the moved image (dashed orange)."
    caption = (
        f"{row['moving']} onto {row['fixed']}.{dice} {len(view.rois)} of {row['n_rois']} matched ROI pairs, "
        f"same colour and number in both.{lines if view.moved_labels is not None else ''}"
    )
    return _figure(folder, f"pair_{role}", figures.pair_panels(view), _describe(row, view, dice), caption)


def _describe(row: Row, view: PairView, dice: str) -> str:
    """Alternative text of a pair's pictures."""
    return (
        f"Six panels of {row['moving']} registered to {row['fixed']}: fixed slice {view.fixed_slice} and "
        f"moving slice {view.moving_slice} with {len(view.rois)} matched ROIs, the moved slice, overlays "
        f"before and after, and the deformation grid, displacements up to {view.shift_mm.max():.1f} "
        f"{view.unit}.{dice}"
    )


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _figure(folder: Path, name: str, png: bytes, alt: str, caption: str) -> Html:
    with replace_file(folder / f"{name}.png") as temporary:
        temporary.write_bytes(png)
    return picture(png, alt, caption)


def _cohort(data: ReportData) -> Html:
    rows = data.subject_rows()
    header = ("subject", "group", "session", "grid (z, y, x)", "ROIs", "state")
    cells = [[r["subject"], r["group"], r["session"], r["grid"], r["rois"], r["state"]] for r in rows]
    typical = [row["rois"] for row in rows if row["state"] == "encoded"]
    caption = f"{len(rows)} subjects" + (f", median {statistics.median(typical):.0f} ROIs" if typical else "")
    return section("Cohort", table("cohort-table", caption, header, cells))


def _failures(data: ReportData) -> Html:
    rows = data.failures.to_pylist()
    if not rows:
        return section("Failures", element("p", "Nothing failed in the latest run."))
    cells: list[list[object]] = [
        [
            row["stage"],
            row["pair"] or row["unit"],
            row["subject"],
            row["error"],
            row["message"],
            row["attempt"],
            folded("show", element("pre", row["traceback"])) if row["traceback"] else "",
        ]
        for row in rows[:FAILURES_SHOWN]
    ]
    caption = f"{len(cells)} of {len(rows)} failures; the same command again tries them again"
    header = ("stage", "unit", "subject", "error", "message", "attempt", "traceback")
    return section("Failures", table("failures-table", caption, header, cells))


def _provenance(data: ReportData) -> Html:
    rows = data.runs.to_pylist()
    last = [row for row in rows if row["run"] == max(r["run"] for r in rows)] if rows else []
    cells = [
        [
            row["stage"],
            row["units_done"],
            row["units_failed"],
            row["seconds"],
            None if row["peak_memory_bytes"] is None else round(row["peak_memory_bytes"] / 2**20),
            row["workers"],
        ]
        for row in last
    ]
    header = ("stage", "units done", "failed", "seconds", "peak memory of a worker (MiB)", "workers")
    record = yaml.safe_dump(data.run, sort_keys=False, allow_unicode=True)
    return section(
        "How it was made",
        table("runs", "Latest run", header, cells),
        folded("Configuration, versions and digests (run.yaml)", element("pre", record)),
    )
