# mypy: disable-error-code="no-untyped-call"
"""What the pictures of one pair need, as arrays: one slice of every image, the matched ROIs, the field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from pipeline.algorithms import warp
from pipeline.folder import StudyFolder
from pipeline.report_data import ReportData
from pipeline.results import rows_of
from pipeline.slice_drawing import Grey, grey_of, read_encoded
from storage.cohort import Subject
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry, moving_to_fixed
from storage.images import Image, ImageError, read_labels
from storage.transforms import TransformError, read_ddf

Labels = npt.NDArray[np.int32]

SHOWN_ROIS = 8


@dataclass(frozen=True)
class PairView:
    """One slice of a registered pair.

    Attributes:
        fixed, moving: grey 0..1, [H, W] and [h, w]; the slices that share most matched ROIs.
        before, moved: grey 0..1 [H, W], the moving image on the fixed slice without and with the field.
        fixed_labels, before_labels, moved_labels: int32 [H, W], or None.
        rois: (fixed mask [H, W], moving mask [h, w]) of the first matched ROI pairs of these slices.
        sampled: float64 [2, H, W], row and column (fixed pixels) where each fixed pixel is taken from.
        shift_mm: float64 [H, W], length of the displacement.
        fixed_slice, moving_slice: indices.
        aspect, moving_aspect: height over width of a fixed and of a moving pixel.
    """

    fixed: Grey
    moving: Grey
    before: Grey
    moved: Grey
    fixed_labels: Labels | None
    before_labels: Labels | None
    moved_labels: Labels | None
    rois: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]
    sampled: npt.NDArray[np.float64]
    shift_mm: npt.NDArray[np.float64]
    unit: str
    fixed_slice: int
    moving_slice: int
    aspect: float
    moving_aspect: float


class NoPictureError(ValueError):
    """The pictures of a pair cannot be made; the message says why."""


def read_pair_view(data: ReportData, row: Mapping[str, Any]) -> PairView:
    """Read images, ROI masks and field of a pair of a study.

    Args:
        row: its `pair`, `moving` and `fixed`.

    Raises:
        NoPictureError: when an image, the transform or a subject's embedding cannot be read.
    """
    pair = row["pair"]
    try:
        fixed_subject, moving_subject = data.subjects[row["fixed"]], data.subjects[row["moving"]]
    except KeyError as error:
        raise NoPictureError(f"the images of subject {error} are not known; give the manifest with --cohort") from None
    folder = StudyFolder(data.root)
    store = EmbeddingStore(folder.embeddings)
    try:
        fixed, moving = read_encoded(store, fixed_subject), read_encoded(store, moving_subject)
        ddf = read_ddf(folder.transform(pair), fixed.geometry, moving.geometry)
        labels = [_read_labels(fixed_subject, fixed.geometry), _read_labels(moving_subject, moving.geometry)]
    except OSError as error:
        raise NoPictureError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None
    except (ImageError, TransformError) as error:
        raise NoPictureError(str(error)) from None
    matches = read_matches_of(data, pair)
    fixed_slice, moving_slice, chosen = choose_slices(matches, fixed.geometry, moving.geometry)
    rois = _masks(store, row["fixed"], row["moving"], chosen)
    return make_view(fixed, moving, ddf, labels[0], labels[1], rois, (fixed_slice, moving_slice))


def read_matches_of(data: ReportData, pair: str) -> list[dict[str, Any]]:
    """The correspondences of one pair, from the one part that holds them."""
    known = data.matches.pairs
    parts = known.filter(pc.equal(known.column("pair"), pair)).column("part").to_pylist()
    return rows_of(data.root, "correspondences", parts[0], [pair])[pair] if parts else []


def choose_slices(
    matches: list[dict[str, Any]], fixed: Geometry, moving: Geometry
) -> tuple[int, int, list[dict[str, Any]]]:
    """(fixed slice, moving slice, their first matches): those of the middle half that share most.

    Without matches there, any slices; without any, the middle ones. End slices often match by background alone.
    """
    if not matches:
        return fixed.shape[0] // 2, moving.shape[0] // 2, []
    middle = [m for m in matches if abs(m["fixed_slice"] - (fixed.shape[0] - 1) / 2) <= fixed.shape[0] / 4]
    shared = Counter((m["fixed_slice"], m["moving_slice"]) for m in middle or matches)
    z, w = min(shared, key=lambda slices: (-shared[slices], slices))
    here = [m for m in matches if (m["fixed_slice"], m["moving_slice"]) == (z, w)]
    return z, w, sorted(here, key=lambda m: m["rank"])[:SHOWN_ROIS]


def make_view(
    fixed: Image,
    moving: Image,
    ddf: npt.NDArray[np.float32],
    fixed_labels: Labels | None,
    moving_labels: Labels | None,
    rois: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]],
    slices: tuple[int, int],
) -> PairView:
    """Cut the slices out of two images and warp one onto the other; ddf float32 [3, D, H, W] mm."""
    z, w = slices
    here, there = grey_of(fixed), grey_of(moving)
    spacing, between = fixed.geometry.spacing_mm, moving_to_fixed(fixed.geometry, moving.geometry)

    def onto_fixed(field: npt.NDArray[np.float32]) -> tuple[Grey, Labels | None]:
        indices = warp.moving_indices(field, spacing, between, moving.geometry.spacing_mm)[:, z : z + 1]
        carried = None if moving_labels is None else warp.warp_labels(moving_labels, indices)[0]
        return warp.warp_image(there, indices)[0], carried

    (before, before_labels), (moved, moved_labels) = onto_fixed(np.zeros_like(ddf)), onto_fixed(ddf)
    shift = ddf[:, z].astype(np.float64)
    pixels = np.indices(fixed.geometry.shape[1:], dtype=np.float64)
    return PairView(
        fixed=here[z],
        moving=there[w],
        before=before,
        moved=moved,
        fixed_labels=None if fixed_labels is None else fixed_labels[z],
        before_labels=before_labels,
        moved_labels=moved_labels,
        rois=rois,
        sampled=pixels + shift[1:] / np.asarray(spacing[1:])[:, None, None],
        shift_mm=np.linalg.norm(shift, axis=0),
        unit="mm" if fixed.geometry.has_spacing else "px",
        fixed_slice=z,
        moving_slice=w,
        aspect=spacing[1] / spacing[2],
        moving_aspect=moving.geometry.spacing_mm[1] / moving.geometry.spacing_mm[2],
    )


def _read_labels(subject: Subject, geometry: Geometry) -> Labels | None:
    return read_labels(subject.label, geometry) if subject.label else None


def _masks(
    store: EmbeddingStore, fixed: str, moving: str, matches: list[Mapping[str, Any]] | list[dict[str, Any]]
) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    if not matches:
        return []
    here = store.read(fixed).masks([m["fixed_roi"] for m in matches])
    there = store.read(moving).masks([m["moving_roi"] for m in matches])
    return list(zip(here, there, strict=True))
