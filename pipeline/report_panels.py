"""The pictures of one pair, as PNG bytes: images, matched ROIs, overlays and the deformation grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from skimage.exposure import match_histograms

from pipeline.report_figures import encode_png
from pipeline.report_pairs import PairView
from pipeline.slice_drawing import COLOURS, draw_grey, draw_outline

OKABE_ITO = (*COLOURS, "#FFFFFF")
_DARK = ("#0072B2", "#009E73", "#D55E00")
_ORANGE, _BLUE = COLOURS[:2]
_BACKING: dict[str, Any] = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 2.5}


def pair_panels(view: PairView) -> bytes:
    """Six panels: fixed and moving with their matched ROIs, moved, overlays before and after, the grid.

    Titles lie on the panels and the ground between them is transparent, so one picture suits light and dark pages.
    """
    across, gap = 3.6, 0.06
    up = across * min(1.4, max(0.6, view.fixed.shape[0] * view.aspect / view.fixed.shape[1]))
    figure = Figure(figsize=(3 * across + 2 * gap, 2 * up + gap), facecolor="none")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=gap / across, hspace=gap / up)
    axes = figure.subplots(2, 3)
    _grey(axes[0, 0], view.fixed, view.aspect, f"fixed, slice {view.fixed_slice}")
    _grey(axes[0, 1], view.moving, view.moving_aspect, f"moving, slice {view.moving_slice}")
    for number, (here, there) in enumerate(view.rois):
        _outline(axes[0, 0], here, number)
        _outline(axes[0, 1], there, number)
    _grey(axes[0, 2], view.moved, view.aspect, "moved, on the fixed slice")
    _label_lines(axes[0, 2], view.fixed_labels, _BLUE, "solid")
    _label_lines(axes[0, 2], view.moved_labels, _ORANGE, "dashed")
    for axis, image, title in ((axes[1, 0], view.before, "before"), (axes[1, 1], view.moved, "after")):
        matched = match_histograms(image, view.fixed) if view.fixed.any() else image
        axis.imshow(composite(view.fixed, matched), aspect=view.aspect, interpolation="nearest")
        _entitle(axis, f"{title}: fixed green, moving magenta")
    _deformation_grid(axes[1, 2], view)
    return encode_png(figure)


def _entitle(axes: Axes, title: str) -> None:
    axes.set_axis_off()
    place: dict[str, Any] = {"xytext": (5, -5), "textcoords": "offset points", "ha": "left", "va": "top"}
    axes.annotate(title, (0, 1), xycoords="axes fraction", color="white", fontsize=10, bbox=_BACKING, **place)


def composite(fixed: npt.NDArray[np.float32], moving: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Overlay [H, W, 3] of two images [H, W], all 0..1: grey where equal, else green or magenta."""
    return np.stack([moving, fixed, moving], axis=-1)


def _deformation_grid(axes: Axes, view: PairView) -> None:
    """Lines of a regular grid where the field takes them, over the length of the displacement."""
    shown = axes.imshow(view.shift_mm, cmap="cividis", aspect=view.aspect, interpolation="nearest")
    rows, columns = view.sampled
    step = max(2, min(rows.shape) // 22)
    for y in range(0, rows.shape[0], step):
        axes.plot(columns[y], rows[y], color="white", linewidth=0.7)
    for x in range(0, rows.shape[1], step):
        axes.plot(columns[:, x], rows[:, x], color="white", linewidth=0.7)
    axes.set(xlim=(-0.5, rows.shape[1] - 0.5), ylim=(rows.shape[0] - 0.5, -0.5))
    _entitle(axes, f"deformation grid; colour: displacement ({view.unit})")
    bar = axes.inset_axes((0.05, 0.06, 0.035, 0.5))
    assert axes.figure is not None
    axes.figure.colorbar(shown, cax=bar)
    bar.tick_params(colors="white", labelsize=9)
    for label in bar.get_yticklabels():
        label.set_bbox(_BACKING)


def _grey(axes: Axes, image: npt.NDArray[np.float32], aspect: float, title: str) -> None:
    draw_grey(axes, image, aspect)
    _entitle(axes, title)


def _outline(axes: Axes, mask: npt.NDArray[np.bool_], number: int) -> None:
    colour = OKABE_ITO[number % len(OKABE_ITO)]
    draw_outline(axes, mask, colour)
    y, x = (float(index.mean()) for index in np.nonzero(mask))
    box = {"facecolor": colour, "pad": 1.0, "linewidth": 0}
    ink = "white" if colour in _DARK else "black"
    axes.text(x, y, str(number + 1), color=ink, fontsize=8, weight="bold", ha="center", va="center", bbox=box)


def _label_lines(axes: Axes, labels: npt.NDArray[np.int32] | None, colour: str, style: str) -> None:
    if labels is None:
        return
    for value in np.unique(labels[labels > 0]):
        draw_outline(axes, labels == value, colour, style)
