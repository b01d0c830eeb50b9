"""The layouts of public data sets, made of the real images of the development data."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from storage.images import read_image, read_labels
from storage.landmarks import read_landmarks
from storage.layouts.found import Found
from storage.layouts.registry import read_layout
from tests import public_data
from tests.public_data import write_text


def read(name: str, root: Path) -> Found:
    found = read_layout(name, root, root.parent / "files")
    assert not found.problems
    return found


def columns(path: Path, *names: str) -> np.ndarray:
    with path.open(newline="", encoding="utf-8") as stream:
        return np.array([[float(row[name]) for name in names] for row in csv.DictReader(stream)])


def need(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"the sample {folder.name} is not in ../shared/data")
    return folder


def test_acdc_frames_and_cine_of_a_patient_agree(shared_data: Path, tmp_path: Path) -> None:
    source, root = need(shared_data / "acdc_cardiac"), tmp_path / "training" / "patient067"
    write_text(root / "Info.cfg", "ED: 1\nES: 2\nGroup: NOR\n")
    for phase, frame in (("ED", "01"), ("ES", "02")):
        shutil.copy(source / f"patient067_{phase}.nii.gz", root / f"patient067_frame{frame}.nii.gz")
        shutil.copy(source / f"patient067_{phase}_gt.nii.gz", root / f"patient067_frame{frame}_gt.nii.gz")
    plain = read("acdc", root.parent)
    cine = sitk.JoinSeries([sitk.ReadImage(subject.image) for subject in plain.subjects])
    sitk.WriteImage(cine, str(root / "patient067_4d.nii.gz"))
    expected = read_image(plain.subjects[1].image)
    (root / "patient067_frame02.nii.gz").unlink()
    cut = read("acdc", root.parent).subjects[1]
    assert cut.image.endswith("patient067_ES.mha")
    found = read_image(cut.image)
    assert np.array_equal(found.array, expected.array)
    assert found.geometry.spacing_mm == pytest.approx(expected.geometry.spacing_mm)
    assert read_labels(cut.label, found.geometry).max() == 3


def test_mnms_cine_of_a_heart(shared_data: Path, tmp_path: Path) -> None:
    source, root = need(shared_data / "mnms_cardiac") / "A" / "D0R0R9", tmp_path / "OpenDataset"
    public_data.mnms(root, ["D0R0R9"])
    for ending, target in (("", "_sa"), ("_gt", "_sa_gt")):
        frames = [sitk.ReadImage(str(source / f"D0R0R9_{phase}{ending}.nii.gz")) for phase in ("ED", "ES")]
        cine = sitk.JoinSeries([frames[0], frames[0], frames[1]])
        sitk.WriteImage(cine, str(root / f"Training/Labeled/D0R0R9/D0R0R9{target}.nii.gz"))
    for subject, phase in zip(read("mnms", root).subjects, ("ED", "ES"), strict=True):
        expected = read_image(source / f"D0R0R9_{phase}.nii.gz")
        found = read_image(subject.image)
        assert np.array_equal(found.array, expected.array)
        labels = read_labels(source / f"D0R0R9_{phase}_gt.nii.gz", expected.geometry)
        assert np.array_equal(read_labels(subject.label, found.geometry), labels)


def test_msd_hippocampus(shared_data: Path, tmp_path: Path) -> None:
    source, root = need(shared_data / "msd_hippocampus"), tmp_path / "Task04_Hippocampus"
    root.mkdir()
    (root / "imagesTr").symlink_to(source / "images")
    (root / "labelsTr").symlink_to(source / "labels")
    names = sorted(path.name for path in (source / "images").glob("*.nii.gz"))
    listed = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    write_text(root / "dataset.json", json.dumps({"modality": {"0": "MRI"}, "training": listed, "test": []}))
    found = read("msd", root)
    assert len(found.subjects) == len(names)
    first = found.subjects[0]
    assert set(np.unique(read_labels(first.label, read_image(first.image).geometry))) == {0, 1, 2}


def test_fire_control_points(shared_data: Path, tmp_path: Path) -> None:
    source, root = need(shared_data / "fire_retina"), tmp_path / "FIRE"
    points = columns(source / "A01_landmarks.csv", "fixed_x", "fixed_y", "moving_x", "moving_y")
    text = "".join(" ".join(map(str, row)) + " \n" for row in points)
    write_text(root / "Ground Truth" / "control_points_A01_1_2.txt", text)
    (root / "Images").mkdir()
    for path in source.glob("*.png"):
        shutil.copy(path, root / "Images")
    found = read("fire", root)
    assert [pair.pair for pair in found.pairs] == sorted({path.name[:3] for path in source.glob("*.png")})
    for subject, at in zip(found.subjects[:2], (0, 2), strict=True):
        image = read_image(subject.image)
        assert image.is_rgb
        place = read_landmarks(subject.landmarks, image.geometry)
        assert np.allclose(place[:, :0:-1], points[:, at : at + 2], atol=1e-3)


def test_aerial_transforms_give_the_known_landmarks(shared_data: Path, tmp_path: Path) -> None:
    source, root = need(shared_data / "aerial_cell_histology_2d"), tmp_path / "patch_tlevel4"
    maps = {}
    for path in sorted(source.glob("zh*_landmarks.csv")):
        points = columns(path, "fixed_x", "fixed_y", "moving_x", "moving_y")
        here = np.column_stack([points[:, :2], np.ones(len(points))])
        maps[path.name.removesuffix("_landmarks.csv")] = np.linalg.lstsq(here, points[:, 2:], rcond=None)[0].T
    found = read("aerial", public_data.aerial(root, maps, source, side=300))
    assert len(found.pairs) == len(maps)
    subjects = {subject.subject: subject for subject in found.subjects}
    for pair in found.pairs:
        image = read_image(subjects[pair.fixed].image)
        assert image.is_rgb
        fixed, moving = (
            read_landmarks(subjects[name].landmarks, image.geometry)[:, :0:-1] for name in (pair.fixed, pair.moving)
        )
        assert len(fixed) > 10
        expected = np.column_stack([fixed, np.ones(len(fixed))]) @ maps[pair.pair].T
        assert np.allclose(moving, expected, atol=0.01)
