"""One displacement field on a regular lattice; batches of them are in `pipeline.algorithms.lattices`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.algorithms import lattices
from pipeline.algorithms.lattices import Lattices, Shape, Spacing


@dataclass(frozen=True)
class Lattice:
    """A displacement, linear between the nodes of a lattice and constant beyond its border.

    Attributes:
        values: [3, nz, ny, nx], mm. step_mm: [3] lattice step (z, y, x); node 0 lies on voxel 0.
    """

    values: Tensor
    step_mm: Tensor

    @staticmethod
    def voxels(shape: Shape, spacing_mm: Spacing) -> Lattice:
        """The zero field on every voxel."""
        return Lattice(torch.zeros((3, *shape)), torch.tensor(spacing_mm, dtype=torch.float32))

    def points(self) -> Tensor:
        """Node positions [3, nz, ny, nx], mm."""
        return self._batch().points()[0]

    def resampled(self, onto: Lattice) -> Lattice:
        """The same field on another lattice, linear along each axis."""
        return replace(onto, values=lattices.resample(self._batch(), onto._batch()).values[0])

    def _batch(self) -> Lattices:
        return Lattices(self.values[None], self.step_mm[None])
