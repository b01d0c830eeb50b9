"""A rigorous check that a stored field never folds, and its repair where it does.

The map is T(x) = A x + u(x), with u linear between the nodes of its lattice and constant beyond its border. In a
cell each column of the derivative is linear in two coordinates, so det J is a polynomial of degree two in each and
lies between the smallest and the largest of its 27 Bernstein coefficients, eight of which are the determinants at
the corners. All of them above 0, in every cell and in the continuation beyond the border, means det J > 0 everywhere
and not at the nodes only; T, proper and locally one-to-one, is then one-to-one as a whole (Hadamard).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.algorithms.affine import Affine
from pipeline.algorithms.lattice import Lattice

SMALLEST_JACOBIAN = 0.05  # what the fit keeps everywhere, of which rounding on disk takes next to nothing
SMALLEST_INVERSE_JACOBIAN = 0.01
_WORST = 4096  # cells whose exact coefficients are looked at first
_CHUNK = 1 << 13  # cells at a time, which the cache holds
_SMOOTHINGS = 60
_REACH = 4  # nodes around a folded cell that are smoothed
_VOLUMES = (0.1, 10.0)


def smallest_determinant(u: Lattice, affine: Affine) -> float:
    """A lower bound of det J that holds everywhere, and is reached at a corner or nearly so; see the module.

    Args:
        u: displacement beside the affine part, mm.
        affine: 4x4, with a positive determinant.
    """
    values, matrix = _continued(u), _linear(affine, u)
    quick = _quick_bounds(values, u.step_mm, matrix).reshape(-1)
    worst = quick.topk(min(_WORST, len(quick)), largest=False).indices
    found = float(_exact_bounds(values, u.step_mm, matrix, worst).min())
    rest = torch.nonzero(quick < found)[:, 0]
    if len(rest) <= len(worst):
        return found
    return float(_exact_bounds(values, u.step_mm, matrix, rest).min())


def stays_above(u: Lattice, affine: Affine | Tensor, floor: float) -> bool:
    """Whether det J > floor everywhere, by the bound of `smallest_determinant`."""
    return not bool(_suspects(_continued(u), u.step_mm, _linear(affine, u), floor).any())


def unfolded(u: Lattice, affine: Affine, floor: float) -> tuple[Lattice, bool]:
    """The field with det J > floor everywhere, and whether it had to be damped for that.

    Where cells fall short, the displacement around them is smoothed, again and again; should some remain, the whole
    displacement is scaled down until none does.

    Args:
        u: displacement beside the affine part, mm.
        affine: 4x4.
        floor: 0 or more.

    Raises:
        ValueError: when det A itself is not above the floor.
    """
    matrix = _linear(affine, u)
    if not torch.linalg.det(matrix) > floor:
        raise ValueError(f"the affine part has determinant {torch.linalg.det(matrix):.3g}, not above {floor}")
    bad = _suspects(_continued(u), u.step_mm, matrix, floor)
    if not bad.any():
        return u, False
    for _ in range(_SMOOTHINGS):
        weight = _nodes_near(bad, u.values.shape[1:])
        u = replace(u, values=torch.lerp(u.values, _smoothed(u.values), weight))
        values = _continued(u)
        cells = torch.nonzero(_cells_of(weight).reshape(-1))[:, 0]
        bad = torch.zeros_like(bad)
        bad.view(-1)[cells] = _exact_bounds(values, u.step_mm, matrix, cells) <= floor
        if not bad.any():
            return u, True
    while not stays_above(u, affine, floor):
        u = replace(u, values=0.9 * u.values)
    return u, True


def orientation_preserving(affine: Affine, center: npt.NDArray[np.floating]) -> tuple[Affine, bool]:
    """The affine drawn towards a translation until it neither mirrors, flattens nor inflates; whether it had to be.

    Args:
        affine: 4x4.
        center: [3], a position that keeps its image.

    Raises:
        ValueError: for a map that is not finite.
    """
    if not np.isfinite(affine).all():
        raise ValueError("the ROIs determine no affine map: it is not finite; raise fit.affine_prior_mm")
    result = affine.copy()
    while not _VOLUMES[0] < np.linalg.det(result[:3, :3]) < _VOLUMES[1]:
        result[:3, :3] = 0.9 * result[:3, :3] + 0.1 * np.eye(3)
    result[:3, 3] += (affine[:3, :3] - result[:3, :3]) @ center
    return result, bool((result != affine).any())


def _linear(affine: Affine | Tensor, u: Lattice) -> Tensor:
    return torch.as_tensor(affine[:3, :3], dtype=torch.float64, device=u.values.device)


def _continued(u: Lattice) -> Tensor:
    """Values in float64 with the border repeated, so that the cells beyond it are cells like the others."""
    return _doubled_border(u.values.double())


def _doubled_border(values: Tensor) -> Tensor:
    """Values [c, ...] with one more node on either side of each axis; an axis of one node gets a second."""
    pads = [p for n in reversed(values.shape[1:]) for p in ((1, 1) if n > 1 else (0, 1))]
    return torch.nn.functional.pad(values[None], pads, mode="replicate")[0]


def _quick_bounds(values: Tensor, step_mm: Tensor, matrix: Tensor) -> Tensor:
    """det A (1 - F)^3 for every cell, F the largest Frobenius norm of A^-1 du/dx in it; -inf where F is 1 or more."""
    scaled = torch.tensordot(torch.linalg.inv(matrix), values, dims=1)
    total: Tensor | float = 0.0
    for axis in range(3):
        edge = (torch.diff(scaled, dim=axis + 1) / float(step_mm[axis])).square().sum(0)
        for other in {0, 1, 2} - {axis}:
            n = edge.shape[other] - 1
            edge = torch.maximum(edge.narrow(other, 0, n), edge.narrow(other, 1, n))
        total = total + edge
    room = 1 - torch.as_tensor(total).sqrt()
    return torch.where(room > 0, torch.linalg.det(matrix) * room**3, -torch.inf)


def _exact_bounds(values: Tensor, step_mm: Tensor, matrix: Tensor, cells: Tensor) -> Tensor:
    """Smallest Bernstein coefficient of det J in cells given by flat index [M]: [M]."""
    return torch.cat([_smallest_coefficient(values, step_mm, matrix, part) for part in torch.split(cells, _CHUNK)])


def _smallest_coefficient(values: Tensor, step_mm: Tensor, matrix: Tensor, cells: Tensor) -> Tensor:
    _, ny, nx = (n - 1 for n in values.shape[1:])
    z, y, x = cells // (ny * nx), cells // nx % ny, cells % nx
    corner = {bits: values[:, z + bits[0], y + bits[1], x + bits[2]] for bits in product((0, 1), repeat=3)}
    dz, dy, dx = (
        {
            bits: (corner[_with(bits, axis, 1)] - corner[_with(bits, axis, 0)]) / float(step_mm[axis])
            + matrix[:, axis, None]
            for bits in product((0, 1), repeat=2)
        }
        for axis in range(3)
    )
    coefficients: dict[tuple[int, int, int], Tensor] = {}
    for (z1, x1), (z2, y1) in product(dy, dx):
        normal = torch.linalg.cross(dy[z1, x1], dx[z2, y1], dim=0)
        for y2, x2 in dz:
            place = (z1 + z2, y1 + y2, x1 + x2)
            share = 0.5 ** sum(k == 1 for k in place)
            term = share * (dz[y2, x2] * normal).sum(0)
            coefficients[place] = coefficients[place] + term if place in coefficients else term
    return torch.stack(list(coefficients.values())).amin(0)


def _with(bits: tuple[int, ...], axis: int, bit: int) -> tuple[int, ...]:
    return (*bits[:axis], bit, *bits[axis:])


def _suspects(values: Tensor, step_mm: Tensor, matrix: Tensor, floor: float) -> Tensor:
    """bool [cells]: where det J > floor is not certain."""
    suspect = _quick_bounds(values, step_mm, matrix) <= floor
    cells = torch.nonzero(suspect.reshape(-1))[:, 0]
    if len(cells):
        suspect.view(-1)[cells] = _exact_bounds(values, step_mm, matrix, cells) <= floor
    return suspect


def _nodes_near(bad: Tensor, shape: torch.Size) -> Tensor:
    """Weight [nz, ny, nx] of the nodes: 1 beside the cells `bad`, falling to 0 beyond `_REACH` nodes."""
    weight = bad.float()
    for axis, n in enumerate(shape):
        if n == 1:
            continue
        weight = torch.maximum(weight.narrow(axis, 0, n), weight.narrow(axis, 1, n))
        wide = _padded(weight, axis, _REACH, "constant")
        for k in range(2 * _REACH + 1):
            share = 1 - abs(k - _REACH) / (_REACH + 1)
            weight = torch.maximum(weight, share * wide.narrow(axis, k, n))
    return weight


def _cells_of(weight: Tensor) -> Tensor:
    """Largest weight of the nodes of every cell, the continuation included."""
    cells = _doubled_border(weight[None])[0]
    for axis, n in enumerate(cells.shape):
        cells = torch.maximum(cells.narrow(axis, 0, n - 1), cells.narrow(axis, 1, n - 1))
    return cells


def _smoothed(values: Tensor) -> Tensor:
    """Values [3, nz, ny, nx] with the weights 1/4, 1/2, 1/4 along each axis, the border repeated."""
    for axis, n in enumerate(values.shape[1:]):
        if n > 1:
            wide = _padded(values, axis, 1, "replicate")
            before, after = wide.narrow(axis + 1, 0, n), wide.narrow(axis + 1, 2, n)
            values = values / 2 + (before + after) / 4
    return values


def _padded(values: Tensor, axis: int, by: int, mode: str) -> Tensor:
    """Values [..., nz, ny, nx] longer by `by` at both ends of an axis, 0 to 2."""
    pads = [by * (k == axis) for k in (2, 2, 1, 1, 0, 0)]
    return torch.nn.functional.pad(values.reshape(1, -1, *values.shape[-3:]), pads, mode=mode).reshape(
        *values.shape[:-3], *(n + 2 * by * (k == axis) for k, n in enumerate(values.shape[-3:]))
    )
