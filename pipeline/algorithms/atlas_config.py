"""Settings of the population template, `pipeline.atlas`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Average = Literal["mean", "median", "trimmed"]


@dataclass(frozen=True)
class AtlasConfig:
    """Settings of `samreg atlas`.

    Attributes:
        reference: subject that the first iteration registers to: a name, or `medoid` for the one most like all others.
        iterations: at most.
        average: of the warped images, voxel by voxel: `mean`, `median`, or `trimmed`, the mean without `trim` of the
            subjects at either end.
        trim: share of the subjects, 0 to below 0.5.
        sharpening: how much of what a Gaussian of one voxel takes away is added to the average; 0 leaves it as it is.
        settled: an iteration is the last if its mean displacement is below this part of the smallest voxel edge
        settled_image: and 1 minus the correlation of its template with that before is below this.
    """

    reference: str = "medoid"
    iterations: int = 4
    average: Average = "trimmed"
    trim: float = 0.1
    sharpening: float = 0.0
    settled: float = 0.5
    settled_image: float = 0.005

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"atlas.iterations is {self.iterations}; it must be 1 or more")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"atlas.trim is {self.trim}; expected 0 or more and less than 0.5")
        for name in ("sharpening", "settled", "settled_image"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"atlas.{name} is {getattr(self, name)}; it must be 0 or more")
