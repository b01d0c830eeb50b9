# mypy: disable-error-code="no-untyped-call"
"""Files that a manifest needs and a data set does not hold as such: single frames, landmarks as CSV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from storage.atomic import replace_file
from storage.images import quiet_itk
from storage.integrity import check_file
from storage.sources import ImageError
from storage.warping import write_image


def write_frame(source: Path, frame: int, target: Path) -> str:
    """Write one frame of a 4D image as a volume, with its grid and nothing else of the header.

    Args:
        frame: from 0.

    Returns:
        `target` as text.

    Raises:
        ImageError: for a file that is missing, damaged, not 4D, or has no such frame.
        OSError: naming the target, for example when the disk is full.
    """
    if not source.is_file():
        raise ImageError(f"{source}: no such file")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(source))
    try:
        with quiet_itk():
            reader.ReadImageInformation()
        size = reader.GetSize()
        if len(size) != 4:
            raise ImageError(f"{source}: {len(size)}D image, expected a 4D one to take frame {frame + 1} from")
        if not 0 <= frame < size[3]:
            raise ImageError(f"{source}: {size[3]} frames, there is no frame {frame + 1}")
        probe = sitk.Image([1, 1], reader.GetPixelID(), reader.GetNumberOfComponents())
        check_file(source, str(source), int(np.prod(size)) * probe.GetSizeOfPixelComponent())
        reader.SetExtractSize([*size[:3], 0])
        reader.SetExtractIndex([0, 0, 0, frame])
        with quiet_itk():
            read = reader.Execute()
    except RuntimeError:
        raise ImageError(f"{source}: not an image, or a damaged one") from None
    volume = sitk.GetImageFromArray(sitk.GetArrayViewFromImage(read))
    volume.CopyInformation(read)
    write_image(volume, target)
    return str(target)


def read_points(source: Path, columns: int, delimiter: str | None = None) -> list[tuple[float, ...]]:
    """Points of a text file without a header, one a line.

    Args:
        columns: numbers in a line.
        delimiter: None for white space.

    Raises:
        ImageError: naming the line that holds something else, or for a file without points.
    """
    points = []
    for number, line in enumerate(source.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        cells = line.split(delimiter)
        if not line.strip():
            continue
        try:
            points.append(tuple(float(cell) for cell in cells))
        except ValueError:
            points.append(())
        if len(points[-1]) != columns:
            raise ImageError(f"{source}, line {number}: expected {columns} numbers, found {line.strip()[:60]!r}")
    if not points:
        raise ImageError(f"{source}: no points in it")
    return points


def write_points(points: npt.ArrayLike, target: Path) -> str:
    """Write landmarks (see `storage.landmarks`): voxels i, j or i, j, k of the image file; returns `target` as text."""
    table = np.asarray(points, dtype=np.float64)
    with replace_file(target) as temporary:
        np.savetxt(temporary, table, "%.4f", ",", header=",".join("ijk"[: table.shape[1]]), comments="")
    return str(target)
