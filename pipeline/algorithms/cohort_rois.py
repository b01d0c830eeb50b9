"""Cohort ROIs: which regions of many subjects are the same structure, from the matches of many pairs.

Regions are nodes of a graph, matches its edges. Where three subjects were registered to each other, going from one
to the next and on to the third should end at the region that the direct match names (cycle consistency). The strength
of an edge is the number of paths that lead from one end to the other, itself and its closed triangles, times the
share of its triangles that close. Clusters then grow as in greedy additive edge contraction (Keuper et al., ICCV
2015): the strongest edge joins its two clusters, the strengths of parallel edges add up, and so on. Two clusters that
hold regions of the same subject never join, which is what refuses wrong matches once the right ones are in. Parallel
edges are closed cycles of any length, so a least strength of 2 asks that every join be confirmed by a second path.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.selection import greedy_one_to_one

Index = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]
_CHUNK = 1_000_000  # neighbours looked up at a time
_TIE = 1e-6  # lets confidence order edges of equal strength


@dataclass(frozen=True)
class Identity:
    """What was found out about N regions.

    Attributes:
        cluster: int64 [N], from 0 by decreasing size; -1 for a region that is like none of another subject.
        size: int64 [N], regions in its cluster; 0 without one.
        matches: int64 [N], its matches, at most one with each other subject.
        agreeing: int64 [N], those of them that lead to a region of the same cluster.
    """

    cluster: Index
    size: Index
    matches: Index
    agreeing: Index


def identify(subject: Index, left: Index, right: Index, confidence: Float, min_paths: float = 1.0) -> Identity:
    """Cluster the regions of a cohort, at most one of each subject in a cluster.

    Args:
        subject: [N], from 0.
        left, right: [E] matched regions of different subjects, in either order; the confidences of repetitions add up.
        confidence: [E], above 0.
        min_paths: least strength of a join, see the module docstring.
    """
    count = len(subject)
    left, right, confidence = _one_to_one(subject, left, right, confidence)
    closed, cycles = count_cycles(subject, left, right)
    strength = (1 + closed) * (2 * closed + 1) / (cycles + 1) + _TIE * confidence
    cluster, size = _by_size(_contract(subject, left, right, strength, min_paths))
    same = (cluster[left] == cluster[right]) & (cluster[left] >= 0)
    matches, agreeing = (np.bincount(np.concatenate([left[e], right[e]]), minlength=count) for e in (same | True, same))
    return Identity(cluster, size, matches, agreeing)


def count_cycles(subject: Index, left: Index, right: Index) -> tuple[Index, Index]:
    """Triangles of every edge: how many close, and how many there are, int64 [E] each.

    A triangle of an edge (a, b) is a third subject in which both a and b have a match; it closes when that is the
    same region. The neighbours of the end with fewer are looked up among those of the other.
    """
    count, subjects = len(subject), int(subject.max(initial=-1)) + 1
    source, target = np.concatenate([left, right]), np.concatenate([right, left])
    order = np.lexsort((target, source))
    source, target = source[order], target[order]
    start = np.searchsorted(source, np.arange(count + 1))
    edge_keys, subject_keys = source * count + target, np.unique(source * subjects + subject[target])
    degree = np.diff(start)
    swap = degree[left] > degree[right]
    few, many = np.where(swap, right, left), np.where(swap, left, right)
    closed, cycles = np.zeros(len(left), np.int64), np.zeros(len(left), np.int64)
    total = np.cumsum(degree[few])
    cuts = np.searchsorted(total, np.arange(_CHUNK, total[-1:].sum(), _CHUNK)).tolist()
    for low, high in pairwise([0, *cuts, len(left)]):
        here, near = few[low:high], degree[few[low:high]]
        edge = np.repeat(np.arange(high - low), near)
        third = target[start[here[edge]] + np.arange(len(edge)) - np.repeat(np.cumsum(near) - near, near)]
        other = many[low:high][edge]
        shared = _contains(subject_keys, other * subjects + subject[third])
        cycles[low:high] = np.bincount(edge[shared], minlength=high - low)
        closed[low:high] = np.bincount(edge[_contains(edge_keys, other * count + third)], minlength=high - low)
    return closed, cycles


def _contains(keys: Index, values: Index) -> npt.NDArray[np.bool_]:
    place = np.searchsorted(keys, values)
    return np.asarray(keys[np.minimum(place, len(keys) - 1)] == values)


def _one_to_one(subject: Index, left: Index, right: Index, confidence: Float) -> tuple[Index, Index, Float]:
    """Edges once each, the region of the earlier subject first, and of two subjects' edges the best one-to-one set."""
    count, subjects = len(subject), int(subject.max(initial=-1)) + 1
    swap = subject[left] > subject[right]
    left, right = np.where(swap, right, left), np.where(swap, left, right)
    keys, inverse = np.unique(left * count + right, return_inverse=True)
    votes = np.zeros(len(keys))
    np.add.at(votes, inverse, confidence)
    left, right = np.divmod(keys, count)
    row = np.unique(left * subjects + subject[right], return_inverse=True)[1]
    col = np.unique(right * subjects + subject[left], return_inverse=True)[1]
    kept = greedy_one_to_one(row, col, votes)
    return left[kept], right[kept], votes[kept]


def _contract(subject: Index, left: Index, right: Index, strength: Float, least: float) -> Index:
    """Root region of each region's cluster; the subjects of a cluster are a bit mask."""
    parent = list(range(len(subject)))
    members = [1 << value for value in subject.tolist()]
    near: list[dict[int, float]] = [{} for _ in parent]
    for a, b, value in zip(left.tolist(), right.tolist(), strength.tolist(), strict=True):
        near[a][b] = near[b][a] = value
    strong = strength >= least
    queue = list(zip((-strength[strong]).tolist(), left[strong].tolist(), right[strong].tolist(), strict=True))
    heapq.heapify(queue)
    while queue:
        value, a, b = heapq.heappop(queue)
        if near[a].get(b) != -value:
            continue  # an end was joined to something since, or the edge became stronger
        del near[a][b], near[b][a]
        if members[a] & members[b]:
            continue
        if len(near[a]) < len(near[b]):
            a, b = b, a
        parent[b] = a
        members[a] |= members[b]
        for c, more in near[b].items():
            del near[c][b]
            total = near[a].get(c, 0.0) + more
            near[a][c] = near[c][a] = total
            if total >= least:
                heapq.heappush(queue, (-total, a, c))
        near[b] = {}
    return _roots(np.array(parent, dtype=np.int64))


def _roots(parent: Index) -> Index:
    while (parent != parent[parent]).any():
        parent = parent[parent]
    return parent


def _by_size(root: Index) -> tuple[Index, Index]:
    """Clusters numbered from the largest, ties by their first region, and the size of each region's."""
    _, first, inverse, size = np.unique(root, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -size))
    number = np.empty(len(size), np.int64)
    number[order] = np.arange(len(size))
    alone = size[inverse] < 2
    return np.where(alone, -1, number[inverse]), np.where(alone, 0, size[inverse])
