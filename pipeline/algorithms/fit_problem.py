"""What a displacement fit is given: pairs of masks and the grids they lie on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.spacing import shortest_edge_mm

Triple: TypeAlias = tuple[int, int, int]
Spacing: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class Roi:
    """A binary mask as a crop of its image grid.

    Attributes:
        mask: bool [d, h, w]; d = 1 is a slab of one slice, whose shape along z is unknown.
        offset: index (z, y, x) of the crop's first voxel in the image.
    """

    mask: npt.NDArray[np.bool_]
    offset: tuple[int, int, int]


@dataclass(frozen=True)
class RoiPair:
    """One matched pair and its confidence, above 0 to 1, which weights it in the fit."""

    fixed: Roi
    moving: Roi
    confidence: float = 1.0


@dataclass(frozen=True)
class Problem:
    """What one fit is given.

    Attributes:
        pairs: matched ROIs with their confidence; masks are crops of the fixed and of the moving grid.
        shape: fixed grid (D, H, W).
        spacing_mm: fixed spacing (z, y, x).
        moving_spacing_mm: moving spacing (z, y, x).
        moving_to_fixed: 4x4, moving-local mm to fixed-local mm.
    """

    pairs: Sequence[RoiPair]
    shape: Triple
    spacing_mm: Spacing
    moving_spacing_mm: Spacing
    moving_to_fixed: npt.NDArray[np.float64]

    @property
    def h0(self) -> float:
        """Smallest fixed spacing, the unit of the fit's lengths; of one slice, the smallest in plane."""
        return shortest_edge_mm(self.shape, self.spacing_mm)

    @property
    def in_plane(self) -> bool:
        """Whether the ROIs lie in one slice of each image, parallel to one another: nothing moves along z."""
        if self.shape[0] > 1 or self.moving_to_fixed[0, 1:3].any() or self.moving_to_fixed[1:3, 0].any():
            return False
        slices = {(pair.moving.offset[0], pair.moving.mask.shape[0]) for pair in self.pairs}
        return len(slices) == 1 and slices.pop()[1] == 1
