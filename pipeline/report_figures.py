"""The figures of a report, as PNG bytes. Arrays and numbers in; no names, so nothing needs escaping.

Colours are those of Okabe and Ito (safe for colour-blind readers) and the cividis map, and never the only sign: stages
have their places, pairs that stand out are triangles. Text and frames take the colours of `theme`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.algorithms.quality import LIMIT
from pipeline.report_data import DICE, TRE_STAGES, ReportData, Values
from pipeline.report_matches import BINS

STAGE_COLOURS = {
    "before": "#888888",
    "centred": "#56B4E9",
    "affine": "#E69F00",
    "after": "#0072B2",
    "refined": "#009E73",
}
_BLUE, _VERMILLION = "#0072B2", "#D55E00"
_POINTS = 300  # single pairs are drawn beside boxes up to this many
_SCATTERED = 3000  # and in scatter plots; more are counted in hexagons
_MATRIX = 150  # subjects, most that a matrix shows
_DPI = 115


@contextmanager
def theme(dark: bool) -> Iterator[None]:
    """Draw on the background of the page, light or dark."""
    ink, paper, line = ("#e6e8ea", "#14171a", "#8a929b") if dark else ("#1c2024", "#ffffff", "#6b737c")
    colours: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), line),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), paper),
        **dict.fromkeys(("patch.facecolor", "lines.color"), "#56B4E9" if dark else _BLUE),
    }
    sizes: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlepad": 9}
    with matplotlib.rc_context({**colours, **sizes}):
        yield


def accuracy(data: ReportData) -> bytes:
    """Dice and distance by stage, and every pair before against after."""
    prefix, unit, meaning = data.distance
    figure, axes = _panels(11, 3.4, 1, 3)
    _stages(axes[0], {stage: data.values(column) for stage, column in DICE.items()}, "Dice, mean over labels")
    axes[0].set_ylim(0, 1)
    tre = {stage: data.values(prefix + ending) for stage, ending in TRE_STAGES.items()}
    _stages(axes[1], tre, f"{meaning} ({unit})")
    axes[1].set_ylim(bottom=0)
    name = "dice" if data.count("dice") else "distance"
    title = "Dice of every pair" if name == "dice" else f"{meaning} of every pair ({unit})"
    before, after = data.columns[f"{name}_before"], data.columns[name]
    _scatter(axes[2], before, after, data.suspect)
    low, high = (0.0, 1.0) if name == "dice" else (0.0, 1.05 * float(np.nanmax([before, after], initial=1e-9)))
    axes[2].plot([low, high], [low, high], color=STAGE_COLOURS["before"], linewidth=1, linestyle="dashed", zorder=1)
    axes[2].set(title=title, xlabel="before", ylabel="after", xlim=(low, high), ylim=(low, high))
    return encode_png(figure)


def fits(data: ReportData) -> bytes:
    """Matches, folding, smoothness and time of the pairs."""
    figure, axes = _panels(11, 5.6, 2, 3)
    edges = np.linspace(0, 1, BINS + 1)
    for panel, (name, counts) in zip(axes, data.matches.counts.items(), strict=False):
        _bars(panel, counts, edges, f"{name} of matched ROIs", "ROI pairs")
    columns = data.columns
    _histogram(axes[2], columns["n_rois"], "matched ROIs in the fit", "pairs")
    _histogram(axes[3], 100 * columns["fold_fraction"], "folded voxels (%)", "pairs")
    _histogram(axes[4], columns["sdlogj"], "SD of log Jacobian", "pairs")
    _histogram(axes[5], columns["seconds"], "seconds a pair, all stages", "pairs")
    return encode_png(figure)


def check(data: ReportData, numbers: npt.NDArray[np.int64]) -> bytes:
    """Histogram of the scores, label-free score against accuracy, and the pairs as a matrix.

    Args:
        numbers: int64 [2, pairs], moving and fixed subject of every pair as their places in the cohort.
    """
    panels = [_scores]
    if data.count("dice"):
        panels.append(_score_against_dice)
    size = int(numbers.max(initial=0)) + 1
    if size <= _MATRIX and numbers.shape[1] >= 0.2 * size**2:
        panels.append(lambda axes, data: _matrix(axes, data, numbers, size))
    figure, places = _panels(3.7 * len(panels), 3.5, 1, len(panels))
    for axes, draw in zip(places, panels, strict=True):
        draw(axes, data)
    return encode_png(figure)


def dice_by_label(data: ReportData) -> bytes:
    """Median and middle half of the Dice of each label, by stage."""
    labels = data.labels
    stages = {stage: column for stage, column in DICE.items() if data.count(column)}
    figure, (axes,) = _panels(max(5.0, 1.1 * len(labels) + 2), 3.2, 1, 1)
    markers = dict(zip(DICE, "os^Dv", strict=True))
    for offset, (stage, column) in zip(np.linspace(-0.27, 0.27, len(stages)), stages.items(), strict=True):
        found = [(i, data.values(column, label)) for i, label in enumerate(labels)]
        quartiles = np.array([(i, *np.percentile(v, (25, 50, 75))) for i, v in found if len(v)]).reshape(-1, 4)
        x, low, middle, high = quartiles.T
        bars = [middle - low, high - middle]
        style: dict[str, Any] = {"fmt": markers[stage], "color": STAGE_COLOURS[stage], "capsize": 2, "markersize": 5}
        axes.errorbar(x + offset, middle, bars, label=stage, **style)
    axes.set_xticks(range(len(labels)), [str(label) for label in labels])
    axes.set(xlabel="label", ylabel="Dice", ylim=(0, 1))
    axes.legend(ncols=5, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    strip_frame(axes)
    return encode_png(figure)


def _panels(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of this size in inches and its axes, with fixed margins: a layout engine takes longer than drawing."""
    figure = Figure(figsize=(width, height))
    left, right, bottom, top, beside, between = 0.55, 0.15, 0.5, 0.4, 0.65, 0.8
    across = (width - left - right - beside * (columns - 1)) / columns
    up = (height - bottom - top - between * (rows - 1)) / rows
    places = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
    figure.subplots_adjust(**places, wspace=beside / across, hspace=between / up)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def _scores(axes: Axes, data: ReportData) -> None:
    score = data.quality.score
    _histogram(axes, score, "score of the pairs", "pairs")
    if np.isfinite(score).any():
        axes.axvline(LIMIT, color=_VERMILLION, linestyle="dashed", linewidth=1.5)
        place: dict[str, Any] = {"xytext": (4, -2), "textcoords": "offset points", "va": "top", "fontsize": 8}
        axes.annotate(f"{LIMIT:g}", (LIMIT, 1), xycoords=("data", "axes fraction"), **place)


def _score_against_dice(axes: Axes, data: ReportData) -> None:
    _scatter(axes, data.quality.check, data.columns["dice"], data.suspect)
    axes.axvline(LIMIT, color=_VERMILLION, linestyle="dashed", linewidth=1.5)
    axes.set(title="label-free score and Dice", xlabel="label-free score", ylabel="Dice", ylim=(0, 1))


def _matrix(axes: Axes, data: ReportData, numbers: npt.NDArray[np.int64], size: int) -> None:
    """Every pair as a cell: its Dice, or without labels its score."""
    labelled = bool(data.count("dice"))
    values = np.full((size, size), np.nan)
    values[numbers[0], numbers[1]] = data.columns["dice"] if labelled else data.quality.score
    shown = axes.imshow(values, cmap="cividis" if labelled else "cividis_r", interpolation="nearest")
    assert axes.figure is not None
    axes.figure.colorbar(shown, ax=axes, shrink=0.85)
    axes.set(title="Dice" if labelled else "score", xlabel="fixed subject, number", ylabel="moving subject, number")
    step = max(1, size // 8)
    axes.set_xticks(range(0, size, step), [str(i + 1) for i in range(0, size, step)])
    axes.set_yticks(range(0, size, step), [str(i + 1) for i in range(0, size, step)])


def _scatter(axes: Axes, x: Values, y: Values, suspect: npt.NDArray[np.bool_]) -> None:
    strip_frame(axes)
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        show_no_values(axes)
    elif known.sum() > _SCATTERED:
        axes.hexbin(x[known], y[known], gridsize=45, bins="log", cmap="cividis_r", mincnt=1, linewidths=0)
    else:
        plain, marked = known & ~suspect, known & suspect
        axes.plot(
            x[plain],
            y[plain],
            "o",
            color=matplotlib.rcParams["lines.color"],
            markersize=4,
            alpha=0.6,
            markeredgewidth=0,
        )
        axes.plot(x[marked], y[marked], "^", color=_VERMILLION, markersize=6, alpha=0.9, markeredgewidth=0)


def _stages(axes: Axes, values: Mapping[str, Values], title: str) -> None:
    """A box per stage, with single pairs as points while they are few."""
    known = {stage: found for stage, found in values.items() if len(found)}
    axes.set_title(title)
    strip_frame(axes)
    if not known:
        show_no_values(axes)
        return
    ink = matplotlib.rcParams["text.color"]
    line = {"color": matplotlib.rcParams["axes.edgecolor"]}
    style: dict[str, Any] = {
        "widths": 0.55,
        "patch_artist": True,
        "showfliers": False,
        "whiskerprops": line,
        "capprops": line,
    }
    boxes = axes.boxplot(list(known.values()), boxprops={"linewidth": 0}, **style)
    for box, median, stage in zip(boxes["boxes"], boxes["medians"], known, strict=True):
        box.set(facecolor=STAGE_COLOURS[stage], alpha=0.6)
        median.set(color=ink, linewidth=1.8)
    for position, found in enumerate(known.values(), 1):
        if len(found) <= _POINTS:
            spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(found))
            axes.plot(position + spread, found, ".", color=ink, markersize=3, alpha=0.45)
    axes.set_xticks(range(1, len(known) + 1), list(known))


def _histogram(axes: Axes, values: Values, title: str, counted: str) -> None:
    known = values[np.isfinite(values)]
    if not len(known):
        axes.set_title(title)
        strip_frame(axes)
        show_no_values(axes)
        return
    low, high = float(known.min()), float(known.max())
    if high - low < 1e-9:
        axes.set_title(title)
        strip_frame(axes)
        show_no_values(axes, f"all {counted}: {low:.3g}")
        return
    counts, edges = np.histogram(known, bins=min(50, max(8, int(2 * len(known) ** 0.5))), range=(low, high))
    _bars(axes, counts, edges, title, counted)


def _bars(axes: Axes, counts: npt.NDArray[np.int64], edges: Values, title: str, counted: str) -> None:
    axes.set(title=title, ylabel=counted)
    strip_frame(axes)
    if not counts.any():
        show_no_values(axes)
        return
    axes.stairs(counts, edges, fill=True, color=matplotlib.rcParams["patch.facecolor"])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def show_no_values(axes: Axes, text: str = "no values") -> None:
    """Say that there is nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def strip_frame(axes: Axes) -> None:
    """Leave the left and lower side of the frame only."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def encode_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()
