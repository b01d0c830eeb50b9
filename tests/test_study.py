"""The study driver: the same tables however it runs, and a change redoes only what depends on it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from pipeline.cohort_rois import write_cohort_rois
from pipeline.config import make_config
from pipeline.errors import FolderError, StudyError, UsageError
from pipeline.folder import StudyFolder
from pipeline.pair_files import read_study_pairs
from pipeline.pairs import PairsError
from pipeline.progress import SilentReporter
from pipeline.report import write_report
from pipeline.request import read_request
from pipeline.status import read_status
from pipeline.study import StudySummary, run_study
from storage import tables
from storage.cohort import Cohort, Pair, Subject, read_cohort
from storage.embeddings import EmbeddingStore
from tests import phantoms


def _run(cohort: Path | Cohort, out: Path, listed: Sequence[Pair] | None = None, **settings: Any) -> StudySummary:
    how = {name: settings.pop(name) for name in ("overwrite", "until") if name in settings}
    execution = {"executor": "serial", **settings.pop("execution", {})}
    fit = {**phantoms.QUICK_FIT, **settings.pop("fit", {})}
    config = make_config({"execution": execution, "fit": fit, **settings})
    found = cohort if isinstance(cohort, Cohort) else read_cohort(cohort)
    return run_study(config, found, out, listed, **how, reporter=SilentReporter())


def _counts(summary: StudySummary) -> dict[str, tuple[int, int, int]]:
    return {stage.stage: (stage.done, stage.reused, stage.failed) for stage in summary.stages}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def finished(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished serial study of all pairs of three subjects; copy before changing it."""
    out = tmp_path_factory.mktemp("studies") / "serial"
    assert _run(cohort, out).n_failures == 0
    return out


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "study"))


def test_a_study_holds_what_it_promises(finished: Path) -> None:
    metrics = tables.read_table(finished, "metrics").to_pylist()
    assert {row["pair"] for row in metrics} == {"a__b", "a__c", "b__a", "b__c", "c__a", "c__b"}
    assert {row["label"] for row in metrics} == {0, 1, 2, 3}
    mean = [row for row in metrics if row["label"] == 0]
    assert np.mean([row["dice"] for row in mean]) > np.mean([row["dice_before"] for row in mean]) + 0.1
    assert all(row["n_rois"] > 0 and row["fold_fraction"] < 0.02 for row in mean)
    matches = tables.read_table(finished, "correspondences").to_pylist()
    assert {row["pair"] for row in matches} == {row["pair"] for row in metrics}
    assert tables.read_table(finished, "rois").num_rows > 0
    assert tables.read_table(finished, "runs").num_rows == 4
    for row in mean:
        assert StudyFolder(finished).transform(row["pair"]).exists()
    assert read_status(finished).complete


def test_label_zero_is_the_mean_over_labels(finished: Path) -> None:
    rows = [row for row in tables.read_table(finished, "metrics").to_pylist() if row["pair"] == "b__a"]
    mean, *labels = rows
    assert [row["label"] for row in rows] == [0, 1, 2, 3]
    for column in ("dice_before", "dice_centered", "dice_affine", "dice", "tre_mm_before", "tre_mm", "hd95_mm"):
        assert mean[column] == pytest.approx(np.mean([row[column] for row in labels])), column


def test_the_transform_does_to_the_user_s_files_what_the_table_says(finished: Path, cohort: Path) -> None:
    fixed = sitk.ReadImage(str(cohort.parent / "0_gt.nii.gz"))
    moving = sitk.ReadImage(str(cohort.parent / "1_gt.nii.gz"))
    transform = sitk.ReadTransform(str(StudyFolder(finished).transform("b__a")))
    moved = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor))
    truth = sitk.GetArrayFromImage(fixed)
    row = next(
        row for row in tables.read_table(finished, "metrics").to_pylist() if (row["pair"], row["label"]) == ("b__a", 1)
    )
    overlap = 2 * ((moved == 1) & (truth == 1)).sum() / ((moved == 1).sum() + (truth == 1).sum())
    assert overlap == pytest.approx(row["dice"], abs=0.01)


def test_an_image_registered_to_itself_is_the_identity(tmp_path: Path) -> None:
    cohort = phantoms.write_cohort(tmp_path / "data", ["a"])
    rows = [{"subject": name, "image": "0.nii.gz", "label": "0_gt.nii.gz"} for name in ("a", "b")]
    _run(phantoms.write_csv(cohort, rows), tmp_path / "s", [Pair("p", "b", "a")])
    for row in tables.read_table(tmp_path / "s", "metrics").to_pylist():
        assert row["dice"] == 1.0
        assert row["tre_mm"] == pytest.approx(0.0, abs=0.05)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the module; studies use it instead of starting their own."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_and_serial_give_the_same_tables(finished: Path, cohort: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "ray"
    _run(cohort, out, execution={"executor": "ray", "workers": workers})
    assert phantoms.study_tables(out) == phantoms.study_tables(finished)
    assert phantoms.study_bytes(out) == phantoms.study_bytes(finished)
    for path in sorted((finished / "transforms").glob("*.h5")):
        assert path.read_bytes() == (out / "transforms" / path.name).read_bytes()


def test_the_plan_remembers_the_manifest_for_the_report(study: Path, cohort: Path) -> None:
    remembered = json.loads((study / "plan.json").read_text(encoding="utf-8"))["manifest"]
    found = read_cohort(cohort)
    assert {name: Subject(name, **row) for name, row in remembered.items()} == found.by_name()
    text = write_report(study).read_text(encoding="utf-8")
    assert "Worst: " in text
    assert "No picture" not in text


def test_running_again_does_nothing(study: Path, cohort: Path) -> None:
    before = phantoms.study_tables(study)
    counts = _counts(_run(cohort, study, execution={"tile": 16, "threads": 1}))
    assert counts == {"encode": (0, 3, 0), "prototypes": (0, 3, 0), "match": (0, 6, 0), "fit": (0, 6, 0)}
    assert phantoms.study_tables(study) == before


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"fit": {"smoothness": 0.03}}, {"encode": 0, "prototypes": 0, "match": 0, "fit": 6}),
        ({"match": {"epsilon": 0.7}}, {"encode": 0, "prototypes": 0, "match": 6, "fit": 6}),
        ({"rois": {"max_area": 0.4}}, {"encode": 0, "prototypes": 3, "match": 6, "fit": 6}),
        ({"execution": {"tile": 2}}, {"encode": 0, "prototypes": 0, "match": 0, "fit": 0}),
    ],
    ids=["fit", "match", "rois", "tile"],
)
def test_a_changed_setting_redoes_what_depends_on_it(
    study: Path, cohort: Path, settings: dict[str, Any], counts: dict[str, int]
) -> None:
    done = {stage: count[0] for stage, count in _counts(_run(cohort, study, **settings)).items()}
    assert done == counts
    assert read_status(study).complete


def test_a_changed_study_equals_a_fresh_one(study: Path, cohort: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"match": {"epsilon": 0.7}, "execution": {"tile": 2}}
    _run(cohort, study, **settings)
    _run(cohort, tmp_path / "fresh", **settings)
    assert phantoms.study_tables(study) == phantoms.study_tables(tmp_path / "fresh")


def test_other_pairs_cost_only_themselves_and_stale_ones_go(study: Path, cohort: Path) -> None:
    pairs = [Pair("a__b", "a", "b"), Pair("again", "a", "b")]
    counts = _counts(_run(cohort, study, pairs, overwrite=True))
    assert (counts["match"], counts["fit"]) == ((1, 1, 0), (1, 1, 0))
    for name in ("metrics", "correspondences"):
        assert set(tables.read_table(study, name).column("pair").to_pylist()) == {"a__b", "again"}
    assert sorted(path.name for path in (study / "transforms").glob("*.h5")) == ["a__b.h5", "again.h5"]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.mark.parametrize(
    ("asked", "lost"),
    [
        ({"pairs": {"mode": "star"}}, 4),
        ({"pairs": {"mode": "star"}, "until": "match"}, 4),
        ({"fit": {"smoothness": 0.03}, "until": "match"}, 6),
    ],
    ids=["fewer pairs", "fewer pairs until match", "another fit until match"],
)
def test_fits_that_are_not_made_again_are_not_removed_unasked(
    study: Path, cohort: Path, asked: dict[str, Any], lost: int
) -> None:
    before = _files(study)
    with pytest.raises(FolderError, match=rf"would remove {lost} fitted pairs .* another --out, or add --overwrite"):
        _run(cohort, study, **asked)
    assert _files(study) == before
    _run(cohort, study, **asked, overwrite=True)
    assert len(set(tables.read_table(study, "metrics").column("pair").to_pylist())) == 6 - lost
    assert len(list((study / "transforms").glob("*.h5"))) == 6 - lost


def test_fits_are_not_removed_for_pairs_chosen_from_prototypes(study: Path, cohort: Path) -> None:
    before = _files(study / "metrics") | _files(study / "transforms")
    with pytest.raises(FolderError, match="would remove 3 fitted pairs"):
        _run(cohort, study, pairs={"mode": "knn", "k": 1})
    assert _files(study / "metrics") | _files(study / "transforms") == before


def test_pairs_chosen_alike_follow_the_cohort(tmp_path: Path, cohort: Path) -> None:
    """A subject that comes or goes changes who is whose neighbour; nobody asked for other pairs."""
    nearest: dict[str, Any] = {"pairs": {"mode": "knn", "k": 1}}
    _run(cohort, tmp_path / "study", **nearest)
    fewer = Cohort(read_cohort(cohort).subjects[:2])
    counts = _counts(_run(fewer, tmp_path / "study", **nearest))
    assert sum(counts["fit"][:2]) == 2
    assert len(list((tmp_path / "study" / "transforms").glob("*.h5"))) == 2


def test_a_run_until_match_leaves_the_fits_of_the_same_settings(study: Path, cohort: Path) -> None:
    before = phantoms.study_bytes(study)
    assert _counts(_run(cohort, study, until="match"))["match"] == (0, 6, 0)
    assert phantoms.study_bytes(study) == before
    assert len(list((study / "transforms").glob("*.h5"))) == 6


def test_a_subject_goes_when_that_is_asked_for(study: Path, cohort: Path) -> None:
    fewer = Cohort(read_cohort(cohort).subjects[:2])
    with pytest.raises(FolderError, match="would remove 4 fitted pairs"):
        _run(fewer, study)
    assert _counts(_run(fewer, study, overwrite=True))["fit"] == (0, 2, 0)
    assert read_status(study).complete


def _interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("changed", [{"output": {"jacobian": True}}, {"fit": {"smoothness": 0.03}}])
def test_files_stay_until_they_are_replaced(
    study: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    before = _files(study / "transforms")
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.stages.fit.task", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            _run(cohort, study, **changed)
    assert _files(study / "transforms") == before
    assert not read_status(study).complete
    pairs = read_study_pairs(study)
    if "fit" in changed:
        assert tables.read_table(study, "metrics").num_rows == 0
        with pytest.raises(FileNotFoundError, match="a__b was fitted otherwise; samreg run makes it again"):
            pairs.transform(pairs.find("a__b"))
    assert _counts(_run(cohort, study, **changed))["fit"] == (6, 0, 0)
    assert pairs.transform(pairs.find("a__b")).is_file()


def test_a_run_cut_short_leaves_no_failures_of_the_one_before_and_says_so(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = tmp_path / "study", read_cohort(cohort)
    *good, last = found.subjects
    broken = Cohort((*good, dataclasses.replace(last, image=str(tmp_path / "gone"))))
    assert _run(broken, out, until="match").n_failures == 1 + 4
    monkeypatch.setattr("pipeline.stages.fit.task", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        _run(found, out)
    status = read_status(out)
    assert not status.failures
    assert [(stage.done, stage.failed, stage.missing) for stage in status.stages] == [
        (3, 0, 0), (3, 0, 0), (6, 0, 0), (0, 0, 6),
    ]  # fmt: skip
    first, second = (list(rows) for _, rows in groupby(tables.read_table(out, "runs").to_pylist(), itemgetter("run")))
    assert all(row["finished"] for row in first)
    assert {row["stage"]: (row["units_done"], row["finished"]) for row in second} == {
        "encode": (1, None), "prototypes": (1, None), "match": (4, None), "fit": (0, None),
    }  # fmt: skip


def test_a_new_fit_leaves_no_file_of_the_old_one(study: Path, cohort: Path) -> None:
    _run(cohort, study, output={"jacobian": True})
    assert len(list((study / "jacobians").iterdir())) == 6
    _run(cohort, study)
    assert len(list((study / "jacobians").iterdir())) == 6
    _run(cohort, study, fit={"smoothness": 0.03})
    assert not list((study / "jacobians").iterdir())


def test_a_new_subject_anywhere_costs_only_its_own_pairs(study: Path, cohort: Path, tmp_path: Path) -> None:
    grown = phantoms.write_cohort(tmp_path / "data", ["a", "b", "c", "d"])
    found = read_cohort(grown)
    shuffled = Cohort((found.subjects[3], *found.subjects[:3]))
    counts = _counts(_run(shuffled, study, execution={"tile": 2}))
    assert counts == {"encode": (1, 3, 0), "prototypes": (1, 3, 0), "match": (6, 6, 0), "fit": (6, 6, 0)}
    _run(shuffled, tmp_path / "fresh", execution={"tile": 2})
    assert phantoms.study_tables(study) == phantoms.study_tables(tmp_path / "fresh")


def test_a_changed_image_redoes_its_pairs_and_a_changed_label_its_metrics(study: Path, tmp_path: Path) -> None:
    cohort = phantoms.write_cohort(tmp_path / "data")
    image, labels = phantoms.ellipses(shift=(2.0, 2.0))
    phantoms.write_volume(tmp_path / "data/0.nii.gz", image)
    counts = _counts(_run(cohort, study))
    assert {stage: count[0] for stage, count in counts.items()} == {
        "encode": 1, "prototypes": 1, "match": 4, "fit": 4,
    }  # fmt: skip
    phantoms.write_volume(tmp_path / "data/0_gt.nii.gz", labels)
    counts = _counts(_run(cohort, study))
    assert {stage: count[0] for stage, count in counts.items()} == {
        "encode": 0, "prototypes": 0, "match": 0, "fit": 4,
    }  # fmt: skip


def test_dropped_features_are_made_again_only_when_needed(cohort: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "s", {"keep": "prototypes"}
    _run(cohort, out, execution=kept)
    store = EmbeddingStore(out / "embeddings.zarr")
    assert store.read("a").features is None
    before = (out / "embeddings.zarr" / "a" / "zarr.json").stat()
    assert _counts(_run(cohort, out, execution=kept, fit={"smoothness": 0.03}))["encode"] == (0, 3, 0)
    assert (out / "embeddings.zarr" / "a" / "zarr.json").stat() == before
    assert _counts(_run(cohort, out, execution=kept, rois={"max_area": 0.4}))["encode"] == (3, 0, 0)


def test_other_input_settings_are_refused_until_overwritten(study: Path, cohort: Path) -> None:
    with pytest.raises(FolderError, match=r"input.percentiles: stored \[0.5, 99.5\], asked for .*--overwrite"):
        _run(cohort, study, input={"percentiles": [1, 99]})
    counts = _counts(_run(cohort, study, input={"percentiles": [1, 99]}, overwrite=True))
    assert counts["encode"] == (3, 0, 0)


def test_a_second_driver_is_refused(study: Path, cohort: Path) -> None:
    with StudyFolder(study).lock(), pytest.raises(FolderError, match=f"written by process {os.getpid()} on "):
        _run(cohort, study)
    _run(cohort, study)


@pytest.mark.parametrize(
    ("pairs", "count"),
    [({"mode": "knn", "k": 1}, 3), ({"mode": "star", "reference": "medoid"}, 2), ({"mode": "tree", "extra": 0}, 2)],
)
def test_pairs_are_chosen_from_prototypes(study: Path, cohort: Path, pairs: dict[str, Any], count: int) -> None:
    counts = _counts(_run(cohort, study, pairs=pairs, overwrite=True))
    assert counts["fit"] == (0, count, 0)
    assert set(json.loads((study / "plan.json").read_text(encoding="utf-8"))["pairs"]["pair"]) == set(
        tables.read_table(study, "metrics").column("pair").to_pylist()
    )


def test_cohort_rois_last_as_long_as_their_matches(study: Path, cohort: Path) -> None:
    assert write_cohort_rois(study, 1.0).tracks > 0
    rows = tables.read_table(study, "cohort_rois").to_pylist()
    _run(cohort, study)
    assert tables.read_table(study, "cohort_rois").to_pylist() == rows
    _run(cohort, study, match={"epsilon": 0.8})
    assert tables.read_table(study, "cohort_rois").num_rows == 0


def test_matching_with_the_votes_of_tracks(study: Path, cohort: Path) -> None:
    assert _run(cohort, study, match={"spatial": {"track_support": 0.3}}).n_failures == 0
    assert read_status(study).complete


def test_impossible_pairs_leave_no_folder_half_made(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="not a subject"):
        _run(cohort, tmp_path / "s", pairs={"mode": "star", "reference": "z"})
    assert not (tmp_path / "s" / "run.yaml").exists()


def test_a_transform_that_was_deleted_is_made_again(study: Path, cohort: Path) -> None:
    StudyFolder(study).transform("a__b").unlink()
    assert not read_status(study).complete
    assert _counts(_run(cohort, study))["fit"] == (1, 5, 0)
    assert read_status(study).complete


def test_a_damaged_part_is_made_again(study: Path, cohort: Path) -> None:
    before = phantoms.study_tables(study)
    part = next((study / "metrics").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-20])
    assert _counts(_run(cohort, study))["fit"] == (6, 0, 0)
    assert phantoms.study_tables(study) == before


def test_unreadable_inputs_do_not_cost_earlier_results(study: Path, cohort: Path, tmp_path: Path) -> None:
    found = read_cohort(cohort)
    gone = Cohort(tuple(type(s)(s.subject, str(tmp_path / s.subject), s.label) for s in found.subjects))
    before = tables.read_table(study, "metrics").to_pylist()
    summary = _run(gone, study)
    assert summary.n_failures == 3 + 6
    assert tables.read_table(study, "metrics").to_pylist() == before
    assert _counts(_run(cohort, study))["fit"] == (0, 6, 0)


def test_rows_lost_during_a_run_are_noticed(study: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import pair_stages

    monkeypatch.setattr(pair_stages.results, "merge_rows", lambda *arguments: None)
    with pytest.raises(StudyError, match=r"no result for .*a__b"):
        _run(cohort, study, fit={"smoothness": 0.05})


def test_a_run_until_match_asks_for_no_fit_and_leaves_the_rest_to_a_later_run(
    cohort: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    assert _counts(_run(cohort, out, until="match")).keys() == {"encode", "prototypes", "match"}
    assert not (out / "metrics").exists()
    assert not (out / "transforms").exists()
    status = read_status(out)
    assert status.complete
    assert [(stage.done, stage.missing, stage.asked) for stage in status.stages] == [
        (3, 0, True), (3, 0, True), (6, 0, True), (0, 0, False),
    ]  # fmt: skip
    counts = _counts(_run(cohort, out))
    assert (counts["match"], counts["fit"]) == ((0, 6, 0), (6, 0, 0))
    assert phantoms.study_tables(out) == phantoms.study_tables(finished)


def test_matching_anew_removes_the_fits_of_the_old_matches(study: Path, cohort: Path) -> None:
    other: dict[str, Any] = {"until": "match", "match": {"epsilon": 0.7}}
    with pytest.raises(FolderError, match="would remove 6 fitted pairs"):
        _run(cohort, study, **other)
    assert _counts(_run(cohort, study, **other, overwrite=True))["match"] == (6, 0, 0)
    assert tables.read_table(study, "metrics").num_rows == 0
    assert not list((study / "transforms").glob("*.h5"))


@pytest.mark.parametrize("until", ["encode", "prototypes"])
def test_a_run_ends_after_the_stage_it_is_asked_for(cohort: Path, tmp_path: Path, until: str) -> None:
    counts = _counts(_run(cohort, tmp_path / "s", until=until, pairs={"mode": "knn"}))
    assert list(counts)[-1] == until
    status = read_status(tmp_path / "s")
    assert status.complete
    assert [stage.stage for stage in status.stages if stage.asked] == list(counts)


def test_an_unknown_last_stage_is_refused(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'fitting', which is no stage; stages are encode, prototypes, match, fit"):
        _run(cohort, tmp_path / "s", until="fitting")


def test_pairs_without_a_match_are_remembered(cohort: Path, tmp_path: Path) -> None:
    out, nothing = tmp_path / "s", {"epsilon": 1.0, "spatial": {"enabled": False}}
    assert _counts(_run(cohort, out, until="match", match=nothing))["match"] == (6, 0, 0)
    assert tables.read_table(out, "correspondences").num_rows == 0
    assert len(tables.read_table(out, "unmatched")) == 6
    assert read_status(out).complete
    assert _counts(_run(cohort, out, until="match", match=nothing))["match"] == (0, 6, 0)
    assert _counts(_run(cohort, out, until="match"))["match"] == (6, 0, 0)
    assert tables.read_table(out, "unmatched").num_rows == 0
    assert read_status(out).complete


def test_matches_lost_during_a_run_are_noticed(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import pair_stages

    monkeypatch.setattr(pair_stages.results, "merge_rows", lambda *arguments: None)
    with pytest.raises(StudyError, match=r"no result for .*b__a"):
        _run(cohort, tmp_path / "s", until="match")


def test_pairs_file_and_mode_words(cohort: Path, tmp_path: Path) -> None:
    listed = phantoms.write_csv(tmp_path / "p.csv", [{"moving": "a", "fixed": "b"}, {"moving": "x", "fixed": "b"}])
    request = read_request(None, cohort, str(listed))
    assert request.pairs == (Pair("a__b", "a", "b"),)
    assert request.unknown == ((3, Pair("x__b", "x", "b"), "x"),)
    assert read_request(None, cohort, "star").config.pairs.mode == "star"
