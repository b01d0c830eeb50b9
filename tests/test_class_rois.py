"""Case 1: classes of two images as ROI pairs, from arrays to a study."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from pipeline.algorithms.class_rois import NoSharedClassError, match_classes, merge_slices
from pipeline.config import ConfigError, make_config
from pipeline.pairs import PairsError
from pipeline.progress import SilentReporter
from pipeline.status import read_status
from pipeline.study import StudySummary, run_study
from storage import tables
from storage.cohort import Cohort, Subject, read_cohort, write_cohort
from tests import phantoms

LABELS = {"segmenter": "labels"}


def _run(cohort: Cohort, out: Path, executor: str = "serial", **settings: Any) -> StudySummary:
    config = make_config({"execution": {"executor": executor}, "fit": phantoms.QUICK_FIT, **settings})
    return run_study(config, cohort, out, reporter=SilentReporter())


def _means(out: Path) -> list[dict[str, Any]]:
    return [row for row in tables.read_table(out, "metrics").to_pylist() if row["label"] == 0]


def _failures(out: Path) -> list[dict[str, Any]]:
    return tables.read_table(out, "failures").to_pylist()


def _replace(cohort: Cohort, name: str, **changes: str) -> Cohort:
    return Cohort(tuple(replace(s, **changes) if s.subject == name else s for s in cohort.subjects))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Three phantoms of different depth whose labels are also their segmentations."""
    folder = tmp_path_factory.mktemp("classes")
    subjects = []
    for number, name in enumerate("abc"):
        image, labels = phantoms.ellipses((5 + number, 48, 48), (1.5 * number, -1.0 * number), 1.0 + 0.04 * number)
        path = str(phantoms.write_volume(folder / f"{name}.nii.gz", image))
        label = str(phantoms.write_volume(folder / f"{name}_gt.nii.gz", labels))
        subjects.append(Subject(name, path, label, segmentation=label))
    return Cohort(tuple(subjects))


@pytest.fixture(scope="module")
def finished(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "serial"
    assert _run(cohort, out, **LABELS).n_failures == 0
    return out


def test_slices_are_joined_by_class_weighted_by_area() -> None:
    centroids = np.array([[0.0, 4.0, 0.0], [0.0, 9.0, 9.0], [6.0, 8.0, 0.0]])
    found = merge_slices(np.array([5, 2, 5], np.int32), np.array([0.5, 0.8, 0.9]), centroids, np.array([10, 7, 30]))
    assert found.value.tolist() == [2, 5]
    np.testing.assert_allclose(found.probability, [0.8, 0.8])
    np.testing.assert_allclose(found.centroid_mm, [[0, 9, 9], [4.5, 7, 0]])
    assert found.largest.tolist() == [1, 2]


def test_shared_classes_are_paired_with_their_joint_probability() -> None:
    moving, fixed = np.array([1, 2, 4], np.int32), np.array([2, 3, 4], np.int32)
    found = match_classes(moving, fixed, np.array([1.0, 0.5, 0.9]), np.array([0.8, 1.0, 0.7]))
    assert moving[found.moving_index].tolist() == fixed[found.fixed_index].tolist() == [4, 2]
    np.testing.assert_allclose(found.confidence, [0.63, 0.4])
    with pytest.raises(NoSharedClassError, match="moving image has 1, the fixed image 2, 3, 4"):
        match_classes(moving[:1], np.array([2, 3, 4], np.int32), np.ones(1), np.ones(3))


def test_every_class_is_one_roi_through_all_its_slices(finished: Path) -> None:
    matches = tables.read_table(finished, "correspondences").to_pylist()
    assert sorted((row["pair"], row["roi_class"]) for row in matches) == [
        (pair, value) for pair in ("a__b", "a__c", "b__a", "b__c", "c__a", "c__b") for value in (1, 2, 3)
    ]
    assert {row["confidence"] for row in matches} == {1.0}
    rois = tables.read_table(finished, "rois").to_pylist()
    assert {(row["subject"], row["roi_class"], row["slice"]) for row in rois} == {
        (name, value, z) for number, name in enumerate("abc") for value in (1, 2, 3) for z in range(5 + number)
    }
    means = _means(finished)
    assert {(row["n_rois"], row["n_slices"], row["pair"][-1]) for row in means} == {
        (3, 5, "a"),
        (3, 6, "b"),
        (3, 7, "c"),
    }
    assert read_status(finished).complete


def test_it_registers_and_says_that_the_labels_were_in_the_fit(finished: Path) -> None:
    means = _means(finished)
    assert np.mean([row["dice"] for row in means]) > np.mean([row["dice_before"] for row in means]) + 0.15
    assert {row["flag"] for row in means} == {"labels_in_fit"}
    assert {row["n_pseudo"] for row in means} == {None}


def test_other_labels_than_those_of_the_fit_are_not_flagged(cohort: Cohort, tmp_path: Path) -> None:
    changed = []
    for subject in cohort.subjects[:2]:
        labels = sitk.ReadImage(subject.label)
        path = tmp_path / f"{subject.subject}.nii.gz"
        sitk.WriteImage(sitk.BinaryErode(labels > 0, (1, 1, 0)), str(path))
        changed.append(replace(subject, label=str(path)))
    assert _run(Cohort(tuple(changed)), tmp_path / "study", **LABELS).n_failures == 0
    assert {row["flag"] for row in _means(tmp_path / "study")} == {""}


@pytest.mark.ray
def test_ray_and_serial_give_the_same_tables(finished: Path, cohort: Cohort, tmp_path: Path) -> None:
    _run(cohort, tmp_path / "ray", executor="ray", execution={"executor": "ray", "workers": 2}, **LABELS)
    assert phantoms.study_tables(tmp_path / "ray") == phantoms.study_tables(finished)


def test_running_again_does_nothing_and_a_changed_segmentation_redoes_its_pairs(
    finished: Path, cohort: Cohort, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "study"))
    assert {(s.done, s.failed) for s in _run(cohort, out, **LABELS).stages} == {(0, 0)}
    labels = sitk.ReadImage(cohort.subjects[2].segmentation)
    sitk.WriteImage(sitk.Cast(labels > 1, sitk.sitkUInt8), str(tmp_path / "c.nii.gz"))
    summary = _run(_replace(cohort, "c", segmentation=str(tmp_path / "c.nii.gz")), out, **LABELS)
    assert {s.stage: (s.done, s.reused) for s in summary.stages} == {
        "encode": (1, 2),
        "prototypes": (1, 2),
        "match": (4, 2),
        "fit": (4, 2),
    }


def test_the_segmentation_is_not_looked_at_by_other_segmenters(cohort: Cohort, tmp_path: Path) -> None:
    first = Cohort((cohort.subjects[0], replace(cohort.subjects[1], segmentation="missing.nii.gz")))
    assert _run(first, tmp_path / "study").n_failures == 0
    assert {row["roi_class"] for row in tables.read_table(tmp_path / "study", "correspondences").to_pylist()} == {0}


def test_probabilities_weight_the_pairs(cohort: Cohort, tmp_path: Path) -> None:
    subjects = []
    for subject, sure in zip(cohort.subjects[:2], (0.9, 0.8), strict=True):
        labels = sitk.ReadImage(subject.label)
        values = sitk.GetArrayFromImage(labels)
        one_hot = (values[..., None] == np.arange(4)).astype(np.float32)
        probabilities = one_hot * sure + (1 - one_hot) * (1 - sure) / 3
        made = sitk.GetImageFromArray(probabilities, isVector=True)
        made.CopyInformation(labels)
        sitk.WriteImage(made, str(tmp_path / f"{subject.subject}.nrrd"))
        subjects.append(replace(subject, segmentation=str(tmp_path / f"{subject.subject}.nrrd")))
    assert _run(Cohort(tuple(subjects)), tmp_path / "study", **LABELS).n_failures == 0
    matches = tables.read_table(tmp_path / "study", "correspondences").to_pylist()
    assert [row["roi_class"] for row in matches] == [1, 2, 3, 1, 2, 3]
    np.testing.assert_allclose([row["confidence"] for row in matches], 0.72, atol=1e-5)


@pytest.mark.parametrize(("kind", "dimensions"), [("script", 3), ("export", 2)])
def test_a_network_finds_the_classes(cohort: Cohort, tmp_path: Path, kind: str, dimensions: int) -> None:
    path = phantoms.write_threshold_network(tmp_path / "net.pt2", kind, dimensions)
    settings = {"name": "network", "checkpoint": str(path), "dimensions": dimensions}
    pair = Cohort(cohort.subjects[:2])
    assert _run(pair, tmp_path / "study", segmenter=settings).n_failures == 0
    assert {row["roi_class"] for row in tables.read_table(tmp_path / "study", "correspondences").to_pylist()} == {1}
    again = tmp_path / "elsewhere.pt2"
    shutil.copy(path, again)
    summary = _run(pair, tmp_path / "study", segmenter={**settings, "checkpoint": str(again)})
    assert {(s.done, s.failed) for s in summary.stages} == {(0, 0)}


def test_what_is_wrong_with_one_subject_is_a_row_that_names_it(cohort: Cohort, tmp_path: Path) -> None:
    a, b, c = cohort.subjects
    empty = phantoms.write_volume(tmp_path / "empty.nii.gz", np.zeros((7, 48, 48), np.uint8))
    others = (
        replace(a, subject="none", segmentation=""),
        replace(a, subject="gone", segmentation=str(tmp_path / "gone.nii.gz")),
        replace(a, subject="grid", segmentation=b.segmentation),
        replace(c, subject="empty", segmentation=str(empty)),
    )
    summary = _run(Cohort((a, b, *others)), tmp_path / "study", pairs="star", **LABELS)
    assert summary.n_failures > 0
    found = {row["subject"]: row for row in _failures(tmp_path / "study") if not row["pair"]}
    for name, message in {
        "none": "the manifest names none for this subject",
        "gone": "gone.nii.gz: no such file",
        "grid": "b_gt.nii.gz: labels are on another grid",
        "empty": "empty.nii.gz: no ROI: found background only, wanted any class but 0",
    }.items():
        assert message in found[name]["message"]
        assert found[name]["stage"] == "encode"
    assert [row["pair"] for row in _means(tmp_path / "study")] == ["b__a"]


def test_no_shared_class_fails_the_pair_and_names_the_classes(cohort: Cohort, tmp_path: Path) -> None:
    a, b, c = cohort.subjects
    moved = sitk.ReadImage(b.segmentation)
    sitk.WriteImage(moved * 10, str(tmp_path / "b.nii.gz"))
    renamed = Cohort((a, replace(b, segmentation=str(tmp_path / "b.nii.gz")), c))
    summary = _run(renamed, tmp_path / "study", pairs="star", **LABELS)
    assert summary.n_failures == 1
    (row,) = _failures(tmp_path / "study")
    assert (row["stage"], row["pair"], row["error"]) == ("match", "b__a", "NoSharedClassError")
    assert "the moving image has 10, 20, 30, the fixed image 1, 2, 3" in row["message"]
    assert [row["pair"] for row in _means(tmp_path / "study")] == ["c__a"]


def test_only_the_chosen_classes_are_used(cohort: Cohort, tmp_path: Path) -> None:
    a, b, _ = cohort.subjects
    only = {"segmenter": {"name": "labels", "classes": [2, 9]}}
    assert _run(Cohort((a, b)), tmp_path / "study", **only).n_failures == 0
    assert {row["roi_class"] for row in tables.read_table(tmp_path / "study", "correspondences").to_pylist()} == {2}
    missing = {"segmenter": {"name": "labels", "classes": [9]}}
    _run(Cohort((a, b)), tmp_path / "other", **missing)
    assert "no ROI: found 1, 2, 3, wanted 9" in _failures(tmp_path / "other")[0]["message"]


def test_held_out_classes_are_evaluated_when_asked_for(finished: Path, cohort: Cohort, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "study"))
    summary = _run(cohort, out, evaluate={"pseudo_folds": 3}, **LABELS)
    assert {s.stage: s.done for s in summary.stages} == {"encode": 0, "prototypes": 0, "match": 0, "fit": 6}
    before = {row["pair"]: row for row in _means(finished)}
    for row in _means(out):
        assert row["dice"] == before[row["pair"]]["dice"]
        assert row["n_pseudo"] == 3
        assert row["pseudo_dice_before"] == pytest.approx(row["dice_before"])
        assert row["pseudo_tre_mm_before"] == pytest.approx(row["tre_mm_before"])
        assert row["pseudo_dice"] < row["dice"]
    assert np.mean([row["pseudo_dice"] - row["pseudo_dice_before"] for row in _means(out)]) > 0.05


def test_held_out_candidates_are_evaluated_when_asked_for(cohort: Cohort, tmp_path: Path) -> None:
    pair = Cohort(cohort.subjects[:2])
    assert _run(pair, tmp_path / "study", pairs="star", evaluate={"pseudo_folds": 2}).n_failures == 0
    (row,) = _means(tmp_path / "study")
    assert 0 < row["n_pseudo"] <= row["n_rois"]
    assert row["pseudo_dice"] > row["pseudo_dice_before"]
    assert row["pseudo_tre_mm"] < row["pseudo_tre_mm_before"]


def test_knn_needs_prototypes(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="class ROIs do not have"):
        _run(cohort, tmp_path / "study", pairs="knn", **LABELS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evaluate": {"pseudo_folds": 1}}, r"evaluate.pseudo_folds is 1; expected 0, or 2 or more"),
        ({"segmenter": {"name": "labels", "classes": [0, 1]}}, r"segmenter.classes is \(0, 1\); expected different"),
        ({"segmenter": {"name": "network", "patch": [0, 8, 8]}}, r"segmenter.patch is \(0, 8, 8\); expected three"),
        ({"segmenter": {"name": "labels", "checkpoint": "x"}}, "unknown setting 'segmenter.checkpoint'"),
    ],
)
def test_settings_that_make_no_sense_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(given)


def test_the_manifest_column_is_located_beside_the_manifest(tmp_path: Path) -> None:
    path = phantoms.write_csv(tmp_path / "cohort.csv", [{"subject": "a", "image": "a.nii", "segmentation": "s/a.nii"}])
    found = read_cohort(path)
    assert found.subjects[0].segmentation == str(tmp_path / "s" / "a.nii")
    write_cohort(found, tmp_path / "again.csv")
    assert read_cohort(tmp_path / "again.csv") == found
