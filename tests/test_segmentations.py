"""Class segmentations on the grid of an image: label maps, probability volumes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image as Picture

from storage.geometry import Geometry
from storage.images import ImageError, read_image
from storage.segmentations import from_probabilities, read_segmentation

SHAPE = (4, 6, 5)


@pytest.fixture
def image(tmp_path: Path) -> sitk.Image:
    """A volume stored backwards along two axes."""
    made = sitk.GetImageFromArray(np.random.default_rng(0).random(SHAPE).astype(np.float32))
    made.SetSpacing((1.0, 1.5, 4.0))
    made.SetOrigin((1.0, 2.0, 3.0))
    made.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(made, str(tmp_path / "image.nii.gz"))
    return made


@pytest.fixture
def geometry(image: sitk.Image, tmp_path: Path) -> Geometry:
    return read_image(tmp_path / "image.nii.gz").geometry


def _probabilities() -> np.ndarray:
    return np.random.default_rng(1).dirichlet([1, 1, 1], SHAPE).astype(np.float32)


def _vector(values: np.ndarray, like: sitk.Image) -> sitk.Image:
    made = sitk.GetImageFromArray(values, isVector=True)
    made.CopyInformation(like)
    return made


def _stack(values: np.ndarray, like: sitk.Image) -> sitk.Image:
    """The classes as the fourth axis."""
    parts = [sitk.GetImageFromArray(np.ascontiguousarray(values[..., c])) for c in range(values.shape[3])]
    for part in parts:
        part.CopyInformation(like)
    return sitk.JoinSeries(parts)


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
@pytest.mark.parametrize("made", [_vector, _stack], ids=["vector", "4D"])
def test_probabilities_become_the_most_probable_class_in_analysis_orientation(
    image: sitk.Image, geometry: Geometry, tmp_path: Path, made, suffix: str
) -> None:
    values = _probabilities()
    sitk.WriteImage(made(values, image), str(tmp_path / f"p.{suffix}"))
    found = read_segmentation(tmp_path / f"p.{suffix}", geometry)
    np.testing.assert_array_equal(found.labels, values.argmax(3)[:, ::-1, ::-1])
    np.testing.assert_allclose(found.probability, values.max(3)[:, ::-1, ::-1], atol=1e-6)


def test_a_label_map_is_certain(image: sitk.Image, geometry: Geometry, tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Cast(image > 0.5, sitk.sitkUInt8) * 7, str(tmp_path / "s.nii.gz"))
    found = read_segmentation(tmp_path / "s.nii.gz", geometry)
    assert set(np.unique(found.labels)) == {0, 7}
    assert (found.probability == 1).all()


def test_a_grey_picture_holds_labels(tmp_path: Path) -> None:
    labels = np.zeros((8, 9), np.uint8)
    labels[2:5, 3:6] = 4
    Picture.fromarray(labels * 20).save(tmp_path / "i.png")
    Picture.fromarray(labels).convert("RGB").save(tmp_path / "s.png")
    found = read_segmentation(tmp_path / "s.png", read_image(tmp_path / "i.png").geometry)
    np.testing.assert_array_equal(found.labels[0], labels)


def test_another_grid_is_refused_by_name(image: sitk.Image, geometry: Geometry, tmp_path: Path) -> None:
    sitk.WriteImage(_vector(_probabilities(), image)[:, :, :3], str(tmp_path / "short.nii.gz"))
    with pytest.raises(ImageError, match=r"short.nii.gz: labels are on another grid: labels 3 x"):
        read_segmentation(tmp_path / "short.nii.gz", geometry)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((1, 2, 2, 2), 3.0), r"lie in 0 to 1, found 3 to 3; apply the softmax"),
        (np.full((1, 2, 2, 1), 0.5), "one class"),
        (np.full((1, 2, 2, 2), np.nan), "8 of 8 voxels are NaN"),
    ],
)
def test_what_is_no_probability_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=f"net: .*{message}"):
        from_probabilities(values, "net")


def test_fractions_in_one_channel_are_no_labels(image: sitk.Image, geometry: Geometry, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="whole"):
        read_segmentation(tmp_path / "image.nii.gz", geometry)
