"""The figures of a report, as PNG bytes. Arrays and numbers in; no names, so nothing needs escaping.

Colours are those of Okabe and Ito (safe for colour-blind readers) and the cividis map; ROIs are numbered too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report_data import DICE, TRE_STAGES, ReportData, Values
from pipeline.report_pairs import PairView

OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#FFFFFF")
STAGE_COLOURS = {"before": "#777777", "centred": "#56B4E9", "affine": "#E69F00", "after": "#0072B2"}
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_DARK = ("#0072B2", "#009E73", "#D55E00")
_POINTS = 300  # single pairs are drawn up to this many
_DPI = 110


def distributions(data: ReportData) -> bytes:
    """Dice and distance by stage, similarity of the matches, folding, smoothness and time of the fits."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    _stages(axes[0], {stage: data.values(column) for stage, column in DICE.items()}, "Dice, mean over labels")
    axes[0].set_ylim(0, 1)
    prefix, unit, meaning = data.distance
    tre = {stage: data.values(prefix + ending) for stage, ending in TRE_STAGES.items()}
    _stages(axes[1], tre, f"{meaning} ({unit})")
    axes[1].set_ylim(bottom=0)
    similarity = np.asarray(data.correspondences.column("similarity").drop_null().to_numpy(), dtype=np.float64)
    _histogram(axes[2], similarity, "similarity of matched ROIs", "ROI pairs")
    _histogram(axes[3], 100 * data.values("fold_fraction"), "folded voxels (%)", "pairs")
    _histogram(axes[4], data.values("sdlogj"), "SD of log Jacobian", "pairs")
    _histogram(axes[5], data.values("seconds_fit"), "seconds of the fit", "pairs")
    return encode_png(figure)


def dice_by_label(data: ReportData) -> bytes:
    """Median and middle half of the Dice of each label, by stage."""
    labels = data.labels
    figure = Figure(figsize=(max(5.0, 1.1 * len(labels) + 2), 3.4), layout="constrained")
    axes = figure.subplots()
    for offset, (stage, column) in zip((-0.27, -0.09, 0.09, 0.27), DICE.items(), strict=True):
        found = [(i, data.values(column, label)) for i, label in enumerate(labels)]
        quartiles = np.array([(i, *np.percentile(v, (25, 50, 75))) for i, v in found if len(v)]).reshape(-1, 4)
        x, low, middle, high = quartiles.T
        bars = [middle - low, high - middle]
        axes.errorbar(
            x + offset,
            middle,
            bars,
            fmt="o",
            color=STAGE_COLOURS[stage],
            capsize=2,
            markersize=5,
            label=stage,
        )
    axes.set_xticks(range(len(labels)), [str(label) for label in labels])
    axes.set(xlabel="label", ylabel="Dice", ylim=(0, 1))
    axes.legend(ncols=4, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    strip_frame(axes)
    return encode_png(figure)


def pair_panels(view: PairView) -> bytes:
    """Six panels: fixed and moving with their matched ROIs, moved, overlays before and after, the grid."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    axes = figure.subplots(2, 3)
    _grey(axes[0, 0], view.fixed, view.aspect, f"fixed, slice {view.fixed_slice}")
    _grey(axes[0, 1], view.moving, view.aspect, f"moving, slice {view.moving_slice}")
    for number, (here, there) in enumerate(view.rois):
        _outline(axes[0, 0], here, number)
        _outline(axes[0, 1], there, number)
    _grey(axes[0, 2], view.moved, view.aspect, "moved, on the fixed slice")
    _label_lines(axes[0, 2], view.fixed_labels, _BLUE, "solid")
    _label_lines(axes[0, 2], view.moved_labels, _ORANGE, "dashed")
    for axis, image, title in ((axes[1, 0], view.before, "before"), (axes[1, 1], view.moved, "after")):
        axis.imshow(composite(view.fixed, image), aspect=view.aspect, interpolation="nearest")
        axis.set_title(f"{title}: fixed green, moving magenta", fontsize=10)
        axis.set_axis_off()
    _deformation_grid(figure, axes[1, 2], view)
    return encode_png(figure)


def composite(fixed: npt.NDArray[np.float32], moving: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Overlay [H, W, 3] of two images [H, W], all 0..1: grey where equal, else green or magenta."""
    return np.stack([moving, fixed, moving], axis=-1)


def _deformation_grid(figure: Figure, axes: Axes, view: PairView) -> None:
    """Lines of a regular grid where the field takes them, over the length of the displacement."""
    shown = axes.imshow(view.shift_mm, cmap="cividis", aspect=view.aspect, interpolation="nearest")
    rows, columns = view.sampled
    step = max(2, min(rows.shape) // 22)
    for y in range(0, rows.shape[0], step):
        axes.plot(columns[y], rows[y], color="white", linewidth=0.7)
    for x in range(0, rows.shape[1], step):
        axes.plot(columns[:, x], rows[:, x], color="white", linewidth=0.7)
    axes.set(xlim=(-0.5, rows.shape[1] - 0.5), ylim=(rows.shape[0] - 0.5, -0.5))
    axes.set_title(f"deformation grid; colour: displacement ({view.unit})", fontsize=10)
    axes.set_axis_off()
    figure.colorbar(shown, ax=axes, shrink=0.8)


def _grey(axes: Axes, image: npt.NDArray[np.float32], aspect: float, title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _outline(axes: Axes, mask: npt.NDArray[np.bool_], number: int) -> None:
    colour = OKABE_ITO[number % len(OKABE_ITO)]
    axes.contour(np.pad(mask, 1).astype(float), [0.5], colors=[colour], linewidths=1.6, extent=_padded(mask.shape))
    y, x = (float(index.mean()) for index in np.nonzero(mask))
    box = {"facecolor": colour, "pad": 1.0, "linewidth": 0}
    ink = "white" if colour in _DARK else "black"
    axes.text(x, y, str(number + 1), color=ink, fontsize=8, weight="bold", ha="center", va="center", bbox=box)


def _padded(shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Centres of the outer pixels of an image padded by one, in pixels of the image."""
    return (-1.0, float(shape[1]), -1.0, float(shape[0]))


def _label_lines(axes: Axes, labels: npt.NDArray[np.int32] | None, colour: str, style: str) -> None:
    if labels is None:
        return
    for value in np.unique(labels[labels > 0]):
        axes.contour((labels == value).astype(float), [0.5], colors=[colour], linewidths=1.4, linestyles=[style])


def _stages(axes: Axes, values: Mapping[str, Values], title: str) -> None:
    """A box per stage, with single pairs as points while they are few."""
    known = {stage: found for stage, found in values.items() if len(found)}
    axes.set_title(title, fontsize=10)
    strip_frame(axes)
    if not known:
        show_no_values(axes)
        return
    boxes = axes.boxplot(list(known.values()), widths=0.55, patch_artist=True, showfliers=False)
    for box, median, stage in zip(boxes["boxes"], boxes["medians"], known, strict=True):
        box.set(facecolor=STAGE_COLOURS[stage], alpha=0.55)
        median.set(color="black", linewidth=1.6)
    for position, found in enumerate(known.values(), 1):
        if len(found) <= _POINTS:
            spread = np.random.default_rng(0).uniform(-0.16, 0.16, len(found))
            axes.plot(position + spread, found, ".", color="black", markersize=4, alpha=0.6)
    axes.set_xticks(range(1, len(known) + 1), list(known))


def _histogram(axes: Axes, values: Values, title: str, counted: str) -> None:
    axes.set_title(title, fontsize=10)
    strip_frame(axes)
    if not len(values):
        show_no_values(axes)
        return
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    axes.hist(values, bins=min(40, max(8, int(len(values) ** 0.5))), range=(low, high), color=_BLUE, alpha=0.85)
    axes.set_ylabel(counted)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def show_no_values(axes: Axes) -> None:
    """Say that there is nothing to draw."""
    axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes, color="#555555")
    axes.set(xticks=[], yticks=[])


def strip_frame(axes: Axes) -> None:
    """Leave the left and lower side of the frame only."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def encode_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
