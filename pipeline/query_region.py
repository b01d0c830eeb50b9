"""What a query asks for: the region that a point, a box or a label points out on one subject, slice by slice.

With a SAM backend the decoder is prompted on the stored features. Otherwise, and where the features were dropped, the
region is made of stored ROIs. A region found in one slice goes on through the others along its track.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from actors.sam_config import SamConfig
from actors.segmenter import Candidates, Features
from pipeline.algorithms.prototypes import pool
from pipeline.algorithms.query import region_at_point
from pipeline.algorithms.rois import moments
from pipeline.config import StudyConfig
from pipeline.errors import UsageError
from storage.cohort import Subject
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry
from storage.images import read_image, read_labels, to_uint8
from storage.landmarks import voxels_to_local, world_to_local
from storage.signature import SignatureMismatch, check_signature

if TYPE_CHECKING:
    from actors.sam import SamSegmenter

Kind = Literal["point", "point-mm", "box", "label"]
Masks = npt.NDArray[np.bool_]
_LEAST_IOU = {"box": 0.3, "label": 0.4, "prompt": 0.5}


@dataclass(frozen=True)
class Seed:
    """What was pointed at.

    Attributes:
        kind: how.
        values: voxel of the file (i, j, k), world position (x, y, z) mm LPS, two opposite voxels of a box, or a label.
    """

    kind: Kind
    values: tuple[float, ...]

    @property
    def name(self) -> str:
        """For file names: `point-10-20-3`."""
        return "-".join([self.kind, *(f"{value:.12g}" for value in self.values)])


@dataclass(frozen=True)
class Region:
    """A region of one subject, one mask per slice.

    Attributes:
        slices: int32 [q], ascending.
        masks: bool [q, H, W].
        prototypes: float32 [q, C], unit norm.
        centroid_mm, covariance_mm2: float64 [q, 3], see `pipeline.algorithms.rois.moments`.
        area_mm2: float64 [q].
    """

    slices: npt.NDArray[np.int32]
    masks: Masks
    prototypes: npt.NDArray[np.float32]
    centroid_mm: npt.NDArray[np.float64]
    covariance_mm2: npt.NDArray[np.float64]
    area_mm2: npt.NDArray[np.float64]


class RegionFinder:
    """Finds regions on one subject of a store.

    Args:
        store: of the study.
        config: of the study.
        subject: its row of the manifest.
        prompt: whether a SAM backend may be prompted.
    """

    def __init__(self, store: EmbeddingStore, config: StudyConfig, subject: Subject, prompt: bool = True) -> None:
        self.subject, self._config = subject, config
        self._stored = store.read(subject.subject)
        self.geometry: Geometry = self._stored.geometry
        found = store.read_prototypes(subject.subject)
        assert found is not None
        self._arrays = found[1]
        self._prompts = prompt and isinstance(config.segmenter, SamConfig) and self._stored.features is not None

    def find(self, seed: Seed) -> Region:
        """The region of a seed.

        Raises:
            UsageError: for a seed outside the image, a subject without labels, a place where there is no ROI, or
                SAM weights that are not those of the stored features.
            ImageError: for labels, or an image that HQ-SAM needs, which cannot be read.
        """
        region = {
            "point": self._at_point,
            "point-mm": self._at_point,
            "box": self._in_box,
            "label": self._of_label,
        }[seed.kind](seed)
        if not len(region.slices):
            raise UsageError(f"the region lies in no slice of {self.subject.subject!r} that can be described")
        return region

    def _of_label(self, seed: Seed) -> Region:
        name, value = self.subject.subject, int(seed.values[0])
        if not self.subject.label:
            raise UsageError(f"--label {value}: the manifest has no label map of {name!r}; give --point or --box")
        labels = read_labels(self.subject.label, self.geometry)
        slices = np.flatnonzero((labels == value).any(axis=(1, 2)))
        if not len(slices) or value == 0:
            known = ", ".join(str(v) for v in np.unique(labels) if v)
            raise UsageError(f"--label {value}: {name!r} has no such label; it has {known}")
        masks = labels[slices] == value
        if self._stored.features is not None:
            return self._describe(slices, masks)
        return self._stored_rois([self._like(int(z), mask, "label") for z, mask in zip(slices, masks, strict=True)])

    def _at_point(self, seed: Seed) -> Region:
        z, y, x = self._voxels(seed, np.array([seed.values]))[0]
        if self._prompts:
            return self._along_track(z, self._prompted([z], points=[(x + 0.5, y + 0.5)]))
        rows = self._rows(z)
        masks = self._masks(rows)
        inside = np.flatnonzero(masks[:, y, x]) if len(rows) else rows[:0]
        if not len(inside):
            raise UsageError(f"no ROI of {self.subject.subject!r} holds this point; try a point nearby, or --box")
        rows = rows[inside]
        quality = self._stored.quality[self._arrays["roi"][rows]]
        place = np.array([y, x]) * np.asarray(self.geometry.spacing_mm[1:])
        best = region_at_point(self._arrays["centroid_mm"][rows, 1:], self._arrays["area_mm2"][rows], quality, place)
        return self._stored_rois(self._track(int(rows[best])))

    def _in_box(self, seed: Seed) -> Region:
        corners = np.sort(self._voxels(seed, np.array(seed.values).reshape(2, -1)), axis=0)
        (z0, y0, x0), (z1, y1, x1) = corners.tolist()
        slices = list(range(z0, z1 + 1))
        if self._prompts:
            return self._prompted(slices, boxes=[(x0, y0, x1 + 1, y1 + 1)] * len(slices))
        region = self._stored_rois([self._fitting(z, (y0, x0, y1 + 1, x1 + 1)) for z in slices])
        if not len(region.slices):
            raise UsageError(f"no ROI of {self.subject.subject!r} fills this box; fit it closely, or give --point")
        return region

    def _voxels(self, seed: Seed, positions: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Voxels (z, y, x) in analysis orientation of positions of the file [n, 2 or 3]."""
        dimension = self.geometry.source_dimension
        if positions.shape[1] != dimension:
            axes = ", ".join("xyz" if seed.kind == "point-mm" else "ijk")[: 3 * dimension - 2]
            raise UsageError(f"--{seed.kind}: this image has {dimension} axes; expected {axes} of each point or corner")
        full = np.pad(positions.astype(np.float64), ((0, 0), (0, 3 - dimension)))
        local = (world_to_local if seed.kind == "point-mm" else voxels_to_local)(full, self.geometry)
        voxels = np.rint(local / np.asarray(self.geometry.spacing_mm)).astype(np.int64)
        if ((voxels < 0) | (voxels >= self.geometry.shape)).any():
            shown = ",".join(f"{v:g}" for v in seed.values)
            raise UsageError(f"--{seed.kind} {shown} is outside the image, {self.geometry.describe()}")
        return np.asarray(voxels)

    def _rows(self, z: int) -> npt.NDArray[np.int64]:
        return np.asarray(np.flatnonzero(self._arrays["slice"] == z), np.int64)

    def _masks(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Masks:
        return self._stored.masks(self._arrays["roi"][np.asarray(rows, np.int64)])

    def _like(self, z: int, mask: Masks, kind: str) -> int | None:
        """The stored ROI of a slice that overlaps a mask [H, W] best, if well enough."""
        rows = self._rows(z)
        if not len(rows):
            return None
        masks = self._masks(rows)
        overlap = (masks & mask).sum(axis=(1, 2)) / (masks | mask).sum(axis=(1, 2))
        return int(rows[overlap.argmax()]) if overlap.max() >= _LEAST_IOU[kind] else None

    def _fitting(self, z: int, box: tuple[int, int, int, int]) -> int | None:
        """The stored ROI of a slice whose bounding box overlaps a box (y0, x0, y1, x1) best, if well enough."""
        rows = self._rows(z)
        if not len(rows):
            return None
        boxes = moments(self._masks(rows), self._arrays["slice"][rows], self.geometry.spacing_mm)["bbox"]
        sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
        both = sides.clip(0).prod(axis=1)
        area, own = ((corners[..., 2:] - corners[..., :2]).prod(axis=-1) for corners in (boxes, np.array(box)))
        overlap = both / (area + own - both)
        return int(rows[overlap.argmax()]) if overlap.max() >= _LEAST_IOU["box"] else None

    def _track(self, row: int) -> list[int]:
        return [int(n) for n in np.flatnonzero(self._arrays["track"] == self._arrays["track"][row])]

    def _stored_rois(self, rows: Sequence[int | None]) -> Region:
        chosen = np.array([row for row in rows if row is not None], np.int64)
        columns = (self._arrays[name][chosen] for name in ("prototypes", "centroid_mm", "covariance_mm2", "area_mm2"))
        return Region(self._arrays["slice"][chosen], self._masks(chosen), *columns)

    def _describe(self, slices: npt.NDArray[np.int64], masks: Masks) -> Region:
        """Pool the stored features over masks, one per slice; those too small for it are left out."""
        features = self._stored.features
        assert features is not None
        pooled, valid = [], []
        for z, mask in zip(slices.tolist(), masks, strict=True):
            values = np.asarray(features[z], dtype=np.float32)
            settings = self._config.prototypes
            one, fits = pool(values, mask[None], self._stored.extent, self._stored.layout, settings)
            pooled.append(one[0])
            valid.append(bool(fits[0]))
        kept = np.array(valid, bool)
        columns = moments(masks[kept], slices[kept], self.geometry.spacing_mm)
        places = (columns[name] for name in ("centroid_mm", "covariance_mm2", "area_mm2"))
        return Region(slices[kept].astype(np.int32), masks[kept], np.stack(pooled)[kept], *places)

    def _prompted(self, slices: list[int], **prompts: Any) -> Region:
        """The masks that the decoder gives for a prompt in each slice; empty ones are left out."""
        segmenter = self._sam()
        assert self._stored.features is not None
        values = np.stack([np.asarray(self._stored.features[z], np.float32) for z in slices])
        pictures = self._pictures(slices, segmenter.decoder.high_quality)
        found = segmenter.prompt(pictures, Features(values, self._stored.extent), **prompts)
        masks = np.stack([_surest(candidates) for candidates in found])
        some = masks.any(axis=(1, 2))
        if not some.any():
            raise UsageError("SAM finds no region there; move the point or box, or choose a stored ROI with --stored")
        return self._describe(np.array(slices)[some], masks[some])

    def _sam(self) -> SamSegmenter:
        """The segmenter that the stored features are of.

        Raises:
            UsageError: when its weights or settings are others now.
        """
        from actors.sam import SamSegmenter

        assert isinstance(self._config.segmenter, SamConfig)
        segmenter = SamSegmenter(self._config.segmenter)
        try:
            check_signature(
                f"embedding of {self.subject.subject!r}", self._stored.signature["segmenter"], segmenter.signature
            )
        except SignatureMismatch as error:
            raise UsageError(
                f"{error}. Put the study's weights back, or choose among the stored ROIs with --stored"
            ) from None
        return segmenter

    def _pictures(self, slices: list[int], needed: bool) -> npt.NDArray[np.uint8]:
        """Slices uint8 [n, H, W, 3] of the image; of no content where nothing looks at it."""
        if not needed:
            return np.zeros((len(slices), *self._stored.mask_shape, 3), np.uint8)
        settings = self._config.input
        image = read_image(self.subject.image, settings.slice_axis)
        return to_uint8(image, settings.percentiles, settings.window)[slices]

    def _along_track(self, z: int, region: Region) -> Region:
        """A prompted mask of slice z, with the track of the stored ROI most like it in the other slices."""
        row = self._like(z, region.masks[0], "prompt") if len(region.slices) else None
        if row is None:
            return region
        rest = self._stored_rois([n for n in self._track(row) if self._arrays["slice"][n] != z])
        both = {name: np.concatenate([value, getattr(rest, name)]) for name, value in vars(region).items()}
        order = np.argsort(both["slices"])
        return Region(**{name: value[order] for name, value in both.items()})


def _surest(candidates: Candidates) -> Masks:
    """The mask [H, W] of the highest predicted IoU."""
    best: Masks = candidates.masks[int(candidates.quality.argmax())]
    return best
