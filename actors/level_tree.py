"""Component trees of quantised slices, built by joining pixels from the highest level to the lowest.

Each pixel edge is seen once, at the level where its second pixel appears, so a tree costs the edges of one slice and
not one labelling for every level. A node is a connected component that differs from those of the level above.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

Index = npt.NDArray[np.int32]


@dataclass(frozen=True)
class LevelTree:
    """A forest of components {q >= level} of one or more quantised slices; a parent comes after its children.

    Attributes:
        node: int32 [K, H, W], node that each pixel enters, -1 where q is 0.
        parent: int32 [n], -1 at roots.
        level: int32 [n], level at which the node appears; the node stands down to above its parent's level.
        plane: int32 [n], slice of the stack.
        own: int32 [n], pixels that enter at the node.
        area: int32 [n], px, descendants included.
    """

    node: Index
    parent: Index
    level: Index
    plane: Index
    own: Index
    area: Index

    def component(self, nodes: Index, level: Index) -> Index:
        """The component at `level`, not above the nodes' own, that holds each node: the node or an ancestor."""
        nodes = nodes.copy()
        while True:
            above = self.parent[nodes]
            rising = (above >= 0) & (self.level[above] >= level)
            if not rising.any():
                return nodes
            nodes[rising] = above[rising]


def build_tree(quantised: npt.NDArray[np.uint8]) -> LevelTree:
    """Components of four neighbours of each uint8 [H, W] slice of a stack [K, H, W], which are not connected."""
    flat = quantised.ravel()
    pixels, pixel_ends = _by_falling_level(flat)
    first, second = _edges(quantised.shape)
    appears = np.minimum(flat[first], flat[second])
    order, edge_ends = _by_falling_level(appears)
    first, second = first[order], second[order]
    node, place = np.full(flat.size, -1, np.int32), np.empty(flat.size, np.int32)
    parent, root = np.full(flat.size, -1, np.int32), np.arange(flat.size, dtype=np.int32)
    level, own, count = np.empty(flat.size, np.int32), np.empty(flat.size, np.int32), 0
    for value in range(int(flat.max(initial=0)), 0, -1):
        new = pixels[pixel_ends[value + 1] : pixel_ends[value]]
        if not len(new):
            continue
        edges = slice(edge_ends[value + 1], edge_ends[value])
        ends = np.concatenate([first[edges], second[edges]])
        place[new] = np.arange(len(new), dtype=np.int32)
        local = place[ends]
        old = np.flatnonzero(flat[ends] != value)
        joined, where = np.unique(_roots(root, node[ends[old]]), return_inverse=True)
        local[old] = len(new) + where
        found, label = _join(local, len(new) + len(joined))
        node[new] = count + label[: len(new)]
        parent[joined] = root[joined] = count + label[len(new) :]
        level[count : count + found] = value
        own[count : count + found] = np.bincount(label[: len(new)], minlength=found)
        count += found
    parent, level, own = parent[:count], level[:count], own[:count]
    plane = np.zeros(count + 1, np.int32)
    nodes = node.reshape(quantised.shape)
    for k, inside in enumerate(nodes):
        plane[inside] = k
    return LevelTree(nodes, parent, level, plane[:-1], own, _areas(parent, level, own))


def _by_falling_level(values: npt.NDArray[np.uint8]) -> tuple[Index, npt.NDArray[np.int64]]:
    """Positions sorted by falling value, and for each value where its run ends."""
    order = np.argsort(255 - values, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(values, minlength=257)[::-1])[::-1]
    return order, ends


def _edges(shape: tuple[int, ...]) -> tuple[Index, Index]:
    """Flat positions of the two pixels of each edge."""
    index = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    pairs = [(index[:, :, :-1], index[:, :, 1:]), (index[:, :-1], index[:, 1:])]
    first, second = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    return first, second


def _roots(root: Index, nodes: Index) -> Index:
    """Roots so far of nodes; shortens their paths."""
    found = root[nodes]
    while True:
        above = root[found]
        if np.array_equal(above, found):
            break
        found = above
    root[nodes] = found
    return found


def _join(ends: Index, size: int) -> tuple[int, Index]:
    """Connected components of `size` vertices under edges given as all first ends, then all second ends."""
    n = len(ends) // 2
    rows = np.zeros(n + size + 1, np.int32)
    rows[1 : n + 1] = np.arange(2, 2 * n + 2, 2)
    rows[n + 1 :] = 2 * n
    graph = csr_array((np.ones(2 * n), ends.reshape(2, n).T.ravel() + np.int32(n), rows), shape=(n + size, n + size))
    count, label = connected_components(graph, directed=False)
    return count, label[n:]


def _areas(parent: Index, level: Index, own: Index) -> Index:
    """Sums of `own` over descendants."""
    area = own.astype(np.float64)
    ends = np.flatnonzero(np.diff(level, append=0))
    for begin, end in zip(np.concatenate([[0], ends[:-1] + 1]), ends + 1, strict=True):
        inner = np.arange(begin, end)[parent[begin:end] >= 0]
        above = parent[inner]
        np.add.at(area, above, area[inner])
    return area.astype(np.int32)
