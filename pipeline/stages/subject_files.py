"""What the files of a subject hold, as it is registered and evaluated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from actors.input_config import InputConfig
from pipeline.stages.evaluate import Reference
from storage.cohort import Subject
from storage.geometry import Geometry
from storage.images import Image, read_labels, to_uint8
from storage.landmarks import read_landmarks


def read_reference(subject: Subject, geometry: Geometry) -> Reference:
    """Labels and landmarks of a subject where the manifest gives them.

    Args:
        geometry: grid of its image.

    Raises:
        ImageError: naming the file, for labels on another grid among others.
    """
    labels = read_labels(subject.label, geometry) if subject.label else None
    landmarks = read_landmarks(subject.landmarks, geometry) if subject.landmarks else None
    return Reference(geometry, labels, landmarks)


def shown_intensities(image: Image, settings: InputConfig) -> npt.NDArray[np.float32]:
    """Intensities as a segmenter sees them, float32 [D, H, W] 0..255; of RGB the mean channel."""
    shown = to_uint8(image, settings.percentiles, settings.window)
    return np.asarray(shown.mean(axis=3, dtype=np.float32))
