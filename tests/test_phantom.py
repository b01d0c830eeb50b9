"""Phantom cohorts: the written truth carries one subject exactly onto another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from pipeline import phantom
from pipeline.algorithms import warp
from storage.cohort import read_cohort
from storage.geometry import Geometry, moving_to_fixed
from storage.images import read_image, read_labels
from storage.landmarks import read_landmarks
from storage.transforms import read_ddf

SHAPES = [(8, 64, 64), (1, 96, 96)]


@pytest.fixture(scope="module", params=SHAPES, ids=["volume", "picture"])
def cohort(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom.make_cohort(tmp_path_factory.mktemp("phantom"), subjects=2, shape=request.param)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_the_true_field_aligns_labels_and_landmarks(cohort: Path) -> None:
    fixed, moving = read_cohort(cohort).subjects
    here, there = read_image(fixed.image).geometry, read_image(moving.image).geometry
    labels = read_labels(fixed.label, here), read_labels(moving.label, there)
    ddf = phantom.true_ddf(*(phantom.read_warp(cohort, s.subject) for s in (moving, fixed)), here)
    indices = warp.moving_indices(ddf, here.spacing_mm, moving_to_fixed(here, there), there.spacing_mm)
    moved = warp.warp_labels(labels[1], indices)
    values = [v for v in range(1, 7) if (labels[0] == v).any()]
    assert len(values) == 6
    before = np.mean([_dice(labels[0] == v, labels[1] == v) for v in values])
    after = np.mean([_dice(labels[0] == v, moved == v) for v in values])
    assert before < 0.75
    assert after > 0.91  # what nearest-neighbour sampling of small organs leaves
    points = read_landmarks(fixed.landmarks, here), read_landmarks(moving.landmarks, there)
    inside = ((points[0] >= 0) & (points[0] <= (np.array(here.shape) - 1) * here.spacing_mm)).all(axis=1)
    carried = warp.warp_points(points[0], ddf, here.spacing_mm)
    distance = np.linalg.norm(carried - points[1], axis=1)[inside]
    assert inside.sum() >= 20
    assert distance.max() < 0.3  # linear interpolation of the field between thick slices
    assert np.linalg.norm(points[0] - points[1], axis=1).mean() > 3


def test_without_sampling_the_true_field_is_exact(cohort: Path) -> None:
    fixed, moving = (phantom.read_warp(cohort, s.subject) for s in read_cohort(cohort).subjects)
    geometry = read_image(read_cohort(cohort).subjects[0].image).geometry
    points = phantom.positions(geometry)
    there = points + np.moveaxis(phantom.true_ddf(moving, fixed, geometry), 0, -1)
    here = phantom.template_labels(fixed.to_template(points), geometry)
    carried = phantom.template_labels(moving.to_template(there), geometry)
    assert (here != carried).mean() < 1e-4


def test_the_written_transform_is_the_map_to_the_template(cohort: Path) -> None:
    subject = read_cohort(cohort).subjects[0]
    geometry = read_image(subject.image).geometry
    known = phantom.read_warp(cohort, subject.subject)
    ddf = np.moveaxis(read_ddf(cohort.parent / "truth" / f"{subject.subject}.h5", geometry), 0, -1)
    points = phantom.positions(geometry)
    np.testing.assert_allclose(points + ddf, known.to_template(points), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_are_one_to_one_and_their_inverse_is_exact(shape: tuple[int, int, int]) -> None:
    geometry = Geometry(shape, (5.0, 1.5, 1.5))
    strong = phantom.Variation(warp_mm=12.0)
    for seed in range(4):
        known = phantom.draw_warp(geometry, strong, np.random.default_rng(seed))
        points = phantom.positions(geometry)
        np.testing.assert_allclose(known.from_template(known.to_template(points)), points, atol=1e-3)
        step = 0.1
        columns = [known.to_template(points + step * axis) - known.to_template(points) for axis in np.eye(3)]
        assert np.linalg.det(np.stack(columns, axis=-1) / step).min() > 0.1


def test_the_identity_shows_the_template() -> None:
    geometry = Geometry((6, 64, 64), (5.0, 1.5, 1.5))
    still = phantom.Variation(rotation_deg=0, scale=0, translation_mm=0, warp_mm=0)
    known = phantom.draw_warp(geometry, still, np.random.default_rng(0))
    points = phantom.positions(geometry)
    np.testing.assert_allclose(known.to_template(points), points, atol=1e-9)
    assert set(np.unique(phantom.template_labels(points, geometry))) == set(range(7))


def test_a_cohort_is_reproducible_and_a_prefix_of_a_larger_one(tmp_path: Path) -> None:
    for name, count in (("small", 1), ("large", 2)):
        phantom.make_cohort(tmp_path / name, subjects=count, shape=(3, 48, 48), seed=5)
    arrays = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / "subject-01.nii.gz")))
        for name in ("small", "large")
    ]
    np.testing.assert_array_equal(*arrays)
    other = phantom.make_cohort(tmp_path / "other", subjects=1, shape=(3, 48, 48), seed=6)
    assert phantom.read_warp(other, "subject-01") != phantom.read_warp(tmp_path / "large" / "cohort.csv", "subject-01")


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 0 subjects"):
        phantom.make_cohort(tmp_path, subjects=0)
    with pytest.raises(ValueError, match="no thinner than a pixel"):
        phantom.make_cohort(tmp_path, spacing_mm=(1.0, 1.5, 1.5))
