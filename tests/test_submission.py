"""Submissions to Learn2Reg and LUMIR: what a dataset JSON asks for, and the evaluators' measures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)
from typer.testing import CliRunner

from pipeline.algorithms import learn2reg
from pipeline.cli import app
from storage import tables
from tests import public_data
from tests.phantoms import QUICK_FIT

NAME = "disp_0002_0002.nii.gz"


def _call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Learn2Reg task and the study of its pair for validation."""
    root = tmp_path_factory.mktemp("task")
    public_data.learn2reg(root / "LungCT")
    pairs = ["--pairs", root / "pairs.csv"]
    assert _call("cohort", "from", "learn2reg", root / "LungCT", "--out", root / "cohort.csv", *pairs)[0] == 0
    quick = ["--set", f"fit={json.dumps(QUICK_FIT)}", "--executor", "serial"]
    code, said = _call("run", "--cohort", root / "cohort.csv", "--out", root / "study", *pairs, *quick)
    assert code == 0, said
    return root


def _export(task: Path, out: Path, *more: object) -> tuple[int, str]:
    listing = ("--dataset", task / "LungCT" / "LungCT_dataset.json")
    return _call("export", task / "study", "--out", out, "--format", "learn2reg", *listing, *more)


def test_a_submission_is_checked_and_scored(task: Path, tmp_path: Path) -> None:
    code, said = _export(task, tmp_path, "--scores")
    assert code == 0, said
    assert "1 scores" in said
    [row] = tables.read_table(tmp_path, "submission").to_pylist()
    assert row["file"] == NAME
    assert 0.9 < row["l2r_dice"] <= 1
    assert 0 <= row["l2r_hd95_vox"] < 2
    assert row["l2r_tre_mm"] > 0
    assert row["lumir_ndv_percent"] == 0


def test_a_pair_that_is_listed_and_not_there_is_named(task: Path, tmp_path: Path) -> None:
    listing = json.loads((task / "LungCT" / "LungCT_dataset.json").read_text(encoding="utf-8"))
    listing["registration_val"] += listing["training_paired_images"]
    changed = tmp_path / "LungCT_dataset.json"
    changed.write_text(json.dumps(listing), encoding="utf-8")
    code, said = _call(
        "export", task / "study", "--out", tmp_path / "out", "--format", "learn2reg", "--dataset", changed
    )
    assert code == 1
    assert "lists LungCT_0001_0001 to LungCT_0001_0000, which the study does not have" in said
    assert (tmp_path / "out" / NAME).exists()
    code, said = _export(task, tmp_path / "none", "--part", "training")
    assert (code, "has none of the 1 pairs" in said) == (2, True)


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_file_that_an_evaluator_would_refuse_is_named(task: Path, tmp_path: Path, fault: str) -> None:
    from pipeline.pair_files import read_study_pairs
    from pipeline.submission import score_submission

    assert _export(task, tmp_path)[0] == 0
    field = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / NAME)))
    if fault == "missing":
        (tmp_path / NAME).unlink()
    else:
        sitk.WriteImage(sitk.GetImageFromArray(field[:, :-1], isVector=False), str(tmp_path / NAME))
    known = read_study_pairs(task / "study")
    table, [failure] = score_submission(known, tmp_path, list(known.pairs.values()))
    assert (failure.error, NAME in failure.message) == ("SubmissionError", True)
    assert len(tables.read_table(table.parents[1], "submission")) == 0


def test_scores_are_for_one_format(task: Path, tmp_path: Path) -> None:
    code, said = _call("export", task / "study", "--out", tmp_path, "--scores")
    assert (code, "for --format learn2reg" in said) == (2, True)


def test_the_evaluators_measures_of_known_fields() -> None:
    shape = (9, 8, 7)
    still = np.zeros((*shape, 3))
    assert learn2reg.ndv_percent(still) == 0
    assert learn2reg.sdlogj(still) == pytest.approx(0, abs=1e-12)
    grown = 0.5 * np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)
    assert learn2reg.sdlogj(grown) == pytest.approx(0, abs=1e-12)
    assert np.isnan(learn2reg.sdlogj(still[:4]))
    mirrored = -2 * np.indices(shape, dtype=np.float64)[0]
    turned = np.stack([mirrored, *np.zeros((2, *shape))], axis=-1)
    assert 60 < learn2reg.ndv_percent(turned) < 100  # all inside; the border goes on unturned
    jumped = still.copy()
    jumped[4, 4, 4, 0] = 1.5  # central differences do not see a single voxel
    assert 0 < learn2reg.ndv_percent(jumped) < 1


def test_labels_move_as_in_the_evaluator() -> None:
    moving = np.zeros((6, 6, 6), np.int32)
    moving[2:4, 2:4, 2:4] = 5
    field = np.zeros((6, 6, 6, 3))
    field[..., 0] = 1
    moved = learn2reg.warp_labels(moving, field)
    assert np.array_equal(moved[:-1], moving[1:])
    assert not moved[-1].any()
    assert learn2reg.shared_labels(np.array([0, 1, 5]), moving) == [5]


def test_landmark_errors_are_in_mm_of_the_moving_image() -> None:
    field = np.zeros((8, 8, 8, 3))
    field[..., 2] = 1
    points = np.array([[2.0, 3.0, 4.0], [3.5, 3.5, 3.5]])
    found = learn2reg.landmark_errors(points, points, field, (1.0, 1.0, 2.5))
    np.testing.assert_allclose(found, 2.5, atol=1e-6)
