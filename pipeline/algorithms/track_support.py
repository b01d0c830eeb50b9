"""Tracks vote on matches: a pair of ROIs is likelier when the rest of their tracks match each other too."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.selection import greedy_one_to_one

Index = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]
Track = npt.NDArray[np.int32]


def favour(
    i: Index, j: Index, score: Float, moving_track: Track | None, fixed_track: Track | None, weight: float
) -> Float:
    """Scores of candidates with `weight` times the support of their tracks added: float32 [n].

    Args:
        i, j: [n] moving and fixed ROI of each candidate.
        score: [n], 0..1.
        moving_track, fixed_track: track of every ROI of a subject, from 0, see `pipeline.algorithms.tracks`.
        weight: 0 returns the scores as they are and needs no tracks.

    Raises:
        ValueError: for a weight without tracks.
    """
    if not weight:
        return score
    if moving_track is None or fixed_track is None:
        raise ValueError(f"match.spatial.track_support is {weight:g}, which needs the tracks of both subjects")
    return score + np.float32(weight) * support(i, j, score, moving_track, fixed_track)


def support(i: Index, j: Index, score: Float, moving_track: Track, fixed_track: Track) -> Float:
    """Support of every candidate by its pair of tracks: float32 [n], 0..1.

    The candidates are matched one to one by score alone; the support of two tracks is the sum of the scores of the
    matches between them over the length of the shorter track. A track of one ROI has no support to give.
    """
    moving_length, fixed_length = np.bincount(moving_track), np.bincount(fixed_track)
    key = moving_track[i].astype(np.int64) * len(fixed_length) + fixed_track[j]
    pair, inverse = np.unique(key, return_inverse=True)
    t, u = np.divmod(pair, max(1, len(fixed_length)))
    shorter = np.minimum(moving_length[t], fixed_length[u])
    chosen = greedy_one_to_one(i, j, score)
    votes = np.bincount(inverse[chosen], score[chosen], minlength=len(pair)) / np.maximum(shorter, 1)
    return np.where(shorter > 1, votes.clip(0, 1), 0)[inverse].astype(np.float32)
