"""How alike two subjects are, from a descriptor of each that is pooled from its prototypes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]


def describe(prototypes: npt.NDArray[np.float32]) -> Float:
    """Mean and standard deviation of the prototypes [N, C] of a subject, N >= 1: float64 [2 C]."""
    return np.concatenate([prototypes.mean(axis=0, dtype=np.float64), prototypes.std(axis=0, dtype=np.float64)])


def similarity(descriptors: Float) -> Float:
    """Cosine of descriptors [N, D] after the mean of the cohort is taken off each: [N, N], -1..1, symmetric.

    What all subjects share would otherwise hide how they differ. Rounded, so that the order of sums does not matter.
    """
    rest = descriptors - descriptors.mean(axis=0)
    rest /= np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-9)
    return np.asarray(np.round(rest @ rest.T, 6))
