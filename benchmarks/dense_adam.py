"""The usual way to fit a field to ROI pairs, as a yardstick: every voxel free, all masks, Adam, fixed steps.

What the public `region-correspondence` package does (single scale, whole volume, its default learning rate, no
stopping test), with the loss of Eq. 10 and an affine start from the corners of the ROIs' boxes. Positions are
normalised to -1..1 along each axis of the moving grid, as in that package.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

Masks = npt.NDArray[np.bool_]
Field = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DenseConfig:
    """Settings: steps, the cap in processor seconds, Adam's learning rate, the weight of the gradient penalty."""

    iterations: int = 10_000
    seconds: float = 60.0
    learning_rate: float = 1e-3
    smoothness: float = 1.0
    check_every: int = 50


@dataclass(frozen=True)
class DenseFit:
    """A field and what it cost.

    Attributes:
        indices: float32 [3, D, H, W], where each fixed voxel falls in the moving grid, voxels.
        iterations: steps made before the cap. seconds: processor time of all steps asked for, extrapolated.
        seconds_to_goal: processor time until the goal was met; None if it was not within the cap.
    """

    indices: Field
    iterations: int
    seconds: float
    seconds_to_goal: float | None


def fit_dense(fixed: Masks, moving: Masks, config: DenseConfig, goal: Callable[[Field], bool]) -> DenseFit:
    """Fit masks [K, D, H, W] to each other; `goal` judges `indices` now and then, outside the measured time."""
    start = time.process_time()
    target, source = (torch.as_tensor(m, dtype=torch.float32) for m in (fixed, moving))
    base = _normalised(_affine_start(fixed, moving), moving.shape[1:])
    u = torch.zeros_like(base, requires_grad=True)
    adam = torch.optim.Adam([u], lr=config.learning_rate)
    spent, met, done = time.process_time() - start, None, 0
    while done < config.iterations and spent < config.seconds:
        start = time.process_time()
        adam.zero_grad()
        loss = _loss(target, source, base + u, u, config.smoothness)
        loss.backward()
        adam.step()
        done += 1
        spent += time.process_time() - start
        if met is None and done % config.check_every == 0 and goal(_indices(base + u, moving.shape[1:])):
            met = spent
    return DenseFit(_indices(base + u, moving.shape[1:]), done, spent * config.iterations / done, met)


def _loss(target: Tensor, source: Tensor, grid: Tensor, u: Tensor, smoothness: float) -> Tensor:
    """Eq. 10: mean over ROIs of half the MSE and half the soft Dice loss, and the squared gradient."""
    warped = grid_sample(source[None], grid.flip(-1)[None], padding_mode="zeros", align_corners=True)[0]
    a, b = warped.flatten(1), target.flatten(1)
    mse = (a - b).square().mean(1)
    dice = 2 * (a * b).sum(1) / (a.sum(1) + b.sum(1)).clamp_min(1e-8)
    slopes = [u.diff(dim=axis).square().sum(-1).mean() for axis in range(3) if u.shape[axis] > 1]
    return 0.5 * (mse + 1 - dice).mean() + smoothness * torch.stack(slopes).sum()


def _affine_start(fixed: Masks, moving: Masks) -> Field:
    """Least-squares affine of the box corners, at every fixed voxel: [3, D, H, W] moving voxels."""
    x, y = _corners(fixed), _corners(moving)
    homogeneous = np.column_stack([x, np.ones(len(x))])
    matrix = np.linalg.lstsq(homogeneous, y, rcond=None)[0]
    grid = np.indices(fixed.shape[1:]).reshape(3, -1).T
    at = np.column_stack([grid, np.ones(len(grid))]) @ matrix
    return np.asarray(at.T.reshape(3, *fixed.shape[1:]), dtype=np.float32)


def _corners(masks: Masks) -> npt.NDArray[np.float64]:
    rows = []
    for mask in masks:
        index = np.argwhere(mask)
        box = np.stack([index.min(0), index.max(0)])
        rows += [[box[i, 0], box[j, 1], box[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    return np.array(rows, dtype=np.float64)


def _scale(shape: tuple[int, ...]) -> Tensor:
    """Half the extent of each axis in voxels; an axis of one voxel counts as its own centre."""
    return torch.tensor([max(n - 1, 1) / 2 for n in shape])


def _normalised(indices: Field, shape: tuple[int, ...]) -> Tensor:
    middle = torch.tensor([(n - 1) / 2 for n in shape])
    return (torch.as_tensor(indices).movedim(0, -1) - middle) / _scale(shape)


def _indices(grid: Tensor, shape: tuple[int, ...]) -> Field:
    middle = torch.tensor([(n - 1) / 2 for n in shape])
    return np.ascontiguousarray((grid.detach() * _scale(shape) + middle).movedim(-1, 0).numpy())
