"""The class encoder (Case 1): one subject at a time from image and segmentation to embedding store.

Every class of a subject is one ROI. The store holds it slice by slice, each slice with the class in `roi_class`
and the mean class probability as quality; there are no features, since class ROIs are paired by class.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actors.class_config import LabelsConfig
from actors.encoder import Encoded
from actors.input_config import InputConfig
from storage.embeddings import EmbeddingStore
from storage.images import Image, read_image
from storage.segmentations import Segmentation, read_segmentation

_NO_FEATURES = np.zeros((1, 1, 1), np.float32)


class ClassError(ValueError):
    """A subject has no class to make ROIs of."""


class ClassSegmenter(Protocol):
    """What gives the voxels of an image their classes.

    Attributes:
        signature: JSON-safe record of everything that changes the output, files of the manifest apart.
    """

    signature: dict[str, Any]

    def segment(self, image: Image, settings: InputConfig, segmentation: str) -> Segmentation:
        """Classes of one image; `segmentation` is the subject's file of the manifest, or ""."""
        ...


class LabelFiles:
    """Takes the classes from the files of the manifest's `segmentation` column."""

    def __init__(self, config: LabelsConfig) -> None:
        self.signature = config.signature()

    def segment(self, image: Image, settings: InputConfig, segmentation: str) -> Segmentation:
        """Read the segmentation of an image.

        Raises:
            ClassError: when the manifest names none.
            ImageError: naming the file, for example when it is on another grid.
        """
        if not segmentation:
            raise ClassError("segmenter 'labels' needs a segmentation, and the manifest names none for this subject")
        return read_segmentation(segmentation, image.geometry)


class ClassEncoder:
    """Writes the class ROIs of subjects.

    Args:
        build: makes the class segmenter; called once, here.
        store: root of the embedding store.
        classes: the classes to use; none means all but 0.
    """

    def __init__(self, build: Callable[[], ClassSegmenter], store: Path, classes: tuple[int, ...]) -> None:
        self.segmenter = build()
        self.store = EmbeddingStore(store)
        self.classes = classes

    def encode(
        self, subject: str, image: str, segmentation: str, signature: dict[str, Any], config: InputConfig
    ) -> Encoded:
        """Write the class ROIs of one subject under `signature`.

        Args:
            segmentation: file of the manifest with class labels or probabilities, or "".

        Raises:
            ImageError, ClassError: naming the file, when it cannot be used or holds none of the classes.
        """
        start = time.perf_counter()
        loaded = read_image(image, config.slice_axis)
        found = self.segmenter.segment(loaded, config, segmentation)
        chosen = self._chosen(found.labels, segmentation or image)
        shape = loaded.geometry.shape
        count = 0
        with self.store.writer(
            subject, signature, loaded.geometry, {"blocks": []}, (1.0, 1.0), (shape[1], shape[2])
        ) as writer:
            for z, (labels, probability) in enumerate(zip(found.labels, found.probability, strict=True)):
                here = chosen[np.isin(chosen, labels)]
                masks = labels[None] == here[:, None, None]
                quality = np.array([probability[mask].mean(dtype=np.float64) for mask in masks], np.float32)
                writer.add_slice(z, _NO_FEATURES, masks, quality, np.ones(len(here), np.float32), here)
                count += len(here)
        return Encoded(subject, shape[0], count, time.perf_counter() - start)

    def _chosen(self, labels: npt.NDArray[np.int32], source: str) -> npt.NDArray[np.int32]:
        present = np.unique(labels[labels != 0])
        chosen = present[np.isin(present, self.classes)] if self.classes else present
        if not len(chosen):
            found = ", ".join(map(str, present)) or "background only"
            wanted = ", ".join(map(str, self.classes)) or "any class but 0"
            raise ClassError(f"{source}: no ROI: found {found}, wanted {wanted} (segmenter.classes)")
        return chosen
