"""Steps of a fit, damped around the nodes where a field would stop being one-to-one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from pipeline.algorithms import damping_loops
from pipeline.algorithms.compiled import runs_compiled
from pipeline.algorithms.lattice import Lattice
from pipeline.algorithms.lattices import Lattices, compose, jacobian
from pipeline.algorithms.regularity import SMALLEST_JACOBIAN, stays_above

_ROUNDING = 1e-4  # of a determinant
_REACHES = (1, 2, 3, 4, 6, 8, 12)


def guarded_step(
    u: Lattices, determinants: Tensor, delta: Tensor, matrix: Tensor, moving: Tensor, everywhere: bool
) -> tuple[Lattices, Tensor]:
    """Compose the fits `moving` [B] with delta, damped around the nodes where a field would stop being one-to-one.

    With `everywhere` no position of any cell may fold, either. `determinants` are those of u; returns those of the
    composed fields with them.
    """
    values, kept = u.values, determinants
    left = torch.nonzero(moving)[:, 0]
    allowed = (determinants - _ROUNDING).clamp(max=SMALLEST_JACOBIAN)
    for reach in _REACHES:
        here = _of(matrix, left)
        moved = compose(Lattices(_of(u.values, left), _of(u.step_mm, left)), _of(delta, left), here)
        found = jacobian(moved, here)
        bad = found < _of(allowed, left)
        damped = bad.flatten(1).any(1)
        good = ~damped
        if everywhere:
            good &= _none_folds(moved, here)
        values = _with(values, left[good], _of(moved.values, torch.nonzero(good)[:, 0]))
        kept = _with(kept, left[good], _of(found, torch.nonzero(good)[:, 0]))
        left, bad, damped = left[~good], bad[~good], damped[~good]
        if not len(left):
            break
        share = torch.where(damped[:, None, None, None], 1 - _softened(bad, reach), 0.5)
        delta = _with(delta, left, _of(delta, left) * share[:, None])
    return Lattices(values, u.step_mm), kept


def _of(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows in ascending order; without a copy if they are all."""
    return values if len(chosen) == len(values) else values[chosen]


def _with(values: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    """The values with other rows, in ascending order; without a copy if they are all."""
    return rows if len(chosen) == len(values) else values.index_copy(0, chosen, rows)


def _softened(bad: Tensor, reach: int) -> Tensor:
    """One within `reach` nodes of a marked node, falling to zero over as many more: [B, nz, ny, nx]."""
    if runs_compiled(bad):
        return torch.from_numpy(damping_loops.softened(bad.numpy(), reach))
    near = bad.float()
    for axis, n in enumerate(bad.shape[1:]):
        if n > 1:
            near = _along(near, axis, lambda rows: max_pool1d(rows, 4 * reach + 1, 1, 2 * reach))
            near = _along(
                near, axis, lambda rows: avg_pool1d(pad(rows, (reach, reach), mode="replicate"), 2 * reach + 1, 1)
            )
    return near


def _along(values: Tensor, axis: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of rows [N, 1, n] along an axis, 0 to 2, of [B, nz, ny, nx]."""
    moved = values.movedim(axis + 1, -1)
    rows = function(moved.reshape(-1, 1, moved.shape[-1]))
    return rows.reshape(moved.shape).movedim(-1, axis + 1)


def _none_folds(u: Lattices, matrix: Tensor) -> Tensor:
    """Whether the field of each fit keeps its cells from folding anywhere: bool [B]."""
    fields = (Lattice(*each) for each in zip(u.values, u.step_mm, strict=True))
    kept = [stays_above(field, affine, SMALLEST_JACOBIAN) for field, affine in zip(fields, matrix, strict=True)]
    return torch.tensor(kept, device=matrix.device)
