"""Transform files do in SimpleITK and ANTs, on the user's files, what the field does in memory."""

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
from scipy.ndimage import map_coordinates

from storage.geometry import Geometry, moving_to_fixed
from storage.images import Image, read_image
from storage.transforms import (
    TransformError,
    make_ddf,
    make_transform,
    read_ddf,
    read_transform,
    transform_signature,
    write_transform,
)
from tests.grids import GRIDS, Pair, make_field, make_landmarks, make_pair

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(params=GRIDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """Two images, and `t.h5` beside them."""
    made = make_pair(tmp_path, request.param)
    geometry = made.fixed.geometry
    write_transform(tmp_path / "t.h5", *make_field(geometry), geometry, {"key": "abc"}, made.moving.geometry)
    return made


def _pull(moving: Image, fixed: Geometry, ddf: np.ndarray) -> np.ndarray:
    """Moving image at q + u(q), written independently of the pipeline's own warp."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in fixed.shape), indexing="ij")).astype(np.float64)
    position = index * np.reshape(fixed.spacing_mm, (3, 1, 1, 1)) + ddf
    to_moving = np.linalg.inv(moving_to_fixed(fixed, moving.geometry))
    local = np.einsum("ij,jdhw->idhw", to_moving[:3, :3], position) + to_moving[:3, 3].reshape(3, 1, 1, 1)
    index = local / np.reshape(moving.geometry.spacing_mm, (3, 1, 1, 1))
    return map_coordinates(moving.array, index, order=1, mode="nearest")


def test_simpleitk_on_the_original_files_gives_our_warp(pair: Pair, tmp_path: Path) -> None:
    fixed = sitk.ReadImage(str(pair.fixed_path))
    moving = sitk.ReadImage(str(pair.moving_path), sitk.sitkFloat32)
    theirs = sitk.Resample(moving, fixed, sitk.ReadTransform(str(tmp_path / "t.h5")), sitk.sitkLinear, -1000.0)
    sitk.WriteImage(theirs, str(tmp_path / "warped.mha"))
    here = pair.fixed.geometry
    warped = read_image(tmp_path / "warped.mha").array.reshape(here.shape)
    ours = _pull(pair.moving, here, read_ddf(tmp_path / "t.h5", here, pair.moving.geometry))
    inside = warped > -1000
    assert inside.mean() > 0.2
    assert np.abs(warped - ours)[inside].max() < 0.01 * np.ptp(pair.moving.array)


def test_landmarks_land_in_simpleitk_where_our_warp_puts_them(pair: Pair, tmp_path: Path) -> None:
    here, there = make_landmarks(pair)
    theirs = sitk.ReadTransform(str(tmp_path / "t.h5"))
    moved = np.array([theirs.TransformPoint(point) for point in here.tolist()])
    assert np.linalg.norm(moved - there, axis=1).max() < 0.005
    assert np.linalg.norm(read_transform(tmp_path / "t.h5").at(here) - there, axis=1).max() < 0.005


def test_landmarks_land_in_ants_where_our_warp_puts_them(pair: Pair, tmp_path: Path) -> None:
    ants = pytest.importorskip("ants", reason="antspyx is not installed")
    here, there = make_landmarks(pair)
    theirs = ants.read_transform(str(tmp_path / "t.h5"))
    moved = np.array([theirs.apply_to_point(point) for point in here.tolist()])
    assert np.linalg.norm(moved - there, axis=1).max() < 0.005


@pytest.mark.parametrize("grid", ["flipped", "plane"])
def test_ants_warps_the_original_files_as_simpleitk_does(grid: str, tmp_path: Path) -> None:
    ants = pytest.importorskip("ants", reason="antspyx is not installed")
    made = make_pair(tmp_path, grid)
    path = str(tmp_path / "t.h5")
    write_transform(path, *make_field(made.fixed.geometry), made.fixed.geometry, {})
    fixed, moving = (str(path) for path in (made.fixed_path, made.moving_path))
    theirs = ants.apply_transforms(ants.image_read(fixed), ants.image_read(moving), [path]).numpy().T
    ours = sitk.GetArrayFromImage(
        sitk.Resample(sitk.ReadImage(moving), sitk.ReadImage(fixed), sitk.ReadTransform(path))
    )
    both = (theirs != 0) & (ours != 0)  # they disagree on the half voxel at the border
    assert both.mean() > 0.2
    assert np.abs(theirs - ours)[both].max() < 1e-3


def test_acdc_transform_applies_to_the_original_files(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "acdc_cardiac"
    fixed = read_image(folder / "patient067_ED.nii.gz")
    moving = read_image(folder / "patient068_ED.nii.gz")
    write_transform(tmp_path / "t.h5", *make_field(fixed.geometry), fixed.geometry, {})
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(
            sitk.ReadImage(str(folder / "patient068_ED.nii.gz"), sitk.sitkFloat32),
            sitk.ReadImage(str(folder / "patient067_ED.nii.gz"), sitk.sitkFloat32),
            sitk.ReadTransform(str(tmp_path / "t.h5")),
        )
    )
    inside = theirs != 0
    difference = np.abs(theirs - _pull(moving, fixed.geometry, read_ddf(tmp_path / "t.h5", fixed.geometry)))[inside]
    assert np.percentile(difference, 99.9) < 0.01 * np.ptp(moving.array)


def test_the_field_comes_back(pair: Pair, tmp_path: Path) -> None:
    geometry = pair.fixed.geometry
    affine, lattice, step = make_field(geometry)
    points = np.moveaxis(np.indices(geometry.shape, dtype=np.float64), 0, -1) * geometry.spacing_mm
    index = np.moveaxis(points / step, -1, 0)
    added = np.stack([map_coordinates(component, index, order=1) for component in lattice])
    expected = np.moveaxis(points @ affine[:3, :3].T + affine[:3, 3] - points, -1, 0) + added
    found = read_ddf(tmp_path / "t.h5", geometry, pair.moving.geometry)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3)


def test_small_voxels_are_rounded_less() -> None:
    geometry = Geometry((5, 5, 7), (5e-4, 2.5e-4, 2.5e-4))
    affine, lattice, step = make_field(geometry)
    affine[:3, 3] *= 1e-4
    found = make_ddf(make_transform(affine, lattice, step, geometry), geometry)[:, ::2, ::2, ::2]
    points = np.moveaxis(np.indices((3, 3, 4), dtype=np.float64), 0, -1) * np.array(step)
    shift = np.moveaxis(points @ affine[:3, :3].T + affine[:3, 3] - points, -1, 0)
    np.testing.assert_allclose(found - shift, lattice, atol=1e-3 * 2.5e-4)


def test_the_signature_lies_in_the_file(tmp_path: Path) -> None:
    geometry, path = Geometry((4, 5, 6), (2.0, 1.0, 1.0)), tmp_path / "out" / "t.h5"
    assert transform_signature(path) is None
    write_transform(path, *make_field(geometry), geometry, {"key": "abc", "name": "ä" * 40_000})
    assert transform_signature(path) == {"key": "abc", "name": "ä" * 40_000}
    assert os.listdir(path.parent) == ["t.h5"]
    path.write_bytes(path.read_bytes()[:-10])
    assert transform_signature(path) is None


def test_same_field_gives_the_same_bytes(tmp_path: Path) -> None:
    geometry = Geometry((4, 5, 6), (2.0, 1.0, 1.0))
    for name in ("a.h5", "b.h5"):
        write_transform(tmp_path / name, *make_field(geometry), geometry, {})
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_smooth_field_takes_a_small_part_of_its_dense_size(tmp_path: Path) -> None:
    geometry = Geometry((10, 128, 128), (8.0, 1.5, 1.5))
    write_transform(tmp_path / "t.h5", *make_field(geometry), geometry, {})
    assert (tmp_path / "t.h5").stat().st_size < 0.05 * 24 * np.prod(geometry.shape)


@pytest.mark.parametrize("limit", [200, 60_000])
def test_a_full_disk_is_an_error_with_its_number_and_no_crash(tmp_path: Path, limit: int) -> None:
    """A limit on file size stands in for the full disk; the process must also end well."""
    code = f"""
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np
from storage.geometry import Geometry
from storage.transforms import write_transform
geometry = Geometry((4, 50, 60), (2.0, 1.0, 1.0))
noise = np.random.default_rng(0).normal(size=(3, *geometry.shape))
try:
    write_transform({str(tmp_path)!r} + "/out/t.h5", np.eye(4), noise, geometry.spacing_mm, geometry, {{}})
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


def test_bad_fields_are_refused(tmp_path: Path) -> None:
    geometry = Geometry((4, 5, 6), (2.0, 1.0, 1.0))
    affine, lattice, step = make_field(geometry)
    with pytest.raises(ValueError, match=r"\(3, 2, 4\) nodes, .* covers no 4 x 5 x 6"):
        write_transform(tmp_path / "t.h5", affine, lattice[:, :, 1:], step, geometry, {})
    with pytest.raises(ValueError, match=r"\[3, nz, ny, nx\]"):
        write_transform(tmp_path / "t.h5", affine, lattice[:2], step, geometry, {})
    with pytest.raises(ValueError, match="NaN"):
        write_transform(tmp_path / "t.h5", affine, lattice + np.nan, step, geometry, {})
    with pytest.raises(ValueError, match="singular"):
        write_transform(tmp_path / "t.h5", np.zeros((4, 4)), lattice, step, geometry, {})
    with pytest.raises(ValueError, match=r"\.h5"):
        write_transform(tmp_path / "t.nii", affine, lattice, step, geometry, {})
    assert os.listdir(tmp_path) == []


def test_bad_files_are_named(tmp_path: Path) -> None:
    geometry = Geometry((4, 5, 6), (2.0, 1.0, 1.0))
    with pytest.raises(FileNotFoundError):
        read_transform(tmp_path / "t.h5")
    write_transform(tmp_path / "t.h5", *make_field(geometry), geometry, {})
    for other, said in (
        (Geometry((4, 5, 60), (2.0, 1.0, 1.0)), "does not cover"),
        (Geometry((1, 5, 6), (2.0, 1.0, 1.0), source_dimension=2), "does not cover"),
        (Geometry((4, 5, 6), (2.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 1.0)), "elsewhere"),
    ):
        with pytest.raises(TransformError, match=rf"t\.h5: .*{said}"):
            read_ddf(tmp_path / "t.h5", other)
    whole = (tmp_path / "t.h5").read_bytes()
    (tmp_path / "t.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TransformError, match="truncated"):
        read_transform(tmp_path / "t.h5")
    sitk.WriteTransform(sitk.AffineTransform(3), str(tmp_path / "t.h5"))
    with pytest.raises(TransformError, match="not a transform that samreg wrote"):
        read_transform(tmp_path / "t.h5")
