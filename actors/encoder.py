"""The slice encoder: one subject at a time from image file to embedding store.

A plain class: a model is loaded when it is made, and every call stands alone. `pipeline.dispatch` decides
whether it lives in this process or in a Ray worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actors.segmenter import Segmenter
from storage.embeddings import EmbeddingStore
from storage.images import read_image, to_uint8


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


@dataclass(frozen=True)
class Encoded:
    """What one call wrote: counts and seconds, no arrays."""

    subject: str
    n_slices: int
    n_candidates: int
    seconds: float


class SliceEncoder:
    """Encodes the slices of a subject and segments everything in them.

    Args:
        build: makes the segmenter; called once, here.
        store: root of the embedding store.
        batch: slices per call of the segmenter.
    """

    def __init__(self, build: Callable[[], Segmenter], store: Path, batch: int = 1) -> None:
        self.segmenter = build()
        self.store = EmbeddingStore(store)
        self.batch = batch

    def encode(self, subject: str, image: str, signature: dict[str, Any], config: InputConfig) -> Encoded:
        """Read `image`, write features, candidate masks and scores of every slice under `signature`.

        Raises:
            ImageError: for an image that cannot be used.
        """
        start = time.perf_counter()
        loaded = read_image(image, config.slice_axis)
        slices = to_uint8(loaded, config.percentiles, config.window)
        first = self.segmenter.encode(slices[:1])
        count = 0
        with self.store.writer(
            subject,
            signature,
            loaded.geometry,
            self.segmenter.layout,
            first.extent,
            (slices.shape[1], slices.shape[2]),
        ) as writer:
            for begin in range(0, len(slices), self.batch):
                part = slices[begin : begin + self.batch]
                features = first if len(part) == 1 and begin == 0 else self.segmenter.encode(part)
                candidates = self.segmenter.everything(part, features)
                for offset, found in enumerate(candidates):
                    values = features.values[offset]
                    writer.add_slice(begin + offset, values, found.masks, found.quality, found.stability)
                    count += len(found.masks)
        return Encoded(subject, len(slices), count, time.perf_counter() - start)
