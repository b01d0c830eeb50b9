"""Settings of the displacement fit, apart from `pipeline.algorithms.ddf` so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _check(settings: object, section: str, positive: tuple[str, ...], not_negative: tuple[str, ...] = ()) -> None:
    """Raise the ValueError of a setting that is too small, or NaN."""
    for name in (*positive, *not_negative):
        value = getattr(settings, name)
        if not (value > 0 or (value == 0 and name in not_negative)):
            wanted = "of 0 or more" if name in not_negative else "above 0"
            raise ValueError(f"{section}.{name} is {value}; expected a number {wanted}")


@dataclass(frozen=True)
class Level:
    """One resolution of the fit; lengths in units of the smallest fixed spacing h0.

    Attributes:
        stride: lattice step of the stored field.
        control: control point spacing of the update.
        tau: softness of the masks.
        iterations: Gauss-Newton steps at most.
        points: row and column step of the points that vote.
        lumped: short, smooth steps that errors in the outlines hardly disturb; off, full steps that converge sooner.
        trust: smallest confidence of the pairs that vote. A level for which no pair votes is left out.
        below: the level is for fits of which a voting ROI has a Dice below this; the others end before it.
        below_flat: the same for pictures, where fine levels cost little; 0 is `below`.
        smoothness: of the level, in units of that of the fit.
        points_per_roi: of the level; 0 is that of the fit.
    """

    stride: int
    control: float
    tau: float
    iterations: int
    points: int = 1
    lumped: bool = True
    trust: float = 0.0
    below: float = 1.0
    below_flat: float = 0.0
    smoothness: float = 1.0
    points_per_roi: int = 0

    def __post_init__(self) -> None:
        _check(self, "fit.levels", ("stride", "control", "tau", "points"), ("smoothness",))


TRUSTED = 0.99  # more than `pipeline.algorithms.matching` ever gives
DEFAULT_LEVELS = (
    Level(8, 32.0, 8.0, 4, 4, trust=TRUSTED),
    Level(4, 16.0, 4.0, 4, 4),
    Level(2, 8.0, 2.0, 4, 2),
    Level(2, 5.0, 1.2, 4, 2),
    Level(2, 4.0, 1.5, 4, 1, False, TRUSTED, below=0.95, below_flat=0.98, smoothness=0.4, points_per_roi=250),
    Level(2, 2.0, 0.8, 6, 1, False, TRUSTED, below=0.95, below_flat=0.98, smoothness=0.4, points_per_roi=250),
    Level(1, 1.0, 0.5, 10, 1, False, TRUSTED, below=0.9, below_flat=0.98, smoothness=0.1, points_per_roi=4000),
)


@dataclass(frozen=True)
class Eq10Config:
    """Settings of the literal Eq. 10, `pipeline.algorithms.eq10`.

    Attributes:
        smoothness: lambda of Eq. 10, for the gradient of what it adds to the field that it starts from, with which
            folds stay rare; after the affine part alone, 0.8 is about as smooth.
        control: control point spacing, in h0.
        band: how far from the fixed boundaries masks are compared, in h0.
        points_per_roi: about how many voxels of a ROI are compared, for each of its slices.
        learning_rate: of Adam, in h0.
        iterations: at most.
        settled: a step that lowers the loss by less than this is none; fifteen such end the fit.
    """

    smoothness: float = 5.0
    control: float = 2.0
    band: float = 4.0
    points_per_roi: int = 2000
    learning_rate: float = 0.05
    iterations: int = 100
    settled: float = 1e-4

    def __post_init__(self) -> None:
        _check(self, "fit.eq10", ("control", "band", "points_per_roi", "learning_rate", "iterations"), ("smoothness",))


@dataclass(frozen=True)
class RefineConfig:
    """Settings of the intensity refinement after the fit, `pipeline.stages.refine`.

    Attributes:
        method: `none` (off), or `demons`, for images of like contrast.
        iterations: per level, coarse to fine; the last level works on voxels of the smallest fixed spacing h0, each
            one before it on voxels twice as large.
        smoothing: standard deviation of the Gaussian that smooths the update, in the shortest voxel edge of the level.
        window: standard deviation in h0 of the Gaussian whose local mean and contrast intensities are measured by.
    """

    method: Literal["none", "demons"] = "none"
    iterations: tuple[int, ...] = (30, 30, 20)
    smoothing: float = 3.0
    window: float = 5.0

    def __post_init__(self) -> None:
        if not self.iterations or min(self.iterations) < 0 or not any(self.iterations):
            raise ValueError(f"fit.refine.iterations is {self.iterations}; expected counts >= 0, one of them positive")
        _check(self, "fit.refine", ("smoothing", "window"))


@dataclass(frozen=True)
class FitConfig:
    """Settings of the displacement fit.

    Attributes:
        objective: `gauss_newton`, or `eq10`, which goes on from there (from the affine if `levels` is empty) with the
            literal Eq. 10: closest to the ROIs, slower, and without a guarantee against folds.
        smoothness: weight of the gradient penalty on each update (the lambda of Eq. 10 for the update).
        step: largest update per iteration, as a fraction of the control spacing.
        affine_iterations: Gauss-Newton steps of the affine part.
        affine_prior_mm: how strongly few or clustered ROIs pull the affine towards a translation.
        robust: exponent by which ROIs that stay apart lose weight from level to level; 0 switches it off.
        slice_weight: weight of the matched slice's position along the through-plane axis.
        confidence_power: a pair weighs its confidence to this power.
        points_per_roi: about how many voxels of a ROI vote, for each of its slices.
        settled: a level stops early when the largest change is below this part of h0.
        levels: coarse to fine. The first and the last three of the default ones are for pairs whose outlines
            are certain (labels), and the last three only for fits of which such a pair does not meet yet.
        diffeomorphic: det J > 0 everywhere in the written field, checked, and its inverse written beside it.
        eq10: settings of that objective.
        refine: refinement on the intensities afterwards, off by default.
    """

    objective: Literal["gauss_newton", "eq10"] = "gauss_newton"
    smoothness: float = 0.001
    step: float = 0.4
    affine_iterations: int = 12
    affine_prior_mm: float = 20.0
    robust: float = 1.0
    slice_weight: float = 0.05
    confidence_power: float = 2.0
    points_per_roi: int = 120
    settled: float = 0.02
    levels: tuple[Level, ...] = field(default=DEFAULT_LEVELS)
    diffeomorphic: bool = False
    eq10: Eq10Config = Eq10Config()
    refine: RefineConfig = RefineConfig()

    def __post_init__(self) -> None:
        _check(self, "fit", ("step", "affine_prior_mm"), ("smoothness",))
