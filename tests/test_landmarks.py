"""Landmark files in voxel, world and pixel coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from storage.geometry import FileGrid, Geometry
from storage.images import read_image
from storage.landmarks import ImageError, local_to_world, read_landmarks

TILT = np.deg2rad(20.0)
TILTED = np.array([[np.cos(TILT), -np.sin(TILT), 0], [np.sin(TILT), np.cos(TILT), 0], [0, 0, 1]])
OBLIQUE = TILTED @ np.diag([-1.0, 1, -1])


@pytest.fixture
def geometry() -> Geometry:
    return Geometry.from_file_grid(FileGrid((9, 8, 7), (5.0, 1.5, 1.0), (4.0, -3.0, 2.0), tuple(OBLIQUE.ravel())))


def _write(path, header, rows):
    path.write_text("\n".join([header, *(",".join(str(v) for v in row) for row in rows)]) + "\n", encoding="utf-8")
    return path


def test_voxel_and_world_coordinates_agree_with_itk(tmp_path, geometry):
    image = sitk.Image(9, 8, 7, sitk.sitkUInt8)
    image.SetSpacing((5.0, 1.5, 1.0))
    image.SetOrigin((4.0, -3.0, 2.0))
    image.SetDirection(OBLIQUE.ravel().tolist())
    voxels = [(0, 0, 0), (8, 1, 3), (2.5, 6.25, 1)]
    worlds = [image.TransformContinuousIndexToPhysicalPoint(v) for v in voxels]
    from_voxels = read_landmarks(_write(tmp_path / "a.csv", "i,j,k", voxels), geometry)
    from_world = read_landmarks(_write(tmp_path / "b.csv", "name,x,y,z", [("p", *w) for w in worlds]), geometry)
    np.testing.assert_allclose(from_voxels, from_world, atol=1e-9)
    np.testing.assert_allclose(local_to_world(from_voxels, geometry), worlds, atol=1e-9)


def test_pixels_of_a_picture(tmp_path):
    picture = Geometry((1, 20, 30), (1.0, 1.0, 1.0), has_spacing=False, source_dimension=2)
    for header in ("x,y", "i,j", "X, Y"):
        points = read_landmarks(_write(tmp_path / "a.csv", header, [(3, 4.5)]), picture)
        np.testing.assert_array_equal(points, [[0, 4.5, 3]])


def test_real_landmarks_lie_on_the_picture(shared_data, tmp_path):
    folder = shared_data / "histology_landmarks"
    listed = sorted(folder.glob("*_landmarks.csv"))[0]
    rows = np.loadtxt(listed, delimiter=",", skiprows=1)
    image = read_image(folder / f"{listed.name.split('__')[0]}.jpg")
    points = read_landmarks(_write(tmp_path / "a.csv", "x,y", rows[:, 2:4]), image.geometry)
    assert (points[:, 1:] < np.array(image.geometry.shape[1:])).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n1,2,3\n", "columns must include i, j, k or x, y, z; found a, b, c"),
        ("x,y\n1,2\n", "columns must include"),
        ("x,y,z\n", "no landmarks"),
        ("", "no landmarks"),
        ("x,y,z\n1,2,3\n1,two,3\n", "line 3: column y is not a number"),
        ("x,y,z\n1,2\n", "line 2: column z"),
        ("x,y,z\n1,2,3\n1,2,nan\n", "line 3: a coordinate is NaN"),
        ("x,y,z\n1,2,3\n,,\n4,5,6\n", "line 3: empty, no position there; remove the row in both files"),
        ("name,x,y,z\na,1,2,3\nb,,,\n", "line 3: empty, no position"),
        ("\x00\xff\xfe", "landmarks"),
    ],
)
def test_bad_files(tmp_path, geometry, text, message):
    (tmp_path / "a.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ImageError, match=message):
        read_landmarks(tmp_path / "a.csv", geometry)


def test_missing_file(tmp_path, geometry):
    with pytest.raises(ImageError, match="no such file"):
        read_landmarks(tmp_path / "none.csv", geometry)
