"""Which pairs of a cohort are chosen."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.algorithms import cohort_graph, descriptors
from pipeline.pairs import PairsConfig, PairsError, choose_pairs, count_pairs, similar_pairs
from storage.cohort import Cohort, Subject

COHORT = Cohort(
    (
        Subject("a", "a.nii", group="p"),
        Subject("b", "b.nii", group="q"),
        Subject("c", "c.nii", group="p"),
        Subject("d", "d.nii"),
    )
)


AMBIGUOUS = Cohort(tuple(Subject(name, "x.nii") for name in ("b__c", "c", "a__b", "a")))
SIMILARITY = np.array([[1.0, 0.5, 0.9, 0.5], [0.5, 1.0, 0.2, 0.8], [0.9, 0.2, 1.0, 0.1], [0.5, 0.8, 0.1, 1.0]])


def _names(config: PairsConfig, cohort: Cohort = COHORT) -> list[str]:
    pairs = choose_pairs(config, cohort)
    assert pairs is not None
    return [pair.pair for pair in pairs]


def _similar(config: PairsConfig, similarity: np.ndarray = SIMILARITY) -> list[str]:
    return [pair.pair for pair in similar_pairs(config, ["a", "b", "c", "d"], similarity)]


def _random_similarity(n: int) -> np.ndarray:
    return descriptors.similarity(np.random.default_rng(0).normal(size=(n, 8)))


def test_all_is_every_ordered_pair() -> None:
    names = _names(PairsConfig("all"))
    assert len(names) == 12
    assert names[:3] == ["b__a", "c__a", "d__a"]
    once = _names(PairsConfig("all", ordered=False))
    assert once == ["b__a", "c__a", "d__a", "c__b", "d__b", "d__c"]


def test_star_is_onto_the_reference() -> None:
    assert _names(PairsConfig("star")) == ["b__a", "c__a", "d__a"]
    assert _names(PairsConfig("star", reference="c")) == ["a__c", "b__c", "d__c"]


def test_intra_is_later_onto_earlier_of_a_group() -> None:
    assert _names(PairsConfig("intra")) == ["c__a"]


def test_knn_is_the_most_similar_with_ties_to_the_earlier() -> None:
    assert _similar(PairsConfig("knn", k=1)) == ["c__a", "d__b", "a__c", "b__d"]
    assert _similar(PairsConfig("knn", k=2)) == ["c__a", "b__a", "d__b", "a__b", "a__c", "b__c", "b__d", "a__d"]
    assert _similar(PairsConfig("knn", k=1, ordered=False)) == ["c__a", "d__b"]
    assert len(_similar(PairsConfig("knn", k=9))) == 12


def test_the_medoid_is_the_most_similar_to_all() -> None:
    assert _similar(PairsConfig("star", reference="medoid")) == ["b__a", "c__a", "d__a"]


def test_a_tree_connects_the_most_similar_and_adds_random_pairs() -> None:
    assert _similar(PairsConfig("tree", extra=0)) == ["b__a", "c__a", "d__b"]
    n, names = 60, [f"{k:02d}" for k in range(60)]
    alike = _random_similarity(n)
    made = [similar_pairs(PairsConfig("tree", extra=2, seed=seed), names, alike) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert len({frozenset((pair.moving, pair.fixed)) for pair in made[0]}) == len(made[0]) == n - 1 + 2 * n
    tree = {(p.moving, p.fixed) for p in similar_pairs(PairsConfig("tree", extra=0), names, alike)}
    assert tree < {(p.moving, p.fixed) for p in made[0]}
    reached = {"00"}
    for _ in range(n):
        reached |= {name for pair in tree if reached & set(pair) for name in pair}
    assert reached == set(names)


def test_equal_subjects_are_still_connected() -> None:
    assert len(cohort_graph.spanning_tree(np.ones((5, 5)))) == 4


def test_similarity_ignores_what_all_share_and_the_order_of_subjects() -> None:
    rng = np.random.default_rng(3)
    kinds = rng.normal(size=(2, 6))
    subjects = [5 + kinds[n % 2] + 0.2 * rng.normal(size=(40, 6)) for n in range(6)]
    found = descriptors.similarity(np.stack([descriptors.describe(s.astype(np.float32)) for s in subjects]))
    assert found[0, 2] > 0.8
    assert found[0, 1] < -0.8
    np.testing.assert_array_equal(found, found.T)
    turned = descriptors.similarity(np.stack([descriptors.describe(s.astype(np.float32)) for s in subjects[::-1]]))
    np.testing.assert_allclose(turned, found[::-1, ::-1], atol=2e-6)


@pytest.mark.parametrize(
    "config",
    [
        PairsConfig("all"),
        PairsConfig("all", ordered=False),
        PairsConfig("knn", k=2),
        PairsConfig("knn", k=9),
        PairsConfig("tree", extra=0),
        PairsConfig("tree", extra=1),
        PairsConfig("tree", extra=9),
        PairsConfig("star", reference="medoid"),
    ],
)
def test_pairs_are_counted_before_they_are_chosen(config: PairsConfig) -> None:
    chosen = choose_pairs(config, COHORT)
    assert (chosen is None) == config.by_similarity
    assert count_pairs(config, COHORT) == len(chosen if chosen is not None else _similar(config))


def test_subjects_that_failed_leave_few_or_no_pairs() -> None:
    assert similar_pairs(PairsConfig("knn"), ["a"], np.ones((1, 1))) == ()
    assert similar_pairs(PairsConfig("tree"), [], np.zeros((0, 0))) == ()


@pytest.mark.parametrize(
    ("config", "cohort", "message"),
    [
        (PairsConfig("star", reference="x"), COHORT, "'x', which is not a subject"),
        (PairsConfig("intra"), Cohort(COHORT.subjects[3:]), "no subject of the cohort has a group"),
        (PairsConfig("all"), Cohort(COHORT.subjects[:1]), "gives no pair for 1 subjects"),
        (PairsConfig("tree"), Cohort(COHORT.subjects[:1]), "gives no pair for 1 subjects"),
        (PairsConfig("list"), COHORT, "add --pairs FILE"),
        (PairsConfig("all"), AMBIGUOUS, "'a' onto 'b__c' and 'a__b' onto 'c' are both called 'a__b__c'; rename"),
    ],
)
def test_impossible_choices_are_refused(config: PairsConfig, cohort: Cohort, message: str) -> None:
    with pytest.raises(PairsError, match=message):
        choose_pairs(config, cohort)


@pytest.mark.parametrize(("name", "value"), [("k", 0), ("extra", -1), ("seed", -1)])
def test_numbers_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"pairs\.{name} is {value}"):
        PairsConfig(**{name: value})
