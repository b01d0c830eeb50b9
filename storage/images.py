# mypy: disable-error-code="no-untyped-call"
"""Read images and label maps into analysis orientation (see storage/geometry.py).

Volumes: NIfTI, MHA/MHD, NRRD and DICOM series folders through SimpleITK. Pictures: PNG, JPEG and TIFF, grey
or RGB. Nothing of a header but the grid leaves this module: no names, dates or free text, not even in errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from storage.dicom import read_series
from storage.geometry import FileGrid, Geometry, SliceAxis, from_file_axes
from storage.image_files import content_digest
from storage.integrity import EXPECTED, check_file, not_finite, unreadable
from storage.sources import PICTURE_SUFFIXES, ImageError, local_copy, suffix

__all__ = [
    "Image",
    "ImageError",
    "content_digest",
    "label_map",
    "quiet_itk",
    "read_image",
    "read_labels",
    "read_on_grid",
    "read_voxels",
    "to_uint8",
    "to_unit",
    "whole_numbers",
]

_SAME_GRID = 0.1  # corners of two equal grids agree within this part of the smallest spacing


@dataclass(frozen=True)
class Image:
    """One image in analysis orientation.

    Attributes:
        array: float32 [D, H, W] intensities, or uint8 [D, H, W, 3] RGB 0..255.
        geometry: its grid.
    """

    array: npt.NDArray[Any]
    geometry: Geometry

    @property
    def is_rgb(self) -> bool:
        """Whether the array has a colour axis."""
        return self.array.ndim == 4


def read_image(path: str | Path, slice_axis: SliceAxis = "auto") -> Image:
    """Read one image.

    Args:
        path: file, DICOM series folder, or URI of one of them.
        slice_axis: "auto", "axial", "coronal" or "sagittal"; ignored for 2D.

    Raises:
        ImageError: for a path that is missing, empty, truncated, not an image, 4D, multi-channel but not RGB,
            all-constant, or holds NaN or infinite voxels.
    """
    array, grid, dimension, physical = read_voxels(path)
    try:
        geometry = Geometry.from_file_grid(grid, slice_axis, has_spacing=physical, source_dimension=dimension)
    except ValueError as error:
        raise ImageError(f"{path}: {error}") from error
    array = _to_rgb(array, path) if array.ndim == 4 else _to_float(array, path)
    if array.min() == array.max():
        raise ImageError(f"{path}: every voxel is {array.flat[0]}, there is nothing to register")
    return Image(np.ascontiguousarray(from_file_axes(array, geometry)), geometry)


def read_labels(path: str | Path, like: Geometry) -> npt.NDArray[np.int32]:
    """Read an integer label map onto the grid of its image, int32 [D, H, W].

    The file may store the axes in another order or direction as long as the voxels coincide.

    Raises:
        ImageError: as read_image (constant is allowed), for values that are not whole numbers, another grid.
    """
    array, own = read_on_grid(path, like)
    return label_map(array, own, path)


def read_on_grid(path: str | Path, like: Geometry, frames: bool = False) -> tuple[npt.NDArray[Any], Geometry]:
    """The voxels of a file [z, y, x] or [z, y, x, channel] in its own order, and its grid, which is that of `like`.

    Args:
        frames: take the frames of a 4D file as channels, instead of refusing it.

    Raises:
        ImageError: as read_image (constant is allowed), for another grid.
    """
    array, grid, dimension, physical = read_voxels(path, frames)
    try:
        own = Geometry.from_file_grid(grid, like.world_axis(), has_spacing=physical, source_dimension=dimension)
    except ValueError as error:
        raise ImageError(f"{path}: {error}") from error
    if not _same_grid(own, like):
        raise ImageError(
            f"{path}: labels are on another grid: labels {own.describe()} at {_rounded(own.origin_mm)}, "
            f"image {like.describe()} at {_rounded(like.origin_mm)}; resample the labels (nearest neighbour)"
        )
    return array, own


def label_map(array: npt.NDArray[Any], own: Geometry, path: str | Path) -> npt.NDArray[np.int32]:
    """Voxels of `read_on_grid` as label numbers in analysis orientation, int32 [D, H, W]; raises as whole_numbers."""
    return np.ascontiguousarray(from_file_axes(whole_numbers(array, path), own))


def whole_numbers(array: npt.NDArray[Any], path: str | Path) -> npt.NDArray[np.int32]:
    """Voxels of `read_voxels` as label numbers, int32 [z, y, x].

    Raises:
        ImageError: for channels that differ, values that are not whole numbers.
    """
    if array.ndim == 4:
        if not (array == array[..., :1]).all():
            raise ImageError(f"{path}: expected one channel of label numbers, got {array.shape[3]}")
        array = array[..., 0]
    values = _to_float(array, path) if array.dtype.kind == "f" else array
    labels = values.astype(np.int32)
    if not np.array_equal(labels, values):
        raise ImageError(f"{path}: labels must be whole 32-bit numbers, the largest here is {values.max()}")
    return labels


def to_uint8(
    image: Image,
    percentiles: tuple[float, float] = (0.5, 99.5),
    window: tuple[float, float] | None = None,
) -> npt.NDArray[np.uint8]:
    """Intensities of a whole volume mapped linearly to uint8 [D, H, W, 3]; RGB is returned as it is.

    Args:
        percentiles: of the volume, mapped to 0 and 255.
        window: (low, high) intensities instead, for example of a CT.

    Raises:
        ValueError: for a window or percentiles that are not increasing.
    """
    if image.is_rgb:
        return image.array
    grey = np.rint(to_unit(image, percentiles, window) * np.float32(255)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def to_unit(
    image: Image, percentiles: tuple[float, float] = (0.5, 99.5), window: tuple[float, float] | None = None
) -> npt.NDArray[np.float32]:
    """Intensities of a whole grey volume mapped linearly to 0..1, float32 [D, H, W]; see `to_uint8`."""
    pair = percentiles if window is None else window
    if not pair[0] < pair[1]:
        raise ValueError(f"{'percentiles' if window is None else 'window'} must increase, got {pair}")
    low, high = pair if window is not None else np.percentile(image.array, percentiles)
    if low == high:  # nearly constant background: the percentiles miss the object
        low, high = image.array.min(), image.array.max()
    return np.asarray(np.clip((image.array - np.float32(low)) / np.float32(high - low), 0, 1), dtype=np.float32)


def read_voxels(path: str | Path, frames: bool = False) -> tuple[npt.NDArray[Any], FileGrid, int, bool]:
    """Array [z, y, x] or [z, y, x, channel] on the file's grid, the grid, its dimension, are mm real.

    Args:
        frames: take the frames of a 4D file as channels, instead of refusing it.

    Raises:
        ImageError: for a path that is missing, empty, truncated, not an image, 4D, or multi-channel but not RGB.
    """
    with local_copy(path) as local, quiet_itk():
        if local.is_dir():
            image, dimension, physical = read_series(local, path), 3, True
        else:
            image, dimension = _read_single(local, path, frames)
            physical = suffix(local) not in PICTURE_SUFFIXES
        array = sitk.GetArrayFromImage(image)
        channels = image.GetNumberOfComponentsPerPixel()
        image_dimension = image.GetDimension()
        grid = _grid(image)
    if image_dimension == 4:
        array = np.moveaxis(array, 0, 3)
    if not frames and (channels > 4 or (channels > 1 and array.dtype.kind not in "u")):
        raise ImageError(f"{path}: {channels} values per voxel; expected one intensity or RGB")
    return (array[None] if image_dimension == 2 else array), grid, dimension, physical


def _read_single(local: Path, path: str | Path, frames: bool) -> tuple[sitk.Image, int]:
    if local.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty; {EXPECTED}")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(local))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise unreadable(path, error) from None
    size, dimension = reader.GetSize(), reader.GetDimension()
    if min(size) < 1:
        raise ImageError(f"{path}: the image has no voxels (size {size})")
    stacked = dimension > 3 and any(n > 1 for n in size[3:])
    if stacked and not (frames and dimension == 4 and reader.GetNumberOfComponents() == 1):
        count = " x ".join(str(n) for n in size[3:])
        raise ImageError(
            f"{path}: {dimension}D image with {count} frames; expected one 3D volume. Split it, for example "
            "SimpleITK image[:, :, :, t] or fslsplit, and list the frames as subjects"
        )
    if dimension == 3 and size[2] > 1 and suffix(local) in PICTURE_SUFFIXES:
        raise ImageError(f"{path}: picture of {size[2]} pages has no spacing; store it as NIfTI, MHA or NRRD")
    probe = sitk.Image([1] * min(dimension, 3), reader.GetPixelID(), reader.GetNumberOfComponents())
    voxel_bytes = int(np.prod(size)) * reader.GetNumberOfComponents() * probe.GetSizeOfPixelComponent()
    check_file(local, str(path), voxel_bytes)
    if dimension > 3 and not stacked:
        reader.SetExtractSize([*size[:3], *([0] * (dimension - 3))])
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise unreadable(path, error) from None
    return image, min(dimension, 3)


def _to_float(array: npt.NDArray[Any], path: str | Path) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise not_finite(path, bad, values.size)
    return values


def _to_rgb(array: npt.NDArray[Any], path: str | Path) -> npt.NDArray[Any]:
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"{path}: colour image of {array.dtype}; expected 8 or 16 bit RGB")
    if array.shape[3] == 2:  # grey and alpha
        return _to_float(array[..., 0], path)
    return array[..., :3]


def _same_grid(a: Geometry, b: Geometry) -> bool:
    if a.shape != b.shape or a.has_spacing != b.has_spacing:
        return False
    corners = np.array([[z, y, x] for z in (0, 1) for y in (0, 1) for x in (0, 1)]) * (np.array(a.shape) - 1)
    world_a, world_b = (
        (corners * np.array(g.spacing_mm)) @ g.local_to_world()[:3, :3].T + np.array(g.origin_mm) for g in (a, b)
    )
    return bool(np.linalg.norm(world_a - world_b, axis=1).max() <= _SAME_GRID * min(b.spacing_mm))


def _grid(image: sitk.Image) -> FileGrid:
    n, axes = image.GetDimension(), min(image.GetDimension(), 3)
    size, spacing = [*image.GetSize(), 1][:3], [*image.GetSpacing(), 1.0][:3]
    origin = [*image.GetOrigin(), 0.0][:3]
    direction = np.eye(3)
    direction[:axes, :axes] = np.asarray(image.GetDirection()).reshape(n, n)[:axes, :axes]
    return FileGrid(
        (size[0], size[1], size[2]),
        (spacing[0], spacing[1], spacing[2]),
        (origin[0], origin[1], origin[2]),
        tuple(float(v) + 0.0 for v in direction.ravel()),
    )


def _rounded(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"


@contextmanager
def quiet_itk() -> Iterator[None]:
    """ITK warns about every inconsistent header and quotes it; the checks here say what matters."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
