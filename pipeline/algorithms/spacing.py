"""The length by which the settings of fits, refinements, inverses and atlases are measured."""

from __future__ import annotations


def shortest_edge_mm(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> float:
    """Shortest voxel edge of a grid (D, H, W) with spacing (z, y, x) in mm; of one slice, in plane."""
    return min(spacing_mm[1:]) if shape[0] == 1 else min(spacing_mm)
