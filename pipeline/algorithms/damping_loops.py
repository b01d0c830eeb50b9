# mypy: disable-error-code="no-untyped-def"
"""The loops of `pipeline.algorithms.damping` for processors."""

from __future__ import annotations

import numpy as np

from pipeline.algorithms.compiled import compiled


@compiled
def softened(marked, reach):
    """One within `reach` nodes of a marked node [B, nz, ny, nx], falling to zero over as many more.

    Along each axis the largest within twice the reach, then the mean within it, the border continued.
    """
    near = marked.astype(np.float32)
    inner = near.size // len(near)
    for axis in range(1, 4):
        n = marked.shape[axis]
        inner //= n
        if n > 1:
            for line in near.reshape(-1, n, inner):
                _average(_largest(line, 2 * reach), reach, line)
    return near


@compiled
def _largest(rows, reach):
    """Of each of the rows [n, m] and those within a reach, the largest, element by element; values of 0 or more."""
    n, m = rows.shape
    now, following = np.zeros((n + 2 * reach, m), np.float32), np.zeros((n + 2 * reach, m), np.float32)
    now[reach : reach + n] = rows
    width = 1  # of the windows from each row on
    while 2 * width <= 2 * reach + 1:
        _larger(now[:-width].reshape(-1), now[width:].reshape(-1), following[:-width].reshape(-1))
        now, following = following, now
        width *= 2
    last = 2 * reach + 1 - width
    found = np.empty_like(rows)
    _larger(now[:n].reshape(-1), now[last : last + n].reshape(-1), found.reshape(-1))
    return found


@compiled
def _larger(a, b, out):
    """np.maximum, because max is not vectorised."""
    for i in range(len(out)):
        out[i] = np.maximum(a[i], b[i])


@compiled
def _average(rows, reach, out):
    """The mean of each of the rows [n, m] and those within a reach, the first and the last one continued."""
    n, m = rows.shape
    total = (reach + np.float32(1)) * rows[0]
    for p in range(1, reach + 1):
        total += rows[min(p, n - 1)]
    for p in range(n):
        following, leaving = rows[min(p + reach + 1, n - 1)], rows[max(p - reach, 0)]
        for i in range(m):
            out[p, i] = total[i] / np.float32(2 * reach + 1)
            total[i] += following[i] - leaving[i]
