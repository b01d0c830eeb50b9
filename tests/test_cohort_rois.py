"""Identity of ROIs over a cohort: known structures are found again, wrong matches are refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.algorithms import cohort_graph, cohort_rois
from pipeline.algorithms.cohort_rois import Identity, count_cycles, identify
from pipeline.cli import app
from pipeline.cohort_rois import remove_stale, write_cohort_rois
from storage import tables
from tests import sample_study

Pairs = Sequence[tuple[int, int]]


def synthetic(
    n: int, structures: int, pairs: Pairs, correct: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Subjects with 80 % of the structures each, of which a pair matches 70 %, some wrongly.

    Returns subject and structure of every region, and both ends and the confidence of every match.
    """
    rng = np.random.default_rng(seed)
    present = rng.random((n, structures)) < 0.8
    region = np.full(present.shape, -1)
    region[present] = np.arange(present.sum())
    subject, truth = np.nonzero(present)
    ends = []
    for a, b in pairs:
        seen = np.flatnonzero(present[a] & present[b] & (rng.random(structures) < 0.7))
        right = region[b, seen]
        wrong = np.flatnonzero(rng.random(len(seen)) >= correct)
        free = np.setdiff1d(region[b][present[b]], np.delete(right, wrong))
        right[wrong] = rng.permutation(free)[: len(wrong)]
        ends.append(np.stack([region[a, seen], right]))
    left, right = np.concatenate(ends, axis=1)
    return subject, truth, left, right, rng.uniform(0.4, 0.9, len(left))


def identity_quality(found: Identity, truth: np.ndarray) -> tuple[float, float]:
    """Precision and recall of "these two regions are the same structure" over all pairs of regions."""

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    inside = found.cluster >= 0
    both = np.unique(np.stack([found.cluster[inside], truth[inside]]), axis=1, return_counts=True)[1]
    agreeing = pairs(both)
    return agreeing / pairs(np.bincount(found.cluster[inside])), agreeing / pairs(np.bincount(truth))


def all_pairs(n: int) -> Pairs:
    return [(i, j) for i in range(n) for j in range(i)]


def nearest_pairs(n: int, k: int) -> Pairs:
    place = np.random.default_rng(1).normal(size=(n, 3))
    near = cohort_graph.nearest(-np.linalg.norm(place[:, None] - place, axis=2), k)
    edges = np.column_stack([np.repeat(np.arange(n), k), near.ravel()])
    return [(int(a), int(b)) for a, b in np.unique(np.sort(edges, axis=1), axis=0)]


@pytest.mark.parametrize(
    ("pairs", "correct", "precision", "recall"),
    [
        (all_pairs(24), 0.8, 0.999, 0.99),
        (all_pairs(24), 0.6, 0.99, 0.9),
        (nearest_pairs(60, 8), 0.9, 0.98, 0.97),
        (nearest_pairs(60, 8), 0.8, 0.95, 0.9),
    ],
)
def test_known_structures_are_found_despite_wrong_matches(
    pairs: Pairs, correct: float, precision: float, recall: float
) -> None:
    n = max(max(pair) for pair in pairs) + 1
    subject, truth, left, right, confidence = synthetic(n, 40, pairs, correct)
    found = identify(subject, left, right, confidence)
    quality = identity_quality(found, truth)
    assert quality[0] > precision
    assert quality[1] > recall
    kept = found.cluster[left] == found.cluster[right]
    wrong = truth[left] != truth[right]
    assert kept[wrong].mean() < 0.15
    assert kept[~wrong].mean() > 0.95


def test_asking_for_a_second_path_is_surer() -> None:
    subject, truth, left, right, confidence = synthetic(60, 40, nearest_pairs(60, 5), 0.7)
    once, twice = (identity_quality(identify(subject, left, right, confidence, n), truth) for n in (1.0, 2.0))
    assert twice[0] > 0.97 > once[0]
    assert twice[1] < once[1]


def test_a_cluster_holds_one_region_of_a_subject_whatever_the_matches() -> None:
    rng = np.random.default_rng(2)
    subject = np.sort(rng.integers(0, 12, 200))
    left, right = rng.integers(0, 200, (2, 900))
    other = subject[left] != subject[right]
    found = identify(subject, left[other], right[other], rng.random(other.sum()))
    inside = found.cluster >= 0
    held = list(zip(found.cluster[inside].tolist(), subject[inside].tolist(), strict=True))
    assert len(set(held)) == len(held)
    sizes = np.bincount(found.cluster[inside])
    assert sizes.min() >= 2
    assert (np.diff(sizes) <= 0).all()
    np.testing.assert_array_equal(found.size[inside], sizes[found.cluster[inside]])
    assert (found.agreeing <= found.matches).all()


def test_the_order_of_matches_and_their_direction_do_not_matter() -> None:
    subject, _, left, right, confidence = synthetic(12, 20, all_pairs(12), 0.7)
    order = np.random.default_rng(4).permutation(len(left))
    first = identify(subject, left, right, confidence)
    second = identify(subject, right[order], left[order], confidence[order])
    np.testing.assert_array_equal(first.cluster, second.cluster)


def test_triangles_are_counted() -> None:
    # subjects 0..3; regions 0, 1 | 2, 3 | 4, 5 | 6
    subject = np.array([0, 0, 1, 1, 2, 2, 3])
    left, right = np.array([0, 2, 0, 1, 1]), np.array([2, 4, 4, 3, 6])
    closed, cycles = count_cycles(subject, left, right)
    assert closed.tolist() == [1, 1, 1, 0, 0]
    assert cycles.tolist() == [1, 1, 1, 0, 0]
    left, right = np.append(left, 3), np.append(right, 5)
    left, right = np.append(left, 1), np.append(right, 4)
    closed, cycles = count_cycles(subject, left, right)
    assert (closed[3], cycles[3]) == (0, 1)


def test_triangles_are_the_same_however_many_are_looked_up_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, _, left, right, _ = synthetic(12, 20, all_pairs(12), 0.7)
    whole = count_cycles(subject, left, right)
    for size in (1, 37):
        monkeypatch.setattr(cohort_rois, "_CHUNK", size)
        np.testing.assert_array_equal(count_cycles(subject, left, right), whole)


def test_no_match_is_no_cohort_roi() -> None:
    nothing = np.zeros(0, np.int64)
    found = identify(np.array([0, 1]), nothing, nothing, np.zeros(0))
    assert found.cluster.tolist() == [-1, -1]
    assert found.matches.tolist() == [0, 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_study.write_study(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "study"))


def test_the_table_says_who_shares_what(study: Path) -> None:
    found = CliRunner().invoke(app, ["cohort", "rois", str(study)])
    assert found.exit_code == 0, found.output
    rows = tables.read_table(study, "cohort_rois").to_pylist()
    assert "100% of the matches agree" in found.stdout
    held = [(row["cohort_roi"], row["subject"]) for row in rows]
    assert held == sorted(set(held))
    whole = [row for row in rows if row["n_subjects"] == 3]
    assert {row["frequency"] for row in whole} == {1.0}
    middle = [row for row in whole if row["subject"] == "subject-02"]
    assert middle
    assert all((row["n_matches"], row["support"], row["n_rois"]) == (2, 2, 1) for row in middle)
    rois = {(row["subject"], row["track"]): row for row in tables.read_table(study, "rois").to_pylist()}
    assert all(rois[row["subject"], row["track"]]["slice"] == row["first_slice"] == row["last_slice"] for row in rows)


def test_the_table_goes_when_the_matches_change(study: Path) -> None:
    write_cohort_rois(study, 1.0)
    assert not remove_stale(study)
    assert tables.read_table(study, "cohort_rois").num_rows
    tables.remove_part(study, "correspondences", tables.part_names(study, "correspondences")[0])
    (part,) = tables.part_names(study, "correspondences")
    rows = tables.read_part(study, "correspondences", part).to_pylist()
    changed = tables.table_from_rows("correspondences", [{**row, "key": "other"} for row in rows])
    tables.write_part(study, "correspondences", part, changed)
    assert remove_stale(study)
    assert tables.read_table(study, "cohort_rois").num_rows == 0


def test_wrong_usage_is_one_line(study: Path, tmp_path: Path) -> None:
    def fails(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, ["cohort", "rois", *map(str, arguments)])
        assert done.exit_code == 2, done.output
        assert len(done.stderr.strip().splitlines()) == 1
        return done.stderr

    (tmp_path / "empty").mkdir()
    assert "is not a study folder" in fails(tmp_path / "empty")
    assert "--min-paths is 0.5; it must be 1 or more" in fails(study, "--min-paths", "0.5")
    tables.remove_part(study, "rois", tables.part_names(study, "rois")[1])
    assert "which the table rois lacks" in fails(study)
    for part in tables.part_names(study, "correspondences"):
        tables.remove_part(study, "correspondences", part)
    assert "has no matches yet" in fails(study)
