"""Choosing pairs from scored candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


def greedy_one_to_one(i: Index, j: Index, score: npt.NDArray[np.floating]) -> Index:
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
        best = _first_of_each(r, rows) & _first_of_each(c, cols)
        taken.append(order[best])
        used_row, used_col = np.zeros(rows, bool), np.zeros(cols, bool)
        used_row[r[best]], used_col[c[best]] = True, True
        order = order[~(used_row[r] | used_col[c])]
    return np.sort(np.concatenate(taken))


def _first_of_each(values: Index, size: int) -> npt.NDArray[np.bool_]:
    first = np.empty(size, np.int64)
    first[values[::-1]] = np.arange(len(values) - 1, -1, -1)
    return np.asarray(first[values] == np.arange(len(values)))
