"""What a study writes beside its tables and transforms."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OutputConfig:
    """Files for every pair that not everyone wants.

    Attributes:
        jacobian: map of the natural logarithm of det J on the grid of the fixed file, `jacobians/<pair>.nii.gz`.
    """

    jacobian: bool = False
