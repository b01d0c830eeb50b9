"""The stages one by one: what a unit writes, and what evaluation reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.segmenter import Candidates, Features
from pipeline import results
from pipeline.algorithms.ddf import FitResult
from pipeline.algorithms.matching import MatchConfig, RoiSet
from pipeline.algorithms.prototypes import PrototypeConfig
from pipeline.algorithms.rois import RoiConfig
from pipeline.algorithms.tracks import TrackConfig
from pipeline.algorithms.warp import affine_ddf
from pipeline.config import make_config
from pipeline.dispatch import Failure
from pipeline.folder import StudyFolder
from pipeline.keys import PlannedPair
from pipeline.stages import fit, match
from pipeline.stages.evaluate import Reference, evaluate
from pipeline.stages.prototypes import NoRoiError, PrototypeUnit, run_unit
from pipeline.stages.roi_sets import SubjectRois, read_rois
from storage import tables
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry

SPACING = (4.0, 2.0, 1.0)
SHAPE = (3, 20, 24)


def _geometry(shift: float = 0.0) -> Geometry:
    return Geometry(shape=SHAPE, spacing_mm=SPACING, origin_mm=(shift, 0.0, 0.0))


def _boxes(*corners: tuple[int, int, int]) -> np.ndarray:
    labels = np.zeros(SHAPE, np.int32)
    for value, y, x in corners:
        labels[:, y : y + 5, x : x + 6] = value
    return labels


def _fit(affine: np.ndarray | None = None) -> FitResult:
    matrix = np.eye(4) if affine is None else affine
    nodes = np.zeros((3, 1, 1, 1), np.float32)
    return FitResult(affine_ddf(matrix, SHAPE, SPACING), matrix, nodes, SPACING, "none", np.zeros(0, np.float32))


def _translation(z: float, y: float, x: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = z, y, x
    return matrix


def test_the_identity_on_equal_labels_is_perfect() -> None:
    same = Reference(_geometry(), _boxes((1, 3, 4), (5, 12, 12)))
    rows = evaluate(same, same, _fit())
    assert [row["label"] for row in rows] == [0, 1, 5]
    for row in rows:
        assert row["dice_before"] == row["dice_centered"] == row["dice_affine"] == row["dice"] == 1.0
        assert row["tre_mm_before"] == row["tre_mm"] == row["hd95_mm"] == 0.0
        assert row["fold_fraction"] == row["sdlogj"] == 0.0


def test_a_known_shift_is_measured_and_undone() -> None:
    fixed, moving = Reference(_geometry(), _boxes((1, 3, 4))), Reference(_geometry(), _boxes((1, 5, 7)))
    mean, row = evaluate(fixed, moving, _fit(_translation(0, 2 * 2.0, 3 * 1.0)))
    assert row["tre_mm_before"] == pytest.approx(np.hypot(4.0, 3.0))
    assert row["tre_vox_before"] == pytest.approx(np.hypot(2, 3))
    assert row["dice_before"] == pytest.approx(2 * 3 * 3 / (2 * 5 * 6))
    assert (row["dice_affine"], row["dice"], row["tre_mm"]) == (1.0, 1.0, 0.0)
    assert {k: v for k, v in mean.items() if k != "label"} == {k: v for k, v in row.items() if k != "label"}


def test_centering_undoes_a_different_origin() -> None:
    fixed, moving = Reference(_geometry(), _boxes((1, 3, 4))), Reference(_geometry(50.0), _boxes((1, 3, 4)))
    row = evaluate(fixed, moving, _fit())[1]
    assert (row["dice_before"], row["dice_centered"]) == (0.0, 1.0)
    assert "tre_mm_before" not in row


def test_a_label_in_one_map_only_counts_zero_but_not_in_the_mean() -> None:
    fixed, moving = Reference(_geometry(), _boxes((1, 3, 4), (2, 12, 12))), Reference(_geometry(), _boxes((1, 3, 4)))
    mean, one, two = evaluate(fixed, moving, _fit())
    assert (mean["dice"], one["dice"], two["dice"]) == (1.0, 1.0, 0.0)
    assert "tre_mm" not in two


def test_landmarks_follow_the_pull_back_field() -> None:
    points = np.array([[4.0, 10.0, 8.0], [8.0, 20.0, 10.0]])
    fixed = Reference(_geometry(), None, points)
    moving = Reference(_geometry(), None, points + np.array([0.0, 3.0, 4.0]))
    (row,) = evaluate(fixed, moving, _fit(_translation(0, 3, 4)))
    assert row["landmark_tre_mm_before"] == pytest.approx(5.0)
    assert row["landmark_tre_vox_before"] == pytest.approx(np.hypot(1.5, 4.0))
    assert row["landmark_tre_mm"] == pytest.approx(0.0, abs=1e-5)
    assert "dice" not in row
    with pytest.raises(ValueError, match="2 fixed but 1 moving landmarks"):
        evaluate(fixed, Reference(_geometry(), None, points[:1]), _fit())


def _store(root: Path, areas: list[int]) -> EmbeddingStore:
    """A store with one subject: two feature channels, and square ROIs of the given sides in slice 1."""
    store = EmbeddingStore(root / "embeddings.zarr")
    features = np.zeros((2, *SHAPE[1:]), np.float32)
    features[0], features[1, :10] = 1.0, 2.0
    layout = {"blocks": [["all", 0, 2, 1.0]]}
    with store.writer("s", {"v": 1}, _geometry(), layout, (20.0, 24.0), SHAPE[1:]) as writer:
        for z in range(SHAPE[0]):
            masks = np.zeros((len(areas) if z == 1 else 0, *SHAPE[1:]), bool)
            for mask, side in zip(masks, areas, strict=False):
                mask[:side, :side] = True
            scores = np.linspace(0.9, 0.5, len(masks), dtype=np.float32)
            found = Candidates(masks, scores, scores)
            seen = Features(features[None], (20.0, 24.0))
            writer.add_slice(z, seen.values[0], found.masks, found.quality, found.stability)
    return store


def test_pooling_writes_rows_and_prototypes_of_the_kept_rois(tmp_path: Path) -> None:
    store = _store(tmp_path, [4, 15, 8])
    config = RoiConfig(min_area=10, max_area=100, area_unit="px")
    done = run_unit(tmp_path, store, config, PrototypeConfig(), TrackConfig(), PrototypeUnit("s", {"p": 1}, "key"))
    assert done.n_rois == 2
    rows = tables.read_table(tmp_path, "rois").to_pylist()
    assert [(row["roi"], row["area_px"], row["slice"]) for row in rows] == [(0, 16, 1), (2, 64, 1)]
    assert rows[1]["area_mm2"] == 64 * 2.0 * 1.0
    assert rows[1]["centroid_y_mm"] == 3.5 * 2.0
    found = read_rois(store, "s")
    np.testing.assert_array_equal(found.roi, [0, 2])
    np.testing.assert_allclose(np.linalg.norm(found.rois.prototypes, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found.rois.prototypes, [[1 / np.sqrt(5), 2 / np.sqrt(5)]] * 2, rtol=1e-5)
    assert [row["track"] for row in rows] == [0, 1]


@pytest.mark.parametrize(
    ("areas", "message"), [([], "found no region in any slice"), ([15], "none of 1 candidate regions passes")]
)
def test_a_subject_without_rois_says_why(tmp_path: Path, areas: list[int], message: str) -> None:
    store = _store(tmp_path, areas)
    config = RoiConfig(min_area=10, max_area=100, area_unit="px")
    with pytest.raises(NoRoiError, match=message):
        run_unit(tmp_path, store, config, PrototypeConfig(), TrackConfig(), PrototypeUnit("s", {}, "key"))


def _metric_rows(*pairs: tuple[str, str]) -> list[dict[str, object]]:
    return [{"pair": pair, "moving": "m", "fixed": "f", "label": 0, "n_rois": 1, "key": key} for pair, key in pairs]


def _write(root: Path, part: str, *pairs: tuple[str, str]) -> None:
    tables.write_part(root, "metrics", part, tables.table_from_rows("metrics", _metric_rows(*pairs)))


def test_reconcile_keeps_moves_and_drops(tmp_path: Path) -> None:
    _write(tmp_path, "p1", ("stays", "k"), ("moves", "k"), ("changed", "old"), ("gone", "k"))
    _write(tmp_path, "p2", ("untouched", "whatever"))
    wanted = {"stays": ("k", "p1"), "moves": ("k", "p3"), "changed": ("new", "p1")}
    assert results.reconcile(tmp_path, "metrics", wanted, {"untouched"}) == {"stays", "moves", "untouched"}
    found = {p: tables.read_part(tmp_path, "metrics", p)["pair"].to_pylist() for p in ("p1", "p2", "p3")}
    assert found == {"p1": ["stays"], "p2": ["untouched"], "p3": ["moves"]}


def test_reconcile_heals_a_row_that_a_kill_left_in_two_parts(tmp_path: Path) -> None:
    _write(tmp_path, "old", ("pair", "k"))
    _write(tmp_path, "new", ("other", "k"), ("pair", "k"))
    wanted = {"pair": ("k", "new"), "other": ("k", "new")}
    assert results.reconcile(tmp_path, "metrics", wanted) == {"pair", "other"}
    assert tables.read_table(tmp_path, "metrics")["pair"].to_pylist() == ["other", "pair"]
    assert tables.part_names(tmp_path, "metrics") == ["new"]


def test_pair_keys_are_the_distinct_ones_whatever_the_order_of_rows(tmp_path: Path) -> None:
    _write(tmp_path, "p1", ("b", "k"), ("a", "k"), ("a", "k"), ("a", "l"), ("b", "k"))
    _write(tmp_path, "p2", ("c", "k"))
    _write(tmp_path, "p3")
    found = list(results.pair_keys(tmp_path, "metrics"))
    assert sorted(found) == [("a", "k"), ("a", "l"), ("b", "k"), ("c", "k")]


def _subject(seed: int) -> SubjectRois:
    """Twelve ROIs in three slices that resemble those of every other such subject."""
    shared, rng = np.random.default_rng(0), np.random.default_rng(seed)
    prototypes = (shared.normal(size=(12, 20)) + 0.1 * rng.normal(size=(12, 20))).astype(np.float32)
    place = shared.uniform(0, 40, (12, 2)) + rng.normal(size=(12, 2))
    z = np.repeat(np.arange(3, dtype=np.int32), 4)
    rois = RoiSet(
        prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True),
        z,
        np.column_stack([z * 4.0, place]),
        np.full(12, 50.0),
        np.tile([16.0, 0.0, 16.0], (12, 1)),
        3,
    )
    return SubjectRois(rois, np.arange(100, 112, dtype=np.int32), _geometry())


def test_a_tile_of_pairs_gives_one_sorted_part_and_a_bad_subject_fails_its_pairs_only(tmp_path: Path) -> None:
    subjects = {"a": _subject(1), "b": _subject(2), "far": _subject(3)}
    far = subjects["far"].rois
    subjects["far"] = replace(subjects["far"], rois=replace(far, prototypes=-far.prototypes))

    def rois_of(name: str) -> SubjectRois:
        if name not in subjects:
            raise FileNotFoundError(name)
        return subjects[name]

    named = [("z", "a", "b"), ("gone", "a", "lost"), ("none", "a", "far"), ("c", "b", "a")]
    pairs = tuple(PlannedPair(pair, moving, fixed, f"key {pair}", "", "p") for pair, moving, fixed in named)
    done = match.run_unit(tmp_path, rois_of, MatchConfig(), match.MatchUnit("p", pairs))
    assert [outcome.error if isinstance(outcome, Failure) else "" for outcome in done] == [
        "", "FileNotFoundError", "", "",
    ]  # fmt: skip
    rows = tables.read_part(tmp_path, "correspondences", "p").to_pylist()
    assert sorted({(row["pair"], row["moving"], row["fixed"], row["key"]) for row in rows}) == [
        ("c", "b", "a", "key c"), ("z", "a", "b", "key z"),
    ]  # fmt: skip
    assert [row["pair"] for row in rows] == sorted(row["pair"] for row in rows)
    one = [row for row in rows if row["pair"] == "z"]
    assert [row["rank"] for row in one] == list(range(12))
    for row in one:
        moving, fixed = row["moving_roi"] - 100, row["fixed_roi"] - 100
        assert row["moving_slice"] == subjects["a"].rois.slice[moving]
        assert row["fixed_centroid_y_mm"] == subjects["b"].rois.centroid_mm[fixed, 1]
        assert row["moving_centroid_x_mm"] == subjects["a"].rois.centroid_mm[moving, 2]
    assert [row["pair"] for row in tables.read_part(tmp_path, "unmatched", "p").to_pylist()] == ["none"]


def test_merging_replaces_the_rows_of_its_pairs_only(tmp_path: Path) -> None:
    _write(tmp_path, "p", ("b", "old"), ("c", "k"))
    fresh = tables.table_from_rows("metrics", _metric_rows(("b", "new"), ("a", "k")))
    results.merge_rows(tmp_path, "metrics", "p", fresh, ["a", "b"])
    rows = tables.read_table(tmp_path, "metrics").to_pylist()
    assert [(row["pair"], row["key"]) for row in rows] == [("a", "k"), ("b", "new"), ("c", "k")]


def test_a_pair_whose_matches_are_gone_fails_where_one_without_matches_does_not(tmp_path: Path) -> None:
    pairs = (PlannedPair("lost", "a", "b", "m", "f", "p"), PlannedPair("none", "b", "a", "m", "f", "p"))
    known = [{"pair": "none", "moving": "b", "fixed": "a", "key": "m"}]
    tables.write_part(tmp_path, "unmatched", "p", tables.table_from_rows("unmatched", known))
    folder, unit = StudyFolder(tmp_path), fit.FitUnit("p.0", "p", pairs, {}, (None, None))
    lost, none = fit.run_unit(folder, folder.store, make_config({}), unit)
    assert isinstance(lost, Failure)
    assert "deleted meanwhile" in lost.message
    assert isinstance(none, Failure)
    assert "encode it first" in none.message
