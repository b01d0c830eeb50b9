"""`samreg query`: a region of one subject, found in all others from the embedding store."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk  # noqa: N813
from typer.testing import CliRunner

from pipeline import phantom
from pipeline.algorithms import query_map
from pipeline.algorithms.consistency import SpatialConfig
from pipeline.algorithms.query import (
    Block,
    QueryConfig,
    Regions,
    answer,
    choose_context,
    mean_of_passes,
    region_at_point,
)
from pipeline.cli import app
from pipeline.config import make_config
from pipeline.query import ask, open_study
from pipeline.query_region import Seed
from pipeline.study import run_study
from storage import tables
from storage.cohort import read_cohort
from storage.embeddings import EmbeddingStore
from storage.query_index import QueryIndexError, open_index
from tests import phantoms
from tests.sample_study import HOSTILE

NAMES = ["a", "b", "c", HOSTILE]
CENTRES = {1: (17, 16), 2: (30, 31)}  # y, x of organs in subject "a"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phantoms with three organs each, encoded."""
    folder = tmp_path_factory.mktemp("query")
    cohort = read_cohort(phantoms.write_cohort(folder / "data", NAMES))
    config = make_config({"execution": {"executor": "serial"}})
    assert run_study(config, cohort, folder / "study", until="prototypes").n_failures == 0
    return folder / "study"


@pytest.fixture
def copy(study: Path, tmp_path: Path) -> Path:
    """The study, to change."""
    shutil.copytree(study, tmp_path / "study")
    return tmp_path / "study"


def _call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["query", *(str(argument) for argument in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, " ".join(result.output.split())


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_a_label_is_found_in_every_subject(study: Path) -> None:
    code, said = _call(study, "--subject", "a", "--label", 2, "--masks", "--name", "organ")
    assert code == 0, said
    assert "found in 3 of 3 subjects" in said
    rows = tables.read_part(study, "queries", "organ").to_pylist()
    assert {row["subject"] for row in rows} == set(NAMES) - {"a"}
    confidence = [row["subject_confidence"] for row in rows]
    assert confidence == sorted(confidence, reverse=True)
    assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)
    masks = sorted((study / "queries" / "organ" / "masks").glob("*.nii.gz"))
    assert len(masks) == 3
    for number, name in enumerate(NAMES):
        if name == "a":
            continue
        here = [row for row in rows if row["subject"] == name]
        assert len(here) == here[0]["n_rois"] == 5
        assert {row["slice"] for row in here} == set(range(5))
        path = next(path for path in masks if path.name[0] == name[0] or (number == 3 and "~" in path.name))
        image = sitk.ReadImage(str(path))
        truth = sitk.ReadImage(str(study.parent / "data" / f"{number}_gt.nii.gz"))
        assert image.GetSpacing() == truth.GetSpacing()
        assert _dice(sitk.GetArrayFromImage(image) > 0, sitk.GetArrayFromImage(truth) == 2) > 0.8
    sheet = study / "queries" / "organ" / "sheet-1.png"
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(sheet))).std() > 10


@pytest.mark.parametrize("organ", [1, 2])
def test_points_and_boxes_lead_to_the_same_region_as_the_label(study: Path, organ: int) -> None:
    opened, (y, x) = open_study(study), CENTRES[organ]
    truth = ask(opened, "a", Seed("label", (organ,))).region
    seeds = [
        Seed("point", (x, y, 2)),
        Seed("point-mm", (1.5 * x, 1.5 * y, 12.0)),
        Seed("box", (x - 6.0, y - 6.0, 0.0, x + 6.0, y + 6.0, 4.0)),
    ]
    for seed in seeds:
        found = ask(opened, "a", seed)
        common = np.isin(truth.slices, found.region.slices)
        assert common.sum() >= 4
        assert _dice(found.region.masks, truth.masks[common]) > 0.8, seed
        assert (found.found.total > 0.5).all()


def test_the_region_itself_is_found_best_in_its_own_subject(study: Path) -> None:
    result = ask(open_study(study), "b", Seed("label", (1,)))
    assert result.study.index.subjects[int(result.found.total.argmax())] == "b"
    assert len(result.ranked) == 3


def test_without_features_the_region_is_made_of_stored_rois(copy: Path) -> None:
    before = ask(open_study(copy), "a", Seed("label", (2,))).region
    EmbeddingStore(copy / "embeddings.zarr").drop_features("a")
    after = ask(open_study(copy), "a", Seed("label", (2,))).region
    np.testing.assert_array_equal(after.slices, before.slices)
    assert _dice(after.masks, before.masks) > 0.8
    assert (np.einsum("ij,ij->i", before.prototypes, after.prototypes) > 0.95).all()


def test_subjects_where_nothing_is_found_are_listed_last(study: Path) -> None:
    code, _ = _call(study, "--subject", "a", "--label", 2, "--min-confidence", 0.99, "--name", "strict", "--top", 0)
    assert code == 0
    rows = tables.read_part(study, "queries", "strict").to_pylist()
    assert [(row["rank"], row["n_rois"], row["roi"], row["subject_confidence"]) for row in rows] == [
        (rank, 0, None, 0.0) for rank in (1, 2, 3)
    ]
    assert not (study / "queries" / "strict").exists()


def test_nothing_of_an_earlier_query_of_the_name_is_left(copy: Path) -> None:
    assert _call(copy, "--subject", "a", "--label", 2, "--masks", "--name", "same")[0] == 0
    assert _call(copy, "--subject", "a", "--label", 1, "--name", "same", "--top", 0)[0] == 0
    assert not (copy / "queries" / "same").exists()


def test_a_query_is_named_after_its_place_however_far_out_it_is() -> None:
    assert Seed("point-mm", (1e6, -2.5, 0)).name == "point-mm-1000000--2.5-0"


def test_an_image_that_is_gone_costs_its_panel_only(copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_text(encoding="utf-8"))
    plan["manifest"]["b"]["image"] = str(copy / "gone.nii.gz")
    (copy / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    code, said = _call(copy, "--subject", "a", "--label", 1)
    assert code == 1
    assert "failed b: " in said
    assert "gone.nii.gz: no such file" in said
    assert pq.read_table(copy / "queries" / "a_label-1.parquet").num_rows == 15
    assert (copy / "queries" / "a_label-1" / "sheet-1.png").exists()


def test_subjects_that_left_the_cohort_are_not_asked(copy: Path) -> None:
    plan = json.loads((copy / "plan.json").read_text(encoding="utf-8"))
    del plan["subjects"]["c"]
    plan["subjects"]["b"]["prototypes"] = "made otherwise since"
    (copy / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert open_study(copy).index.subjects == sorted({"a", HOSTILE})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--subject", "aa", "--label", "1"], "has no prototypes of 'aa'; it has those of a"),
        (["--subject", "a", "--label", "7"], "'a' has no such label; it has 1, 2, 3"),
        (["--subject", "a"], "give one of --point, --point-mm, --box and --label"),
        (["--subject", "a", "--label", "1", "--point", "1,2,3"], "give one of --point, --point-mm, --box and --label"),
        (["--subject", "a", "--point", "1,2"], "--point: this image has 3 axes; expected i, j, k"),
        (["--subject", "a", "--point", "x,y,z"], "--point 'x,y,z': expected 3 numbers with commas between"),
        (["--subject", "a", "--point", "16,17,9"], "--point 16,17,9 is outside the image, 5 x 48 x 48 voxels"),
        (["--subject", "a", "--point", "0,0,2"], "no ROI of 'a' holds this point"),
        (["--subject", "a", "--box", "0,0,0,1,1,1"], "no ROI of 'a' fills this box"),
        (["--subject", "a", "--label", "1", "--name", "../x"], "must be letters, digits"),
        (["--subject", "a", "--label", "1", "--min-confidence", "1"], "and --min-confidence at least 0 and below 1"),
    ],
)
def test_wrong_usage(study: Path, arguments: list[str], expected: str) -> None:
    before = set(study.glob("queries/**/*"))
    code, said = _call(study, *arguments)
    assert code == 2
    assert expected in said
    assert set(study.glob("queries/**/*")) == before


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    code, said = _call(tmp_path, "--subject", "a", "--label", 1)
    assert code == 2
    assert "is not a study folder" in said


def test_pictures_have_two_axes(tmp_path: Path) -> None:
    cohort = read_cohort(phantom.make_cohort(tmp_path, subjects=3, shape=(1, 64, 64)))
    config = make_config({"execution": {"executor": "serial"}})
    run_study(config, cohort, tmp_path / "study", until="prototypes")
    code, said = _call(tmp_path / "study", "--subject", "subject-01", "--label", 1, "--masks", "--name", "q")
    assert code == 0, said
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "subject-02_label.png"))) == 1
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "study/queries/q/masks/subject-02.png"))) > 0
    assert _dice(found, truth) > 0.5
    y, x = (int(v.mean()) for v in np.nonzero(truth))
    assert _call(tmp_path / "study", "--subject", "subject-02", "--point", f"{x},{y}", "--top", 0)[0] == 0


def test_the_index_is_made_once_for_what_the_store_holds(copy: Path) -> None:
    store, root = EmbeddingStore(copy / "embeddings.zarr"), copy / "index"
    first = open_index(store, root)
    marker = root / first.signature / "index.json"
    stamp = marker.stat().st_mtime_ns
    assert open_index(store, root).signature == first.signature
    assert marker.stat().st_mtime_ns == stamp
    stored = store.read_prototypes("b")
    assert stored is not None
    np.testing.assert_allclose(first.columns["prototypes"][first.rows("b")], stored[1]["prototypes"], atol=1e-3)
    np.testing.assert_array_equal(first.columns["roi"][first.rows("b")], stored[1]["roi"])
    fewer = {name: values[:3] for name, values in stored[1].items()}
    store.write_prototypes("b", {"made": "otherwise"}, fewer)
    second = open_index(store, root)
    assert second.signature != first.signature
    assert [path.name for path in root.iterdir()] == [second.signature]
    rows = second.rows("b")
    assert rows.stop - rows.start == 3


def test_an_index_without_its_marker_is_made_anew(copy: Path) -> None:
    store, root = EmbeddingStore(copy / "embeddings.zarr"), copy / "index"
    first = open_index(store, root)
    (root / first.signature / "index.json").unlink()
    assert open_index(store, root).subjects == first.subjects


def test_of_two_first_queries_the_faster_makes_the_index(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, root = EmbeddingStore(copy / "embeddings.zarr"), copy / "index"
    rename = Path.rename

    def slower(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        open_index(store, root)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slower)
    found = open_index(store, root)
    assert found.subjects == sorted(NAMES)
    assert [path.name for path in root.iterdir()] == [found.signature]


def test_what_a_killed_builder_of_an_index_left_goes_and_what_a_living_one_writes_stays(copy: Path) -> None:
    dead, alive = (copy / "index" / f".0123456789abcdef-{token}" for token in ("dead0000", "a11fe000"))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
    with (alive / ".lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = open_index(EmbeddingStore(copy / "embeddings.zarr"), copy / "index")
    assert {path.name for path in (copy / "index").iterdir()} == {alive.name, found.signature}


def test_stores_that_cannot_be_asked(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(QueryIndexError, match="holds no prototypes of this cohort"):
        open_index(EmbeddingStore(tmp_path / "none.zarr"), tmp_path / "index")
    store = EmbeddingStore(copy / "embeddings.zarr")
    stored = store.read_prototypes("b")
    assert stored is not None
    store.write_prototypes("b", {"s": 1}, {**stored[1], "prototypes": stored[1]["prototypes"][:, :7]})
    with pytest.raises(QueryIndexError, match="two backends in one store"):
        open_index(store, tmp_path / "index")
    store.write_prototypes("b", {"s": 2}, {**stored[1], "roi_class": np.ones(len(stored[1]["roi"]), np.int32)})
    with pytest.raises(QueryIndexError, match="'b' are classes"):
        open_index(store, tmp_path / "index")
    assert list((tmp_path / "index").iterdir()) == []


def _regions(count: int, seed: int) -> Regions:
    rng = np.random.default_rng(seed)
    prototypes = rng.normal(size=(count, 40)).astype(np.float32)
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    slices = rng.integers(0, 10, count)
    centroid = np.column_stack([8.0 * slices, rng.uniform(40, 200, (count, 2))])
    return Regions(prototypes, centroid, np.tile([30.0, 5.0, 40.0], (count, 1)), (slices + 0.5) / 10, 4)


def test_partners_are_found_under_an_affine_and_lookalikes_elsewhere_are_not() -> None:
    regions, rng = _regions(40, 0), np.random.default_rng(1)
    matrix = np.array([[1.0, 0, 0, 2], [0, 1.1, 0.2, -9], [0, -0.1, 0.95, 14], [0, 0, 0, 1]])
    moved = regions.centroid_mm @ matrix[:3, :3].T + matrix[:3, 3]
    order = rng.permutation(40)
    twins = moved[:4] + np.array([0.0, 90.0, 90.0])  # as alike as the partners, but in another place
    place = np.concatenate([moved[order], twins])
    prototypes = np.concatenate([regions.prototypes[order], regions.prototypes[:4]])
    depth = np.concatenate([regions.depth[order], regions.depth[:4]])
    count = len(place)
    block = Block(
        np.concatenate([prototypes, prototypes[:5]]),
        np.arange(count) < np.array([[count], [5]]),
        np.stack([place, np.pad(place[:5], ((0, count - 5), (0, 0)))]),
        np.tile([30.0, 5.0, 40.0], (2, count, 1)),
        np.stack([depth, np.pad(depth[:5], (0, count - 5), constant_values=-9.0)]),
        np.array([72.0, 72.0]),
    )
    found = answer(regions, block, 0.64, SpatialConfig(), QueryConfig())
    here = found.subject == 0
    pairs = {(int(order[j]), int(i)) for j, i in zip(found.roi[here], found.region[here], strict=True)}
    slices = {float(regions.depth[i]) for i in range(4)}
    assert len(pairs) == len(slices)
    assert all(j == i for j, i in pairs)
    assert (found.overlap[here] > 0.8).all()
    assert (found.confidence[here] > 0.8).all()


def test_the_consensus_of_a_block_is_that_of_each_subject() -> None:
    rng = np.random.default_rng(2)
    here = rng.uniform(0, 150, (30, 3))
    maps = np.tile(np.eye(4), (3, 1, 1))
    maps[:, :3, :3] += rng.normal(0, 0.05, (3, 3, 3))
    maps[:, :3, 3] = rng.normal(0, 20, (3, 3))
    there = here @ np.swapaxes(maps[:, :3, :3], 1, 2) + maps[:, None, :3, 3]
    weight = np.ones((3, 30))
    there[:, :9] += rng.normal(0, 80, (3, 9, 3))
    weight[2] = 0
    found = query_map.consensus_affines(here, there, weight, 1.0, 64)
    np.testing.assert_allclose(found[:2], maps[:2], atol=0.05)
    assert np.isfinite(found[2]).all()
    shift = np.array([0.0, 3.0, -2.0])
    place = query_map.expected_places(here, there[:2] + shift, weight[:2], maps[:2], np.full(3, 60.0))
    clean = here @ np.swapaxes(maps[:2, :3, :3], 1, 2) + maps[:2, None, :3, 3] + shift
    assert np.abs(place - clean).max() < 1.5


def test_the_mean_of_passes_counts_a_pass_without_the_roi_as_zero() -> None:
    row = np.array([0, 1, 2, 1, 2, 3])
    slices = np.array([0, 0, 1, 0, 1, 2])
    subject = np.array([5, 5, 5, 5, 5, 6])
    confidence = np.array([0.9, 0.8, 0.4, 0.8, 0.6, 0.9], np.float32)
    weight = np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    chosen, mean = mean_of_passes(row, slices, subject, confidence, weight, 1.5)
    assert row[chosen].tolist() == [1, 2, 3]  # ROI 0 was found once only
    np.testing.assert_allclose(mean, [0.8, 0.7 / 1.5, 0.45 / 1.5], atol=1e-6)
    assert chosen.tolist() == [1, 2, 5]  # the surest of the answers that name a ROI


def test_the_surest_subjects_ask_again(study: Path) -> None:
    opened, seed = open_study(study), Seed("label", (2,))
    straight = ask(opened, "a", seed, QueryConfig(relays=0)).found
    through = ask(opened, "a", seed, QueryConfig(relays=2)).found
    np.testing.assert_array_equal(straight.row, through.row)
    assert (np.diff(through.subject) >= 0).all()
    assert not np.array_equal(straight.confidence, through.confidence)
    region = ask(opened, "a", seed).region
    same = opened.index.columns["slice"][through.row] == region.slices[through.region]
    assert same.mean() > 0.7


def test_a_system_that_does_not_tell_its_affinity_is_no_obstacle(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert (ask(open_study(study), "a", Seed("label", (2,))).found.total > 0.5).all()


def test_small_pieces() -> None:
    best, weight = query_map.mutual_best(np.array([[[0.9, 0.8], [0.1, 0.7]]], np.float32))
    assert best.tolist() == [[0, 0]]
    np.testing.assert_allclose(weight, [[0.9, 0.0]], atol=1e-6)
    centroid = np.array([[0.0, 0, 0], [0, 9, 9], [8, 0, 0], [0, 1, 1]])
    assert choose_context(centroid, centroid[:1], 2).tolist() == [0, 3]
    centres, place = np.array([[10.0, 10.0], [20.0, 20.0]]), np.array([19.0, 20.0])
    quality = np.array([0.9, 0.8], np.float32)
    assert region_at_point(centres, np.array([400.0, 400.0]), quality, place) == 1
    with pytest.raises(ValueError, match="at least 4 ROIs"):
        QueryConfig(context=3)
    with pytest.raises(ValueError, match="relays is -1; it must be 0 or more"):
        QueryConfig(relays=-1)


@pytest.mark.slow
def test_the_left_ventricle_is_found_in_real_hearts(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "mnms_cardiac"
    images = sorted(folder.glob("*/*/*_ED.nii.gz"))[:6]
    rows = [
        {"subject": path.name[:6], "image": str(path), "label": str(path).replace("_ED.nii.gz", "_ED_gt.nii.gz")}
        for path in images
    ]
    cohort = read_cohort(phantoms.write_csv(tmp_path / "cohort.csv", rows))
    run_study(make_config({"execution": {"executor": "serial"}}), cohort, tmp_path / "study", until="prototypes")
    code, said = _call(tmp_path / "study", "--subject", rows[0]["subject"], "--label", 1, "--masks", "--name", "lv")
    assert code == 0, said
    overlaps = []
    for row in rows[1:]:
        path = tmp_path / "study" / "queries" / "lv" / "masks" / f"{row['subject']}.nii.gz"
        found, truth = (sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in (path, row["label"]))
        overlaps.append(_dice(found == 1, truth == 1))
    assert np.mean(overlaps) > 0.65
    assert min(overlaps) > 0.3


def test_classes_are_not_asked_for(tmp_path: Path) -> None:
    manifest = phantoms.write_cohort(tmp_path / "data", ["a", "b"])
    rows = manifest.read_text(encoding="utf-8").replace("label", "segmentation", 1)
    manifest.write_text(rows, encoding="utf-8")
    config = make_config({"segmenter": "labels", "execution": {"executor": "serial"}})
    run_study(config, read_cohort(manifest), tmp_path / "study", until="prototypes")
    code, said = _call(tmp_path / "study", "--subject", "a", "--label", 1)
    assert code == 2
    assert "the ROIs of 'a' are classes, which are the same in every subject" in said
