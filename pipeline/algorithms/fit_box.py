"""The part of the fixed image that the ROIs of a fit see: fits are made there and continued beyond."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.nn.functional import pad

from pipeline.algorithms.affine import Affine
from pipeline.algorithms.fit_config import Level
from pipeline.algorithms.fit_problem import Problem, Roi
from pipeline.algorithms.lattice import Lattice
from pipeline.algorithms.lattices import Shape, node_counts

_SEEN = 16.0  # h0


@dataclass(frozen=True)
class Box:
    """A problem on the part of the fixed grid that its ROIs see; beyond it the field goes on as at its border.

    Attributes:
        problem: in the frame of the box. whole: as it was given.
        first: voxel (z, y, x) of the fixed grid that is the first of the box.
    """

    problem: Problem
    whole: Problem
    first: Shape


def cropped(problem: Problem, levels: Sequence[Level]) -> Box:
    """The box of the fixed ROIs and `_SEEN` h0 around them, beginning on a node of every level."""
    if not problem.pairs:
        return Box(problem, problem, (0, 0, 0))
    offsets = np.array([pair.fixed.offset for pair in problem.pairs])
    ends = offsets + [pair.fixed.mask.shape for pair in problem.pairs]
    reach = np.ceil(_SEEN * problem.h0 / np.array(problem.spacing_mm)).astype(int)
    steps = [_voxels_per_step(problem, level) for level in levels]
    multiple = np.lcm.reduce(np.array(steps or [(1, 1, 1)]), axis=0)
    first = (offsets.min(0) - reach).clip(min=0) // multiple * multiple
    shape = np.minimum(ends.max(0) + reach, problem.shape) - first
    shift = np.eye(4)
    shift[:3, 3] = -first * problem.spacing_mm
    pairs = [
        replace(pair, fixed=Roi(pair.fixed.mask, _triple(np.subtract(pair.fixed.offset, first))))
        for pair in problem.pairs
    ]
    inside = replace(problem, pairs=pairs, shape=_triple(shape), moving_to_fixed=shift @ problem.moving_to_fixed)
    return Box(inside, problem, _triple(first))


def _voxels_per_step(problem: Problem, level: Level) -> Shape:
    step_mm = node_counts(problem.shape, problem.spacing_mm, level.stride, problem.h0)[1]
    return _triple(np.rint(np.array(step_mm) / problem.spacing_mm))


def _triple(values: npt.NDArray[Any]) -> Shape:
    z, y, x = (int(value) for value in values)
    return z, y, x


def uncropped(u: Lattice, affine: Affine, box: Box) -> tuple[Lattice, Affine]:
    """The field of a box on the whole grid, its values continued, and the affine part in its frame."""
    origin = box.first * np.array(box.whole.spacing_mm)
    matrix = affine.copy()
    matrix[:3, 3] += origin - affine[:3, :3] @ origin
    steps = [round(float(step) / s) for step, s in zip(u.step_mm, box.whole.spacing_mm, strict=True)]
    pads = []
    for n, k, start, size in zip(u.values.shape[1:], steps, box.first, box.whole.shape, strict=True):
        pads.append((start // k, math.ceil((size - 1) / k) + 1 - start // k - n))
    z, y, x = pads
    padded = pad(u.values[None], (*x, *y, *z), mode="replicate")[0]
    return replace(u, values=padded), matrix
