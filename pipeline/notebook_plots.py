# mypy: disable-error-code="no-untyped-call"
"""Figures of one pair for a notebook; see `pipeline.notebook.OpenStudy`."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from pipeline.algorithms import warp
from pipeline.errors import UsageError
from pipeline.notebook import OpenPair, OpenSubject
from pipeline.report_figures import encode_png
from pipeline.slice_drawing import COLOURS, draw_grey, draw_outline
from storage.geometry import moving_to_fixed

Grey = npt.NDArray[np.float32]
_LINES = 22


class ShownFigure(Figure):
    """A figure that a notebook shows by itself: pyplot, which would keep it for good, is not involved."""

    def _repr_png_(self) -> bytes:
        return encode_png(self)


def draw_overlay(pair: OpenPair, slice_index: int | None) -> Figure:
    """Fixed green and moving magenta (grey where equal), before and after."""
    z = _slice(pair, slice_index)
    fixed, moving, ddf = (values.compute() for values in (pair.fixed.image, pair.moving.image, pair.ddf))
    figure = ShownFigure(figsize=(8, 4.3), layout="constrained")
    aspect = _aspect(pair)
    for axes, title, field in zip(figure.subplots(1, 2), ("before", "after"), (np.zeros_like(ddf), ddf), strict=True):
        moved = warp.warp_image(moving, _taken_from(pair, field, z))[0]
        axes.imshow(np.stack([moved, fixed[z], moved], axis=-1), aspect=aspect, interpolation="nearest")
        axes.set_title(f"{title}, slice {z}", fontsize=10)
        axes.set_axis_off()
    return _titled(figure, pair)


def draw_matches(pair: OpenPair, slice_index: int | None, most: int) -> Figure:
    """Matched ROIs of one fixed slice, and of the moving slice that holds most of their partners."""
    rows = pair.matches.to_pylist()
    if not rows:
        raise UsageError(f"pair {pair.name!r} has no matched ROIs; samreg status says why")
    counted = Counter((row["fixed_slice"], row["moving_slice"]) for row in rows)
    if slice_index is not None:
        counted = Counter({slices: n for slices, n in counted.items() if slices[0] == slice_index})
        if not counted:
            known = ", ".join(str(z) for z in sorted({row["fixed_slice"] for row in rows}))
            raise UsageError(f"slice {slice_index} of {pair.fixed.name!r} has no matched ROIs; these have: {known}")
    z, w = min(counted, key=lambda slices: (-counted[slices], slices))
    shown = [row for row in rows if (row["fixed_slice"], row["moving_slice"]) == (z, w)][:most]
    figure = ShownFigure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, subject, role, number in zip(panels, (pair.fixed, pair.moving), ("fixed", "moving"), (z, w), strict=True):
        spacing = subject.geometry.spacing_mm
        draw_grey(axes, subject.image[number].compute(), spacing[1] / spacing[2])
        axes.set_title(f"{role}, slice {number}", fontsize=10)
        masks = subject.masks([row[f"{role}_roi"] for row in shown])
        for mask, colour in zip(masks, _cycled(len(shown)), strict=True):
            draw_outline(axes, mask, colour)
    sides = ((pair.fixed, "fixed"), (pair.moving, "moving"))
    ends = [_middles(subject, [row[f"{role}_roi"] for row in shown]) for subject, role in sides]
    for here, there, colour in zip(*ends, _cycled(len(shown)), strict=True):
        line = ConnectionPatch(here, there, "data", "data", axesA=panels[0], axesB=panels[1], color=colour, alpha=0.6)
        figure.add_artist(line)
    return _titled(figure, pair)


def draw_grid(pair: OpenPair, slice_index: int | None) -> Figure:
    """A regular grid where the field takes its lines, in the fixed frame."""
    z = _slice(pair, slice_index)
    shift = pair.ddf[:, z].compute().astype(np.float64)
    spacing = np.asarray(pair.fixed.geometry.spacing_mm)
    rows, columns = np.indices(shift.shape[1:]) + shift[1:] / spacing[1:, None, None]
    figure = ShownFigure(figsize=(5.4, 4.6), layout="constrained")
    axes: Axes = figure.subplots()
    length = np.linalg.norm(shift, axis=0)
    drawn = axes.imshow(length, cmap="cividis", aspect=_aspect(pair), interpolation="nearest")
    step = max(2, min(rows.shape) // _LINES)
    axes.plot(columns[::step].T, rows[::step].T, color="white", linewidth=0.7)
    axes.plot(columns[:, ::step], rows[:, ::step], color="white", linewidth=0.7)
    axes.set(xlim=(-0.5, rows.shape[1] - 0.5), ylim=(rows.shape[0] - 0.5, -0.5))
    axes.set_axis_off()
    unit = "mm" if pair.fixed.geometry.has_spacing else "px"
    figure.colorbar(drawn, ax=axes, shrink=0.8, label=f"displacement ({unit}), slice {z}")
    return _titled(figure, pair)


def _slice(pair: OpenPair, wanted: int | None) -> int:
    depth = pair.fixed.geometry.shape[0]
    if wanted is None:
        return depth // 2
    if not 0 <= wanted < depth:
        raise UsageError(f"slice {wanted} is outside 0..{depth - 1} of {pair.fixed.name!r}")
    return wanted


def _taken_from(pair: OpenPair, field: npt.NDArray[np.float32], z: int) -> npt.NDArray[np.float64]:
    """Moving voxels from which each voxel of a fixed slice is taken, [3, 1, H, W]."""
    fixed, moving = pair.fixed.geometry, pair.moving.geometry
    indices = warp.moving_indices(field, fixed.spacing_mm, moving_to_fixed(fixed, moving), moving.spacing_mm)
    return np.asarray(indices[:, z : z + 1])


def _middles(subject: OpenSubject, rois: list[int]) -> list[tuple[float, float]]:
    """Centroid (x, y) of the masks of ROIs, pixels."""
    found = []
    for mask in subject.masks(rois):
        y, x = np.nonzero(mask)
        found.append((float(x.mean()), float(y.mean())))
    return found


def _cycled(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _aspect(pair: OpenPair) -> float:
    spacing = pair.fixed.geometry.spacing_mm
    return spacing[1] / spacing[2]


def _titled(figure: Figure, pair: OpenPair) -> Figure:
    figure.suptitle(f"{pair.moving.name} onto {pair.fixed.name}", fontsize=11, parse_math=False)
    return figure
