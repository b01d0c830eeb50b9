# mypy: disable-error-code="no-untyped-call"
"""Reductions over the volumes of all subjects of an iteration, by Dask, a block of voxels at a time.

Memory does not grow with the number of subjects: blocks shrink as it grows (`pipeline.atlas_folder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask import config
from dask.base import compute

from pipeline.algorithms import label_votes, template
from pipeline.algorithms.atlas_config import AtlasConfig
from pipeline.atlas_folder import IterationFolder
from pipeline.process import own_cores

Volume = npt.NDArray[np.float32]
_THREADS = 4


@dataclass(frozen=True)
class Agreement:
    """What the labels of all subjects make together.

    Attributes:
        votes: float32 [K, D, H, W], how many of the subjects with labels give a voxel to each.
        majority: int32 [D, H, W], label numbers.
        dice: [N, N] of the subjects with labels, mean over labels.
    """

    votes: Volume
    majority: label_votes.Labels
    dice: npt.NDArray[np.float64]


def images(folder: IterationFolder, members: Sequence[int], settings: AtlasConfig) -> tuple[Volume, Volume]:
    """Average and variance of the warped images, [D, H, W]; NaN and 0 where too few have data."""
    stack = _stack(folder, "images", members)
    made = stack.map_blocks(
        partial(template.average, how=settings.average, trim=settings.trim), drop_axis=0, dtype=np.float32
    )
    mean, spread = _compute(made, stack.map_blocks(template.variance, drop_axis=0, dtype=np.float32))
    return mean, spread


def log_jacobians(folder: IterationFolder, members: Sequence[int]) -> tuple[Volume, Volume]:
    """Mean and variance of the logarithm of det J over the subjects, [D, H, W]."""
    stack = _stack(folder, "log_jacobians", members)
    plain = partial(template.average, how="mean", trim=0.0)
    mean, spread = _compute(
        stack.map_blocks(plain, drop_axis=0, dtype=np.float32),
        stack.map_blocks(template.variance, drop_axis=0, dtype=np.float32),
    )
    return mean, spread


def mean_left(folder: IterationFolder, members: Sequence[int]) -> Volume:
    """Mean of what the stretches leave of the subjects' shapes, [3, nz, ny, nx] mm."""
    (mean,) = _compute(_stack(folder, "left", members).mean(axis=0, dtype=np.float64))
    return np.asarray(mean, dtype=np.float32)


def agreement(folder: IterationFolder, members: Sequence[int], labels: Sequence[int]) -> Agreement:
    """Votes, majority and pairwise Dice of the labels.

    Args:
        members: subjects that have labels.
        labels: the K labels, in the order of the stored shares.
    """
    shares = _stack(folder, "shares", members)
    hard = shares.astype(np.int32).map_blocks(
        partial(label_votes.winner, total=label_votes.WHOLE, axis=1), drop_axis=1, dtype=np.intp
    )
    flat = [(hard == number + 1).astype(np.float32) for number in range(len(labels))]
    overlaps = [da.tensordot(mask, mask, axes=((1, 2, 3), (1, 2, 3))) for mask in flat]
    total, *found = _compute(shares.sum(axis=0, dtype=np.float32) / np.float32(label_votes.WHOLE), *overlaps)
    votes = np.asarray(total, np.float32)
    majority = label_votes.numbered(label_votes.winner(votes, len(members)), labels)
    return Agreement(votes, majority, label_votes.dice_matrix(np.stack(found)))


def roi_frequency(
    folder: IterationFolder, members: Sequence[int], numbers: Sequence[int]
) -> tuple[Volume, npt.NDArray[np.int32]]:
    """Largest share of subjects in which one and the same cohort ROI lies at a voxel, and its number, -1 for none.

    Args:
        numbers: of the cohort ROIs; those of a subject are the bits of the array `rois`.
    """
    stack = _stack(folder, "rois", members)
    found = stack.map_blocks(_shares, count=len(numbers), chunks=((len(numbers),), *stack.chunks[1:]), dtype=np.float32)
    share, which = _compute(found.max(axis=0), found.argmax(axis=0))
    return share, np.where(share > 0, np.asarray(numbers, np.int32)[which], -1).astype(np.int32)


def _shares(bits: npt.NDArray[np.uint32], count: int) -> Volume:
    shares = [((bits >> np.uint32(number)) & np.uint32(1)).mean(axis=0) for number in range(count)]
    return np.stack(shares).astype(np.float32)


def _stack(folder: IterationFolder, name: str, members: Sequence[int]) -> Any:
    """Volumes of some subjects, [n, ...], a block holding all of them at some voxels."""
    stored = folder.volumes(name)
    whole = stored.shape[: stored.ndim - 3]
    stack = da.from_array(stored, chunks=(*whole, *stored.chunks[len(whole) :]), name=False)
    return stack if len(members) == whole[0] else stack[list(members)]


def _compute(*arrays: Any) -> tuple[Any, ...]:
    """Results in memory, by a few threads; blocks in the same order whatever their number."""
    with config.set(scheduler="threads", num_workers=min(_THREADS, own_cores())):
        found: tuple[Any, ...] = compute(*arrays)
    return found
