"""Choosing pairs from scored candidates."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from pipeline.algorithms import match_loops

Index = npt.NDArray[np.int64]
Score = npt.NDArray[np.floating]
Rule = Literal["greedy", "mutual", "optimal"]


def one_to_one(i: Index, j: Index, score: Score, rule: Rule = "greedy") -> Index:
    """Positions, ascending, of a selection that takes each i and each j at most once (Eq. 8).

    Args:
        i, j: [n], non-negative.
        score: [n], positive.
        rule: "greedy" by descending score (Eq. 9, argmax again and again); "mutual" takes the pairs that are the best
            of both their i and their j and nothing else; "optimal" has the largest sum of scores.
    """
    if rule == "greedy":
        return greedy_one_to_one(i, j, score)
    if rule == "mutual":
        return np.flatnonzero(match_loops.mutual(i, j, score, *_sizes(i, j)))
    return _optimal(i, j, score)


def greedy_one_to_one(i: Index, j: Index, score: Score) -> Index:
    """Positions of the pairs that greedy selection by descending score takes, each i and each j at most once.

    Ties go to the pair given first.

    Args:
        i, j: [n], non-negative.
        score: [n].
    """
    order = np.argsort(-score, kind="stable")
    return np.flatnonzero(match_loops.greedy(order, i, j, *_sizes(i, j)))


def best_of_each(group: Index, score: Score) -> Index:
    """Positions, ascending, of the best entry of every group; ties go to the entry given first."""
    order = np.argsort(-score, kind="stable")
    return np.sort(order[_first_of_each(group[order])])


def _optimal(i: Index, j: Index, score: Score) -> Index:
    """Largest sum of scores (Hungarian assignment); where a pair is given twice its better score counts."""
    rows, row = np.unique(i, return_inverse=True)
    cols, col = np.unique(j, return_inverse=True)
    if not len(i):
        return np.zeros(0, np.int64)
    position = np.full((len(rows), len(cols)), -1, np.int64)
    order = np.argsort(score, kind="stable")
    position[row[order], col[order]] = order
    gain = np.where(position >= 0, score[position], 0.0)
    position = position[linear_sum_assignment(gain, maximize=True)]
    return np.sort(position[position >= 0])


def _sizes(i: Index, j: Index) -> tuple[int, int]:
    """How many values i and j can have."""
    return int(i.max(initial=-1)) + 1, int(j.max(initial=-1)) + 1


def _first_of_each(values: Index) -> npt.NDArray[np.bool_]:
    first = np.empty(int(values.max(initial=0)) + 1, np.int64)
    first[values[::-1]] = np.arange(len(values) - 1, -1, -1)
    return np.asarray(first[values] == np.arange(len(values)))
