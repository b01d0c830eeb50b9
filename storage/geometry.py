"""Where the voxels of an image lie: the frames and units of the whole program.

- Arrays are (z, y, x); axis 0 is the slice (through-plane) axis. A volume is held in *analysis orientation*:
  reoriented to the nearest canonical LPS axes, then permuted so that the slice axis comes first.
  `Geometry.source_axes` remembers how, so that results go back to the grid of the user's own file.
- index: voxel (z, y, x). Local mm: q = index * spacing_mm, (z, y, x), origin at the centre of voxel 0.
  World: ITK's LPS mm, (x, y, z).
- 2D images have D = 1. A picture without physical spacing (PNG, JPEG, TIFF) has spacing 1 and
  `has_spacing=False`: every "mm" of it is a pixel.
- 4x4 affines are homogeneous float64 on local (z, y, x) positions.

The displacement field convention is stated in pipeline/algorithms/warp.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import permutations
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
import numpy.typing as npt

SliceAxis = Literal["auto", "axial", "coronal", "sagittal"]
Triple = tuple[float, float, float]
Affine = npt.NDArray[np.float64]
_Scalar = TypeVar("_Scalar", bound=np.generic)

_WORLD_AXIS = {"sagittal": 0, "coronal": 1, "axial": 2}
_ARRAY_ORDER = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}  # slice axis -> world axes of array axes 0, 1, 2
_ISOTROPIC = 1.01


class FileGrid(NamedTuple):
    """A grid as ITK describes it: everything in (x, y, z) order, direction row-major, always three axes."""

    size: tuple[int, int, int]
    spacing: Triple
    origin: Triple
    direction: tuple[float, ...]


@dataclass(frozen=True)
class Geometry:
    """Grid of one image in analysis orientation.

    Attributes:
        shape: voxels (D, H, W).
        spacing_mm: (z, y, x) mm, > 0.
        origin_mm: world position (x, y, z) LPS mm of the centre of voxel 0.
        direction: 9 numbers, row-major 3x3, orthonormal; its columns are the world directions of array axes
            x, y, z (ITK's order).
        has_spacing: False when the unit is the pixel.
        source_axes: (perm, flips). Array axis i runs along axis perm[i] of the file's own (z, y, x) array,
            backwards where flips[i].
        source_dimension: 2 or 3, axes of the file itself.
        nominal_spacing: (z, y, x) spacing that ITK reads from a picture's printing resolution. Only transform
            files use it, because ITK tools will.
    """

    shape: tuple[int, int, int]
    spacing_mm: Triple
    origin_mm: Triple = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    has_spacing: bool = True
    source_axes: tuple[tuple[int, int, int], tuple[bool, bool, bool]] = ((0, 1, 2), (False, False, False))
    source_dimension: int = 3
    nominal_spacing: Triple = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape must be three sizes of at least 1, got {self.shape}")
        if len(self.spacing_mm) != 3 or not all(0 < s < np.inf for s in self.spacing_mm):
            raise ValueError(f"spacing must be three positive numbers, got {self.spacing_mm}")
        if not np.isfinite(self.origin_mm).all():
            raise ValueError(f"origin must be finite, got {self.origin_mm}")
        matrix = np.asarray(self.direction, dtype=np.float64).reshape(3, 3)
        if not np.allclose(matrix.T @ matrix, np.eye(3), atol=1e-3):
            raise ValueError(f"direction must be orthonormal, got {self.direction}")

    @classmethod
    def from_file_grid(
        cls,
        grid: FileGrid,
        slice_axis: SliceAxis | int = "auto",
        *,
        has_spacing: bool = True,
        source_dimension: int = 3,
    ) -> Geometry:
        """Analysis orientation of a file's grid.

        Args:
            slice_axis: "auto" takes an axis of a single voxel, else the axis of the largest spacing, else
                (all within 1 %) axial. A number is a world axis, 0 sagittal, 1 coronal, 2 axial.

        Raises:
            ValueError: for an unknown slice axis or a grid that is not orthonormal.
        """
        if source_dimension == 2:
            return cls(
                shape=(1, grid.size[1], grid.size[0]),
                spacing_mm=_reverse(grid.spacing) if has_spacing else (1.0, 1.0, 1.0),
                origin_mm=grid.origin if has_spacing else (0.0, 0.0, 0.0),
                direction=grid.direction if has_spacing else (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
                has_spacing=has_spacing,
                source_dimension=2,
                nominal_spacing=_reverse(grid.spacing),
            )
        matrix = np.asarray(grid.direction, dtype=np.float64).reshape(3, 3)
        columns = max(permutations(range(3)), key=lambda p: sum(abs(matrix[w, p[w]]) for w in range(3)))
        world = slice_axis if isinstance(slice_axis, int) else _slice_world_axis(grid, columns, slice_axis)
        axes = [columns[w] for w in _ARRAY_ORDER[world]]  # file axis (x, y, z numbering) of each array axis
        flips = [bool(matrix[w, columns[w]] < 0) for w in _ARRAY_ORDER[world]]
        origin = np.asarray(grid.origin, dtype=np.float64)
        steps = []
        for axis, flip in zip(axes, flips, strict=True):
            step = matrix[:, axis]
            if flip:
                origin = origin + step * grid.spacing[axis] * (grid.size[axis] - 1)
                step = -step
            steps.append(step)
        turned = np.stack(steps[::-1], axis=1)
        return cls(
            shape=(grid.size[axes[0]], grid.size[axes[1]], grid.size[axes[2]]),
            spacing_mm=(grid.spacing[axes[0]], grid.spacing[axes[1]], grid.spacing[axes[2]]),
            origin_mm=_triple(origin),
            direction=tuple(float(v) + 0.0 for v in turned.ravel()),
            has_spacing=has_spacing,
            source_axes=((2 - axes[0], 2 - axes[1], 2 - axes[2]), (flips[0], flips[1], flips[2])),
            nominal_spacing=(grid.spacing[axes[0]], grid.spacing[axes[1]], grid.spacing[axes[2]]),
        )

    def file_grid(self) -> FileGrid:
        """The grid of the user's own file, as ITK reads it (a 2D file: third axis of size 1, spacing 1)."""
        if self.source_dimension == 2:
            spacing = self.spacing_mm if self.has_spacing else self.nominal_spacing
            return FileGrid((self.shape[2], self.shape[1], 1), _reverse(spacing), self.origin_mm, self.direction)
        perm, flips = self.source_axes
        origin = np.asarray(self.origin_mm, dtype=np.float64)
        size, spacing_xyz, matrix = [0, 0, 0], [0.0, 0.0, 0.0], np.zeros((3, 3))
        for i in range(3):
            step = self.axis_direction(i)
            if flips[i]:
                origin = origin + step * self.spacing_mm[i] * (self.shape[i] - 1)
                step = -step
            column = 2 - perm[i]
            size[column], spacing_xyz[column], matrix[:, column] = self.shape[i], self.spacing_mm[i], step
        return FileGrid(
            (size[0], size[1], size[2]),
            _triple(spacing_xyz),
            _triple(origin),
            tuple(float(v) + 0.0 for v in matrix.ravel()),
        )

    def axis_direction(self, axis: int) -> Affine:
        """World unit vector (x, y, z) float64 [3] along array axis 0, 1 or 2."""
        return np.asarray(self.direction, dtype=np.float64).reshape(3, 3)[:, 2 - axis]

    def world_axis(self) -> int:
        """World axis nearest to the slice axis: 0 sagittal, 1 coronal, 2 axial."""
        return int(np.argmax(np.abs(self.axis_direction(0))))

    def local_to_world(self) -> Affine:
        """float64 [4, 4] from local mm (z, y, x) to world LPS mm (x, y, z)."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([self.axis_direction(i) for i in range(3)], axis=1)
        matrix[:3, 3] = self.origin_mm
        return matrix

    @cached_property
    def _world_maps(self) -> tuple[Affine, Affine]:
        """Local to world and back, which matching needs for every pair of a subject."""
        there = self.local_to_world()
        return there, np.asarray(np.linalg.inv(there), np.float64)

    def center_mm(self) -> Affine:
        """Local mm (z, y, x) float64 [3] of the middle of the volume."""
        center: Affine = (np.asarray(self.shape) - 1) / 2 * np.asarray(self.spacing_mm)
        return center

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Geometry:
        """Inverse of to_dict, also after a trip through JSON."""
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        perm, flips = record["source_axes"]
        fields["source_axes"] = (tuple(perm), tuple(flips))
        return cls(**cast(dict[str, Any], fields))

    def describe(self) -> str:
        """One line for messages: size and spacing, no position."""
        size = " x ".join(str(n) for n in self.shape)
        if not self.has_spacing:
            return f"{size} px"
        return f"{size} voxels of " + " x ".join(f"{s:.4g}" for s in self.spacing_mm) + " mm (z, y, x)"


def moving_to_fixed(fixed: Geometry, moving: Geometry) -> Affine:
    """float64 [4, 4] from moving-local mm to fixed-local mm, both (z, y, x).

    Raises:
        ValueError: when only one of the two has a physical spacing.
    """
    if fixed.has_spacing != moving.has_spacing:
        raise ValueError(
            "one image has a physical spacing and the other has none, so they share no unit: "
            f"fixed {fixed.describe()}, moving {moving.describe()}"
        )
    matrix: Affine = fixed._world_maps[1] @ moving._world_maps[0]
    return matrix


def center_alignment(fixed: Geometry, moving: Geometry) -> Affine:
    """Pull-back translation float64 [4, 4], fixed-local mm, that takes the fixed centre to the moving centre.

    Moving is sampled at `A @ q` for the fixed position q, so its displacement field is the constant A[:3, 3].
    """
    affine = np.eye(4)
    center = moving_to_fixed(fixed, moving) @ np.append(moving.center_mm(), 1.0)
    affine[:3, 3] = center[:3] - fixed.center_mm()
    return affine


def from_file_axes(array: npt.NDArray[_Scalar], geometry: Geometry) -> npt.NDArray[_Scalar]:
    """Turn an array [z, y, x, ...] of the file's own grid into analysis orientation."""
    perm, flips = geometry.source_axes
    turned = array.transpose(*perm, *range(3, array.ndim))
    return np.flip(turned, tuple(i for i in range(3) if flips[i]))


def to_file_axes(array: npt.NDArray[_Scalar], geometry: Geometry) -> npt.NDArray[_Scalar]:
    """Inverse of from_file_axes."""
    perm, flips = geometry.source_axes
    turned = np.flip(array, tuple(i for i in range(3) if flips[i]))
    back = [perm.index(axis) for axis in range(3)]
    return turned.transpose(*back, *range(3, array.ndim))


def _slice_world_axis(grid: FileGrid, columns: tuple[int, ...], slice_axis: str) -> int:
    if slice_axis != "auto":
        if slice_axis not in _WORLD_AXIS:
            raise ValueError(f"slice axis {slice_axis!r} is not one of {', '.join(get_args(SliceAxis))}")
        return _WORLD_AXIS[slice_axis]
    single = [w for w in range(3) if grid.size[columns[w]] == 1]
    if len(single) == 1:
        return single[0]
    spacing = [grid.spacing[columns[w]] for w in range(3)]
    largest = max(spacing)
    near = [w for w in range(3) if spacing[w] * _ISOTROPIC >= largest]
    return max(near)


def _reverse(values: Triple) -> Triple:
    return (values[2], values[1], values[0])


def _triple(values: Sequence[float] | Affine) -> Triple:
    return (float(values[0]) + 0.0, float(values[1]) + 0.0, float(values[2]) + 0.0)
