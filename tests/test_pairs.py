"""Which pairs of a cohort are chosen."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.pairs import PairsConfig, PairsError, choose_pairs, nearest_pairs
from storage.cohort import Cohort, Subject

COHORT = Cohort(
    (
        Subject("a", "a.nii", group="p"),
        Subject("b", "b.nii", group="q"),
        Subject("c", "c.nii", group="p"),
        Subject("d", "d.nii"),
    )
)


def _names(config: PairsConfig, cohort: Cohort = COHORT) -> list[str]:
    return [pair.pair for pair in choose_pairs(config, cohort)]


def test_all_is_every_ordered_pair() -> None:
    names = _names(PairsConfig("all"))
    assert len(names) == 12
    assert names[:3] == ["b__a", "c__a", "d__a"]


def test_star_is_onto_the_reference() -> None:
    assert _names(PairsConfig("star")) == ["b__a", "c__a", "d__a"]
    assert _names(PairsConfig("star", reference="c")) == ["a__c", "b__c", "d__c"]


def test_intra_is_later_onto_earlier_of_a_group() -> None:
    assert _names(PairsConfig("intra")) == ["c__a"]


def test_knn_is_the_nearest_by_cosine_with_ties_to_the_earlier() -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [3.0, 0.0], "d": [1.0, 0.0]}
    descriptors = {name: np.array(vector) for name, vector in vectors.items()}
    pairs = nearest_pairs(PairsConfig("knn", k=1), descriptors)
    assert [(pair.moving, pair.fixed) for pair in pairs] == [("c", "a"), ("a", "b"), ("a", "c"), ("a", "d")]
    assert len(nearest_pairs(PairsConfig("knn", k=9), descriptors)) == 12


@pytest.mark.parametrize(
    ("config", "cohort", "message"),
    [
        (PairsConfig("star", reference="x"), COHORT, "'x', which is not a subject"),
        (PairsConfig("intra"), Cohort(COHORT.subjects[3:]), "no subject of the cohort has a group"),
        (PairsConfig("all"), Cohort(COHORT.subjects[:1]), "gives no pair for 1 subjects"),
        (PairsConfig("list"), COHORT, "add --pairs FILE"),
    ],
)
def test_impossible_choices_are_refused(config: PairsConfig, cohort: Cohort, message: str) -> None:
    with pytest.raises(PairsError, match=message):
        choose_pairs(config, cohort)


def test_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"pairs\.k is 0"):
        PairsConfig("knn", k=0)
