"""Tracks: the ROIs of neighbouring slices of one subject that show the same structure, linked through the volume.

Two ROIs of neighbouring slices can be linked when their ellipses overlap and their prototypes are alike; of the
candidates, those with the best score are taken, each ROI with at most one in the slice above and one below. A track
is a chain of links, so it holds at most one ROI of a slice and no gap. Section 3 of the paper leaves open how 2D
ROIs become 3D structures; this is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csgraph

from pipeline.algorithms import ellipses
from pipeline.algorithms.selection import greedy_one_to_one

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrackConfig:
    """Which ROIs of neighbouring slices are linked.

    Attributes:
        min_overlap: least overlap of the two ellipses, 0..1.
        min_similarity: least cosine of the two prototypes.
    """

    min_overlap: float = 0.4
    min_similarity: float = 0.75


def link(
    roi_slice: npt.NDArray[np.integer],
    centroid_mm: npt.NDArray[np.float64],
    covariance_mm2: npt.NDArray[np.float64],
    prototypes: npt.NDArray[np.float32],
    config: TrackConfig,
) -> npt.NDArray[np.int32]:
    """Track of every ROI of a subject, numbered from 0 in the order of their first ROI.

    Args:
        roi_slice: [N] slice of each ROI.
        centroid_mm: float64 [N, 3] local (z, y, x).
        covariance_mm2: float64 [N, 3] (yy, yx, xx).
        prototypes: float32 [N, C], unit norm.
        config: settings.

    Returns:
        int32 [N].
    """
    count = len(roi_slice)
    links = [np.zeros((2, 0), np.int64)]
    members = [np.flatnonzero(roi_slice == z) for z in range(int(roi_slice.max(initial=-1)) + 1)]
    for here, above in pairwise(members):
        i, j = (axis.ravel() for axis in np.meshgrid(here, above, indexing="ij"))
        alike = (prototypes[here] @ prototypes[above].T).ravel()
        overlap = ellipses.overlap(centroid_mm[i, 1:], covariance_mm2[i], centroid_mm[j, 1:], covariance_mm2[j])
        good = (overlap >= config.min_overlap) & (alike >= config.min_similarity)
        score = (alike + np.sqrt(overlap))[good]
        best = greedy_one_to_one(i[good], j[good], score)
        links.append(np.stack([i[good][best], j[good][best]]))
    rows, cols = np.concatenate(links, axis=1)
    graph = coo_array((np.ones(len(rows), bool), (rows, cols)), shape=(count, count))
    component = csgraph.connected_components(graph, directed=False)[1]
    first, inverse = np.unique(component, return_index=True, return_inverse=True)[1:]
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[inverse]
