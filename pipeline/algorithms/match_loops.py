# mypy: disable-error-code="no-untyped-def"
"""The loops of the matching: scans and selections that array operations would go through several times."""

from __future__ import annotations

import numpy as np

from pipeline.algorithms.compiled import compiled


@compiled
def exceeding(block, least, left, right):
    """Row, column and value of what exceeds `least` in a block [n, m], row by row.

    left, right: [n, 4] and [m, 4], of which the product must stay below one half (`ellipses.Gate`); empty for no gate.
    """
    n, m = block.shape
    gated, count, found = len(left) > 0, 0, 0
    for row in range(n):
        for column in range(m):
            count += block[row, column] > least
    i, j, value = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.float32)
    columns = np.empty(m + 1, np.int64)
    for row in range(n):
        some = 0
        for column in range(m):  # without a branch, which would mostly be guessed wrong
            columns[some] = column
            some += block[row, column] > least
        for column in columns[:some]:
            if gated:
                product = left[row, 0] * right[column, 0] + left[row, 1] * right[column, 1]
                product += left[row, 2] * right[column, 2] + left[row, 3] * right[column, 3]
                if product >= np.float32(0.5):
                    continue
            i[found], j[found] = row, column
            value[found] = min(block[row, column], np.float32(1))
            found += 1
    return i[:found], j[:found], value[:found]


@compiled
def rivals(block, rows, columns):
    """Largest value of each row of a block beside that in one column, from 0: float32 [len(rows)]."""
    found = np.zeros(len(rows), np.float32)
    for p in range(len(rows)):
        best = np.float32(0)
        for column in range(block.shape[1]):
            if column != columns[p]:
                best = max(best, block[rows[p], column])
        found[p] = best
    return found


@compiled
def greedy(order, i, j, rows, columns):
    """Whether each pair is taken, in the given order, while neither its i nor its j has been: bool [n]."""
    taken, used_row, used_column = np.zeros(len(i), np.bool_), np.zeros(rows, np.bool_), np.zeros(columns, np.bool_)
    for p in order:
        if not used_row[i[p]] and not used_column[j[p]]:
            taken[p] = used_row[i[p]] = used_column[j[p]] = True
    return taken


@compiled
def mutual(i, j, score, rows, columns):
    """Whether each pair is the best of its i and of its j, and the first such of both: bool [n]."""
    best_row, best_column = np.full(rows, -np.inf, score.dtype), np.full(columns, -np.inf, score.dtype)
    for p in range(len(i)):
        best_row[i[p]] = max(best_row[i[p]], score[p])
        best_column[j[p]] = max(best_column[j[p]], score[p])
    taken, seen_row, seen_column = np.zeros(len(i), np.bool_), np.zeros(rows, np.bool_), np.zeros(columns, np.bool_)
    for p in range(len(i)):
        if score[p] >= best_row[i[p]] and score[p] >= best_column[j[p]]:
            taken[p] = not (seen_row[i[p]] or seen_column[j[p]])
            seen_row[i[p]] = seen_column[j[p]] = True
    return taken
