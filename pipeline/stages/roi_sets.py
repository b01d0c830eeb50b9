"""What matching needs to know of a subject's ROIs, read from its prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.matching import RoiSet
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry


@dataclass(frozen=True)
class SubjectRois:
    """The ROIs of one subject.

    Attributes:
        rois: prototypes and moments.
        roi: int32 [N], row of each ROI in the embedding store.
        geometry: grid of the image.
        roi_class: int32 [N], ascending, where the ROIs are classes (Case 1); else None.
        probability: float64 [N], 0..1, of the classes; else None.
    """

    rois: RoiSet
    roi: npt.NDArray[np.int32]
    geometry: Geometry
    roi_class: npt.NDArray[np.int32] | None = None
    probability: npt.NDArray[np.float64] | None = None


def read_rois(store: EmbeddingStore, subject: str) -> SubjectRois:
    """Read the prototypes of a subject.

    Raises:
        FileNotFoundError: when it has none.
    """
    stored = store.read_prototypes(subject)
    if stored is None:
        raise FileNotFoundError(f"no prototypes of subject {subject!r} in {store.root}")
    arrays = stored[1]
    geometry = store.geometry(subject)
    rois = RoiSet(
        prototypes=arrays["prototypes"],
        slice=arrays["slice"],
        centroid_mm=arrays["centroid_mm"],
        area_mm2=arrays["area_mm2"],
        covariance_mm2=arrays["covariance_mm2"],
        n_slices=geometry.shape[0],
        track=arrays["track"],
    )
    return SubjectRois(rois, arrays["roi"], geometry, arrays.get("roi_class"), arrays.get("probability"))
