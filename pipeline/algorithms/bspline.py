"""Displacement lattices and cubic B-spline control grids of a batch of fits, on any torch device.

The first axis of every tensor is the fit. Fits of a batch share the number of nodes and of control points, not the
distances between them: a lattice that reaches beyond its image is a field over a somewhat larger box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.algorithms import fit_loops, fit_solver
from pipeline.algorithms.compiled import runs_compiled

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


def node_counts(shape: Shape, spacing_mm: Spacing, stride: int, h0: float) -> tuple[Shape, Spacing]:
    """Nodes on every `stride`-th voxel, thick axes less often so that steps stay near stride * h0; steps in mm."""
    steps = [1 if stride == 1 else max(1, int(stride * h0 / s + 1e-6)) for s in spacing_mm]
    z, y, x = (math.ceil((n - 1) / k) + 1 for n, k in zip(shape, steps, strict=True))
    return (z, y, x), (steps[0] * spacing_mm[0], steps[1] * spacing_mm[1], steps[2] * spacing_mm[2])


@dataclass(frozen=True)
class Lattices:
    """Displacements sampled on regular lattices.

    Attributes:
        values: [B, 3, nz, ny, nx], mm. step_mm: [B, 3] lattice step (z, y, x); node 0 lies on voxel 0.
    """

    values: Tensor
    step_mm: Tensor

    @staticmethod
    def zero(nodes: Shape, step_mm: Sequence[Spacing], device: str | torch.device) -> Lattices:
        """Zero fields of so many nodes, one for each step."""
        steps = torch.tensor(step_mm, dtype=torch.float32, device=device)
        return Lattices(torch.zeros((len(steps), 3, *nodes), device=device), steps)

    def points(self) -> Tensor:
        """Node positions [B, 3, nz, ny, nx], mm."""
        axes = [torch.arange(n, device=self.values.device, dtype=torch.float32) for n in self.values.shape[2:]]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")) * self.step_mm[:, :, None, None, None]

    def at(self, fit: Tensor, x: Tensor) -> Tensor:
        """Linear interpolation for points [P, 3] mm of the fits [P] (nearest outside): [P, 3] mm."""
        shape = self.values.shape[2:]
        nodes = self.values.movedim(1, -1).reshape(-1, 3)
        position = torch.minimum((x / self.step_mm[fit]).clamp_min(0), self._last(x))
        low = torch.minimum(position.floor(), (self._last(x) - 1).clamp_min(0))
        fraction = position - low
        row = self._row(fit, low.long())
        jumps = (shape[1] * shape[2], shape[2], 1)
        axes = [k for k in range(3) if shape[k] > 1]
        total = torch.zeros_like(x)
        for bits in product((0, 1), repeat=len(axes)):
            weight = torch.ones_like(fraction[:, :1])
            index = row
            for axis, bit in zip(axes, bits, strict=True):
                share = fraction[:, axis, None]
                weight = weight * (share if bit else 1 - share)
                index = index + bit * jumps[axis]
            total += nodes[index] * weight
        return total

    def nearest(self, fit: Tensor, x: Tensor) -> Tensor:
        """Flat index, over the whole batch, of the node nearest to each point [P, 3] mm: [P]."""
        return self._row(fit, torch.minimum((x / self.step_mm[fit]).round().clamp_min(0), self._last(x)).long())

    def _last(self, like: Tensor) -> Tensor:
        return torch.tensor(self.values.shape[2:], dtype=like.dtype, device=like.device) - 1

    def _row(self, fit: Tensor, i: Tensor) -> Tensor:
        nz, ny, nx = self.values.shape[2:]
        return ((fit * nz + i[:, 0]) * ny + i[:, 1]) * nx + i[:, 2]


def jacobian(u: Lattices, matrix: Tensor) -> Tensor:
    """Determinant of the derivative of A x + u(x) at the nodes (forward differences): [B, nz, ny, nx]."""
    if runs_compiled(u.values):
        return torch.from_numpy(fit_loops.determinants(u.values.numpy(), matrix.numpy(), u.step_mm.numpy()))
    columns = []
    for axis in range(3):
        if u.values.shape[axis + 2] == 1:
            slope = torch.zeros_like(u.values)
        else:
            slope = torch.diff(u.values, dim=axis + 2) / u.step_mm[:, axis, None, None, None, None]
            slope = torch.cat([slope, slope.narrow(axis + 2, slope.shape[axis + 2] - 1, 1)], axis + 2)
        columns.append((slope + matrix[:, :3, axis, None, None, None]).unbind(1))
    a, b, c = columns
    return a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])


def resample(u: Lattices, onto: Lattices) -> Lattices:
    """The same fields on other lattices, linear along each axis."""
    matrices = [
        _linear_matrices(
            onto.values.shape[axis + 2], onto.step_mm[:, axis], u.values.shape[axis + 2], u.step_mm[:, axis]
        )
        for axis in range(3)
    ]
    return replace(onto, values=_separable(u.values, matrices))


def _linear_matrices(rows: int, row_step: Tensor, cols: int, col_step: Tensor) -> Tensor:
    """[B, rows, cols]."""
    place = torch.arange(rows, device=row_step.device) * (row_step / col_step)[:, None]
    place = place.clamp(0, cols - 1)[:, :, None]
    return (1 - (place - torch.arange(cols, device=row_step.device)).abs()).clamp_min(0)


def compose(u: Lattices, delta: Tensor, matrix: Tensor) -> Lattices:
    """T after x + delta(x), for T(x) = A x + u(x): u(x + delta) + A delta, with delta [B, 3, nz, ny, nx] mm."""
    if runs_compiled(u.values):
        arrays = (t.numpy() for t in (u.values, delta, matrix, u.step_mm))
        return replace(u, values=torch.from_numpy(fit_loops.compose(*arrays)))
    moved = _sample(u.values, delta / u.step_mm[:, :, None, None, None])
    return replace(u, values=moved + (matrix[:, :3, :3] @ delta.flatten(2)).reshape(delta.shape))


def _sample(values: Tensor, shift: Tensor) -> Tensor:
    """Linear interpolation of [B, 3, nz, ny, nx] at every node moved by `shift` nodes (nearest outside)."""
    axes = [k for k in (2, 1, 0) if values.shape[k + 2] > 1]  # x, y, z as grid_sample has them
    if len(axes) < 2:
        return _sample_line(values, shift)
    place = []
    for k in axes:
        n = values.shape[k + 2]
        node = torch.arange(n, device=values.device, dtype=values.dtype).reshape([n if a == k else 1 for a in range(3)])
        place.append((node + shift[:, k]) * (2 / (n - 1)) - 1)
    thin = [k for k in range(3) if k not in axes]
    grid = torch.stack(place, -1)
    if thin:
        values, grid = values.squeeze(thin[0] + 2), grid.squeeze(thin[0] + 1)
    found = grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return found.unsqueeze(thin[0] + 2) if thin else found


def _sample_line(values: Tensor, shift: Tensor) -> Tensor:
    """`_sample` of lattices that are long along one axis at most."""
    axis = max(range(3), key=lambda k: values.shape[k + 2])
    n = values.shape[axis + 2]
    node = torch.arange(n, device=values.device).reshape([n if a == axis else 1 for a in range(3)])
    place = (node + shift[:, axis]).clamp(0, n - 1)[:, None]
    low = place.floor().clamp(max=max(n - 2, 0)).long()
    below, above = (values.gather(axis + 2, i.expand_as(values)) for i in (low, (low + 1).clamp(max=n - 1)))
    return below + (place - low) * (above - below)


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
        return _separable(d, self.basis)

    def collect(self, values: Tensor) -> Tensor:
        """The adjoint of `expand`."""
        return _separable(values, [b.mT for b in self.basis])

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
        return _separable(d, self.modes)

    def coefficients(self, spectrum: Tensor) -> Tensor:
        """The inverse, and adjoint, of `spectrum`."""
        return _separable(spectrum, [m.mT for m in self.modes])


def control_counts(nodes: Shape, ratio: Sequence[float]) -> Shape:
    """Control points along each axis that cover the nodes, one beyond each border; 1 along an axis of one node.

    `ratio` is the lattice step over the control spacing.
    """
    z, y, x = (1 if n == 1 else math.floor((n - 1) * r + 1e-6) + 4 for n, r in zip(nodes, ratio, strict=True))
    return z, y, x


def solve(
    grid: ControlGrid, gradient: Tensor, curvature: Tensor, smooth: Tensor, lumped: bool, iterations: int = 4
) -> Tensor:
    """Preconditioned conjugate gradients for (H + smooth L) d = -B' g.

    Args:
        grid: of the update; B expands its coefficients to the lattice.
        gradient: [B, 3, nz, ny, nx] g at the nodes.
        curvature: [B, 6, nz, ny, nx] symmetric 3x3 blocks (zz, zy, zx, yy, yx, xx) at the nodes.
        smooth: [B], weight of the graph Laplacian L.
        lumped: H is the row sums of B' curvature B, an upper bound that makes short, smooth steps; else B' curvature B.
        iterations: of the conjugate gradients.

    Returns:
        [B, 3, ...control] coefficients.
    """
    if not lumped:
        return _solve_exact(grid, gradient, curvature, smooth, iterations)
    collected = grid.collect(torch.cat([gradient, curvature], 1))
    return _solve_lumped(grid, collected[:, :3], collected[:, 3:], smooth, iterations)


def _solve_lumped(grid: ControlGrid, gradient: Tensor, blocks: Tensor, smooth: Tensor, iterations: int) -> Tensor:
    """In the modes of L, where L and the preconditioner, the exact solution for a constant H, are diagonal."""
    trace = blocks[:, [0, 3, 5]]
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
        arrays = (t.numpy() for t in (gradient, curvature, grid.ratio, grid.spacing_mm, smooth))
        return torch.from_numpy(fit_solver.solve(*arrays, tuple(grid.eigenvalues.shape[1:]), iterations))
    gradient = grid.collect(gradient)
    trace = grid.collect(curvature[:, [0, 3, 5]])
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
    """Symmetric 3x3 blocks [B, 6, ...] times vectors [B, 3, ...]."""
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


def _separable(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply [B, c, z, y, x] along z, y and x by [B or 1, new, old] matrices; [1, 1] ones are left out.

    One product for each fit, so that the rounding of a fit does not depend on the batch.
    """
    for matrix in reversed(matrices):
        if matrix.shape[1:] != (1, 1):
            product_ = torch.bmm(values.flatten(1, 3), matrix.mT.expand(len(values), -1, -1))
            values = product_.reshape(*values.shape[:-1], matrix.shape[1])
        values = values.movedim(-1, 2)
    return values.contiguous()


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
