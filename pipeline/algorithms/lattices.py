"""Displacement lattices of a batch of fits, on any torch device.

The first axis of every tensor is the fit. Fits of a batch share the number of nodes, not the distances between them: a
lattice that reaches beyond its image is a field over a somewhat larger box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.algorithms import fit_loops
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
    return replace(onto, values=separable(u.values, matrices))


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


def separable(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply [B, c, z, y, x] along z, y and x by [B or 1, new, old] matrices; [1, 1] ones are left out.

    No product spans fits, so that the rounding of a fit does not depend on the batch.
    """
    along_z, along_y, along_x = matrices
    if along_x.shape[1:] != (1, 1):
        product_ = torch.bmm(values.flatten(1, 3), along_x.mT.expand(len(values), -1, -1))
        values = product_.reshape(*values.shape[:-1], -1)
    if along_y.shape[1:] != (1, 1):
        values = along_y[:, None, None] @ values
    if along_z.shape[1:] != (1, 1):
        values = (along_z[:, None] @ values.flatten(3)).reshape(*values.shape[:2], -1, *values.shape[3:])
    return values.contiguous()
