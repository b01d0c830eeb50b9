# mypy: disable-error-code="no-untyped-call"
"""The user's own files carried through a transform file by SimpleITK, onto the grid of the fixed file."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from storage.atomic import replace_file
from storage.geometry import FileGrid, Geometry, to_file_axes
from storage.images import read_voxels, whole_numbers
from storage.integrity import check_file, not_finite
from storage.sources import ImageError
from storage.transforms import TransformError

_PROBE = 1 << 20  # bytes
LabelRule = Literal["nearest", "linear"]


def read_itk_transform(path: str | Path) -> sitk.Transform:
    """Any transform file that ITK reads.

    Raises:
        FileNotFoundError: when it does not exist.
        TransformError: when ITK cannot read it.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such transform")
    try:
        transform: sitk.Transform = sitk.ReadTransform(str(path))
    except RuntimeError:
        raise TransformError(f"{path}: not a transform that ITK reads, or a truncated or damaged one") from None
    return transform


def read_moving(path: str | Path, moving: Geometry | None = None, labels: bool = False) -> sitk.Image:
    """A file that lies in the space of the moving image, on any grid there; with its voxels and grid, nothing else.

    Args:
        moving: grid of the moving image. A picture must have its size, and counts as lying on it whatever its own
            printing resolution.
        labels: only take whole numbers.

    Raises:
        ImageError: as read_voxels; for NaN or infinite voxels, a picture beside an image with spacing or the reverse.
    """
    array, grid, dimension, physical = read_voxels(path)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise not_finite(path, int((~np.isfinite(array)).sum()), array.size)
    if moving is not None:
        if (dimension, physical) != (moving.source_dimension, moving.has_spacing):
            kind = "a picture without spacing" if not physical else f"{dimension}D with a spacing in mm"
            raise ImageError(f"{path}: {kind}; the moving image of this transform is {moving.describe()}")
        if not physical:
            if grid.size != moving.file_grid().size:
                raise ImageError(f"{path}: {grid.size[:2]} pixels; the moving image has {moving.file_grid().size[:2]}")
            grid = moving.file_grid()
    if labels:
        array = compact(whole_numbers(array, path))
    return make_image(array, grid, dimension)


def make_image(array: npt.NDArray[Any], grid: FileGrid, dimension: int) -> sitk.Image:
    """An image of voxels [z, y, x] or [z, y, x, channel] on a file's grid."""
    voxels = array if dimension == 3 else array[0]
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels), isVector=array.ndim == 4)
    image.SetSpacing(grid.spacing[:dimension])
    image.SetOrigin(grid.origin[:dimension])
    matrix = np.asarray(grid.direction).reshape(3, 3)[:dimension, :dimension]
    image.SetDirection([float(v) for v in matrix.ravel()])
    return image


def from_analysis(array: npt.NDArray[Any], geometry: Geometry) -> sitk.Image:
    """An image of voxels [D, H, W] in analysis orientation, on the grid of its file."""
    return make_image(to_file_axes(array, geometry), geometry.file_grid(), geometry.source_dimension)


def compact(labels: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """Labels in 8 or 16 bits where they fit."""
    return labels.astype(np.min_scalar_type(labels.max())) if labels.min() >= 0 else labels


def warp_intensities(image: sitk.Image, transform: sitk.Transform, fixed: Geometry, fill: float = 0.0) -> sitk.Image:
    """Linear interpolation in the image's own type; `fill` where the moving image does not reach."""
    return _resample(image, transform, fixed, sitk.sitkLinear, fill)


def warp_labels(image: sitk.Image, transform: sitk.Transform, fixed: Geometry, rule: LabelRule) -> sitk.Image:
    """Labels on the fixed grid, 0 where there are none.

    Args:
        rule: "nearest" takes the label of the nearest voxel; "linear" each label where its interpolated mask is
            0.5 or more, of two such labels the higher.
    """
    nearest = _resample(image, transform, fixed, sitk.sitkNearestNeighbor, 0.0)
    if rule == "nearest":
        return nearest
    carried: sitk.Image = nearest * 0
    for value in np.unique(sitk.GetArrayViewFromImage(image)):
        if value:
            mask = _resample(sitk.Cast(image == int(value), sitk.sitkFloat32), transform, fixed, sitk.sitkLinear, 0.0)
            carried = sitk.Mask(carried, mask < 0.5, int(value))
    return carried


def write_image(image: sitk.Image, path: Path) -> None:
    """Write an image, whole or not at all, in the format of its suffix.

    Raises:
        OSError: naming the file, with the system's errno, for example when the disk is full.
    """
    with replace_file(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
            _check_written(temporary, image)
        except (RuntimeError, ImageError) as error:
            raise write_error(path, temporary) from error


def _check_written(path: Path, image: sitk.Image) -> None:
    """Raise for a file that was cut short, as by a full disk, of which ITK often says nothing."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    values = image.GetNumberOfPixels() * image.GetNumberOfComponentsPerPixel()
    check_file(path, path.name, values * image.GetSizeOfPixelComponent())


def write_error(path: Path, temporary: Path) -> OSError:
    """Why ITK could not write a file, which it does not tell: the system is asked to write more to it."""
    try:
        with temporary.open("ab") as stream:
            stream.write(bytes(_PROBE))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as reason:
        return OSError(reason.errno, reason.strerror, str(path))
    return OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def _resample(image: sitk.Image, transform: sitk.Transform, fixed: Geometry, how: int, fill: float) -> sitk.Image:
    n, grid = fixed.source_dimension, fixed.file_grid()
    if not image.GetDimension() == transform.GetDimension() == n:
        raise TransformError(
            f"the transform is {transform.GetDimension()}D, the fixed image {n}D and the moving {image.GetDimension()}D"
        )
    direction = np.asarray(grid.direction).reshape(3, 3)[:n, :n].ravel().tolist()
    warped: sitk.Image = sitk.Resample(
        image, grid.size[:n], transform, how, grid.origin[:n], grid.spacing[:n], direction, fill, image.GetPixelID()
    )
    return warped
