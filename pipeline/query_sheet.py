# mypy: disable-error-code="no-untyped-call"
"""The contact sheets of a query: the region that was asked for, and what was found, the surest first; and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.dispatch import Failure, attempt
from pipeline.query import QueryResult
from pipeline.report_figures import encode_png
from pipeline.slice_drawing import COLOURS, draw_grey, draw_outline, grey_of, read_encoded
from storage import warping
from storage.atomic import replace_file
from storage.cohort import Subject, subject_key

_COLUMNS, _ROWS = 6, 4
_TITLE = 28  # letters of a subject's name


@dataclass(frozen=True)
class Panel:
    """One slice with a region.

    Attributes:
        title: above it.
        grey: float32 [H, W], 0..1, or None where the image cannot be read.
        mask: bool [H, W], or None where nothing was found.
        aspect: height over width of a pixel.
    """

    title: str
    grey: npt.NDArray[np.float32] | None
    mask: npt.NDArray[np.bool_] | None
    aspect: float = 1.0


@dataclass(frozen=True)
class _Unit:
    unit: str
    subject: Subject
    z: int


def write_sheets(result: QueryResult, top: int) -> tuple[list[Path], list[Failure]]:
    """Draw the `top` surest subjects, 23 to a page; a subject whose image cannot be read has an empty panel."""
    asked, failures = result.region, []
    largest = int(np.argmax(asked.area_mm2))

    def panel(title: str, subject: Subject, z: int, mask: npt.NDArray[np.bool_]) -> Panel:
        store = result.study.folder.store
        found = attempt(
            lambda unit: grey_of(read_encoded(store, unit.subject))[unit.z], _Unit(subject.subject, subject, z)
        )
        spacing = store.geometry(subject.subject).spacing_mm
        if isinstance(found, Failure):
            failures.append(found)
            return Panel(title, None, mask, spacing[1] / spacing[2])
        return Panel(title, found, mask, spacing[1] / spacing[2])

    name = result.subject.subject
    first = panel(f"asked: {_short(name)}", result.subject, int(asked.slices[largest]), asked.masks[largest])
    found = []
    for rank, position in enumerate(result.ranked[:top].tolist(), 1):
        name = result.study.index.subjects[position]
        here = result.found.of_subject(position)
        if not len(here):
            break
        best = here[np.argmax(result.found.confidence[here])]
        row = int(result.found.row[best])
        columns = result.study.index.columns
        mask = result.study.folder.store.read(name).masks([int(columns["roi"][row])])[0]
        title = f"{rank}  {_short(name)}  {result.found.total[position]:.2f}"
        found.append(panel(title, result.study.subject(name), int(columns["slice"][row]), mask))
    size = _COLUMNS * _ROWS - 1
    pages = [[first, *found[start : start + size]] for start in range(0, max(1, len(found)), size)]
    folder = result.study.folder.root / "queries" / result.name
    paths = []
    for number, page in enumerate(pages, 1):
        paths.append(folder / f"sheet-{number}.png")
        with replace_file(paths[-1]) as temporary:
            temporary.write_bytes(draw_sheet(page))
    return paths, failures


def draw_sheet(panels: Sequence[Panel]) -> bytes:
    """A page of panels as PNG; the first is the region that was asked for."""
    rows = -(-len(panels) // _COLUMNS)
    columns = min(len(panels), _COLUMNS)
    figure = Figure(figsize=(2.1 * columns + 0.2, 2.3 * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, axes in enumerate(grid):
        axes.set_axis_off()
        if number < len(panels):
            _draw(axes, panels[number], COLOURS[0 if number == 0 else 1])
    return encode_png(figure)


def write_masks(result: QueryResult) -> tuple[int, list[Failure]]:
    """Write what was found in each subject as a label map on the grid of its image: how many, and what failed."""
    folder, store = result.study.folder.root / "queries" / result.name / "masks", result.study.folder.store
    columns, failures, count = result.study.index.columns, [], 0

    def write(unit: _Unit) -> Path:
        stored = store.read(unit.unit)
        rows = result.found.row[result.found.of_subject(unit.z)]
        volume = np.zeros(stored.geometry.shape, np.uint8)
        for z, mask in zip(columns["slice"][rows].tolist(), stored.masks(columns["roi"][rows]), strict=True):
            volume[z] |= mask
        suffix = ".nii.gz" if stored.geometry.has_spacing else ".png"
        path = folder / f"{subject_key(unit.unit)}{suffix}"
        warping.write_image(warping.from_analysis(volume, stored.geometry), path)
        return path

    for position in result.ranked.tolist():
        if result.found.total[position] > 0:
            name = result.study.index.subjects[position]
            done = attempt(write, _Unit(name, result.study.subject(name), position))
            if isinstance(done, Failure):
                failures.append(done)
            else:
                count += 1
    return count, failures


def _draw(axes: Axes, panel: Panel, colour: str) -> None:
    axes.set_title(panel.title, fontsize=8, parse_math=False)
    shape = panel.mask.shape if panel.mask is not None else (1, 1)
    draw_grey(axes, np.zeros(shape, np.float32) if panel.grey is None else panel.grey, panel.aspect)
    if panel.mask is not None:
        draw_outline(axes, panel.mask, colour)
    if panel.grey is None:
        axes.text(0.5, 0.02, "image cannot be read", color="white", fontsize=7, ha="center", transform=axes.transAxes)


def _short(name: str) -> str:
    return name if len(name) <= _TITLE else f"{name[: _TITLE - 1]}…"
