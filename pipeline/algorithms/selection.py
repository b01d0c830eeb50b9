"""Choosing pairs from scored candidates."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

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
        best = np.flatnonzero((score >= _best_score(i, score)) & (score >= _best_score(j, score)))
        return best[_first_of_each(i[best]) & _first_of_each(j[best])]
    return _optimal(i, j, score)


def greedy_one_to_one(i: Index, j: Index, score: Score) -> Index:
    """Positions of the pairs that greedy selection by descending score takes, each i and each j at most once.

    Ties go to the pair given first. A pair that is the best left of both its row and its column is taken whatever
    else happens, so whole rounds of such pairs are taken at once; the result is that of the one-by-one rule.

    Args:
        i, j: [n], non-negative.
        score: [n].
    """
    order = np.argsort(-score, kind="stable")
    rows, cols = int(i.max(initial=0)) + 1, int(j.max(initial=0)) + 1
    taken = [np.zeros(0, np.int64)]
    while len(order):
        r, c = i[order], j[order]
        best = _first_of_each(r) & _first_of_each(c)
        taken.append(order[best])
        used_row, used_col = np.zeros(rows, bool), np.zeros(cols, bool)
        used_row[r[best]], used_col[c[best]] = True, True
        order = order[~(used_row[r] | used_col[c])]
    return np.sort(np.concatenate(taken))


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


def _best_score(group: Index, score: Score) -> Score:
    """Largest score of each entry's group: [n]."""
    best = np.zeros(int(group.max(initial=0)) + 1, score.dtype)
    np.maximum.at(best, group, score)
    return np.asarray(best[group])


def _first_of_each(values: Index) -> npt.NDArray[np.bool_]:
    first = np.empty(int(values.max(initial=0)) + 1, np.int64)
    first[values[::-1]] = np.arange(len(values) - 1, -1, -1)
    return np.asarray(first[values] == np.arange(len(values)))
