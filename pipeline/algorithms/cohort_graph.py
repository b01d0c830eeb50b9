"""Which subjects of a cohort go together, from how alike they are: nearest, medoid, spanning tree.

Everywhere a similarity is float64 [N, N], symmetric, in -1..1; its diagonal is ignored. Ties go to the earlier
subject, so equal input gives equal output.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csgraph

Similarity = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]


def nearest(similarity: Similarity, k: int) -> Index:
    """The k most similar others of each subject, best first: int64 [N, min(k, N - 1)]."""
    return np.argsort(-_without_self(similarity), axis=1, kind="stable")[:, : min(k, len(similarity) - 1)]


def medoid(similarity: Similarity) -> int:
    """The subject that is most similar to the others on average."""
    others = similarity.sum(axis=1) - np.diag(similarity)
    return int(np.argmax(np.round(others / max(1, len(similarity) - 1), 9)))


def spanning_tree(similarity: Similarity) -> Index:
    """Edges of the tree of largest total similarity: int64 [N - 1, 2], earlier subject first, in order."""
    if len(similarity) < 2:
        return np.zeros((0, 2), np.int64)
    cost = 3.0 - np.triu(similarity, 1)  # csgraph takes 0 for "no edge"
    tree = csgraph.minimum_spanning_tree(np.triu(cost, 1)).tocoo()
    edges = np.sort(np.column_stack([tree.row, tree.col]).astype(np.int64), axis=1)
    return edges[np.lexsort(edges.T[::-1])]


def random_edges(count: int, n: int, taken: Index, seed: int) -> Index:
    """Random pairs of different subjects, none twice and none of `taken`, both [E, 2] with the earlier first.

    Args:
        count: how many; fewer when there are not so many left.
        n: subjects.
        taken: pairs that are there already.
        seed: of the draw.
    """
    row, col = np.triu_indices(n, 1)
    free = np.flatnonzero(~np.isin(row * n + col, taken[:, 0] * n + taken[:, 1]))
    drawn = np.random.default_rng(seed).choice(free, size=min(count, len(free)), replace=False)
    drawn.sort()
    return np.column_stack([row[drawn], col[drawn]]).astype(np.int64)


def _without_self(similarity: Similarity) -> Similarity:
    rest = similarity.copy()
    np.fill_diagonal(rest, -np.inf)
    return rest
