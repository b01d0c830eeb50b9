"""Settings of the step from image to slices: `input:` in a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class InputConfig:
    """How an image becomes 8-bit slices.

    Attributes:
        slice_axis: `auto` (the axis of the largest spacing; axial if isotropic), or an anatomical axis.
        percentiles: intensities mapped to 0 and 255, in percent of the volume's voxels.
        window: (low, high) intensities instead of percentiles, for example of a CT.
    """

    slice_axis: Literal["auto", "axial", "coronal", "sagittal"] = "auto"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"input.percentiles is {self.percentiles}; expected 0 <= low < high <= 100")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"input.window is {self.window}; expected low < high")
