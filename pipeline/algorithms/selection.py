"""Choosing pairs from scored candidates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


def greedy_one_to_one(i: Index, j: Index, score: npt.NDArray[np.floating]) -> Index:
    """Positions of the pairs that greedy selection by descending score takes, each i and each j at most once.

    Ties go to the smaller (i, j). A pair that is the best left of both its row and its column is taken whatever
    else happens, so whole rounds of such pairs are taken at once; the result is that of the one-by-one rule.
    """
    order = np.lexsort((j, i, -score))
    rows = np.unique(i, return_inverse=True)[1]
    cols = np.unique(j, return_inverse=True)[1]
    taken = []
    while len(order):
        r, c = rows[order], cols[order]
        first_row, first_col = _first_of_each(r), _first_of_each(c)
        best = first_row & first_col
        taken.append(order[best])
        used_row, used_col = np.zeros(rows.max() + 1, bool), np.zeros(cols.max() + 1, bool)
        used_row[r[best]], used_col[c[best]] = True, True
        order = order[~(used_row[r] | used_col[c])]
    return np.sort(np.concatenate(taken)) if taken else np.zeros(0, np.int64)


def _first_of_each(values: Index) -> npt.NDArray[np.bool_]:
    first = np.full(int(values.max()) + 1, len(values))
    first[values[::-1]] = np.arange(len(values) - 1, -1, -1)
    return np.asarray(first[values] == np.arange(len(values)))
