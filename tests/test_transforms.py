"""Transform files do in SimpleITK, on the user's files, what the field does in memory."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image as Picture
from scipy.ndimage import map_coordinates

from storage.geometry import Geometry, moving_to_fixed
from storage.images import read_image
from storage.landmarks import local_to_world
from storage.transforms import (
    TransformError,
    ddf_to_itk,
    itk_to_ddf,
    read_transform,
    remove_transform,
    transform_signature,
    write_transform,
)

REPO = Path(__file__).resolve().parents[1]


def _smooth_field(geometry: Geometry, amplitude: float) -> np.ndarray:
    z, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in geometry.shape), indexing="ij")
    field = np.stack([np.sin(2 * y + x), np.cos(3 * x - z), np.sin(2 * z + y)])
    if geometry.shape[0] == 1:
        field[0] = 0
    return (amplitude * field).astype(np.float32)


def _write_volume(path, size, spacing, matrix, seed):
    rng = np.random.default_rng(seed)
    image = sitk.GetImageFromArray(rng.normal(size=size[::-1]).astype(np.float32))
    image = sitk.SmoothingRecursiveGaussian(image, 2.0)
    image.SetSpacing(spacing)
    image.SetDirection(matrix.ravel().tolist())
    middle = matrix @ ((np.array(size) - 1) / 2 * spacing)
    image.SetOrigin((np.array([5.0, -20.0, 8.0]) - middle).tolist())
    sitk.WriteImage(image, str(path))


def _oblique(signs):
    angle = np.deg2rad(17.0)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return turn @ np.diag(signs)


def _pull(moving, fixed: Geometry, ddf):
    """Moving image at q + u(q), written independently of the pipeline's own warp."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in fixed.shape), indexing="ij")).astype(np.float64)
    position = index * np.reshape(fixed.spacing_mm, (3, 1, 1, 1)) + ddf
    to_moving = np.linalg.inv(moving_to_fixed(fixed, moving.geometry))
    local = np.einsum("ij,jdhw->idhw", to_moving[:3, :3], position) + to_moving[:3, 3].reshape(3, 1, 1, 1)
    index = local / np.reshape(moving.geometry.spacing_mm, (3, 1, 1, 1))
    return map_coordinates(moving.array, index, order=1, mode="nearest")


@pytest.mark.parametrize("signs", [(1.0, 1.0, 1.0), (-1.0, -1.0, 1.0), (1.0, -1.0, 1.0)])
@pytest.mark.parametrize("spacing", [(1.2, 1.4, 6.0), (5.0, 1.2, 1.0), (1.1, 1.1, 1.1)])
def test_simpleitk_on_the_original_files_gives_our_warp(tmp_path, signs, spacing):
    _write_volume(tmp_path / "fixed.nii.gz", (21, 18, 9), spacing, _oblique(signs), 1)
    _write_volume(tmp_path / "moving.mha", (17, 20, 11), (1.5, 1.3, 4.0), _oblique((1.0, -1.0, -1.0)), 2)
    fixed, moving = read_image(tmp_path / "fixed.nii.gz"), read_image(tmp_path / "moving.mha")
    ddf = _smooth_field(fixed.geometry, 2.5)
    write_transform(tmp_path / "t.h5", ddf, fixed.geometry, {})
    theirs = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "moving.mha")),
        sitk.ReadImage(str(tmp_path / "fixed.nii.gz")),
        sitk.ReadTransform(str(tmp_path / "t.h5")),
        sitk.sitkLinear,
    )
    sitk.WriteImage(theirs, str(tmp_path / "warped.nii.gz"))
    warped, ours = read_image(tmp_path / "warped.nii.gz").array, _pull(moving, fixed.geometry, ddf)
    inside = warped != 0
    assert inside.mean() > 0.2
    assert np.abs(warped - ours)[inside].max() < 0.02 * np.ptp(moving.array)


def test_landmarks_move_as_the_field_says(tmp_path):
    _write_volume(tmp_path / "fixed.nii.gz", (21, 18, 9), (1.2, 1.4, 6.0), _oblique((-1.0, 1.0, 1.0)), 1)
    geometry = read_image(tmp_path / "fixed.nii.gz").geometry
    ddf = _smooth_field(geometry, 4.0)
    write_transform(tmp_path / "t.h5", ddf, geometry, {})
    transform = read_transform(tmp_path / "t.h5")
    voxels = np.random.default_rng(0).integers(0, geometry.shape, (40, 3))
    local = voxels * np.asarray(geometry.spacing_mm)
    expected = local_to_world(local + ddf[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T, geometry)
    moved = [transform.TransformPoint(point) for point in local_to_world(local, geometry)]
    assert np.linalg.norm(np.asarray(moved) - expected, axis=1).max() < 1e-3


def test_acdc_transform_applies_to_the_original_files(shared_data, tmp_path):
    folder = shared_data / "acdc_cardiac"
    fixed = read_image(folder / "patient067_ED.nii.gz")
    moving = read_image(folder / "patient068_ED.nii.gz")
    ddf = _smooth_field(fixed.geometry, 8.0)
    write_transform(tmp_path / "t.h5", ddf, fixed.geometry, {})
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(
            sitk.ReadImage(str(folder / "patient068_ED.nii.gz"), sitk.sitkFloat32),
            sitk.ReadImage(str(folder / "patient067_ED.nii.gz"), sitk.sitkFloat32),
            sitk.ReadTransform(str(tmp_path / "t.h5")),
        )
    )
    inside = theirs != 0
    difference = np.abs(theirs - _pull(moving, fixed.geometry, ddf))[inside]
    assert np.percentile(difference, 99.9) < 0.01 * np.ptp(moving.array)


@pytest.mark.parametrize("dpi", [(72, 72), (72, 300)])
def test_pictures_with_a_printing_resolution(tmp_path, dpi):
    rng = np.random.default_rng(3)
    for name, size, resolution in (("fixed", (40, 50), dpi[0]), ("moving", (44, 46), dpi[1])):
        coarse = Picture.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).resize(size, Picture.BICUBIC)
        coarse.save(tmp_path / f"{name}.tif", dpi=(resolution, resolution))
    fixed, moving = read_image(tmp_path / "fixed.tif"), read_image(tmp_path / "moving.tif")
    ddf = _smooth_field(fixed.geometry, 2.0)
    write_transform(tmp_path / "t.h5", ddf, fixed.geometry, {}, moving.geometry)
    theirs = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "moving.tif"), sitk.sitkFloat32),
        sitk.ReadImage(str(tmp_path / "fixed.tif"), sitk.sitkFloat32),
        sitk.ReadTransform(str(tmp_path / "t.h5")),
    )
    warped = sitk.GetArrayFromImage(theirs)
    inside = warped != 0
    assert inside.mean() > 0.5
    assert np.abs(warped - _pull(moving, fixed.geometry, ddf)[0])[inside].max() < 1.0
    field = read_transform(tmp_path / "t.h5").GetDisplacementField()
    np.testing.assert_allclose(itk_to_ddf(field, fixed.geometry, moving.geometry), ddf, atol=1e-4)


def test_field_round_trip_and_signature(tmp_path):
    _write_volume(tmp_path / "a.mha", (9, 8, 7), (3.0, 1.0, 1.5), _oblique((1.0, -1.0, -1.0)), 1)
    geometry = read_image(tmp_path / "a.mha").geometry
    ddf = _smooth_field(geometry, 3.0)
    np.testing.assert_allclose(itk_to_ddf(ddf_to_itk(ddf, geometry), geometry), ddf, atol=1e-5)
    path = tmp_path / "out" / "t.h5"
    assert transform_signature(path) is None
    write_transform(path, ddf, geometry, {"key": "abc"})
    assert transform_signature(path) == {"key": "abc"}
    assert sorted(os.listdir(path.parent)) == ["t.h5", "t.json"]
    with pytest.raises(TransformError, match="size"):
        itk_to_ddf(read_transform(path).GetDisplacementField(), Geometry((3, 3, 3), (1.0, 1.0, 1.0)))
    remove_transform(path)
    assert transform_signature(path) is None


def test_same_field_gives_the_same_bytes(tmp_path):
    geometry = Geometry((4, 5, 6), (2.0, 1.0, 1.0))
    for name in ("a.h5", "b.h5"):
        write_transform(tmp_path / name, _smooth_field(geometry, 1.0), geometry, {})
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize("limit", [200, 60_000])
def test_a_full_disk_is_an_error_with_its_number_and_no_crash(tmp_path, limit):
    """A limit on file size stands in for the full disk; the process must also end well."""
    code = f"""
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np
from storage.geometry import Geometry
from storage.transforms import write_transform
geometry = Geometry((4, 50, 60), (2.0, 1.0, 1.0))
try:
    write_transform({str(tmp_path)!r} + "/out/t.h5", np.zeros((3, *geometry.shape)), geometry, {{}})
except OSError as error:
    print(error.errno, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        cwd=REPO,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert str(tmp_path / "out" / "t.h5") in done.stdout
    assert os.listdir(tmp_path / "out") == []


def test_bad_fields_and_files(tmp_path):
    geometry = Geometry((4, 5, 6), (2.0, 1.0, 1.0))
    field = np.zeros((3, 4, 5, 6), np.float32)
    with pytest.raises(ValueError, match=r"\[3, 4, 5, 6\]"):
        write_transform(tmp_path / "t.h5", field[:, 1:], geometry, {})
    with pytest.raises(ValueError, match="NaN"):
        write_transform(tmp_path / "t.h5", field + np.nan, geometry, {})
    with pytest.raises(ValueError, match=r"\.h5"):
        write_transform(tmp_path / "t.nii", field, geometry, {})
    with pytest.raises(FileNotFoundError):
        read_transform(tmp_path / "t.h5")
    write_transform(tmp_path / "t.h5", field, geometry, {})
    whole = (tmp_path / "t.h5").read_bytes()
    (tmp_path / "t.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TransformError, match="truncated"):
        read_transform(tmp_path / "t.h5")
