"""Displacement lattices and cubic B-spline control grids (separable, dense, on any torch device)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lattice:
    """A displacement sampled on a regular lattice that covers the fixed grid.

    Attributes:
        values: [3, nz, ny, nx], mm. step_mm: [3] lattice step (z, y, x); node 0 lies on voxel 0.
    """

    values: Tensor
    step_mm: Tensor

    @staticmethod
    def over(
        shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], stride: int, h0: float, device: str
    ) -> Lattice:
        """The zero field on every `stride`-th voxel, thick axes less often so that steps stay near stride * h0."""
        steps = [1 if stride == 1 else max(1, int(stride * h0 / s + 1e-6)) for s in spacing_mm]
        nodes = [math.ceil((n - 1) / k) + 1 for n, k in zip(shape, steps, strict=True)]
        step_mm = torch.tensor([k * s for k, s in zip(steps, spacing_mm, strict=True)], device=device)
        return Lattice(torch.zeros((3, *nodes), device=device), step_mm.float())

    def zeros(self) -> Lattice:
        """The zero field on the same lattice."""
        return replace(self, values=torch.zeros_like(self.values))

    def points(self) -> Tensor:
        """Node positions [3, nz, ny, nx], mm."""
        axes = [
            torch.arange(n, device=self.values.device) * s
            for n, s in zip(self.values.shape[1:], self.step_mm, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))

    def at(self, x: Tensor) -> Tensor:
        """Linear interpolation at points [P, 3] mm (nearest outside): [P, 3] mm."""
        shape = self.values.shape[1:]
        flat = self.values.reshape(3, -1)
        last = torch.tensor(shape, device=x.device) - 1
        position = torch.minimum((x / self.step_mm).clamp_min(0), last.float())
        low = torch.minimum(position.floor(), (last - 1).clamp_min(0).float())
        fraction = (position - low).T
        i = low.long()
        row = (i[:, 0] * shape[1] + i[:, 1]) * shape[2] + i[:, 2]
        jumps = (shape[1] * shape[2], shape[2], 1)
        axes = [k for k in range(3) if shape[k] > 1 and bool(fraction[k].any())]
        total = torch.zeros((3, len(x)), device=x.device)
        for bits in product((0, 1), repeat=len(axes)):
            weight = torch.ones_like(fraction[0])
            index = row
            for axis, bit in zip(axes, bits, strict=True):
                weight = weight * (fraction[axis] if bit else 1 - fraction[axis])
                index = index + bit * jumps[axis]
            total += flat[:, index] * weight
        return total.T

    def nearest(self, x: Tensor) -> Tensor:
        """Flat index of the node nearest to each point [P, 3] mm: [P]."""
        shape = self.values.shape[1:]
        size = torch.tensor(shape, device=x.device)
        i = torch.minimum((x / self.step_mm).round().clamp_min(0), (size - 1).float()).long()
        return (i[:, 0] * shape[1] + i[:, 1]) * shape[2] + i[:, 2]


def smallest_jacobian(u: Lattice, matrix: Tensor) -> float:
    """Smallest determinant of the derivative of A x + u(x) over the lattice cells (one-sided differences)."""
    columns = []
    for axis in range(3):
        if u.values.shape[axis + 1] == 1:
            slope = torch.zeros_like(u.values)
        else:
            slope = torch.diff(u.values, dim=axis + 1) / u.step_mm[axis]
            slope = torch.cat([slope, slope.narrow(axis + 1, slope.shape[axis + 1] - 1, 1)], axis + 1)
        columns.append(slope + matrix[:3, axis, None, None, None])
    a, b, c = columns
    return float((a * torch.linalg.cross(b, c, dim=0)).sum(0).min())


def resample(u: Lattice, onto: Lattice) -> Lattice:
    """The same field on another lattice, linear along each axis."""
    values = u.values
    for axis in range(3):
        rows, cols = onto.values.shape[axis + 1], values.shape[axis + 1]
        matrix = _linear_matrix(rows, onto.step_mm[axis], cols, u.step_mm[axis])
        values = torch.movedim(torch.tensordot(matrix, values, dims=([1], [axis + 1])), 0, axis + 1)
    return replace(onto, values=values.contiguous())


def _linear_matrix(rows: int, row_step: Tensor, cols: int, col_step: Tensor) -> Tensor:
    position = (torch.arange(rows, device=row_step.device) * row_step / col_step).clamp(0, cols - 1)
    return (1 - (position[:, None] - torch.arange(cols, device=row_step.device)).abs()).clamp_min(0)


def compose(u: Lattice, delta: Tensor, matrix: Tensor) -> Lattice:
    """T after x + delta(x), for T(x) = A x + u(x): the new u(x) = u(x + delta) + A delta, delta [3, nz, ny, nx] mm."""
    moved = (u.points() + delta).reshape(3, -1).T
    values = u.at(moved).T.reshape(u.values.shape)
    return replace(u, values=values + torch.einsum("ij,j...->i...", matrix[:3, :3], delta))


@dataclass(frozen=True)
class ControlGrid:
    """Cubic B-spline control points over a lattice.

    Attributes:
        basis: per axis, [lattice nodes, control points] values of the B-splines at the lattice nodes.
        spacing_mm: [3] control spacing (z, y, x). modes: per axis, orthonormal DCT-II [n, n] and its eigenvalues [n].
    """

    basis: tuple[Tensor, Tensor, Tensor]
    spacing_mm: Tensor
    modes: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def over(u: Lattice, control_mm: float) -> ControlGrid:
        """Control points every `control_mm`, at least one lattice step apart, one beyond each border."""
        basis, spacing, modes = [], [], []
        for n, step in zip(u.values.shape[1:], u.step_mm.tolist(), strict=True):
            gap = max(control_mm, step)
            basis.append(_bspline_matrix(n, step, gap, u.values.device))
            spacing.append(gap)
        smallest = min(spacing)
        for matrix, gap in zip(basis, spacing, strict=True):
            dct, eigenvalues = _dct(matrix.shape[1], u.values.device)
            modes.append((dct, eigenvalues * (smallest / gap) ** 2))
        spacing_mm = torch.tensor(spacing, dtype=torch.float32, device=u.values.device)
        return ControlGrid((basis[0], basis[1], basis[2]), spacing_mm, tuple(modes))

    def expand(self, d: Tensor) -> Tensor:
        """Coefficients [c, ...control] to lattice values [c, ...lattice]."""
        return _separable(d, self.basis)

    def collect(self, values: Tensor) -> Tensor:
        """The adjoint of `expand`."""
        return _separable(values, tuple(b.T for b in self.basis))

    def gather(self, cell: Tensor, gain: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Sum point gradients [P, 3] and curvatures [P, 6] onto the control points: [3, ...], [6, ...]."""
        shape = [b.shape[0] for b in self.basis]
        stacked = torch.cat([gain, curvature], 1)
        dense = torch.zeros((math.prod(shape), 9), device=gain.device).index_add_(0, cell, stacked)
        summed = self.collect(dense.T.reshape(9, *shape))
        return summed[:3], summed[3:]

    def laplacian(self, d: Tensor) -> Tensor:
        """Graph Laplacian of the coefficients (Neumann), axes weighted by inverse squared spacing."""
        spectrum = _separable(d, tuple(m for m, _ in self.modes)) * self._eigenvalues()
        return _separable(spectrum, tuple(m.T for m, _ in self.modes))

    def precondition(self, values: Tensor, data: Tensor, smooth: float) -> Tensor:
        """Exact solve for a constant curvature `data` [3] plus smooth * Laplacian."""
        spectrum = _separable(values, tuple(m for m, _ in self.modes))
        spectrum = spectrum / (data[:, None, None, None] + smooth * self._eigenvalues())
        return _separable(spectrum, tuple(m.T for m, _ in self.modes))

    def _eigenvalues(self) -> Tensor:
        z, y, x = (e for _, e in self.modes)
        return z[:, None, None] + y[:, None] + x


def solve(grid: ControlGrid, gradient: Tensor, curvature: Tensor, smooth: float, iterations: int = 6) -> Tensor:
    """Preconditioned conjugate gradients for (H + smooth L) d = -gradient, H block-diagonal [6, ...]."""
    zz, zy, zx, yy, yx, xx = curvature

    def operator(d: Tensor) -> Tensor:
        data = torch.stack(
            [
                zz * d[0] + zy * d[1] + zx * d[2],
                zy * d[0] + yy * d[1] + yx * d[2],
                zx * d[0] + yx * d[1] + xx * d[2],
            ]
        )
        return data + smooth * grid.laplacian(d)

    floor = 1e-6 * (zz + yy + xx).mean() + 1e-12
    mean = torch.stack([zz.mean(), yy.mean(), xx.mean()]) + floor
    d = torch.zeros_like(gradient)
    r = -gradient
    z = grid.precondition(r, mean, smooth)
    p, rz = z, (r * z).sum()
    for _ in range(iterations):
        ap = operator(p) + floor * p
        alpha = rz / (p * ap).sum().clamp_min(1e-30)
        d = d + alpha * p
        r = r - alpha * ap
        z = grid.precondition(r, mean, smooth)
        rz, previous = (r * z).sum(), rz
        p = z + rz / previous.clamp_min(1e-30) * p
    return d


def _separable(values: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    for axis, matrix in enumerate(matrices):
        values = torch.movedim(torch.tensordot(matrix, values, dims=([1], [axis + 1])), 0, axis + 1)
    return values


def _bspline_matrix(n: int, step: float, gap: float, device: torch.device) -> Tensor:
    """Cubic B-spline values [n, m] of nodes at i * step for control points at (j - 1) * gap."""
    if n == 1:
        return torch.ones((1, 1), device=device)
    count = math.floor((n - 1) * step / gap + 1e-6) + 4
    t = (torch.arange(n, device=device)[:, None] * step / gap - (torch.arange(count, device=device) - 1)).abs()
    inner = 2 / 3 - t**2 + t**3 / 2
    outer = (2 - t).clamp_min(0) ** 3 / 6
    return torch.where(t < 1, inner, outer)


def _dct(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    k = torch.arange(n, device=device, dtype=torch.float32)
    matrix = torch.cos(math.pi * k[:, None] * (2 * k[None] + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix, 2 - 2 * torch.cos(math.pi * k / n)
