"""The sections of a report that show results: accuracy, pictures of pairs, matches and fields, atlas, sweeps."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from PIL import Image

from pipeline import report_figures as figures
from pipeline.algorithms.quality import LIMIT
from pipeline.report_album import Album
from pipeline.report_data import DICE, TRE_STAGES, ReportData, best_median_worst, summarise
from pipeline.report_page import Html, element, section
from pipeline.report_pairs import NoPictureError, PairView, read_pair_view
from pipeline.report_panels import pair_panels
from pipeline.report_tables import table
from pipeline.sweep_figures import axis_figure
from storage.cohort import subject_key

SUSPECTS_SHOWN = 3
_OF_THE_PAIR = ("landmarks", "held-out")  # measures that no label has for itself
_MONTAGE = 2400  # pixels, longest side of a montage in the page
_SWEPT = ("n_pairs", "n_failed", "dice", "dice_sd", "dice_p30", "tre_mm", "tre_vox", "landmark_tre_mm", "fold_fraction")


def accuracy_section(data: ReportData, album: Album) -> Html:
    """Before, affine and after, over the pairs and by label."""
    measured = data.count("dice") or data.count(data.distance[0])
    if not measured and not data.count("pseudo_dice"):
        why = "no pair was registered yet" if not data.pairs else "the manifest gives neither labels nor landmarks"
        return section("Accuracy", element("p", f"Accuracy is not known: {why}. See Quality control."))
    parts = [*_caveat(data), *([_distributions(data, album)] if measured else [])]
    columns = _metric_columns(data)
    rows: list[list[object]] = []
    for label in [0, *data.labels]:
        found = {name: summarise(data.values(column, label)) for name, column in columns.items()}
        means = [None if s is None or (label and name.startswith(_OF_THE_PAIR)) else s[0] for name, s in found.items()]
        lowest = summarise(data.values("dice", label))
        rows.append(["mean over labels" if label == 0 else str(label), *means, lowest and lowest[2]])
    caption = f"Mean over {data.means.num_rows:,} pairs. TRE: distance of the label centroids."
    parts.append(table("metrics-table", caption, ["label", *columns, "lowest Dice after"], rows))
    if data.labels and data.count("dice"):
        alt = f"Median and middle half of the Dice of labels {', '.join(map(str, data.labels))} by stage."
        caption = "Median and middle half over the pairs."
        parts.append(album.add_chart("dice_by_label", lambda: figures.dice_by_label(data), alt, caption))
    return section("Accuracy", *parts)


def _caveat(data: ReportData) -> list[Html]:
    """What is to be known before the numbers of some pairs are believed."""
    flagged = sum("labels_in_fit" in (flag or "").split() for flag in data.means.column("flag").to_pylist())
    if not flagged:
        return []
    pairs = "All pairs" if flagged == len(data.pairs) else f"{flagged:,} of {len(data.pairs):,} pairs"
    text = " were fitted to the labels that measure them (labels_in_fit): their Dice says how well the fit follows its "
    return [element("p", element("strong", f"{pairs}{text}ROIs, not how well it registers."))]


def _distributions(data: ReportData, album: Album) -> Html:
    """The figure of the pairs by stage."""
    alt = f"Distributions over {data.means.num_rows} pairs. {_spoken(data)}"
    side = "above the diagonal Dice rose" if data.count("dice") else "below the diagonal it fell"
    note = f"Boxes: median, middle half and whiskers. Right: {side}; triangles are pairs to look at."
    return album.add_chart("accuracy", lambda: figures.accuracy(data), alt, note)


def _metric_columns(data: ReportData) -> dict[str, str]:
    """Title and column of the metrics table, those that have values."""
    unit, ending = ("voxel", "vox") if data.unit == "voxel" else ("mm", "mm")
    columns = {f"Dice {stage}": column for stage, column in DICE.items()}
    for title, prefix in (("TRE", "tre"), ("landmarks", "landmark_tre")):
        columns |= {f"{title} {stage} ({unit})": f"{prefix}_{ending}{end}" for stage, end in TRE_STAGES.items()}
    if ending == "mm":
        columns["HD95 before (mm)"] = "hd95_mm_before"
    columns |= {f"HD95 after ({unit})": f"hd95_{ending}", f"HD95 refined ({unit})": f"hd95_{ending}_refined"}
    ends = {"before": "_before", "affine": "_affine", "after": ""}
    columns |= {f"held-out ROIs, Dice {stage}": f"pseudo_dice{end}" for stage, end in ends.items()}
    return {title: column for title, column in columns.items() if data.count(column)}


def _spoken(data: ReportData) -> str:
    """The distributions in words."""
    found = {stage: summarise(data.values(column)) for stage, column in DICE.items()}
    return " ".join(
        f"Dice {stage}: median {s[1]:.2f}, from {s[2]:.2f} to {s[3]:.2f}." for stage, s in found.items() if s
    )


def fits_section(data: ReportData, album: Album) -> Html:
    """Distributions that need no labels."""
    spoken = [f"{name}: median {np.nanmedian(v):.3g}" for name, v in data.columns.items() if np.isfinite(v).any()]
    alt = f"Histograms over {data.matches.total} matches and {len(data.pairs)} pairs. {', '.join(spoken)}."
    drawn = album.add_chart("fits", lambda: figures.fits(data), alt, "Every match or pair counts once.")
    return section("Matches and fields", drawn)


def pictures_section(data: ReportData, album: Album) -> Html:
    """Best, median and worst pair, and those that stand out most."""
    if not data.pairs:
        return section("Pictures", element("p", "No pair was registered."))
    measure, values = data.ranking
    places = {pair: row for row, pair in enumerate(data.pairs)}
    ranked = [data.pairs[row] for row in np.lexsort((np.array(data.pairs), -values))]
    roles = [(role, pair) for role, pair in best_median_worst(ranked)]
    shown = {pair for _, pair in roles}
    suspects = [data.pairs[row] for row in data.worst_first if data.suspect[row]]
    standing = [pair for pair in suspects if pair not in shown][:SUSPECTS_SHOWN]
    roles += [(f"stands out {number}", pair) for number, pair in enumerate(standing, 1)]
    parts: list[object] = [element("p", f"Best, median and worst by {measure}, and what stands out besides.")]
    for role, pair in roles:
        parts.append(element("h3", f"{role.capitalize()}: {pair}"))
        parts.append(_pair_figure(data, album, role, places[pair]))
    return section("Pictures", *parts)


def _pair_figure(data: ReportData, album: Album, role: str, row: int) -> Html:
    names = {role: data.means.column(role)[row].as_py() for role in ("pair", "moving", "fixed")}
    numbers = {name: values[row] for name, values in data.columns.items()}
    try:
        view = read_pair_view(data, names)
    except NoPictureError as error:
        return element("p", f"No picture: {error}")
    known = np.isfinite(numbers["dice"])
    dice = f" Dice {numbers['dice_before']:.3f} before, {numbers['dice']:.3f} after." if known else ""
    score = data.quality.score[row]
    stands = f" Score {score:.1f}: {data.quality.reasons[row]}." if score >= LIMIT else ""
    alarm = f" Alarm: {data.alarms[row]}." if data.alarms[row] else ""
    lines = " Lines on the moved image: labels of the fixed (solid blue) and of the moved image (dashed orange)."
    caption = (
        f"{names['moving']} onto {names['fixed']}.{dice}{stands}{alarm} {len(view.rois)} of "
        f"{numbers['n_rois']:.0f} matched ROI pairs, same colour and number in both."
        f"{lines if view.moved_labels is not None else ''}"
    )
    name = f"pair_{role.replace(' ', '_')}"
    return album.add_picture(name, pair_panels(view), _describe(names, view, dice), caption)


def _describe(names: Mapping[str, str], view: PairView, dice: str) -> str:
    """Alternative text of a pair's pictures."""
    return (
        f"Six panels of {names['moving']} registered to {names['fixed']}: fixed slice {view.fixed_slice} and "
        f"moving slice {view.moving_slice} with {len(view.rois)} matched ROIs, the moved slice, overlays "
        f"before and after, and the deformation grid, displacements up to {view.shift_mm.max():.1f} "
        f"{view.unit}.{dice}"
    )


def atlas_section(root: Path, album: Album) -> list[tuple[str, Html]]:
    """The montage and the table of `samreg atlas`, if it was run."""
    montage, iterations = root / "atlas" / "montage.png", root / "atlas" / "atlas.parquet"
    if not montage.exists():
        return []
    alt = "Montage of the atlas: slices of the template and of the maps that were made with it."
    parts = [album.add_picture("atlas", _fitting(montage), alt, "The whole atlas is in atlas/.")]
    if iterations.exists():
        header, rows = _atlas_means(pq.read_table(iterations))
        parts.append(table("atlas-table", "Mean over the subjects, by iteration", header, rows))
    return [("Atlas", section("Atlas", *parts))]


def _atlas_means(found: pa.Table) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Means over the subjects of every measure of `atlas.parquet` that has values, an iteration a row."""
    names = [
        field.name
        for field in found.schema
        if pa.types.is_floating(field.type) and found.column(field.name).null_count < found.num_rows
    ]
    groups = found.group_by("iteration", use_threads=False)
    means = groups.aggregate([(name, "mean") for name in names] + [("iteration", "count")]).sort_by("iteration")
    columns = [means.column("iteration"), means.column("iteration_count"), *(means.column(f"{n}_mean") for n in names)]
    return ["iteration", "subjects", *names], list(zip(*(column.to_pylist() for column in columns), strict=True))


def _fitting(path: Path) -> bytes:
    """A PNG no larger than the page has use for."""
    stream = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((_MONTAGE, _MONTAGE))
        image.convert("RGB").save(stream, format="PNG")
    return stream.getvalue()


def sweeps_section(root: Path, album: Album) -> list[tuple[str, Html]]:
    """Curves and table of every `samreg sweep`."""
    parts: list[object] = []
    for path in sorted((root / "sweeps").glob("*/sweep.parquet")):
        name, found = path.parent.name, pq.read_table(path)
        grid = yaml.safe_load((path.parent / "sweep.yaml").read_text(encoding="utf-8"))["grid"]
        axes = [axis for axis in grid if axis != "set"]
        parts.append(element("h3", name))
        for axis in axes:
            parts.append(_sweep_figure(album, name, found, axis, [other for other in axes if other != axis]))
        means = found.filter(pc.equal(found.column("label"), 0))
        known = [c for c in _SWEPT if c in means.column_names and means.column(c).null_count < means.num_rows]
        rows: list[list[Any]] = [
            [_setting(row[a]) for a in axes] + [row[c] for c in known] for row in means.to_pylist()
        ]
        parts.append(
            table(f"sweep-{subject_key(name)}", "Mean over the pairs of each combination", [*axes, *known], rows)
        )
    return [("Sweeps", section("Sweeps", *parts))] if parts else []


def _sweep_figure(album: Album, name: str, found: pa.Table, axis: str, others: list[str]) -> Html:
    alt = f"Sweep {name}: accuracy and number of matched ROIs against {axis}."
    file = f"sweep_{subject_key(name)}_{subject_key(axis)}"
    return album.add_chart(
        file, lambda: axis_figure(found, axis, others), alt, f"Over {axis}; other settings as lines."
    )


def _setting(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) and not isinstance(value, bool) else str(value)
