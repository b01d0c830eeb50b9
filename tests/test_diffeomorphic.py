"""`fit.diffeomorphic` and `output.jacobian` through a study: what is written, said and made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image as Picture

from pipeline.algorithms import metrics
from pipeline.algorithms.inverse import NotInvertedError
from pipeline.config import make_config
from pipeline.folder import OUTPUTS, StudyFolder
from pipeline.progress import SilentReporter
from pipeline.stages.inverse import invert_transform, without_folds
from pipeline.status import read_status
from pipeline.study import StudySummary, run_study
from storage import tables
from storage.cohort import Pair, read_cohort
from storage.geometry import Geometry
from storage.images import read_image
from storage.transforms import make_transform, read_ddf
from tests import phantoms

PAIRS = [Pair("p", "b", "a"), Pair("q", "a", "b")]
FIT = {**phantoms.QUICK_FIT, "diffeomorphic": True, "refine": {"method": "demons", "iterations": [15, 15]}}


def run(cohort: Path, out: Path, fit: dict[str, Any] = FIT, jacobian: bool = True) -> StudySummary:
    config = make_config({"execution": {"executor": "serial"}, "fit": fit, "output": {"jacobian": jacobian}})
    return run_study(config, read_cohort(cohort), out, PAIRS, reporter=SilentReporter())


def fitted(summary: StudySummary) -> int:
    return next(stage.done for stage in summary.stages if stage.stage == "fit")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes on grids of their own."""
    folder = tmp_path_factory.mktemp("cohort")
    manifest = phantoms.write_cohort(folder, ["a", "b"])
    image, labels = phantoms.ellipses((6, 56, 56), (2.0, -1.0), 1.05)
    phantoms.write_volume(folder / "1.nii.gz", image, (1.3, 1.4, 5.0))
    phantoms.write_volume(folder / "1_gt.nii.gz", labels, (1.3, 1.4, 5.0))
    return manifest


@pytest.fixture(scope="module")
def study(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "study"
    assert run(cohort, out).n_failures == 0
    return out


def image_of(cohort: Path, name: str) -> sitk.Image:
    return sitk.ReadImage(str(cohort.parent / {"a": "0.nii.gz", "b": "1.nii.gz"}[name]))


def test_the_rows_say_what_was_guaranteed(study: Path) -> None:
    for row in tables.read_table(study, "metrics").to_pylist():
        assert row["jacobian_min"] > 0
        assert 0 < row["inverse_error_mm"] < row["inverse_error_mm_p95"] < 1
        assert row["inverse_error_vox"] > 0
        assert row["fold_fraction_rois"] == row["fold_fraction_rois_refined"] == 0
        assert 0 <= row["roi_dice_min"] <= row["roi_dice"] <= 1
        assert row["roi_dice"] > 0.7
        assert row["seconds_inverse"] > 0


def test_itk_goes_there_and_back(study: Path, cohort: Path) -> None:
    folder = StudyFolder(study)
    there, back = (sitk.ReadTransform(str(folder.output(name, "p"))) for name in ("transforms", "inverses"))
    fixed, moving = image_of(cohort, "a"), image_of(cohort, "b")
    errors = []
    for index in np.ndindex(*fixed.GetSize()):
        point = fixed.TransformIndexToPhysicalPoint(index)
        moved = there.TransformPoint(point)
        inside = moving.TransformPhysicalPointToContinuousIndex(moved)
        if all(0 <= i <= n - 1 for i, n in zip(inside, moving.GetSize(), strict=True)):
            errors.append(np.linalg.norm(np.subtract(back.TransformPoint(moved), point)))
    said = next(row for row in tables.read_table(study, "metrics").to_pylist() if row["pair"] == "p")
    assert len(errors) > 2000
    assert np.mean(errors) == pytest.approx(said["inverse_error_mm"], rel=0.05)


def test_the_inverse_pulls_the_fixed_image_onto_the_moving_grid(study: Path, cohort: Path) -> None:
    fixed, moving = image_of(cohort, "a"), image_of(cohort, "b")
    inverse = sitk.ReadTransform(str(StudyFolder(study).output("inverses", "p")))
    goal, before, after = (
        sitk.GetArrayFromImage(image)
        for image in (moving, sitk.Resample(fixed, moving), sitk.Resample(fixed, moving, inverse))
    )
    assert np.abs(goal - after).mean() < 0.5 * np.abs(goal - before).mean()


def test_the_map_is_the_log_jacobian_of_the_written_field(study: Path, cohort: Path) -> None:
    folder, geometry = StudyFolder(study), read_image(cohort.parent / "0.nii.gz").geometry
    moving = read_image(cohort.parent / "1.nii.gz").geometry
    written = read_image(folder.output("jacobians", "p"))
    assert written.geometry == geometry
    truth = metrics.log_jacobian(read_ddf(folder.transform("p"), geometry, moving), geometry.spacing_mm)
    np.testing.assert_allclose(written.array, truth, atol=0.02)


@pytest.mark.parametrize("name", ["transforms", "inverses", "jacobians"])
def test_a_file_that_was_deleted_is_made_again(study: Path, cohort: Path, name: str) -> None:
    before = phantoms.study_tables(study)
    path = StudyFolder(study).output(name, "q")
    whole = path.read_bytes()
    path.unlink()
    assert not read_status(study).complete
    assert fitted(run(cohort, study)) == 1
    assert read_status(study).complete
    assert path.read_bytes() == whole
    assert phantoms.study_tables(study) == before


def test_a_map_never_outlives_its_fit(cohort: Path, tmp_path: Path) -> None:
    folder, plain = StudyFolder(tmp_path / "study"), {**phantoms.QUICK_FIT, "diffeomorphic": True}
    run(cohort, folder.root, plain)
    assert fitted(run(cohort, folder.root, plain, jacobian=False)) == 0
    assert folder.output("jacobians", "p").exists()
    assert fitted(run(cohort, folder.root, phantoms.QUICK_FIT, jacobian=False)) == 2
    assert not folder.output("jacobians", "p").exists()
    assert not folder.output("inverses", "p").exists()
    row = tables.read_table(folder.root, "metrics").to_pylist()[0]
    assert row["jacobian_min"] is row["inverse_error_mm"] is row["seconds_inverse"] is None
    assert row["roi_dice"] is not None
    assert fitted(run(cohort, folder.root, phantoms.QUICK_FIT)) == 2
    assert read_status(folder.root).complete


@pytest.mark.parametrize("step", ["pipeline.stages.fit.invert_transform", "pipeline.stages.fit.write_image"])
def test_a_pair_that_fails_leaves_no_file(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*given: Any) -> None:
        raise NotInvertedError("the field as written folds")

    monkeypatch.setattr(step, fail)
    folder = StudyFolder(tmp_path / "study")
    assert run(cohort, folder.root, {**phantoms.QUICK_FIT, "diffeomorphic": True}).n_failures == 2
    assert [path for name in OUTPUTS for path in (folder.root / name).glob("*")] == []


def test_pictures_are_inverted_in_pixels(tmp_path: Path) -> None:
    rows = []
    for name, shift in (("a", 0.0), ("b", 3.0)):
        image, _ = phantoms.ellipses((1, 64, 64), (shift, -shift))
        Picture.fromarray(np.clip(image[0], 0, 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
        rows.append({"subject": name, "image": f"{name}.png"})
    cohort = phantoms.write_csv(tmp_path / "cohort.csv", rows)
    assert run(cohort, tmp_path / "study").n_failures == 0
    row = tables.read_table(tmp_path / "study", "metrics").to_pylist()[0]
    assert row["inverse_error_mm"] is None
    assert row["inverse_error_vox"] < 0.1
    inverse = sitk.ReadTransform(str(StudyFolder(tmp_path / "study").output("inverses", "p")))
    assert inverse.GetDimension() == 2
    assert sitk.ReadImage(str(StudyFolder(tmp_path / "study").output("jacobians", "p"))).GetSize() == (64, 64)


def test_a_sweep_measures_without_keeping_files(study: Path) -> None:
    grid = "fit.diffeomorphic=true,false"
    done = phantoms.samreg("sweep", study, "--grid", grid, "--name", "d", "--executor", "serial")
    assert done.returncode == 0, done.stderr
    found = pq.read_table(study / "sweeps" / "d" / "pairs.parquet").to_pylist()
    assert {row["fit.diffeomorphic"]: row["jacobian_min"] is not None for row in found} == {True: True, False: False}
    assert not list((study / "sweeps").rglob("*.h5"))


def test_a_refined_field_that_folds_between_voxels_is_repaired() -> None:
    ddf = np.zeros((3, 1, 30, 30), np.float32)
    ddf[2, 0, 12, 13], ddf[2, 0, 12, 12] = -0.6, 0.6
    found, damped = without_folds(ddf, np.eye(4), (1.0, 1.0, 1.0))
    assert damped
    np.testing.assert_array_equal(found[:, :, 20:], ddf[:, :, 20:])
    same, damped = without_folds(found, np.eye(4), (1.0, 1.0, 1.0))
    assert same is found
    assert not damped


def test_a_stored_field_that_folds_is_refused() -> None:
    geometry = Geometry((3, 8, 8), (2.0, 1.0, 1.0))
    values = np.zeros((3, 3, 8, 8))
    values[2, :, :, 4:] = -3.0
    with pytest.raises(ValueError, match="the field as written folds: det J is -2"):
        invert_transform(make_transform(np.eye(4), values, geometry.spacing_mm, geometry), geometry, geometry, None, {})
