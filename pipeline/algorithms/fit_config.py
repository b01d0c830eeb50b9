"""Settings of the displacement fit, apart from `pipeline.algorithms.ddf` so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Level:
    """One resolution of the fit; lengths in units of the smallest fixed spacing h0.

    Attributes:
        stride: lattice step of the stored field.
        control: control point spacing of the update.
        tau: softness of the masks.
        points: row and column step of the points that vote.
        iterations: Gauss-Newton steps.
    """

    stride: int
    control: float
    tau: float
    iterations: int
    points: int = 1


DEFAULT_LEVELS = (
    Level(4, 16.0, 4.0, 4, 4),
    Level(2, 8.0, 2.0, 4, 2),
    Level(2, 5.0, 1.2, 4, 2),
)


@dataclass(frozen=True)
class FitConfig:
    """Settings of the displacement fit.

    Attributes:
        smoothness: weight of the gradient penalty on each update (the lambda of Eq. 10 for the update).
        step: largest update per iteration, as a fraction of the control spacing.
        affine_iterations: Gauss-Newton steps of the affine part.
        affine_prior_mm: how strongly few or clustered ROIs pull the affine towards a translation.
        robust: exponent by which ROIs that stay apart lose weight from level to level; 0 switches it off.
        slice_weight: weight of the matched slice's position along the through-plane axis.
        confidence_power: a pair weighs its confidence to this power.
        points_per_roi: about how many voxels of a ROI vote, for each of its slices.
        levels: coarse to fine.
    """

    smoothness: float = 0.001
    step: float = 0.4
    affine_iterations: int = 12
    affine_prior_mm: float = 20.0
    robust: float = 1.0
    slice_weight: float = 0.05
    confidence_power: float = 2.0
    points_per_roi: int = 120
    levels: tuple[Level, ...] = field(default=DEFAULT_LEVELS)
