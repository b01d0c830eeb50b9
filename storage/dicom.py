# mypy: disable-error-code="no-untyped-call"
"""DICOM series as volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from storage.integrity import EXPECTED, unreadable
from storage.sources import ImageError

_UNEVEN = 0.05  # slice steps may differ by this part of the mean step


def read_series(folder: Path, path: str | Path) -> sitk.Image:
    """The volume of a local folder with one DICOM series.

    Args:
        path: to name in messages.

    Raises:
        ImageError: for no series or several, slices that are not evenly spaced, damaged files.
    """
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise ImageError(f"{path}: folder without a DICOM series; {EXPECTED}")
    if len(series) > 1:
        raise ImageError(f"{path}: {len(series)} DICOM series in one folder; give each its own folder")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    _check_slice_steps(files, path)
    try:
        return sitk.ReadImage(files)
    except RuntimeError as error:
        raise unreadable(path, error) from None


def _check_slice_steps(files: tuple[str, ...], path: str | Path) -> None:
    """ITK lays the slices of a series with a gap evenly, which moves them: refuse instead."""
    reader, origins = sitk.ImageFileReader(), []
    for file in files:
        reader.SetFileName(file)
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise unreadable(path, error) from None
        origins.append(reader.GetOrigin()[:3])
    if len(origins) < 3:
        return
    steps = np.linalg.norm(np.diff(np.asarray(origins), axis=0), axis=1)
    if np.ptp(steps) > _UNEVEN * steps.mean():
        raise ImageError(
            f"{path}: DICOM slices are not evenly spaced (steps {steps.min():.4g} to {steps.max():.4g} mm); "
            "a slice may be missing or doubled"
        )
