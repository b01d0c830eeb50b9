"""The mean shape of subjects that are mapped from one template, and the map that takes the template there.

A subject's map phi takes template positions to its own. Where a subject lies and how it is turned is no shape, and
averaging turned copies would shrink them, so the pose goes first, as in Procrustes analysis: the affine that fits phi
best over the template's foreground is L = R S, R a rotation and S a stretch of the template, and

    R^T (phi(x) - mean phi) = S (x - c) + r(x),        c the centre of the foreground.

The mean shape is m(x) = c + exp(mean log S) (x - c) + mean r(x): stretches are averaged by their logarithm, so that
twice and half as large make equal (Arsigny et al., SIAM J. Matrix Anal. 29, 2007), what is left by its vectors. The
split does not depend on the affine part that a fit began with. A template is unbiased when m is the identity; carried
by m it becomes so (Guimond et al., Comput. Vis. Image Underst. 77, 2000).

Positions are local mm (z, y, x), see `storage.geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.algorithms.warp import Affine, Array, apply_affine

if TYPE_CHECKING:  # loads torch
    from pipeline.algorithms.lattice import Lattice

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FieldMap:
    """q -> affine q + u(q).

    Attributes:
        affine: float64 [4, 4].
        values: [3, nz, ny, nx] mm, u at the nodes of a lattice; linear in between, constant beyond.
        step_mm: distance of the nodes (z, y, x); the first lies on voxel 0.
    """

    affine: Affine
    values: npt.NDArray[np.floating]
    step_mm: Triple

    def at(self, points: Array) -> Array:
        """Images [N, 3] of positions [N, 3], mm."""
        index = (points / self.step_mm).T
        added = [ndimage.map_coordinates(component, index, order=1, mode="nearest") for component in self.values]
        return np.asarray(apply_affine(self.affine, points) + np.stack(added, axis=1))

    def nodes(self) -> Array:
        """Positions of the nodes, [nz ny nx, 3] mm."""
        index = np.moveaxis(np.indices(self.values.shape[1:], dtype=np.float64), 0, -1).reshape(-1, 3)
        return np.asarray(index * self.step_mm)

    def on_nodes(self, affine: Affine, images: Array) -> FieldMap:
        """The map on the same lattice that takes its nodes to `images` [nz ny nx, 3], with another affine part."""
        left = (images - apply_affine(affine, self.nodes())).T
        return FieldMap(affine, left.reshape(self.values.shape), self.step_mm)


def node_lattice(shape: Shape, spacing_mm: Triple) -> FieldMap:
    """The identity on a lattice over an image, about two shortest voxel edges wide."""
    from pipeline.algorithms.inverse import lattice_over

    lattice = lattice_over(shape, spacing_mm)
    z, y, x = lattice.step_mm.tolist()
    return FieldMap(np.eye(4), lattice.values.numpy(), (z, y, x))


def without_pose(points: Array, moved: Array, inside: Mask) -> tuple[Array, Array]:
    """Logarithm of the stretch S, [3, 3], and what it leaves, r [N, 3] mm.

    Args:
        points: [N, 3] mm, template positions x.
        moved: [N, 3] mm, phi(x) in any frame.
        inside: [N], those that S and the pose are fitted to.

    Raises:
        ValueError: for a map that mirrors or flattens.
    """
    x, y = points - points[inside].mean(axis=0), moved - moved[inside].mean(axis=0)
    gram, cross = x[inside].T @ x[inside], y[inside].T @ x[inside]
    flat = np.diag(gram) <= 1e-9 * np.trace(gram)
    gram[flat, flat] = cross[flat, flat] = 1.0
    u, stretch, v = np.linalg.svd(cross @ np.linalg.inv(gram))
    if not np.linalg.det(u @ v) > 0 or not stretch.min() > 1e-3:
        raise ValueError(f"the map mirrors or flattens the template: its stretches are {np.round(stretch, 4)}")
    logarithm = v.T @ np.diag(np.log(stretch)) @ v
    return logarithm, np.asarray(y @ (u @ v) - x @ (v.T @ np.diag(stretch) @ v))


def between(before: FieldMap, after: FieldMap, share: float) -> FieldMap:
    """(1 - share) `before` + share `after` on the lattice of the latter, smoothed where it would fold.

    Raises:
        ValueError: when `after` mirrors or flattens.
    """
    images = (1 - share) * before.at(after.nodes()) + share * after.at(after.nodes())
    return unfolded_map(after.on_nodes(after.affine, images))


def unfolded_map(found: FieldMap) -> FieldMap:
    """The map, smoothed where it would fold.

    Raises:
        ValueError: when its affine part mirrors or flattens.
    """
    from pipeline.algorithms.regularity import SMALLEST_JACOBIAN, unfolded

    return replace(found, values=unfolded(_lattice(found), found.affine, SMALLEST_JACOBIAN)[0].values.numpy())


def mean_map(lattice: FieldMap, centre: Array, log_stretch: Array, left: npt.NDArray[np.floating]) -> FieldMap:
    """The map m to the mean shape, drawn back where it would fold.

    Args:
        lattice: the nodes.
        centre: [3] mm, c.
        log_stretch: [3, 3], mean of log S.
        left: [3, nz, ny, nx] mm, mean of r at the nodes.
    """
    affine = np.eye(4)
    affine[:3, :3] = exp_symmetric(log_stretch)
    affine[:3, 3] = centre - affine[:3, :3] @ centre
    return unfolded_map(FieldMap(affine, left, lattice.step_mm))


def inverse_map(forward: FieldMap, onto: FieldMap, moving_to_fixed: Affine) -> FieldMap:
    """The inverse of a map, as `pipeline.algorithms.inverse` has it, on the lattice of `onto`.

    Args:
        moving_to_fixed: [4, 4], of the frames of the two images; the identity for a map of the template to itself.

    Raises:
        NotInvertedError: when the map folds.
    """
    from pipeline.algorithms.inverse import invert

    affine, found = invert(_lattice(forward), forward.affine, _lattice(onto), moving_to_fixed)
    return FieldMap(affine, found.values.numpy(), onto.step_mm)


def _lattice(found: FieldMap) -> Lattice:
    import torch

    from pipeline.algorithms.lattice import Lattice

    return Lattice(torch.as_tensor(found.values, dtype=torch.float32), torch.tensor(found.step_mm))


def exp_symmetric(matrix: Array) -> Array:
    """Exponential of a symmetric matrix [3, 3]."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors @ np.diag(np.exp(values)) @ vectors.T)
