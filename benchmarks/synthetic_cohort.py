"""Synthetic subjects for benchmarks of matching and queries, as the prototype stage leaves them.

Features, masks and ROI rows, which neither reads, are left out; the "image" is a file with the subject's name, which a
run only digests. Subjects are noisy copies of one anatomy, a part of whose ROIs each replaces by its own, with the
statistics of M&Ms hearts under the default segmenter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actors.build import segmenter_signature
from pipeline.config import StudyConfig
from pipeline.folder import StudyFolder
from pipeline.inputs import DigestCache, InputDigests, digest_inputs
from pipeline.keys import subject_keys
from storage import tables
from storage.cohort import Cohort, Subject
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry

SPACING_MM = (10.0, 1.25, 1.25)
IN_PLANE = (256, 256)
SHARED = 0.5  # norm of the mean prototype of real ROIs
SPECTRUM = 0.86 ** np.arange(60)  # variance of real prototypes along their principal axes, near enough
COMMON, KINSHIP, STEADY = 0.45, 0.88, 0.97  # share of ROIs from the anatomy; correlation with it; from slice to slice
PLACE_MM, SPREAD_MM = 6.0, 60.0
RADIUS_MM, RADIUS_LOG_SD = 15.0, 0.7


@dataclass(frozen=True)
class Anatomy:
    """ROIs of one slice stack: latent [D, R, L], place [D, R, 2] mm, log radius [D, R]."""

    latent: npt.NDArray[np.float64]
    place: npt.NDArray[np.float64]
    radius: npt.NDArray[np.float64]


def random_anatomy(rng: np.random.Generator, slices: int, rois: int) -> Anatomy:
    """Structures that change slowly from slice to slice."""
    latent = rng.normal(size=(slices, rois, len(SPECTRUM)))
    place, radius = rng.normal(size=(slices, rois, 2)), rng.normal(size=(slices, rois))
    for z in range(1, slices):
        for values in (latent, place, radius):
            values[z] = STEADY * values[z - 1] + np.sqrt(1 - STEADY**2) * values[z]
    return Anatomy(latent, 160 + SPREAD_MM * place, np.log(RADIUS_MM) + RADIUS_LOG_SD * radius)


def subject_arrays(
    rng: np.random.Generator, atlas: Anatomy, axes: npt.NDArray[np.float64], mean: npt.NDArray[np.float64]
) -> dict[str, npt.NDArray[np.generic]]:
    """What the prototype stage writes of one subject."""
    slices, rois = atlas.radius.shape
    own = random_anatomy(rng, slices, rois)
    common = rng.random((slices, rois)) < COMMON
    kin = KINSHIP * atlas.latent + np.sqrt(1 - KINSHIP**2) * rng.normal(size=atlas.latent.shape)
    moved = atlas.place * rng.normal(1, 0.05, 2) + rng.normal(0, 8, 2) + rng.normal(0, PLACE_MM, atlas.place.shape)
    latent = np.where(common[..., None], kin, own.latent) * np.sqrt(SPECTRUM / SPECTRUM.sum() * (1 - SHARED**2))
    place = np.where(common[..., None], moved, own.place).reshape(-1, 2)
    radius = np.exp(np.where(common, atlas.radius + rng.normal(0, 0.1, common.shape), own.radius)).ravel()
    prototypes = mean + latent.reshape(-1, len(SPECTRUM)) @ axes
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    z = np.repeat(np.arange(slices), rois)
    stretch = rng.uniform(0.5, 2, radius.shape)
    return {
        "prototypes": prototypes.astype(np.float32),
        "roi": np.arange(slices * rois, dtype=np.int32),
        "slice": z.astype(np.int32),
        "track": np.tile(np.arange(rois, dtype=np.int32), slices),
        "centroid_mm": np.column_stack([z * SPACING_MM[0], place]),
        "area_mm2": np.pi * radius**2,
        "covariance_mm2": np.column_stack([stretch, np.zeros_like(radius), 1 / stretch]) * radius[:, None] ** 2 / 4,
    }


def write_cohort(config: StudyConfig, out: Path, subjects: int, slices: int, rois: int, channels: int) -> Cohort:
    """A cohort whose embeddings and prototypes are done, in `out/study`."""
    folder, store = StudyFolder(out / "study"), EmbeddingStore(out / "study" / "embeddings.zarr")
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    found = [Subject(f"s{number:05d}", str(images / f"s{number:05d}.txt")) for number in range(subjects)]
    for subject in found:
        Path(subject.image).write_text(subject.subject, encoding="utf-8")
    folder.root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    atlas = random_anatomy(rng, slices, rois)
    basis = np.linalg.qr(rng.normal(size=(channels, len(SPECTRUM) + 1)))[0].T
    geometry = Geometry((slices, *IN_PLANE), SPACING_MM, (0.0, 0.0, 0.0))
    segmenter = segmenter_signature(config.segmenter)
    nothing = (np.zeros((1, 1, 1)), np.zeros((0, *IN_PLANE), bool), np.zeros(0), np.zeros(0))
    digests = digest_inputs(found, DigestCache(folder.root / ".digests.json"))
    for number, (name, digest) in enumerate(digests.items()):
        assert isinstance(digest, InputDigests)
        keys = subject_keys(config, segmenter, digest)
        extent = (float(IN_PLANE[0]), float(IN_PLANE[1]))
        with store.writer(name, keys.encode_signature, geometry, {"blocks": []}, extent, IN_PLANE) as writer:
            for z in range(slices):
                writer.add_slice(z, *nothing)
        arrays = subject_arrays(np.random.default_rng([1, number]), atlas, basis[1:], SHARED * basis[0])
        store.write_prototypes(name, keys.prototypes_signature, arrays)
        tables.write_part(folder.root, "rois", name, tables.table_from_rows("rois", []))
    return Cohort(tuple(found))
