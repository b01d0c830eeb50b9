"""How inner loops are compiled for processors: the first time they run on a machine, which takes seconds, then kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba

if TYPE_CHECKING:
    from torch import Tensor

_MATH = {"contract", "nsz", "arcp", "reassoc"}  # what keeps infinities and NaN as they are


def runs_compiled(values: Tensor) -> bool:
    """Whether compiled loops take over: on a processor, where nothing is differentiated through them."""
    return values.device.type == "cpu" and not values.requires_grad


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code for one thread; its arguments are arrays of one layout, scalars and tuples."""
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _MATH}
    try:
        made = numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written: each process compiles for itself
        made = numba.njit(**settings)(function)
    kept: Callable[..., Any] = made
    return kept
