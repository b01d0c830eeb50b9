"""`samreg export` and `samreg apply` on a finished study and on single files."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from typer.testing import CliRunner

from pipeline.algorithms import warp
from pipeline.apply import inverse_at
from pipeline.cli import app
from pipeline.export import ExportRequest, export_study
from pipeline.folder import StudyFolder
from pipeline.pair_files import bids_labels, bids_stems, learn2reg_names
from storage.cohort import Pair
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry
from storage.landmarks import read_landmarks
from storage.transforms import make_transform, read_ddf, write_transform
from tests.grids import GRIDS, make_field, make_landmarks, make_pair
from tests.sample_study import write_study

PAIR = "subject-02__subject-01"
STEM = "sub-subject01/sub-subject01_from-subject02"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a phantom cohort and `study` of it."""
    folder = tmp_path_factory.mktemp("export")
    write_study(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    write_study(folder, shape=(1, 64, 64))
    return folder


def _call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * ((a > 0) & (a == b)).sum() / ((a > 0).sum() + (b > 0).sum()))


def _array(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def _points(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8", newline="") as stream:
        return np.array([[float(row[name]) for name in "xyz" if name in row] for row in csv.DictReader(stream)])


def test_every_form_of_a_pair_is_written(made: Path, tmp_path: Path) -> None:
    forms = [word for name in ("itk", "nifti", "ants", "learn2reg") for word in ("--format", name)]
    code, said = _call("export", made / "study", "--out", tmp_path, "--pairs", PAIR, *forms, "--images", "--labels")
    assert (code, said) == (0, f"{tmp_path}: 1 pairs\n")
    assert _files(tmp_path) == [
        "disp_subject-01_subject-02.nii.gz",
        f"{STEM}_0GenericAffine.mat",
        f"{STEM}_1Warp.nii.gz",
        f"{STEM}_desc-affine_mode-image_xfm.tfm",
        f"{STEM}_dseg.nii.gz",
        f"{STEM}_image.nii.gz",
        f"{STEM}_mode-image_xfm.h5",
        f"{STEM}_mode-image_xfm.nii.gz",
    ]
    stored = made / "study" / "transforms" / f"{PAIR}.h5"
    assert (tmp_path / f"{STEM}_mode-image_xfm.h5").read_bytes() == stored.read_bytes()
    assert nibabel.load(tmp_path / f"{STEM}_mode-image_xfm.nii.gz").header["intent_code"] == 1007
    truth, moving = (_array(made / f"subject-0{i}_label.nii.gz") for i in (1, 2))
    carried = _array(tmp_path / f"{STEM}_dseg.nii.gz")
    assert _dice(carried, truth) > max(0.9, _dice(moving, truth))


def test_a_dense_composite_is_the_same_map(made: Path, tmp_path: Path) -> None:
    geometry = Geometry((3, 64, 64), (5.0, 1.5, 1.5))
    study = tmp_path / "study"
    shutil.copytree(made / "study", study)
    write_transform(StudyFolder(study).transform(PAIR), *make_field(geometry, 4), geometry, {"key": "k"})
    request = ExportRequest(dense=True)
    assert export_study(study, tmp_path / "out", request, [PAIR]).done == 1
    coarse, dense = StudyFolder(study).transform(PAIR), tmp_path / "out" / f"{STEM}_mode-image_xfm.h5"
    assert dense.stat().st_size > 2 * coarse.stat().st_size
    points = np.random.default_rng(0).uniform(0, 1, (50, 3)) * (63 * 1.5, 63 * 1.5, 10.0)
    here, there = (
        np.array([sitk.ReadTransform(str(path)).TransformPoint(p) for p in points.tolist()]) for path in (coarse, dense)
    )
    np.testing.assert_allclose(here, there, atol=1e-3)


def test_a_pair_that_fails_costs_only_itself(made: Path, tmp_path: Path) -> None:
    code, said = _call("export", made / "study", "--out", tmp_path)
    assert code == 1
    assert f"{tmp_path}: 2 pairs" in said
    assert "failed subject-03__subject-01: " in said
    assert "has no transform; samreg status says why" in said
    assert len(list(tmp_path.rglob("*.h5"))) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pairs", "subject-02_subject-01"], "has no pair 'subject-02_subject-01'; it has subject-02__subject-01"),
        (["--format", "ants1"], "--format ants1 is not one of itk, nifti, ants, learn2reg, csv, duckdb"),
        (["--labels", "--label-rule", "cubic"], "--label-rule cubic is not one of nearest, linear"),
    ],
)
def test_wrong_usage_of_export(made: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    code, said = _call("export", made / "study", "--out", tmp_path, *arguments)
    assert code == 2
    assert expected in " ".join(said.split())
    assert _files(tmp_path) == []


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    code, said = _call("export", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert "holds no registered pairs" in said


def test_images_labels_landmarks_and_rois_are_carried(made: Path, tmp_path: Path) -> None:
    code, said = _call(
        *("apply", made / "study", PAIR, "--out", tmp_path, "--rois", "--label-rule", "linear"),
        *("--image", made / "subject-02.nii.gz", "--labels", made / "subject-02_label.nii.gz"),
        *("--landmarks", made / "subject-01_landmarks.csv", "--moving-landmarks", made / "subject-02_landmarks.csv"),
    )
    assert code == 0, said
    assert _files(tmp_path) == [
        "rois_in-subject01.nii.gz",
        "subject-01_landmarks_in-subject02.csv",
        "subject-02_in-subject01.nii.gz",
        "subject-02_label_in-subject01.nii.gz",
        "subject-02_landmarks_in-subject01.csv",
    ]
    here, there = (_points(made / f"subject-0{i}_landmarks.csv") for i in (1, 2))
    carried = _points(tmp_path / "subject-01_landmarks_in-subject02.csv")
    back = _points(tmp_path / "subject-02_landmarks_in-subject01.csv")
    before = np.linalg.norm(here - there, axis=1).mean()
    assert np.linalg.norm(carried - there, axis=1).mean() < 0.2 * before  # what three thick slices leave
    assert np.linalg.norm(back - here, axis=1).mean() < 0.2 * before
    store = EmbeddingStore(StudyFolder(made / "study").embeddings)
    grids = [store.geometry(f"subject-0{i}") for i in (1, 2)]
    ddf = read_ddf(StudyFolder(made / "study").transform(PAIR), *grids)
    local = read_landmarks(made / "subject-01_landmarks.csv", grids[0])
    inside = ((local >= 0) & (local <= (np.array(grids[0].shape) - 1) * grids[0].spacing_mm)).all(axis=1)
    ours = warp.warp_points(local, ddf, grids[0].spacing_mm)[:, ::-1]  # the phantom's axes are the world's
    assert inside.sum() > 10
    np.testing.assert_allclose(carried[inside], ours[inside], atol=0.01)
    truth = _array(made / "subject-01_label.nii.gz")
    assert _dice(_array(tmp_path / "subject-02_label_in-subject01.nii.gz"), truth) > 0.9
    fixed, moved = _array(made / "subject-01.nii.gz"), _array(tmp_path / "subject-02_in-subject01.nii.gz")
    moving = _array(made / "subject-02.nii.gz")
    assert np.abs(fixed - moved).mean() < 0.7 * np.abs(fixed - moving).mean()
    rois = np.moveaxis(nibabel.load(tmp_path / "rois_in-subject01.nii.gz").get_fdata(), 3, 0)
    inside = [np.bincount(truth.T[roi > 0].astype(int), minlength=2)[1:].max() / max(roi.sum(), 1) for roi in rois]
    assert len(rois) > 3
    assert np.median(inside) > 0.9


def test_pictures_stay_pictures(pictures: Path, tmp_path: Path) -> None:
    code, said = _call(
        *("apply", pictures / "study", PAIR, "--out", tmp_path, "--image", pictures / "subject-02.png"),
        *("--labels", pictures / "subject-02_label.png", "--rois"),
        *("--landmarks", pictures / "subject-01_landmarks.csv"),
    )
    assert code == 0, said
    truth = _array(pictures / "subject-01_label.png")
    assert _dice(_array(tmp_path / "subject-02_label_in-subject01.png"), truth) > 0.9
    there = _points(pictures / "subject-02_landmarks.csv")
    assert np.linalg.norm(_points(tmp_path / "subject-01_landmarks_in-subject02.csv") - there, axis=1).max() < 0.3
    export = tmp_path / "export"
    assert _call("export", pictures / "study", "--out", export, "--pairs", PAIR, "--images", "--labels")[0] == 0
    assert _array(export / f"{STEM}_image.png").dtype == np.uint8
    assert _dice(_array(export / f"{STEM}_dseg.png"), truth) > 0.9


@pytest.mark.parametrize("grid", GRIDS)
def test_a_transform_file_needs_no_study(grid: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, grid)
    here, there = make_landmarks(pair)
    write_transform(tmp_path / "t.h5", *make_field(pair.fixed.geometry), pair.fixed.geometry, {}, pair.moving.geometry)
    names = "ijk"[: here.shape[1]]  # and extra columns, which stay
    fixed, moving = (sitk.ReadImage(str(path)) for path in (pair.fixed_path, pair.moving_path))
    indices = [
        np.array([image.TransformPhysicalPointToContinuousIndex(p) for p in points.tolist()])
        for image, points in ((fixed, here), (moving, there))
    ]
    for name, index in zip(("fixed", "moving"), indices, strict=True):
        rows = [["name", *names], *([f"p{i}", *row] for i, row in enumerate(index.tolist()))]
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    code, said = _call(
        *("apply", tmp_path / "t.h5", "--fixed", pair.fixed_path, "--moving", pair.moving_path, "--out", tmp_path),
        *("--landmarks", tmp_path / "fixed.csv", "--moving-landmarks", tmp_path / "moving.csv"),
        *("--image", pair.moving_path),
    )
    assert code == 0, said
    for name, expected in (("fixed_in-moving", indices[1]), ("moving_in-fixed", indices[0])):
        with (tmp_path / f"{name}.csv").open(newline="") as stream:
            found = list(csv.DictReader(stream))
        assert [row["name"] for row in found] == [f"p{i}" for i in range(len(here))]
        np.testing.assert_allclose([[float(row[c]) for c in names] for row in found], expected, atol=0.02)
    warped = sitk.ReadImage(str(next(tmp_path.glob("moving_in-fixed.[!c]*"))))
    assert warped.GetSize() == fixed.GetSize()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "is a folder: name a pair"),
        ([PAIR], "nothing to apply the transform to"),
        ([PAIR, "--fixed", "a.nii.gz"], "--fixed and --moving are for a transform file"),
        (
            [PAIR, "--image", "a/x.nii.gz", "--labels", "b/x.nii.gz"],
            "two files would be written as x_in-subject01.nii.gz",
        ),
        ([PAIR, "--label-rule", "cubic"], "--label-rule cubic is not one of nearest, linear"),
    ],
)
def test_wrong_usage_of_apply(made: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    code, said = _call("apply", made / "study", *arguments, "--out", tmp_path)
    assert code == 2
    assert expected in " ".join(said.split())


def test_a_transform_file_needs_its_images(made: Path, tmp_path: Path) -> None:
    path = made / "study" / "transforms" / f"{PAIR}.h5"
    code, said = _call("apply", path, "--out", tmp_path, "--image", made / "subject-02.nii.gz")
    assert code == 2
    assert "give its fixed image with --fixed" in said
    fixed = made / "subject-01.nii.gz"
    for option, expected in ((["--landmarks", "a.csv"], "give it with --moving"), (["--rois"], "has no ROIs")):
        code, said = _call("apply", path, "--out", tmp_path, "--fixed", fixed, *option)
        assert code == 2
        assert expected in " ".join(said.split())


def test_files_that_cannot_be_used_are_named_and_the_others_done(made: Path, pictures: Path, tmp_path: Path) -> None:
    code, said = _call(
        *("apply", made / "study", PAIR, "--out", tmp_path, "--labels", made / "subject-02.nii.gz"),
        *("--image", pictures / "subject-02.png", "--image", tmp_path / "none.nii.gz"),
        *("--labels", made / "subject-02_label.nii.gz"),
    )
    said = " ".join(said.split())
    assert code == 1
    assert "subject-02.nii.gz: labels must be whole" in said
    assert "subject-02.png: a picture without spacing; the moving image of this transform is 3 x 64 x 64" in said
    assert "none.nii.gz: no such file" in said
    assert _files(tmp_path) == ["subject-02_label_in-subject01.nii.gz"]


def test_points_are_inverted_everywhere() -> None:
    geometry = Geometry((9, 33, 41), (5.0, 1.5, 1.5))
    rng = np.random.default_rng(0)
    affine = np.eye(4)
    affine[1:3, 1:3] = [[1.1, -0.3], [0.2, 0.9]]
    lattice = 3.0 * np.sin(np.linspace(0, 6, 3 * 9 * 17 * 21).reshape(3, 9, 17, 21) + rng.uniform(0, 6, (3, 1, 1, 1)))
    transform = make_transform(affine, lattice, (5.0, 3.0, 3.0), geometry)
    points = rng.uniform(-0.2, 1.2, (300, 3)) * (60.0, 48.0, 40.0)
    np.testing.assert_allclose(inverse_at(transform, transform.at(points)), points, atol=0.02)


def test_landmarks_that_come_from_nowhere_are_left_empty_and_named(made: Path, tmp_path: Path) -> None:
    geometry, rng = Geometry((3, 64, 64), (5.0, 1.5, 1.5)), np.random.default_rng(0)
    torn = rng.normal(0, 4, (3, 3, 17, 17)) * np.reshape((0, 1, 1), (3, 1, 1, 1))
    study = tmp_path / "study"
    shutil.copytree(made / "study", study)
    write_transform(StudyFolder(study).transform(PAIR), np.eye(4), torn, (5.0, 6.0, 6.0), geometry, {"key": "k"})
    points = tmp_path / "points.csv"
    rows = [("name", "x", "y", "z"), *((n, *p) for n, p in enumerate(rng.uniform(0, 90, (12, 3)) * (1, 1, 0.1)))]
    points.write_text("\n".join(",".join(map(str, row)) for row in rows), encoding="utf-8")
    code, said = _call("apply", study, PAIR, "--out", tmp_path / "out", "--moving-landmarks", points)
    assert code == 1
    target = tmp_path / "out" / "points_in-subject01.csv"
    with target.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    empty = [number for number, row in enumerate(found, 1) if row["x"] == row["y"] == row["z"] == ""]
    assert 0 < len(empty) < 12
    assert all(row["x"] and row["y"] and row["z"] for n, row in enumerate(found, 1) if n not in empty)
    assert [row["name"] for row in found] == [str(n) for n in range(12)]
    said = " ".join(said.split())
    assert f"takes no position to point {', '.join(map(str, empty))} of 12, since it folds there" in said
    assert f"left empty in {target}" in said


def test_names_that_bids_does_not_allow() -> None:
    found = bids_labels(["sub 1", "sub_1", "p02", "ä"])
    assert found["p02"] == "p02"
    assert len(set(found.values())) == 4
    assert all(label.isalnum() and label.isascii() for label in found.values())


def test_pairs_of_the_same_subjects_have_names_of_their_own() -> None:
    pairs = [Pair("a", "m", "f"), Pair("b", "m", "f"), Pair("c", "f", "m")]
    stems = bids_stems(pairs, bids_labels("mf"))
    assert stems == {"a": "sub-f/sub-f_from-m", "b": "sub-f/sub-f_from-m_run-2", "c": "sub-m/sub-m_from-f"}
    assert learn2reg_names(pairs) == {name: f"disp_{name}.nii.gz" for name in "abc"}


def test_learn2reg_names() -> None:
    listed = learn2reg_names([Pair("a", "OASIS_0438_0000", "OASIS_0437_0000"), Pair("b", "T_0001_0001", "T_0001_0000")])
    assert listed == {"a": "disp_0437_0438.nii.gz", "b": "disp_0001_0001.nii.gz"}
    assert learn2reg_names([Pair("a", "p/2", "p1")])["a"].startswith("disp_p1_p-2~")
