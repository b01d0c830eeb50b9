"""The inverse of a fitted map, as the pull-back field of the other direction.

T(x) = A x + u(x) takes fixed-local positions to fixed-frame moving positions, with u linear between the nodes of its
lattice and constant beyond its border. With B the map from moving-local to fixed-local mm, the inverse carries a
moving-local position q to S(q) = B^-1 T^-1(B q), again in the moving frame: what `pipeline.algorithms.warp` states,
with the two images exchanged. T^-1 is found by Newton steps with the exact derivative in the cell where a point lies.
Where det J > 0 everywhere (`pipeline.algorithms.regularity`) it exists for every position.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.algorithms.affine import Affine
from pipeline.algorithms.lattice import Lattice
from pipeline.algorithms.spacing import shortest_edge_mm

NODES = 2.0
TOLERANCE = 1e-3  # of the shortest lattice step
_STEPS = 100
_CHUNK = 1 << 15  # points at a time, which the cache holds
_COARSE = 4
_ON_BORDER = 1e-6  # of a voxel


class NotInvertedError(ValueError):
    """Positions without a preimage, which a map that folds nowhere does not have."""


def lattice_over(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Lattice:
    """The zero field on nodes about `NODES` shortest voxel edges apart along every axis, thick slices divided.

    Under a large deformation an inverse varies within a thick slice, so that a node per slice would miss much of it.
    """
    reach = NODES * shortest_edge_mm(shape, spacing_mm)
    step = [s * int(reach / s + 1e-6) if s <= reach else s / math.ceil(s / reach - 1e-6) for s in spacing_mm]
    nodes = [math.ceil((n - 1) * s / d - 1e-6) + 1 for n, s, d in zip(shape, spacing_mm, step, strict=True)]
    return Lattice(torch.zeros((3, *nodes)), torch.tensor(step, dtype=torch.float32))


def invert(u: Lattice, affine: Affine, onto: Lattice, moving_to_fixed: Affine) -> tuple[Affine, Lattice]:
    """The inverse map: its affine part 4x4, and what it adds to that at the nodes of `onto`, mm.

    Args:
        u: displacement of the map beside its affine part, mm.
        affine: 4x4, fixed-local to fixed-frame moving mm.
        onto: lattice over the moving grid.
        moving_to_fixed: 4x4, moving-local mm to fixed-local mm.

    Raises:
        NotInvertedError: when T is not one-to-one.
    """
    back = _inverse(moving_to_fixed)
    linear = back @ _inverse(affine) @ moving_to_fixed
    guess = _coarser(onto, _COARSE)
    for lattice in (guess, onto):
        added = guess.resampled(lattice).values.double().reshape(3, -1).T
        q = lattice.points().double().reshape(3, -1).T
        first = _apply(moving_to_fixed, _apply(linear, q) + added)
        found = _apply(back, preimages(u, affine, _apply(moving_to_fixed, q), first))
        guess = replace(lattice, values=(found - _apply(linear, q)).T.reshape(lattice.values.shape).to(u.values))
    return linear, guess


def preimages(u: Lattice, affine: Affine, targets: Tensor, first: Tensor) -> Tensor:
    """Positions x with T(x) = target: float64 [P, 3] mm.

    Each point takes Newton steps, halved while they do not bring it nearer.

    Args:
        u, affine: as in `invert`.
        targets: [P, 3] mm.
        first: [P, 3] mm, a first guess.

    Raises:
        NotInvertedError: when some have none within `TOLERANCE`.
    """
    u = _double(u)
    found = [
        _newton(u, affine, t, x) for t, x in zip(torch.split(targets, _CHUNK), torch.split(first, _CHUNK), strict=True)
    ]
    return torch.cat(found)


def round_trip(
    forward: tuple[Affine, Lattice],
    inverse: tuple[Affine, Lattice],
    fixed: Lattice,
    moving: Lattice,
    moving_to_fixed: Affine,
) -> npt.NDArray[np.float64]:
    """S(T(x)) - x of the fixed voxels that T carries into the moving image: [P, 3] mm; none may be.

    Args:
        forward: affine part and displacement of T.
        inverse: those of S.
        fixed, moving: lattices of the voxels of the two images.
        moving_to_fixed: 4x4, moving-local mm to fixed-local mm.
    """
    back, size, step = _inverse(moving_to_fixed), torch.tensor(moving.values.shape[1:]), moving.step_mm.double().cpu()
    margin = torch.where(size == 1, step / 2, _ON_BORDER * step)
    errors = []
    (affine, there), (linear, here) = ((matrix, _double(u)) for matrix, u in (forward, inverse))
    for x in torch.split(fixed.points().double().reshape(3, -1).T, _CHUNK):
        q = _apply(back, _value(there, affine, x))
        inside = ((q >= -margin.to(q)) & (q <= ((size - 1) * step + margin).to(q))).all(1)
        returned = _apply(moving_to_fixed, _value(here, linear, q[inside]))
        errors.append((returned - x[inside]).cpu().numpy())
    return np.concatenate(errors)


def _coarser(lattice: Lattice, stride: int) -> Lattice:
    """The zero field on about every `stride`-th node."""
    nodes = [-(-(n - 1) // stride) + 1 for n in lattice.values.shape[1:]]
    return Lattice(lattice.values.new_zeros((3, *nodes)), lattice.step_mm * stride)


def _inverse(matrix: Affine) -> Affine:
    return np.asarray(np.linalg.inv(matrix), np.float64)


def _double(u: Lattice) -> Lattice:
    return replace(u, values=u.values.double())


def _apply(matrix: Affine, x: Tensor) -> Tensor:
    m = torch.as_tensor(matrix, dtype=x.dtype, device=x.device)
    return x @ m[:3, :3].T + m[:3, 3]


def _newton(u: Lattice, affine: Affine, targets: Tensor, x: Tensor) -> Tensor:
    tolerance = TOLERANCE * float(u.step_mm.min())
    result = x.clone()
    open_, size = torch.arange(len(x), device=x.device), torch.ones(len(x), dtype=x.dtype, device=x.device)
    rest = targets - _value(u, affine, x)
    move = _solved(_slope(u, affine, x), rest)
    for _ in range(_STEPS):
        left = rest.norm(dim=1) > tolerance
        open_, x, rest, move, size = (v[left] for v in (open_, x, rest, move, size))
        if not len(open_):
            return result
        trial = x + size[:, None] * move
        ahead = targets[open_] - _value(u, affine, trial)
        nearer = ahead.norm(dim=1) < rest.norm(dim=1)
        x, rest = (torch.where(nearer[:, None], new, old) for new, old in ((trial, x), (ahead, rest)))
        result[open_] = x
        going = nearer & (rest.norm(dim=1) > tolerance)
        move[going] = _solved(_slope(u, affine, x[going]), rest[going])
        size = torch.where(nearer, (2 * size).clamp(max=1), size / 2)
    raise NotInvertedError(f"{len(open_)} of {len(targets)} positions have no preimage: the field folds there")


def _solved(slope: Tensor, rest: Tensor) -> Tensor:
    """slope^-1 rest by Cramer's rule, [P, 3, 3] and [P, 3]; LAPACK takes longer for a matrix this small."""
    a, b, c = slope.unbind(2)
    bc, ca, ab = torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)
    solved: Tensor = torch.stack([(n * rest).sum(1) for n in (bc, ca, ab)], 1) / (a * bc).sum(1, keepdim=True)
    return solved


def _value(u: Lattice, affine: Affine, x: Tensor) -> Tensor:
    """T(x) [P, 3] at positions [P, 3] mm, in float64."""
    last = torch.tensor(u.values.shape[1:], device=x.device) - 1
    place = (2 * x / (u.step_mm.to(x) * last.clamp_min(1)) - 1).flip(1)
    added: Tensor = torch.nn.functional.grid_sample(
        u.values[None], place[None, None, None], padding_mode="border", align_corners=True
    )
    value: Tensor = _apply(affine, x) + added[0, :, 0, 0].T
    return value


def _slope(u: Lattice, affine: Affine, x: Tensor) -> Tensor:
    """The derivative of T [P, 3, 3] at positions [P, 3] mm, in the cell that they lie in."""
    shape = u.values.shape[1:]
    last = torch.tensor(shape, device=x.device) - 1
    step = u.step_mm.to(x)
    place = x / step
    within = (place >= 0) & (place <= last) & (last > 0)
    place = torch.minimum(place.clamp_min(0), last)
    low = torch.minimum(place.floor(), (last - 1).clamp_min(0))
    up = (place - low).T
    weights = (1 - up, up)
    z, y, cell = low.long().T
    jump = [k * (n > 1) for k, n in zip((shape[1] * shape[2], shape[2], 1), shape, strict=True)]
    flat, row = u.values.reshape(3, -1), (z * shape[1] + y) * shape[2] + cell
    corner = {
        bits: flat[:, row + sum(b * j for b, j in zip(bits, jump, strict=True))] for bits in product((0, 1), repeat=3)
    }
    columns = []
    for axis in range(3):
        first, second = (k for k in range(3) if k != axis)
        rise = torch.zeros_like(corner[0, 0, 0])
        for i, j in product((0, 1), repeat=2):
            ends = [corner[(*(i, j)[:axis], bit, *(i, j)[axis:])] for bit in (0, 1)]
            rise += weights[i][first] * weights[j][second] * (ends[1] - ends[0])
        columns.append(rise.T * (within[:, axis, None] / step[axis]))
    return torch.stack(columns, 2) + torch.as_tensor(affine[:3, :3], dtype=x.dtype, device=x.device)
