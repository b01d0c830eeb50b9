"""Prototypes: filter the ROIs of a subject, pool its features over them and link them to tracks, a subject per unit.

Reads the embedding store only, so filters and pooling can change without encoding again. The class ROIs of Case 1 are
what the user's segmentation says: none is filtered out, and none has a prototype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import descriptors
from pipeline.algorithms.class_rois import merge_slices
from pipeline.algorithms.prototypes import PrototypeConfig, pool
from pipeline.algorithms.rois import RoiConfig, filter_rois, moments
from pipeline.algorithms.tracks import TrackConfig, link
from pipeline.config import StudyConfig
from pipeline.dispatch import Task
from pipeline.keys import SubjectKeys
from storage import tables
from storage.cohort import subject_key
from storage.embeddings import EmbeddingStore, SubjectEmbedding


class NoRoiError(ValueError):
    """No ROI of a subject is left to match."""


@dataclass(frozen=True)
class PrototypeUnit:
    """One subject to pool."""

    subject: str
    signature: dict[str, Any]
    key: str

    @property
    def unit(self) -> str:
        """Name in failure rows."""
        return self.subject


@dataclass(frozen=True)
class Pooled:
    """What one unit wrote."""

    subject: str
    n_rois: int


def plan(root: Path, store: EmbeddingStore, keys: Mapping[str, SubjectKeys]) -> list[PrototypeUnit]:
    """Units of the subjects whose prototypes or ROI table are missing or made otherwise."""
    present = set(tables.part_names(root, "rois"))
    units = []
    for subject, key in keys.items():
        stored = store.prototypes_signature(subject)
        if stored != key.prototypes_signature or subject_key(subject) not in present:
            units.append(PrototypeUnit(subject, key.prototypes_signature, key.prototypes))
    return units


def task(config: StudyConfig, root: Path, store: EmbeddingStore) -> Task:
    """The task of pooling, for `pipeline.dispatch`."""
    return Task("prototypes", partial(_build, config, root, store))


def _build(config: StudyConfig, root: Path, store: EmbeddingStore, device: str) -> Callable[[PrototypeUnit], Pooled]:
    return partial(run_unit, root, store, config.rois, config.prototypes, config.tracks)


def run_unit(
    root: Path,
    store: EmbeddingStore,
    rois: RoiConfig,
    config: PrototypeConfig,
    tracks: TrackConfig,
    unit: PrototypeUnit,
) -> Pooled:
    """Filter, pool and link one subject: its ROI rows first, its prototypes, which mark it done, last.

    Raises:
        NoRoiError: saying how many candidates there were and what took them away.
    """
    embedding = store.read(unit.subject)
    classes = bool(embedding.roi_class.any())
    if classes:
        chosen, pooled = np.arange(len(embedding.roi_class)), np.zeros((0, 0), np.float32)
    else:
        chosen, pooled = _pool_slices(embedding, rois, config)
    if not len(chosen):
        raise NoRoiError(_why_none(embedding))
    roi_slice = embedding.roi_slice[chosen]
    columns = moments(embedding.masks(chosen), roi_slice, embedding.geometry.spacing_mm)
    if classes:
        columns["track"] = np.unique(embedding.roi_class, return_inverse=True)[1].astype(np.int32)
    else:
        columns["track"] = link(roi_slice, columns["centroid_mm"], columns["covariance_mm2"], pooled, tracks)
    rows = _roi_rows(unit, embedding, chosen, columns)
    tables.write_part(root, "rois", subject_key(unit.subject), tables.table_from_rows("rois", rows))
    if classes:
        arrays = _class_arrays(embedding, columns)
    else:
        arrays = {"prototypes": pooled, "roi": chosen.astype(np.int32), **_match_arrays(roi_slice, columns)}
    store.write_prototypes(unit.subject, unit.signature, arrays)
    return Pooled(unit.subject, len(chosen))


def _pool_slices(
    embedding: SubjectEmbedding, rois: RoiConfig, config: PrototypeConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Store rows of the kept ROIs, [N], and their prototypes, float32 [N, C], slice by slice."""
    if embedding.features is None:
        raise ValueError("features were dropped; encode again to pool otherwise")
    rows: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    pooled: list[npt.NDArray[np.float32]] = []
    for z in np.unique(embedding.roi_slice):
        here = np.flatnonzero(embedding.roi_slice == z)
        masks = embedding.masks(here)
        spacing = embedding.geometry.spacing_mm
        kept = filter_rois(masks, embedding.quality[here], embedding.stability[here], spacing, rois)
        if not len(kept):
            continue
        features = np.asarray(embedding.features[int(z)], dtype=np.float32)
        values, valid = pool(features, masks[kept], embedding.extent, embedding.layout, config)
        rows.append(here[kept][valid])
        pooled.append(values[valid])
    chosen = np.concatenate(rows)
    return chosen, np.concatenate(pooled) if pooled else np.zeros((0, 0), np.float32)


def _why_none(embedding: SubjectEmbedding) -> str:
    count = len(embedding.roi_slice)
    if count == 0:
        return "the segmenter found no region in any slice; look at the image's contrast and input settings"
    return f"none of {count} candidate regions passes the filters under rois; look at the area and quality limits"


def remove_stale(root: Path, subjects: Iterable[str], failed: Iterable[str]) -> None:
    """Remove the ROI tables of subjects that left the cohort or whose present image failed."""
    wanted = {subject_key(name) for name in subjects} - {subject_key(name) for name in failed}
    for part in tables.part_names(root, "rois"):
        if part not in wanted:
            tables.remove_part(root, "rois", part)


def similarity(store: EmbeddingStore, subjects: Sequence[str]) -> npt.NDArray[np.float64]:
    """How alike subjects with prototypes are, [N, N]: what `pairs: knn` and its like choose by."""
    if not subjects:
        return np.zeros((0, 0))
    return descriptors.similarity(np.stack([_descriptor(store, subject) for subject in subjects]))


def _descriptor(store: EmbeddingStore, subject: str) -> npt.NDArray[np.float64]:
    found = store.read_prototypes(subject)
    assert found is not None
    return descriptors.describe(found[1]["prototypes"])


def _roi_rows(
    unit: PrototypeUnit,
    embedding: SubjectEmbedding,
    chosen: npt.NDArray[np.int64],
    columns: Mapping[str, npt.NDArray[Any]],
) -> list[dict[str, Any]]:
    """Rows of the ROI table."""
    pixels = embedding.mask_shape[0] * embedding.mask_shape[1]
    return [
        {
            "subject": unit.subject,
            "roi": int(row),
            "slice": int(embedding.roi_slice[row]),
            "track": int(columns["track"][n]),
            "area_px": int(columns["area_px"][n]),
            "area_mm2": float(columns["area_mm2"][n]),
            "area_fraction": float(columns["area_px"][n]) / pixels,
            **{f"centroid_{a}_vox": float(v) for a, v in zip("zyx", columns["centroid_vox"][n], strict=True)},
            **{f"centroid_{a}_mm": float(v) for a, v in zip("zyx", columns["centroid_mm"][n], strict=True)},
            **{f"bbox_{c}": int(v) for c, v in zip(("y0", "x0", "y1", "x1"), columns["bbox"][n], strict=True)},
            "quality": float(embedding.quality[row]),
            "stability": float(embedding.stability[row]),
            "roi_class": int(embedding.roi_class[row]),
            "key": unit.key,
        }
        for n, row in enumerate(chosen)
    ]


def _match_arrays(
    roi_slice: npt.NDArray[np.int32], columns: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    return {
        "slice": roi_slice,
        **{name: columns[name] for name in ("centroid_mm", "area_mm2", "covariance_mm2", "track")},
    }


def _class_arrays(embedding: SubjectEmbedding, columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The classes as ROIs, each standing on the slice in which it is largest."""
    found = merge_slices(embedding.roi_class, embedding.quality, columns["centroid_mm"], columns["area_px"])
    largest = found.largest
    return {
        "prototypes": np.zeros((len(found.value), 0), np.float32),
        "roi": largest.astype(np.int32),
        **_match_arrays(embedding.roi_slice[largest], {name: values[largest] for name, values in columns.items()}),
        "centroid_mm": found.centroid_mm,
        "roi_class": found.value,
        "probability": found.probability,
    }
