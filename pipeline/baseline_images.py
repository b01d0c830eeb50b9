# mypy: disable-error-code="no-untyped-call"
"""A pair of images as a registration tool takes it, and the displacement field that it gives back.

Tools see both images in one frame: the local millimetres of the fixed grid, whose first voxel is the origin and whose
axes are the coordinate axes, as ITK's (x, y, z). The moving image lies there as it lies in world space. So a tool's map
of fixed points to moving points is the pull-back of `pipeline.algorithms.warp` but for the order of the axes. A pair of
single slices is given to the tools as two 2D images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from storage.geometry import Geometry, Triple, moving_to_fixed

Volume = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]


class NotRegisteredError(RuntimeError):
    """A tool gave no field, or one that cannot be used."""


@dataclass(frozen=True)
class PairImages:
    """Two images.

    Attributes:
        fixed: [D, H, W] intensities, 0..255.
        moving: [Dm, Hm, Wm] intensities, 0..255.
        here: grid of the fixed image.
        there: grid of the moving image.
    """

    fixed: Volume
    moving: Volume
    here: Geometry
    there: Geometry

    @property
    def dimension(self) -> int:
        """2 for a pair of single slices, else 3.

        Raises:
            NotRegisteredError: for a slice and a volume.
        """
        flat = [geometry.shape[0] == 1 for geometry in (self.here, self.there)]
        if any(flat) and not all(flat):
            raise NotRegisteredError(
                f"a slice and a volume: fixed {self.here.describe()}, moving {self.there.describe()}"
            )
        return 2 if all(flat) else 3

    @cached_property
    def moving_to_fixed(self) -> Affine:
        """4x4, moving-local mm to fixed-local mm, (z, y, x)."""
        return moving_to_fixed(self.here, self.there)

    @cached_property
    def itk(self) -> tuple[sitk.Image, sitk.Image]:
        """Fixed and moving image, float32, in the frame of the fixed grid."""
        n = self.dimension
        found = []
        for array, geometry, matrix in (
            (self.fixed, self.here, np.eye(4)),
            (self.moving, self.there, self.moving_to_fixed),
        ):
            image = sitk.GetImageFromArray(array[0] if n == 2 else array)
            image.SetSpacing(geometry.spacing_mm[::-1][:n])
            image.SetOrigin(matrix[:3, 3][::-1][:n].tolist())
            image.SetDirection(matrix[:3, :3][::-1, ::-1][:n, :n].ravel().tolist())
            found.append(image)
        return found[0], found[1]


@dataclass(frozen=True)
class Registered:
    """What a method found.

    Attributes:
        ddf: [3, D, H, W] mm, pull-back on the fixed grid.
        affine: 4x4 in fixed-local mm (z, y, x) before what is not affine; None where the tool does not say.
    """

    ddf: Volume
    affine: Affine | None = None


def ddf_of_transform(transform: sitk.Transform, fixed: sitk.Image) -> Volume:
    """The field of a map of fixed points to moving points, in the frame of `fixed`."""
    sampler = sitk.TransformToDisplacementFieldFilter()
    sampler.SetReferenceImage(fixed)
    return ddf_of_vectors(sitk.GetArrayFromImage(sampler.Execute(transform)))


def ddf_of_vectors(vectors: npt.NDArray[Any]) -> Volume:
    """The field of displacements [D, H, W, 3], or [H, W, 2], as (x, y, z)."""
    components = np.moveaxis(vectors, -1, 0)[::-1]
    if vectors.shape[-1] == 3:
        return np.ascontiguousarray(components, dtype=np.float32)
    flat = np.zeros((3, 1, *vectors.shape[:2]), np.float32)
    flat[1:, 0] = components
    return flat


def affine_matrix(transform: sitk.Transform) -> Affine:
    """4x4 on (z, y, x) of an affine map of points (x, y) or (x, y, z)."""
    n = transform.GetDimension()
    origin = np.asarray(transform.TransformPoint([0.0] * n))
    steps = [np.asarray(transform.TransformPoint(axis.tolist())) - origin for axis in np.eye(n)]
    matrix = np.eye(4)
    matrix[3 - n : 3, 3 - n : 3] = np.stack(steps, axis=1)[::-1, ::-1]
    matrix[3 - n : 3, 3] = origin[::-1]
    return matrix


def check_field(found: Registered, images: PairImages) -> Registered:
    """The same, which lies on the fixed grid and is finite.

    Raises:
        NotRegisteredError: where it does not, or is not.
    """
    if found.ddf.shape != (3, *images.here.shape):
        raise NotRegisteredError(f"the field has the shape {found.ddf.shape}; expected {(3, *images.here.shape)}")
    if not np.isfinite(found.ddf).all():
        raise NotRegisteredError("the field is not finite")
    return found


def shrink_factors(spacing: Sequence[float], factor: int, size: Sequence[int]) -> list[int]:
    """Voxels to join along each axis so that none is longer than the finest, joined `factor` times; 4 stay at least."""
    goal = factor * min(spacing)
    return [max(1, min(round(goal / step), n // 4)) for step, n in zip(spacing, size, strict=True)]


def local_spacing(images: PairImages) -> tuple[Triple, Triple]:
    """Spacing of the fixed and of the moving grid, mm (z, y, x)."""
    return images.here.spacing_mm, images.there.spacing_mm
