"""Frames: file grid, analysis orientation and back."""

from __future__ import annotations

import json
from itertools import permutations, product

import numpy as np
import pytest

from storage.geometry import (
    FileGrid,
    Geometry,
    center_alignment,
    from_file_axes,
    moving_to_fixed,
    to_file_axes,
)


def _rotation(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    about_z = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    return about_z @ about_x


def _grid(matrix: np.ndarray, size=(7, 6, 5), spacing=(1.5, 2.0, 6.0)) -> FileGrid:
    return FileGrid(size, spacing, (-12.5, 30.0, 4.25), tuple(matrix.ravel()))


ORIENTATIONS = [
    np.eye(3)[:, list(order)] * np.array(signs)
    for order in permutations(range(3))
    for signs in product((1.0, -1.0), repeat=3)
]


@pytest.mark.parametrize("tilt", [0.0, 12.0])
@pytest.mark.parametrize("slice_axis", ["auto", "axial", "coronal", "sagittal"])
def test_every_orientation_keeps_each_voxel_where_it_is(slice_axis, tilt):
    for matrix in ORIENTATIONS:
        grid = _grid(_rotation(tilt) @ matrix)
        geometry = Geometry.from_file_grid(grid, slice_axis)
        index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.size[::-1]), indexing="ij"), axis=-1)
        world = (index[..., ::-1] * grid.spacing) @ np.array(grid.direction).reshape(3, 3).T + grid.origin
        turned = from_file_axes(world, geometry)
        assert turned.shape[:3] == geometry.shape
        local = np.stack(np.meshgrid(*(np.arange(n) for n in geometry.shape), indexing="ij"), axis=-1)
        ours = (local * geometry.spacing_mm) @ geometry.local_to_world()[:3, :3].T + geometry.origin_mm
        np.testing.assert_allclose(ours, turned, atol=1e-9)
        np.testing.assert_array_equal(to_file_axes(turned, geometry), world)
        back = geometry.file_grid()
        assert back.size == grid.size
        np.testing.assert_allclose(back.spacing, grid.spacing)
        np.testing.assert_allclose(back.origin, grid.origin, atol=1e-9)
        np.testing.assert_allclose(back.direction, grid.direction, atol=1e-12)


def test_axes_point_left_posterior_superior_after_reading():
    for matrix in ORIENTATIONS:
        geometry = Geometry.from_file_grid(_grid(_rotation(12.0) @ matrix), "axial")
        for axis, world in zip(range(3), (2, 1, 0), strict=True):
            assert geometry.axis_direction(axis)[world] > 0.9


@pytest.mark.parametrize(
    ("size", "spacing", "expected"),
    [
        ((7, 6, 5), (1.5, 2.0, 6.0), 2),
        ((7, 6, 5), (6.0, 2.0, 1.5), 0),
        ((7, 6, 5), (2.0, 6.0, 1.5), 1),
        ((7, 6, 5), (1.0, 1.0, 1.0), 2),
        ((7, 6, 5), (1.005, 1.0, 1.0), 2),
        ((7, 1, 5), (1.0, 1.0, 4.0), 1),
    ],
)
def test_slice_axis_is_the_through_plane_one(size, spacing, expected):
    assert Geometry.from_file_grid(_grid(np.eye(3), size, spacing)).world_axis() == expected


def test_record_survives_json():
    geometry = Geometry.from_file_grid(_grid(_rotation(31.0)))
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_moving_to_fixed_of_differently_stored_copies_is_a_world_identity():
    fixed = Geometry.from_file_grid(_grid(np.eye(3)), "axial")
    moving = Geometry.from_file_grid(_grid(np.diag([-1.0, 1.0, -1.0])), "sagittal")
    point = np.array([3.0, 4.0, 5.0, 1.0])
    world = moving.local_to_world() @ point
    np.testing.assert_allclose(fixed.local_to_world() @ moving_to_fixed(fixed, moving) @ point, world, atol=1e-9)


def test_center_alignment_takes_the_fixed_centre_to_the_moving_centre():
    fixed = Geometry((4, 6, 8), (5.0, 1.0, 1.0), origin_mm=(10.0, 0.0, -3.0))
    moving = Geometry((5, 9, 7), (2.0, 1.5, 1.0), origin_mm=(0.0, 7.0, 1.0))
    center = center_alignment(fixed, moving) @ np.append(fixed.center_mm(), 1)
    np.testing.assert_allclose(center, moving_to_fixed(fixed, moving) @ np.append(moving.center_mm(), 1))


def test_pixels_and_millimetres_do_not_mix():
    picture = Geometry((1, 4, 4), (1.0, 1.0, 1.0), has_spacing=False, source_dimension=2)
    with pytest.raises(ValueError, match="share no unit"):
        moving_to_fixed(picture, Geometry((1, 4, 4), (1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (0, 3, 3)}, "shape"),
        ({"spacing_mm": (1.0, -1.0, 1.0)}, "spacing"),
        ({"origin_mm": (np.nan, 0.0, 0.0)}, "origin"),
        ({"direction": (1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}, "orthonormal"),
    ],
)
def test_impossible_grids_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**({"shape": (2, 3, 3), "spacing_mm": (1.0, 1.0, 1.0)} | change))


def test_unknown_slice_axis_names_the_allowed_ones():
    with pytest.raises(ValueError, match="auto, axial, coronal, sagittal"):
        Geometry.from_file_grid(_grid(np.eye(3)), "oblique")
