"""Cubic B-spline control grids over the lattices of a batch of fits, on any torch device.

The first axis of every tensor is the fit; fits of a batch share the number of control points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.algorithms import fit_solver
from pipeline.algorithms.compiled import runs_compiled
from pipeline.algorithms.lattices import Lattices, Shape, separable

_DIAGONAL = {6: [0, 3, 5], 3: [0, 2]}  # of symmetric blocks of so many entries


@dataclass(frozen=True)
class ControlGrid:
    """Cubic B-spline control points over lattices.

    Attributes:
        basis: per axis, [B, nodes, control points] values of the B-splines at the nodes.
        spacing_mm: [B, 3] control spacing (z, y, x).
        modes: per axis, the orthonormal DCT-II [n, n].
        eigenvalues: [B, nz, ny, nx] of the Laplacian, axes weighted by inverse squared spacing.
        ratio: [B, 3] lattice step over control spacing.
    """

    basis: tuple[Tensor, ...]
    spacing_mm: Tensor
    modes: tuple[Tensor, ...]
    eigenvalues: Tensor
    ratio: Tensor

    @staticmethod
    def over(u: Lattices, control_mm: Tensor, counts: Shape) -> ControlGrid:
        """Control points every `control_mm` [B], at least one lattice step apart, the first one beyond the border.

        Of `counts` control points along each axis, at least as many as `control_counts`.
        """
        spacing = torch.maximum(control_mm[:, None], u.step_mm)
        ratio = u.step_mm / spacing
        basis = tuple(
            _bspline_matrices(n, m, ratio[:, axis])
            for axis, (n, m) in enumerate(zip(u.values.shape[2:], counts, strict=True))
        )
        scale = (spacing.amin(1, keepdim=True) / spacing) ** 2
        modes = [_dct(m, spacing.device) for m in counts]
        (ez, ey, ex) = (value * scale[:, axis, None] for axis, (_, value) in enumerate(modes))
        total = ez[:, :, None, None] + ey[:, None, :, None] + ex[:, None, None]
        return ControlGrid(basis, spacing, tuple(matrix[None] for matrix, _ in modes), total, ratio)

    def expand(self, d: Tensor) -> Tensor:
        """Coefficients [B, c, ...control] to lattice values [B, c, ...lattice]."""
        return separable(d, self.basis)

    def collect(self, values: Tensor) -> Tensor:
        """The adjoint of `expand`."""
        return separable(values, [b.mT for b in self.basis])

    def scatter(self, cell: Tensor, values: Tensor) -> Tensor:
        """Sum point quantities [P, c] at their nodes, given by flat index over the batch: [B, c, ...lattice]."""
        shape = [len(self.spacing_mm), *(b.shape[1] for b in self.basis)]
        dense = torch.zeros((math.prod(shape), values.shape[1]), device=values.device).index_add_(0, cell, values)
        return dense.reshape(*shape, -1).movedim(-1, 1)

    def laplacian(self, d: Tensor) -> Tensor:
        """Graph Laplacian of the coefficients (Neumann), axes weighted by inverse squared spacing."""
        total = torch.zeros_like(d)
        weight = (self.spacing_mm.amin(1, keepdim=True) / self.spacing_mm).square()
        for axis in range(3):
            slope = _per_fit(weight[:, axis]) * d.diff(dim=axis + 2)
            total.narrow(axis + 2, 1, slope.shape[axis + 2]).add_(slope)
            total.narrow(axis + 2, 0, slope.shape[axis + 2]).sub_(slope)
        return total

    def spectrum(self, d: Tensor) -> Tensor:
        """Coefficients [B, c, ...control] in the modes of the Laplacian."""
        return separable(d, self.modes)

    def coefficients(self, spectrum: Tensor) -> Tensor:
        """The inverse, and adjoint, of `spectrum`."""
        return separable(spectrum, [m.mT for m in self.modes])


def control_counts(nodes: Shape, ratio: Sequence[float]) -> Shape:
    """Control points along each axis that cover the nodes, one beyond each border; 1 along an axis of one node.

    `ratio` is the lattice step over the control spacing.
    """
    z, y, x = (1 if n == 1 else math.floor((n - 1) * r + 1e-6) + 4 for n, r in zip(nodes, ratio, strict=True))
    return z, y, x


def solve(grid: ControlGrid, votes: Tensor, smooth: Tensor, lumped: bool, iterations: int = 4) -> Tensor:
    """Preconditioned conjugate gradients for (H + smooth L) d = -B' g.

    Args:
        grid: of the update; B expands its coefficients to the lattice.
        votes: [B, 9, nz, ny, nx] at the nodes: g, and symmetric 3x3 blocks of curvature (zz, zy, zx, yy, yx, xx); or
            [B, 5, nz, ny, nx] without z.
        smooth: [B], weight of the graph Laplacian L.
        lumped: H is the row sums of B' curvature B, an upper bound that makes short, smooth steps; else B' curvature B.
        iterations: of the conjugate gradients.

    Returns:
        [B, 3 or 2, ...control] coefficients.
    """
    parts = 3 if votes.shape[1] == 9 else 2
    if not lumped:
        return _solve_exact(grid, votes[:, :parts], votes[:, parts:], smooth, iterations)
    collected = grid.collect(votes)
    return _solve_lumped(grid, collected[:, :parts], collected[:, parts:], smooth, iterations)


def _solve_lumped(grid: ControlGrid, gradient: Tensor, blocks: Tensor, smooth: Tensor, iterations: int) -> Tensor:
    """In the modes of L, where L and the preconditioner, the exact solution for a constant H, are diagonal."""
    trace = blocks[:, _DIAGONAL[blocks.shape[1]]]
    floor = _floor(trace)
    mean = trace.flatten(2).mean(2) + floor[:, None]
    stiffness = _per_fit(smooth) * grid.eigenvalues[:, None]
    inverse = 1 / (mean[:, :, None, None, None] + stiffness)
    stiffness = stiffness + _per_fit(floor)

    def operator(d: Tensor) -> Tensor:
        return grid.spectrum(_times(blocks, grid.coefficients(d))) + stiffness * d

    d = _conjugate_gradients(operator, inverse, -grid.spectrum(gradient), iterations)
    return grid.coefficients(d)


def _solve_exact(grid: ControlGrid, gradient: Tensor, curvature: Tensor, smooth: Tensor, iterations: int) -> Tensor:
    if runs_compiled(gradient):
        arrays = (t.contiguous().numpy() for t in (gradient, curvature, grid.ratio, grid.spacing_mm, smooth))
        return torch.from_numpy(fit_solver.solve(*arrays, tuple(grid.eigenvalues.shape[1:]), iterations))
    gradient = grid.collect(gradient)
    trace = grid.collect(curvature[:, _DIAGONAL[curvature.shape[1]]])
    floor = _floor(trace)
    inverse = 1 / (trace + _per_fit(6 * smooth + floor))

    def operator(d: Tensor) -> Tensor:
        data = grid.collect(_times(curvature, grid.expand(d)))
        return data + _per_fit(smooth) * grid.laplacian(d) + _per_fit(floor) * d

    return _conjugate_gradients(operator, inverse, -gradient, iterations)


def _conjugate_gradients(operator: Callable[[Tensor], Tensor], inverse: Tensor, r: Tensor, iterations: int) -> Tensor:
    """Approximate solution of operator(d) = r, preconditioned by the diagonal `inverse`."""
    d = torch.zeros_like(r)
    z = inverse * r
    p, rz = z, _inner(r, z)
    for _ in range(iterations):
        ap = operator(p)
        alpha = _per_fit(rz / _inner(p, ap).clamp_min(1e-30))
        d = d + alpha * p
        r = r - alpha * ap
        z = inverse * r
        rz, previous = _inner(r, z), rz
        p = z + _per_fit(rz / previous.clamp_min(1e-30)) * p
    return d


def _times(blocks: Tensor, d: Tensor) -> Tensor:
    """Symmetric 3x3 blocks [B, 6, ...] times vectors [B, 3, ...], or 2x2 [B, 3, ...] times [B, 2, ...]."""
    if d.shape[1] == 2:
        yy, yx, xx = blocks.unbind(1)
        y, x = d.unbind(1)
        return torch.stack([yy * y + yx * x, yx * y + xx * x], 1)
    zz, zy, zx, yy, yx, xx = blocks.unbind(1)
    z, y, x = d.unbind(1)
    return torch.stack([zz * z + zy * y + zx * x, zy * z + yy * y + yx * x, zx * z + yx * y + xx * x], 1)


def _floor(trace: Tensor) -> Tensor:
    """What keeps the system definite where no point votes: [B]."""
    return 1e-6 * trace.sum(1).flatten(1).mean(1) + 1e-12


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each fit: [B]."""
    return (a * b).flatten(1).sum(1)


def _per_fit(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]


def _bspline_matrices(nodes: int, count: int, ratio: Tensor) -> Tensor:
    """Cubic B-spline values [B, nodes, count] of nodes at i * ratio for control points at j - 1."""
    if count == 1:
        return torch.ones((len(ratio), nodes, 1), device=ratio.device)
    place = torch.arange(nodes, device=ratio.device) * ratio[:, None]
    t = (place[:, :, None] - (torch.arange(count, device=ratio.device) - 1)).abs()
    inner = 2 / 3 - t**2 + t**3 / 2
    outer = (2 - t).clamp_min(0) ** 3 / 6
    return torch.where(t < 1, inner, outer)


def _dct(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal DCT-II [n, n] and the eigenvalues [n] of its modes."""
    k = torch.arange(n, device=device, dtype=torch.float32)
    matrix = torch.cos(math.pi * k[:, None] * (2 * k[None] + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix, 2 - 2 * torch.cos(math.pi * k / n)
