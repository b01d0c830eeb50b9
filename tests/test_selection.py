"""The three one-to-one rules against their definitions."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.algorithms.selection import best_of_each, greedy_one_to_one, one_to_one


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_rounds_equal_the_one_by_one_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    i, j = (a.ravel() for a in np.indices((7, 9)))
    score = rng.integers(0, 12, len(i)) / 12
    expected, used_i, used_j = [], set(), set()
    for k in np.lexsort((j, i, -score)):
        if i[k] not in used_i and j[k] not in used_j:
            expected.append(k)
            used_i.add(i[k])
            used_j.add(j[k])
    assert greedy_one_to_one(i, j, score).tolist() == sorted(expected)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_optimal_has_the_largest_sum(seed: int) -> None:
    score = np.random.default_rng(seed).uniform(0.1, 1, (4, 5))
    i, j = (a.ravel() for a in np.indices(score.shape))
    chosen = one_to_one(i, j, score.ravel(), "optimal")
    best = max(sum(score[r, c] for r, c in enumerate(columns)) for columns in permutations(range(5), 4))
    assert score.ravel()[chosen].sum() == pytest.approx(best)
    assert len(set(i[chosen])) == len(set(j[chosen])) == len(chosen)


def test_optimal_never_invents_a_pair() -> None:
    i, j = np.array([0, 1, 1]), np.array([0, 0, 0])
    assert one_to_one(i, j, np.array([0.5, 0.7, 0.6]), "optimal").tolist() == [1]


def test_mutual_leaves_out_whatever_has_a_better_partner() -> None:
    i, j, score = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([0.9, 0.8, 0.7, 0.6])
    assert one_to_one(i, j, score, "mutual").tolist() == [0]
    assert one_to_one(i, j, score, "greedy").tolist() == [0, 3]
    assert one_to_one(i, j, score, "optimal").tolist() in ([0, 3], [1, 2])


@pytest.mark.parametrize("rule", ["greedy", "mutual", "optimal"])
def test_nothing_to_select(rule: str) -> None:
    nothing = np.zeros(0, np.int64)
    assert one_to_one(nothing, nothing, np.zeros(0), rule).tolist() == []  # type: ignore[arg-type]


def test_best_of_each_keeps_the_first_of_equals() -> None:
    assert best_of_each(np.array([3, 1, 3, 1]), np.array([0.5, 0.2, 0.5, 0.4])).tolist() == [0, 3]
