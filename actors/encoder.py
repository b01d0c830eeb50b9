"""The slice encoder: one subject at a time from image file to embedding store.

A plain class: a model is loaded when it is made, and every call stands alone. `pipeline.dispatch` decides
whether it lives in this process or in a Ray worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.input_config import InputConfig
from actors.segmenter import Segmenter
from storage.embeddings import EmbeddingStore
from storage.images import read_image, to_uint8


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
        first = self.segmenter.encode(slices[: self.batch])
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
                features = first if begin == 0 else self.segmenter.encode(part)
                candidates = self.segmenter.everything(part, features)
                for offset, found in enumerate(candidates):
                    values = features.values[offset]
                    writer.add_slice(begin + offset, values, found.masks, found.quality, found.stability)
                    count += len(found.masks)
        return Encoded(subject, len(slices), count, time.perf_counter() - start)
