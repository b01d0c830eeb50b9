# mypy: disable-error-code="no-untyped-call"
"""The arrays of one subject in the embedding store: how they are written slice by slice and read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from storage.atomic import named_error
from storage.columns import create_column
from storage.geometry import Geometry

_MASK_ROWS = 64
_FLUSH_ROWS = 8 * _MASK_ROWS


@dataclass(frozen=True)
class SubjectEmbedding:
    """What the store holds of one subject.

    Attributes:
        geometry: grid of the image the masks lie on.
        signature: everything the content depends on.
        layout: feature blocks, see actors/segmenter.py.
        extent: rows and columns of the feature grid that the image covers, in cells.
        features: Zarr array float16 [D, C, h, w], read lazily; None after `drop_features`.
        roi_slice: int32 [N], slice of each ROI, in the order the slices were added.
        quality: float32 [N].
        stability: float32 [N].
        roi_class: int32 [N], class that a ROI is one slice of; 0 for a candidate ROI, which has none.
        mask_shape: (H, W).
    """

    geometry: Geometry
    signature: dict[str, Any]
    layout: dict[str, Any]
    extent: tuple[float, float]
    features: zarr.Array[Any] | None
    roi_slice: npt.NDArray[np.int32]
    quality: npt.NDArray[np.float32]
    stability: npt.NDArray[np.float32]
    roi_class: npt.NDArray[np.int32]
    mask_shape: tuple[int, int]
    packed: zarr.Array[Any]

    def masks(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None) -> npt.NDArray[np.bool_]:
        """ROI masks bool [n, H, W]: all, or those of the given row numbers in that order."""
        if rows is None:
            packed = self.packed[:]
        else:
            wanted = np.asarray(rows, dtype=np.int64)
            packed = self.packed.oindex[wanted, :] if len(wanted) else self.packed[:0]
        height, width = self.mask_shape
        bits = np.unpackbits(np.asarray(packed, dtype=np.uint8), axis=1, count=height * width)
        return bits.view(np.bool_).reshape(-1, height, width)


@dataclass
class SubjectWriter:
    """Adds the slices of one subject, in any order, each once; made by `EmbeddingStore.writer`."""

    group: zarr.Group
    folder: Path
    depth: int
    mask_shape: tuple[int, int]
    _added: set[int] = field(default_factory=set)
    _pending: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    _columns: dict[str, list[npt.NDArray[Any]]] = field(
        default_factory=lambda: {"roi_slice": [], "quality": [], "stability": [], "roi_class": []}
    )

    def add_slice(
        self,
        z: int,
        features: npt.NDArray[np.floating[Any]],
        masks: npt.NDArray[np.bool_],
        quality: npt.NDArray[np.floating[Any]],
        stability: npt.NDArray[np.floating[Any]],
        roi_class: npt.NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """Store one slice.

        Args:
            z: slice index, 0..D-1.
            features: float [C, h, w], finite in float16; the same shape for every slice.
            masks: bool [n, H, W], n may be 0.
            quality: [n].
            stability: [n].
            roi_class: [n], class of each; None for candidate ROIs, which have none.

        Raises:
            ValueError: for a slice added twice or out of range, shapes that disagree, values beyond float16.
            OSError: naming the store, for example when the disk is full.
        """
        classes = np.zeros(len(masks), np.int32) if roi_class is None else np.asarray(roi_class, np.int32)
        self._check(z, masks, quality, stability, classes)
        with np.errstate(over="ignore"):
            half = np.asarray(features, dtype=np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"features of slice {z} hold NaN or exceed float16 (largest {np.abs(features).max()})")
        try:
            if not self._added:
                self._create_arrays(half.shape)
            stored = self._array("features")
            if stored.shape[1:] != half.shape:
                raise ValueError(f"features of slice {z} are {half.shape}, earlier slices {stored.shape[1:]}")
            stored[z] = half
            self._pending.append(np.packbits(masks.reshape(len(masks), masks.shape[1] * masks.shape[2]), axis=1))
            if sum(len(rows) for rows in self._pending) >= _FLUSH_ROWS:
                self._flush(final=False)
        except OSError as error:
            raise named_error(error, self.folder) from error.__cause__
        self._added.add(z)
        self._columns["roi_slice"].append(np.full(len(masks), z, np.int32))
        self._columns["quality"].append(np.asarray(quality, np.float32))
        self._columns["stability"].append(np.asarray(stability, np.float32))
        self._columns["roi_class"].append(classes)

    def finish(self) -> None:
        """Write what is left.

        Raises:
            ValueError: naming the slices never added.
        """
        missing = sorted(set(range(self.depth)) - self._added)
        if missing:
            raise ValueError(f"embedding is not whole: slices {missing} of {self.depth} were not added")
        self._flush(final=True)
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        if not columns["roi_class"].any():
            del columns["roi_class"]
        for name, values in columns.items():
            create_column(self.group, name, values)

    def _check(self, z: int, masks: npt.NDArray[Any], *columns: npt.NDArray[Any]) -> None:
        if not 0 <= z < self.depth:
            raise ValueError(f"slice {z} is outside 0..{self.depth - 1}")
        if z in self._added:
            raise ValueError(f"slice {z} was added before")
        if masks.dtype != np.bool_ or masks.shape[1:] != self.mask_shape:
            raise ValueError(f"masks must be bool [n, {self.mask_shape}], got {masks.dtype} {masks.shape}")
        if any(column.shape != (len(masks),) for column in columns):
            raise ValueError(
                f"slice {z}: {len(masks)} masks but {[c.shape for c in columns]} quality, stability and class"
            )

    def _array(self, name: str) -> zarr.Array[Any]:
        return cast("zarr.Array[Any]", self.group[name])

    def _create_arrays(self, feature_shape: tuple[int, ...]) -> None:
        self.group.create_array(
            "features",
            shape=(self.depth, *feature_shape),
            chunks=(1, *feature_shape),
            dtype="float16",
            compressors=BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2),
        )
        row_bytes = -(-self.mask_shape[0] * self.mask_shape[1] // 8)
        self.group.create_array(
            "masks",
            shape=(0, row_bytes),
            chunks=(_MASK_ROWS, row_bytes),
            dtype="uint8",
            compressors=ZstdCodec(level=3),
        )

    def _flush(self, *, final: bool) -> None:
        rows = np.concatenate(self._pending)
        count = len(rows) if final else len(rows) // _MASK_ROWS * _MASK_ROWS
        array = self._array("masks")
        start = array.shape[0]
        if count:
            array.resize((start + count, array.shape[1]))
            array[start:] = rows[:count]
        self._pending = [rows[count:]]
