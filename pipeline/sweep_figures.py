"""The figures of a sweep, as PNG bytes: accuracy and number of ROIs over one setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report_figures import STAGE_COLOURS, encode_png, show_no_values, strip_frame
from pipeline.sweep_tables import best_distance

Row = dict[str, Any]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_SHIFT = 0.3  # lines beside each other over a value that is no number, at most this far from it
_LOGARITHMIC = 20  # ratio of the largest to the smallest value from which an axis is logarithmic


def axis_figure(table: pa.Table, axis: str, others: Sequence[str] = (), label: int = 0) -> bytes:
    """Mean and standard deviation over pairs against the values of an axis, a line per combination of the others.

    Args:
        table: see `pipeline.sweep_tables.sweep_table`.
        axis, others: columns with the settings.
        label: 0 is the mean over labels.
    """
    rows = table.filter(pc.equal(table.column("label"), label)).to_pylist()
    values = _in_order(row[axis] for row in rows)
    lines = {key: [row for row in rows if _key(row, others) == key] for key in _in_order(_key(r, others) for r in rows)}
    distance = best_distance(table)
    unit = "mm" if distance.endswith("mm") else "voxel"
    titles = {"dice": "Dice, mean and SD", distance: f"TRE ({unit}), mean and SD", "n_rois": "matched ROIs of a pair"}
    shown = {name: title for name, title in titles.items() if any(row[name] is not None for row in rows)}
    columns, extra = max(1, len(shown)), len(lines) // 4 if len(lines) > 1 else 0
    figure = Figure(figsize=(3.8 * columns, 3.4 + 0.2 * extra), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes, (name, title) in zip(panels, shown.items(), strict=bool(shown)):
        _draw(axes, name, axis, values, lines)
        axes.set(title=title, xlabel=axis)
        strip_frame(axes)
    if not shown:
        show_no_values(panels[0])
    legend = [axes.get_legend_handles_labels() for axes in panels]
    handles = {text: handle for found in legend for handle, text in zip(*found, strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return encode_png(figure)


def _draw(axes: Axes, name: str, axis: str, values: Sequence[Any], lines: dict[tuple[Any, ...], list[Row]]) -> None:
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    place = {value: value if numeric else number for number, value in enumerate(values)}
    offsets = np.zeros(len(lines)) if numeric else np.linspace(-_SHIFT, _SHIFT, len(lines) + 2)[1:-1]
    for number, (key, rows) in enumerate(lines.items()):
        known = sorted((row for row in rows if row[name] is not None), key=lambda row: place[row[axis]])
        if not known:
            continue
        x = np.array([place[row[axis]] for row in known], dtype=np.float64) + offsets[number]
        mean = np.array([row[name] for row in known], dtype=np.float64)
        colour = _COLOURS[number] if len(lines) <= len(_COLOURS) else colormaps["cividis"](number / len(lines))
        text = ", ".join(map(str, key)) or "after registration"
        axes.plot(x, mean, "o-" if numeric else "o", color=colour, markersize=4, linewidth=1.6, label=text)
        if f"{name}_sd" in known[0]:
            sd = np.array([row[f"{name}_sd"] for row in known], dtype=np.float64)
            if numeric and len(known) > 1:
                axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.12, linewidth=0)
            else:
                axes.errorbar(x, mean, sd, fmt="none", ecolor=colour, alpha=0.5, capsize=3)
    if numeric and min(values) > 0 and max(values) >= _LOGARITHMIC * min(values):
        axes.set_xscale("log")
    if not numeric:
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        axes.set_xlim(-0.6, len(values) - 0.4)
    _draw_before(axes, name, [row for rows in lines.values() for row in rows])


def _draw_before(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    """The level before registration, which no setting changes."""
    before = [row[f"{name}_before"] for row in rows if row.get(f"{name}_before") is not None]
    if before:
        axes.axhline(float(np.mean(before)), color=STAGE_COLOURS["before"], linestyle="dashed", label="before")


def _key(row: Row, others: Sequence[str]) -> tuple[Any, ...]:
    return tuple(f"{name.rsplit('.', 1)[-1]}={row[name]}" for name in others)


def _in_order(values: Any) -> list[Any]:
    """Different values in the order of their first appearance."""
    return list(dict.fromkeys(values))
