"""Pairs of images whose headers are hard to get right, and fields fitted to neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from PIL import Image as Picture
from scipy.ndimage import gaussian_filter

from pipeline.algorithms import warp
from storage.geometry import Geometry, Triple
from storage.images import Image, read_image
from storage.landmarks import local_to_world
from storage.transforms import make_ddf, make_transform

GRIDS = ("oblique", "flipped", "sagittal", "plane", "picture")
_SIGNS = {"oblique": (1, 1, 1), "flipped": (-1, -1, 1), "sagittal": (1, -1, 1)}
_SPACING = {"oblique": (1.1, 1.2, 1.3), "flipped": (1.2, 1.4, 6.0), "sagittal": (5.0, 1.2, 1.0)}


@dataclass(frozen=True)
class Pair:
    """Two image files and what is in them."""

    fixed_path: Path
    moving_path: Path
    fixed: Image
    moving: Image


def make_pair(folder: Path, grid: str) -> Pair:
    """Write two smooth images of about the same place on grids of their own."""
    if grid == "picture":  # printing resolutions, which ITK takes for a spacing
        paths = folder / "fixed.tif", folder / "moving.tif"
        for path, size, dpi in zip(paths, ((40, 50), (44, 46)), ((72, 72), (72, 300)), strict=True):
            Picture.fromarray((255 * _noise(size[::-1], 1)).astype(np.uint8)).save(path, dpi=dpi)
    elif grid == "plane":
        paths = folder / "fixed.mha", folder / "moving.mha"
        _write(paths[0], (24, 31), (1.2, 0.8), _turn((1, -1, 1))[:2, :2])
        _write(paths[1], (30, 27), (0.9, 1.1), _turn((1, 1, 1))[:2, :2])
    else:
        paths = folder / "fixed.nii.gz", folder / "moving.mha"
        _write(paths[0], (21, 18, 9), _SPACING[grid], _turn(_SIGNS[grid]))
        _write(paths[1], (17, 20, 11), (1.5, 1.3, 4.0), _turn((1, -1, -1)))
    return Pair(*paths, read_image(paths[0]), read_image(paths[1]))


def make_field(geometry: Geometry, stride: int = 2) -> tuple[np.ndarray, np.ndarray, Triple]:
    """A turned affine and a smooth lattice [3, nz, ny, nx] over the image: what a fit gives."""
    flat = geometry.shape[0] == 1
    strides = [1 if n == 1 else stride for n in geometry.shape]
    nodes = [-(-(n - 1) // k) + 1 for n, k in zip(geometry.shape, strides, strict=True)]
    z, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in nodes), indexing="ij")
    values = 2.5 * np.stack([np.sin(2 * y + x), np.cos(3 * x - z), np.sin(2 * z + y)]) * geometry.spacing_mm[2]
    affine = np.eye(4)
    affine[1:3, 1:3] = [[1.03, -0.1], [0.12, 0.96]]
    affine[:3, 3] = 1.5, -1.0, 0.5
    if flat:
        values[0], affine[0, 3] = 0, 0
    step = tuple(float(k * s) for k, s in zip(strides, geometry.spacing_mm, strict=True))
    return affine, values.astype(np.float32), step


def make_landmarks(pair: Pair, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Points in the fixed image, and where `warp.warp_points` puts them: [N, n] world mm (x, y, z) of each file."""
    geometry = pair.fixed.geometry
    field = make_field(geometry)
    ddf = make_ddf(make_transform(*field, geometry, pair.moving.geometry), geometry, pair.moving.geometry)
    unit = np.random.default_rng(0).uniform(0, 1, (count, 3))
    local = unit * (np.asarray(geometry.shape) - 1) * geometry.spacing_mm
    moved = warp.warp_points(local, ddf, geometry.spacing_mm)
    return _world(local, geometry, geometry), _world(moved, geometry, pair.moving.geometry)


def _world(local: np.ndarray, geometry: Geometry, file: Geometry) -> np.ndarray:
    """Fixed-frame local positions as ITK gives them for a file."""
    if not geometry.has_spacing:
        return local[:, :0:-1] * file.nominal_spacing[:0:-1]
    return local_to_world(local, geometry)[:, : geometry.source_dimension]


def _write(path: Path, size: tuple[int, ...], spacing: tuple[float, ...], matrix: np.ndarray) -> None:
    image = sitk.GetImageFromArray(_noise(size[::-1], len(size)))
    image.SetSpacing(spacing)
    image.SetDirection(matrix.ravel().tolist())
    middle = matrix @ ((np.array(size) - 1) / 2 * spacing)
    image.SetOrigin((np.array([5.0, -20.0, 8.0])[: len(size)] - middle).tolist())
    sitk.WriteImage(image, str(path))


def _noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.0)
    return ((smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32)


def _turn(signs: tuple[int, int, int]) -> np.ndarray:
    angle = np.deg2rad(17.0)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return turn @ np.diag(signs)
