"""The weight-free default backend: stable bright and dark components as ROIs, hand-made features as embedding.

Candidates come from the component trees (max-tree and min-tree) of each smoothed slice, cut at quantile levels; a
component's stability is the analogue of SAM's stability score, the area two levels further in over the area two
levels further out (the maximally-stable-region idea of Matas et al., BMVC 2002). Features are those of
`actors.tree_features`. Nothing is learned, downloaded or random.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from actors import tree_features
from actors.level_tree import LevelTree, build_tree
from actors.segmenter import Candidates, Features

VERSION = 3
_SMOOTHING = 1.0
_MOST_CANDIDATES = 3000  # of one slice; bounds memory on large noisy slices

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ComponentTreeConfig:
    """Settings of the component-tree backend.

    Attributes:
        levels: quantile levels of each tree.
        even_levels: further levels at even steps of intensity, which separate small objects of strong contrast.
        delta: levels between a component and the two areas that its stability compares.
        min_stability: components at or below are dropped, 0..1.
        min_contrast: least intensity between the two areas that stability compares, as a share of the slice's
            range; noise in a flat region has none.
        min_area, max_area: share of the slice that a component may cover; never under `min_pixels`.
        min_pixels: smallest component, px.
        max_overlap: intersection over union above which the less stable of two components is dropped.
        max_rois: components kept per slice, shared evenly over sizes (octaves of area).
    """

    name: Literal["component_tree"] = "component_tree"
    levels: int = 48
    even_levels: int = 16
    delta: int = 2
    min_stability: float = 0.2
    min_contrast: float = 0.01
    min_area: float = 0.0015
    max_area: float = 0.2
    min_pixels: int = 12
    max_overlap: float = 0.75
    max_rois: int = 40

    def __post_init__(self) -> None:
        if self.levels < 1 or self.even_levels < 0 or self.levels + self.even_levels > 254:
            found = f"{self.levels} and {self.even_levels}"
            raise ValueError(f"segmenter.levels and segmenter.even_levels are {found}; expected 1 to 254 together")
        if self.max_rois < 1:
            raise ValueError(f"segmenter.max_rois is {self.max_rois}; expected a number above 0")


class ComponentTree:
    """The component-tree segmenter (`actors.segmenter.Segmenter`)."""

    name = "component_tree"

    def __init__(self, config: ComponentTreeConfig) -> None:
        self.config = config
        self.layout: dict[str, Any] = tree_features.layout()
        self.signature: dict[str, Any] = {**asdict(config), "version": VERSION}

    def encode(self, slices: npt.NDArray[np.uint8]) -> Features:
        """Features of uint8 [B, H, W, 3] slices on a grid of about 64 cells along the longer side."""
        height, width = slices.shape[1:3]
        stride = tree_features.grid_stride(height, width)
        values = np.stack([tree_features.describe(grey, stride) for grey in _grey(slices)])
        return Features(values, (height / stride, width / stride))

    def everything(self, slices: npt.NDArray[np.uint8], features: Features) -> list[Candidates]:
        """Stable components of each slice, most stable of each size first; none in a constant slice."""
        return [self._slice_candidates(grey) for grey in _grey(slices)]

    def _slice_candidates(self, grey: Float) -> Candidates:
        smooth = ndimage.gaussian_filter(grey, _SMOOTHING)
        levels = _levels(smooth, self.config)
        step = np.searchsorted(levels, smooth, side="right").astype(np.uint8)
        tree = build_tree(np.stack([step, len(levels) - step]))
        nodes, stability = _stable_nodes(tree, levels, grey.size, self.config)
        inside = _containment(tree, nodes)
        keep = _suppress(_nested_overlap(inside, tree.area[nodes]), self.config.max_overlap)
        nodes, stability, inside = nodes[keep], stability[keep], inside[np.ix_(keep, keep)]
        regions = _innermost(tree, nodes)[tree.node]
        keep = _suppress(_crossing_overlap(inside, regions, tree.area[nodes]), self.config.max_overlap)
        keep = keep[_spread_over_sizes(tree.area[nodes[keep]])[: self.config.max_rois]]
        masks = np.zeros((len(keep), *grey.shape), bool)
        for mask, n in zip(masks, keep, strict=True):
            np.take(np.append(inside[:, n], False), regions[tree.plane[nodes[n]]], out=mask)
        return Candidates(masks, stability[keep], stability[keep])


def _grey(slices: npt.NDArray[np.uint8]) -> Float:
    """Luminance 0..1, float32 [B, H, W]."""
    return (slices.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)) / np.float32(255)


def _levels(image: Float, config: ComponentTreeConfig) -> Float:
    """Quantiles of the intensities, and even steps between the extreme ones, ascending."""
    ordered = np.sort(image, axis=None)
    share = np.linspace(0, 1, config.levels + 2)[1:-1]
    by_rank = ordered[np.round(share * (len(ordered) - 1)).astype(np.int64)]
    by_value = np.linspace(by_rank[0], by_rank[-1], config.even_levels + 2)[1:-1]
    return np.unique(np.concatenate([by_rank, by_value.astype(np.float32)]))


def _stable_nodes(tree: LevelTree, levels: Float, size: int, config: ComponentTreeConfig) -> tuple[Index, Float]:
    """Nodes [n] of fitting size and their stabilities [n], the best over the levels where each stands, best first."""
    top = len(levels)
    fits = (tree.area >= max(config.min_area * size, config.min_pixels)) & (tree.area <= config.max_area * size)
    fitting = np.flatnonzero(fits).astype(np.int32)
    lowest = np.where(tree.parent >= 0, tree.level[tree.parent] + 1, 1)[fitting]
    stands = tree.level[fitting] - lowest + 1
    row = np.repeat(np.arange(len(fitting)), stands)
    level = lowest[row] + np.arange(len(row)) - np.repeat(np.cumsum(stands) - stands, stands)
    outer, inner = np.maximum(level - config.delta, 1), np.minimum(level + config.delta, top)
    core = tree.area[fitting][row] - _pixels_below(tree, fitting, config.delta, top)[row, level]
    stability = (core / tree.area[tree.component(fitting[row], outer)]).astype(np.float32)
    value = np.stack([levels, -levels[::-1]])[tree.plane[fitting[row]]]
    each = np.arange(len(row))
    contrast = value[each, inner - 1] - value[each, outer - 1]
    good = (stability > config.min_stability) & (contrast >= config.min_contrast * (levels[-1] - levels[0]))
    order = np.flatnonzero(good)[np.argsort(-stability[good], kind="stable")]
    first = np.sort(np.unique(row[order], return_index=True)[1])[:_MOST_CANDIDATES]
    return fitting[row[order[first]]], stability[order[first]]


def _pixels_below(tree: LevelTree, nodes: Index, delta: int, top: int) -> npt.NDArray[np.int64]:
    """Pixels of the component of each node at each level that enter under `delta` levels further in: [n, top + 1]."""
    row = np.full(len(tree.parent), -1, np.int64)
    row[nodes] = np.arange(len(nodes))
    lost = np.zeros(len(nodes) * (top + 1), np.int64)
    for step in range(delta):
        entering = np.flatnonzero((tree.level > step) & (tree.level < top)).astype(np.int32)
        level = tree.level[entering] - step
        at = row[tree.component(entering, level)]
        wanted = at >= 0
        cell = at[wanted] * (top + 1) + level[wanted]
        lost += np.bincount(cell, tree.own[entering[wanted]], minlength=len(lost)).astype(np.int64)
    return lost.reshape(len(nodes), top + 1)


def _innermost(tree: LevelTree, nodes: Index) -> npt.NDArray[np.int64]:
    """Position in `nodes` of the smallest that holds each node of the tree, len(nodes) where none: [N + 1].

    The entry past the end is that of node -1.
    """
    found = np.full(len(tree.parent) + 1, len(nodes), np.int64)
    found[nodes] = np.arange(len(nodes))
    up = np.append(np.where(tree.parent < 0, len(tree.parent), tree.parent), len(tree.parent))
    up[nodes] = nodes
    while not np.array_equal(up[up], up):
        up = up[up]
    return np.asarray(found[up])


def _containment(tree: LevelTree, nodes: Index) -> npt.NDArray[np.bool_]:
    """Whether node i lies in node j or is it: bool [n, n]."""
    container = _innermost(tree, nodes)[tree.parent[nodes]]
    inside = np.eye(len(nodes) + 1, len(nodes), dtype=bool)
    for n in np.argsort(-nodes):
        inside[n] |= inside[container[n]]
    return inside[:-1]


def _nested_overlap(inside: npt.NDArray[np.bool_], area: Index) -> Float:
    """Intersection over union of the components of one tree, [n, n]: they are nested or disjoint."""
    ratio = inside * (area[:, None] / area).astype(np.float32)
    return np.asarray(np.maximum(ratio, ratio.T))


def _crossing_overlap(inside: npt.NDArray[np.bool_], regions: npt.NDArray[np.int64], area: Index) -> Float:
    """Intersection over union of bright with dark components, [n, n]; 0 between those of one tree.

    Args:
        inside: of `_containment`.
        regions: [2, H, W], innermost bright and dark component of each pixel, n where there is none.
        area: [n], px.
    """
    n = len(area)
    shared = np.bincount((regions[0] * (n + 1) + regions[1]).ravel(), minlength=(n + 1) ** 2)
    held = inside.astype(np.float32)
    both = held.T @ shared.reshape(n + 1, n + 1)[:n, :n].astype(np.float32) @ held
    both += both.T
    return np.asarray(both / (area[:, None] + area - both), dtype=np.float32)


def _suppress(overlap: Float, limit: float) -> npt.NDArray[np.int64]:
    """Greedy non-maximum suppression of candidates given best first: indices kept."""
    alive = np.ones(len(overlap), bool)
    for n in range(len(overlap)):
        if alive[n]:
            alive[n + 1 :] &= overlap[n, n + 1 :] <= limit
    return np.flatnonzero(alive)


def _spread_over_sizes(areas: Index) -> npt.NDArray[np.int64]:
    """Order that takes the best of each octave of area, then the second of each, and so on."""
    octave = np.floor(np.log2(np.maximum(areas, 1)))
    rank = np.zeros(len(areas), np.int64)
    for value in np.unique(octave):
        members = np.flatnonzero(octave == value)
        rank[members] = np.arange(len(members))
    return np.argsort(rank, kind="stable")
