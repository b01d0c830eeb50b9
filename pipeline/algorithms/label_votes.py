"""Labels of many subjects on one grid: how many vote for each, what most say, how well they agree.

Shares are uint8 [K, ...]: how much of a voxel each of K labels takes, in 255ths; the rest is background.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.metrics import dice
from pipeline.algorithms.warp import Array, warp_image

Shares = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]
WHOLE = 255


def label_shares(labels: Labels, values: Sequence[int], indices: Array) -> Shares:
    """Shares [K, D, H, W] of a moving label map, linear between its voxels; outside it all is background.

    Args:
        labels: [Dm, Hm, Wm].
        values: the K labels.
        indices: [3, D, H, W], where each voxel falls in the moving grid.
    """
    shares = [
        np.rint(WHOLE * warp_image((labels == value).astype(np.float32), indices)).astype(np.uint8) for value in values
    ]
    return np.stack(shares)


def winner(votes: npt.NDArray[np.floating | np.integer], total: float, axis: int = 0) -> npt.NDArray[np.intp]:
    """Position + 1 of the label with most votes along an axis, 0 where the background, all of `total` left, has more.

    Of equal votes the background wins, then the first label.
    """
    rest = total - votes.sum(axis=axis, keepdims=True, dtype=np.float64)
    return np.asarray(np.argmax(np.concatenate([rest, votes], axis=axis), axis=axis))


def numbered(winners: npt.NDArray[np.intp], values: Sequence[int]) -> Labels:
    """Positions of `winner` as label numbers."""
    return np.asarray([0, *values], dtype=np.int32)[winners]


def dice_matrix(overlaps: npt.NDArray[np.floating]) -> Array:
    """Mean Dice over the labels that both subjects hold, [N, N]; NaN where there is none.

    Args:
        overlaps: [K, N, N], voxels that subjects i and j both give to a label; on the diagonal its size.
    """
    size = np.diagonal(overlaps, axis1=1, axis2=2)
    held = (size[:, :, None] > 0) & (size[:, None, :] > 0)
    both = np.where(held, size[:, :, None] + size[:, None, :], 1)
    count = held.sum(axis=0)
    total = np.where(held, 2 * overlaps / both, 0).sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0))


def mean_dice(found: Labels, truth: Labels) -> float:
    """Mean Dice over the labels that `truth` holds; NaN where it holds none."""
    values = [int(value) for value in np.unique(truth) if value]
    return float(np.mean([dice(found == v, truth == v) for v in values])) if values else float("nan")
