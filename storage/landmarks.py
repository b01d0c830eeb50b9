"""Landmarks from and to CSV, in the local frame of their image."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.atomic import replace_file
from storage.geometry import Geometry
from storage.sources import ImageError, local_copy

__all__ = ["ImageError", "read_landmarks", "rewrite_landmarks"]

Points = npt.NDArray[np.float64]


def read_landmarks(path: str | Path, geometry: Geometry) -> Points:
    """Read landmarks, float64 [N, 3] local mm (z, y, x); px for an image without spacing.

    Args:
        path: CSV file or URI. Columns i, j, k are voxels of the file's own grid (ITK order, from 0, whole
            numbers at voxel centres); x, y, z are world mm LPS. A 2D image needs i, j or x, y only, and
            without spacing x, y are pixels too. Further columns are ignored; rows of two files correspond.
        geometry: grid of the image.

    Raises:
        ImageError: for a file that is missing, no such CSV, or holds no points or a cell that is no number.
    """
    columns, rows = _read_csv(path)
    wanted = _choose_columns(columns, geometry, path)
    points = np.zeros((len(rows), 3))
    for row, (line, cells) in enumerate(rows):
        if not any(cells[columns.index(name)] for name in wanted if columns.index(name) < len(cells)):
            raise ImageError(f"{path}, line {line}: empty, no position there; remove the row in both files")
        for axis, name in enumerate(wanted):
            try:
                points[row, axis] = float(cells[columns.index(name)])
            except (ValueError, IndexError):
                raise ImageError(f"{path}, line {line}: column {name} is not a number") from None
        if not np.isfinite(points[row]).all():
            raise ImageError(f"{path}, line {line}: a coordinate is NaN or infinite")
    if wanted[0] == "i" or not geometry.has_spacing:
        return voxels_to_local(points, geometry)
    return world_to_local(points, geometry)


def voxels_to_local(indices: Points, geometry: Geometry) -> Points:
    """[N, 3] voxels (i, j, k) of the file's own grid to local mm (z, y, x)."""
    perm, flips = geometry.source_axes
    turned = indices[:, ::-1][:, list(perm)]
    last = np.asarray(geometry.shape) - 1
    local: Points = np.where(flips, last - turned, turned) * np.asarray(geometry.spacing_mm)
    return local


def local_to_voxels(points: Points, geometry: Geometry) -> Points:
    """Inverse of voxels_to_local."""
    perm, flips = geometry.source_axes
    index = points / np.asarray(geometry.spacing_mm)
    turned = np.where(flips, np.asarray(geometry.shape) - 1 - index, index)
    voxels: Points = turned[:, np.argsort(perm)][:, ::-1]
    return voxels


def rewrite_landmarks(path: str | Path, target: Path, points: Points, geometry: Geometry) -> None:
    """Write the CSV `path` anew with other positions, in the same kind of coordinates, everything else as it was.

    Args:
        target: file to write, whole or not at all.
        points: [N, 3] local mm (z, y, x) in the image that `geometry` is of; NaN leaves its cells empty.
        geometry: grid of the image that the points now lie in.

    Raises:
        ImageError: as read_landmarks.
        OSError: naming the file, for example when the disk is full.
    """
    columns, rows = _read_csv(path)
    wanted = _choose_columns(columns, geometry, path)
    voxels = wanted[0] == "i" or not geometry.has_spacing
    found = local_to_voxels(points, geometry) if voxels else local_to_world(points, geometry)
    for (_, cells), position in zip(rows, found, strict=True):
        for axis, name in enumerate(wanted):
            cells[columns.index(name)] = "" if np.isnan(position[axis]) else f"{position[axis] + 0.0:.4f}"
    with replace_file(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([columns, *(cells for _, cells in rows)])


def world_to_local(points: Points, geometry: Geometry) -> Points:
    """[N, 3] world mm LPS (x, y, z) to local mm (z, y, x)."""
    local: Points = (points - np.asarray(geometry.origin_mm)) @ geometry.local_to_world()[:3, :3]
    return local


def local_to_world(points: Points, geometry: Geometry) -> Points:
    """[N, 3] local mm (z, y, x) to world mm LPS (x, y, z)."""
    world: Points = points @ geometry.local_to_world()[:3, :3].T + np.asarray(geometry.origin_mm)
    return world


def _read_csv(path: str | Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    with local_copy(path) as local:
        if not local.is_file():
            raise ImageError(f"{path}: a folder; expected a CSV file of landmarks")
        try:
            with local.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.reader(stream)
                table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
        except (UnicodeDecodeError, csv.Error):
            raise ImageError(f"{path}: not a UTF-8 CSV file of landmarks") from None
    rows = [(line, cells) for line, cells in table[1:] if any(cells) or len(cells) > 1]
    if not rows:
        raise ImageError(f"{path}: no landmarks; expected a header line and one line per point")
    return [name.lower() for name in table[0][1]], rows


def _choose_columns(columns: list[str], geometry: Geometry, path: str | Path) -> tuple[str, ...]:
    for names in ("ijk", "xyz") if geometry.source_dimension == 3 else ("ij", "xy"):
        if set(names) <= set(columns):
            return tuple(names)
    allowed = "i, j, k or x, y, z" if geometry.source_dimension == 3 else "i, j or x, y"
    raise ImageError(f"{path}: columns must include {allowed}; found {', '.join(columns)}")
