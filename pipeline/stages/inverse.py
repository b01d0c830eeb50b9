"""The diffeomorphic guarantee of a pair: its transform as it is stored, checked, inverted, and gone there and back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from storage.geometry import Affine, Geometry, Triple, moving_to_fixed
from storage.transforms import Transform, make_transform, read_transform, stored_field, write_transform

if TYPE_CHECKING:  # loads torch
    from pipeline.algorithms.lattice import Lattice

Field = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Inverted:
    """Columns of the metrics table, and whether the inverse on the moving grid had to be damped so as not to fold."""

    columns: dict[str, float]
    damped: bool


def without_folds(ddf: Field, affine: Affine, spacing_mm: Triple) -> tuple[Field, bool]:
    """A dense field float32 [3, D, H, W] mm that folds nowhere between its voxels either; whether that changed it."""
    from pipeline.algorithms.regularity import SMALLEST_JACOBIAN, unfolded
    from pipeline.algorithms.warp import affine_ddf

    linear = affine_ddf(affine, ddf.shape[1:], spacing_mm)
    u, damped = unfolded(_lattice(ddf - linear, spacing_mm), affine, SMALLEST_JACOBIAN)
    return (u.values.numpy() + linear, True) if damped else (ddf, False)


def invert_transform(
    transform: Transform, fixed: Geometry, moving: Geometry, path: Path | None, signature: dict[str, Any]
) -> Inverted:
    """Check a transform as it was read back and write its inverse, a transform of the moving file's grid.

    Args:
        transform: of fixed to moving positions.
        path: `.h5` file of the inverse; None writes none.
        signature: of the inverse.

    Raises:
        NotInvertedError: when the stored field is not one-to-one after all.
        OSError: naming the file, for example when the disk is full.
    """
    from pipeline.algorithms.inverse import NotInvertedError, invert, lattice_over, round_trip
    from pipeline.algorithms.lattice import Lattice
    from pipeline.algorithms.regularity import SMALLEST_INVERSE_JACOBIAN, smallest_determinant, unfolded

    start = time.perf_counter()
    affine, values, step_mm = stored_field(transform, fixed, moving)
    u = _lattice(values, step_mm)
    bound = smallest_determinant(u, affine)
    if not bound > 0:
        raise NotInvertedError(f"the field as written folds: det J is {bound:.3g} somewhere")
    between = moving_to_fixed(fixed, moving)
    linear, v = invert(u, affine, lattice_over(moving.shape, moving.spacing_mm), between)
    v, damped = unfolded(v, linear, SMALLEST_INVERSE_JACOBIAN)
    z, y, x = v.step_mm.tolist()
    inverse = (linear, v.values.numpy(), (z, y, x), moving)
    if path is not None:
        write_transform(path, *inverse, signature, fixed)
    written = make_transform(*inverse, fixed) if path is None else read_transform(path)
    linear, values, step_mm = stored_field(written, moving, fixed)
    back = linear, _lattice(values, step_mm)
    voxels = [Lattice.voxels(g.shape, g.spacing_mm) for g in (fixed, moving)]
    error = round_trip((affine, u), back, voxels[0], voxels[1], between)
    columns = {"jacobian_min": bound, **_error_columns(error, fixed), "seconds_inverse": time.perf_counter() - start}
    return Inverted(columns, damped)


def _lattice(values: npt.NDArray[np.floating[Any]], step_mm: Triple) -> Lattice:
    import torch

    from pipeline.algorithms.lattice import Lattice

    return Lattice(torch.as_tensor(values, dtype=torch.float32), torch.tensor(step_mm, dtype=torch.float32))


def _error_columns(error: npt.NDArray[np.float64], fixed: Geometry) -> dict[str, float]:
    """Mean and 95th percentile of the lengths of [P, 3] mm; nothing where there is no point."""
    units: dict[str, Triple] = {"vox": fixed.spacing_mm}
    if fixed.has_spacing:
        units["mm"] = (1.0, 1.0, 1.0)
    columns = {}
    for unit, length in units.items() if len(error) else ():
        distance = np.linalg.norm(error / length, axis=1)
        columns[f"inverse_error_{unit}"] = float(distance.mean())
        columns[f"inverse_error_{unit}_p95"] = float(np.percentile(distance, 95))
    return columns
