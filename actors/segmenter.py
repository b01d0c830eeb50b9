"""The one interface of every segmenter, weight-free or SAM: encode slices, then segment everything in them.

A segmenter is functional: it keeps nothing between calls but its weights, so the same object serves any
number of subjects and two calls with the same input give the same output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Features:
    """Feature maps of a batch of slices (Eq. 3).

    Attributes:
        values: float32 [B, C, h, w].
        extent: rows and columns of the feature grid that the image covers, in cells (may be fractional and
            smaller than h, w where the backend pads). Pixel row y of an image of height H spans the cell rows
            y * extent[0] / H to (y + 1) * extent[0] / H; columns likewise.
    """

    values: npt.NDArray[np.float32]
    extent: tuple[float, float]


@dataclass(frozen=True)
class Candidates:
    """Candidate ROIs of one slice (Eq. 4).

    Attributes:
        masks: bool [n, H, W].
        quality: float32 [n], predicted IoU or the backend's analogue, higher is better.
        stability: float32 [n], 0..1, how little the mask changes with its threshold.
    """

    masks: npt.NDArray[np.bool_]
    quality: npt.NDArray[np.float32]
    stability: npt.NDArray[np.float32]


class Segmenter(Protocol):
    """What the pipeline asks of a backend.

    Attributes:
        name: the word that selects it in the configuration.
        layout: how feature channels form blocks, `{"blocks": [[name, start, stop, weight], ...]}`; the cosine of
            two prototypes is the weighted mean of the cosines of their blocks. SAM has one block.
        signature: JSON-safe record of everything that changes the output (parameters, weights digest).
    """

    name: str
    layout: dict[str, Any]
    signature: dict[str, Any]

    def encode(self, slices: npt.NDArray[np.uint8]) -> Features:
        """Encode uint8 [B, H, W, 3] slices, 0..255 RGB."""
        ...

    def everything(self, slices: npt.NDArray[np.uint8], features: Features) -> list[Candidates]:
        """Candidate ROIs of every slice of the batch, in a deterministic order."""
        ...
