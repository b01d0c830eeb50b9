"""Every exported form, read again by other programs, takes landmarks to where our own warp puts them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.ndimage import map_coordinates

from storage.exports import (
    affine_transform,
    displacement_image,
    offset_image,
    voxel_displacement_image,
    write_affine,
)
from storage.geometry import Geometry
from storage.transforms import Transform, TransformError, make_transform
from storage.warping import write_image
from tests.grids import GRIDS, Pair, make_field, make_landmarks, make_pair

REPO = Path(__file__).resolve().parents[1]
TOLERANCE_MM = 0.05


class Exported(NamedTuple):
    """A pair, its transform, and landmarks [N, n] in the fixed and in the moving file."""

    pair: Pair
    transform: Transform
    here: np.ndarray
    there: np.ndarray

    @property
    def n(self) -> int:
        """Dimension."""
        return self.here.shape[1]


@pytest.fixture(params=GRIDS)
def known(request: pytest.FixtureRequest, tmp_path: Path) -> Exported:
    """A pair and a field on a lattice."""
    pair = make_pair(tmp_path, request.param)
    geometry = pair.fixed.geometry
    transform = make_transform(*make_field(geometry), geometry, pair.moving.geometry)
    return Exported(pair, transform, *make_landmarks(pair))


def _off(transform: sitk.Transform, known: Exported) -> float:
    moved = np.array([transform.TransformPoint(point) for point in known.here.tolist()])
    return float(np.linalg.norm(moved - known.there, axis=1).max())


def _read_field(path: Path) -> sitk.Transform:
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


def _off_in_ants(chain: list[Path], known: Exported) -> float:
    ants = pytest.importorskip("ants", reason="antspyx is not installed")
    import pandas as pd

    names = list("xyz"[: known.n])
    points = pd.DataFrame(known.here, columns=names)
    moved = ants.apply_transforms_to_points(known.n, points, [str(path) for path in chain])[names].to_numpy()
    return float(np.linalg.norm(moved - known.there, axis=1).max())


def test_the_vector_image_is_the_displacement(known: Exported, tmp_path: Path) -> None:
    path = tmp_path / "xfm.nii.gz"
    write_image(displacement_image(known.transform, known.pair.fixed.geometry), path)
    header = nibabel.load(path).header
    size = known.pair.fixed.geometry.file_grid().size
    assert header["intent_code"] == 1007
    assert header.get_data_shape() == (*size, 1, known.n)
    assert header.get_data_dtype() == np.float32
    assert _off(_read_field(path), known) < TOLERANCE_MM
    assert _off_in_ants([path], known) < TOLERANCE_MM


@pytest.mark.parametrize("suffix", [".mat", ".tfm"])
def test_the_two_parts_in_a_chain_are_the_transform(known: Exported, tmp_path: Path, suffix: str) -> None:
    affine, warp = tmp_path / f"0GenericAffine{suffix}", tmp_path / "1Warp.nii.gz"
    write_affine(affine_transform(known.transform), affine)
    write_image(offset_image(known.transform, known.pair.fixed.geometry), warp)
    chain = sitk.CompositeTransform([sitk.ReadTransform(str(affine)), _read_field(warp)])  # the last is applied first
    assert _off(chain, known) < TOLERANCE_MM
    if suffix == ".mat":
        assert _off_in_ants([warp, affine], known) < TOLERANCE_MM


def test_the_field_of_learn2reg_leads_to_the_moving_voxel(known: Exported, tmp_path: Path) -> None:
    path = tmp_path / "disp_0001_0002.nii.gz"
    write_image(voxel_displacement_image(known.transform, known.pair.fixed.geometry, known.pair.moving.geometry), path)
    field = nibabel.load(path).get_fdata()
    assert field.shape == (*known.pair.fixed.geometry.file_grid().size, 3)
    fixed, moving = (sitk.ReadImage(str(p)) for p in (known.pair.fixed_path, known.pair.moving_path))
    index = np.zeros((len(known.here), 3))
    expected = index.copy()
    for row, (here, there) in enumerate(zip(known.here.tolist(), known.there.tolist(), strict=True)):
        index[row, : known.n] = fixed.TransformPhysicalPointToContinuousIndex(here)
        expected[row, : known.n] = moving.TransformPhysicalPointToContinuousIndex(there)
    found = index + np.stack([map_coordinates(component, index.T, order=1) for component in np.moveaxis(field, 3, 0)]).T
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_the_nifti_lies_on_the_grid_of_the_fixed_file(known: Exported, tmp_path: Path) -> None:
    if known.pair.fixed_path.suffix != ".gz":
        pytest.skip("the fixed file is no NIfTI")
    geometry = known.pair.fixed.geometry
    write_image(voxel_displacement_image(known.transform, geometry, known.pair.moving.geometry), tmp_path / "a.nii.gz")
    write_image(displacement_image(known.transform, geometry), tmp_path / "b.nii.gz")
    expected = nibabel.load(known.pair.fixed_path).affine
    for name in ("a.nii.gz", "b.nii.gz"):
        np.testing.assert_allclose(nibabel.load(tmp_path / name).affine, expected, atol=1e-3)


def test_another_grid_is_refused() -> None:
    geometry = Geometry((4, 5, 6), (2.0, 1.0, 1.0))
    transform = make_transform(*make_field(geometry), geometry)
    with pytest.raises(TransformError, match="does not cover"):
        displacement_image(transform, Geometry((9, 9, 9), (2.0, 1.0, 1.0)))


@pytest.mark.parametrize("limit", [100, 60_000])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".mat"])
def test_a_full_disk_is_an_error_with_its_number(tmp_path: Path, suffix: str, limit: int) -> None:
    """ITK writes half a NIfTI without a word. A limit on file size stands in for the full disk."""
    if suffix == ".mat" and limit > 100:
        pytest.skip("a small file")
    code = f"""
import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
import numpy as np, SimpleITK as sitk
from storage.exports import write_affine
from storage.warping import write_image
image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(20, 50, 60)))
path = Path({str(tmp_path)!r}, "out", "a{suffix}")
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    write_affine(sitk.AffineTransform(3), path) if path.suffix == ".mat" else write_image(image, path)
except OSError as error:
    print(error.errno, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert str(tmp_path / "out" / f"a{suffix}") in done.stdout
    assert os.listdir(tmp_path / "out") == []
