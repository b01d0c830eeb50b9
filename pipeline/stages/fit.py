"""Fit: the displacement field of a few pairs from their matched ROIs, written as transforms, and its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actors.input_config import InputConfig
from pipeline import results
from pipeline.config import StudyConfig
from pipeline.dispatch import Failure, Task, attempt
from pipeline.folder import StudyFolder
from pipeline.keys import PlannedPair
from pipeline.stages.evaluate import WORSE_THAN_AFFINE, Reference, Row, evaluate
from pipeline.stages.refine import Volume, refine
from storage.cohort import Subject
from storage.embeddings import EmbeddingStore, SubjectEmbedding
from storage.geometry import moving_to_fixed
from storage.images import read_image, read_labels, to_uint8
from storage.landmarks import read_landmarks
from storage.transforms import write_transform

if TYPE_CHECKING:  # these load torch, which only a process that fits needs
    from pipeline.algorithms.ddf import FitResult
    from pipeline.algorithms.fit_config import FitConfig
    from pipeline.algorithms.roi_fields import Roi, RoiPair


@dataclass(frozen=True)
class FitUnit:
    """A few pairs of one tile.

    Attributes:
        name: unique among the units.
        part: where the correspondences are.
        subjects: manifest rows of the subjects in `pairs`.
        seconds_match: of each pair; None where the matching was reused.
    """

    name: str
    part: str
    pairs: tuple[PlannedPair, ...]
    subjects: Mapping[str, Subject]
    seconds_match: tuple[float | None, ...]

    @property
    def unit(self) -> str:
        """Name in failure rows."""
        return self.name


@dataclass(frozen=True)
class _PairUnit:
    pair: PlannedPair
    matches: list[dict[str, Any]]
    seconds_match: float | None

    @property
    def unit(self) -> str:
        return self.pair.pair


def task(config: StudyConfig, folder: StudyFolder) -> Task:
    """The task of fitting, for `pipeline.dispatch`."""
    return Task("fit", partial(_build, config.fit, config.input, folder))


def _build(
    config: FitConfig, image_config: InputConfig, folder: StudyFolder, device: str
) -> Callable[[FitUnit], list[list[Row] | Failure]]:
    return partial(run_unit, folder, EmbeddingStore(folder.embeddings), config, image_config)


def run_unit(
    folder: StudyFolder, store: EmbeddingStore, config: FitConfig, image_config: InputConfig, unit: FitUnit
) -> list[list[Row] | Failure]:
    """Fit and evaluate each pair; its metrics rows, or the Failure, of each."""
    names = [pair.pair for pair in unit.pairs]
    matches = results.rows_of(folder.root, "correspondences", unit.part, names)

    @lru_cache(maxsize=2 * len(unit.pairs))
    def reference(name: str) -> Reference:
        return read_reference(store, unit.subjects[name])

    @lru_cache(maxsize=2 * len(unit.pairs))
    def intensities(name: str) -> Volume:
        return read_intensities(unit.subjects[name], image_config)

    def fit_one(item: _PairUnit) -> list[Row]:
        return fit_pair(folder, store, config, item, reference, intensities)

    return [
        attempt(fit_one, _PairUnit(pair, matches[pair.pair], seconds))
        for pair, seconds in zip(unit.pairs, unit.seconds_match, strict=True)
    ]


def read_reference(store: EmbeddingStore, subject: Subject) -> Reference:
    """Labels and landmarks of a subject where the manifest gives them.

    Raises:
        ImageError: naming the file, for labels on another grid among others.
    """
    geometry = store.read(subject.subject).geometry
    labels = read_labels(subject.label, geometry) if subject.label else None
    landmarks = read_landmarks(subject.landmarks, geometry) if subject.landmarks else None
    return Reference(geometry, labels, landmarks)


def read_intensities(subject: Subject, config: InputConfig) -> Volume:
    """Intensities of a subject as its segmenter saw them, float32 [D, H, W] 0..255; of RGB the mean channel.

    Raises:
        ImageError: for an image that cannot be used.
    """
    shown = to_uint8(read_image(subject.image, config.slice_axis), config.percentiles, config.window)
    return np.asarray(shown.mean(axis=3, dtype=np.float32))


def fit_pair(
    folder: StudyFolder,
    store: EmbeddingStore,
    config: FitConfig,
    item: _PairUnit,
    reference: Callable[[str], Reference],
    intensities: Callable[[str], Volume],
) -> list[Row]:
    """Fit one pair, refine it if asked to, write its transform, and return its metrics rows."""
    from pipeline.algorithms.ddf import fit_ddf

    pair = item.pair
    fixed, moving = store.read(pair.fixed), store.read(pair.moving)
    known_fixed, known_moving = reference(pair.fixed), reference(pair.moving)
    start = time.perf_counter()
    spaces = (
        fixed.geometry.spacing_mm,
        moving.geometry.spacing_mm,
        moving_to_fixed(fixed.geometry, moving.geometry),
    )
    result = fit_ddf(roi_pairs(fixed, moving, item.matches), fixed.geometry.shape, *spaces, config)
    seconds = time.perf_counter() - start
    refined, seconds_refine = None, None
    if config.refine.method != "none":
        here, there = intensities(pair.fixed), intensities(pair.moving)
        start = time.perf_counter()
        refined = refine(here, there, result.ddf, *spaces, config.refine)
        seconds_refine = time.perf_counter() - start
    rows = evaluate(known_fixed, known_moving, result, refined)
    signature = {"pair": pair.pair, "moving": pair.moving, "fixed": pair.fixed, "key": pair.fit_key}
    written = result.ddf if refined is None else refined
    write_transform(folder.transform(pair.pair), written, fixed.geometry, signature, moving.geometry)
    shared = {
        "pair": pair.pair,
        "moving": pair.moving,
        "fixed": pair.fixed,
        "n_rois": len(item.matches),
        "n_slices": len({row["fixed_slice"] for row in item.matches}),
        "fallback": result.fallback,
        "flag": _flag(rows[0], result),
        "seconds_match": item.seconds_match,
        "seconds_fit": seconds,
        "seconds_refine": seconds_refine,
        "key": pair.fit_key,
    }
    return [{**row, **shared} for row in rows]


def roi_pairs(fixed: SubjectEmbedding, moving: SubjectEmbedding, matches: list[dict[str, Any]]) -> list[RoiPair]:
    """Matched ROIs as crops of their slices, weighted by confidence."""
    from pipeline.algorithms.roi_fields import RoiPair

    here = _rois(fixed, [row["fixed_roi"] for row in matches])
    there = _rois(moving, [row["moving_roi"] for row in matches])
    return [RoiPair(here[row["fixed_roi"]], there[row["moving_roi"]], float(row["confidence"])) for row in matches]


def _rois(embedding: SubjectEmbedding, rows: list[int]) -> dict[int, Roi]:
    wanted = sorted(set(rows))
    masks = embedding.masks(wanted)
    return {row: _crop(mask, int(embedding.roi_slice[row])) for row, mask in zip(wanted, masks, strict=True)}


def _crop(mask: npt.NDArray[np.bool_], z: int) -> Roi:
    """The mask [H, W] as a slab of slice z, cut to its bounding box."""
    from pipeline.algorithms.roi_fields import Roi

    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[None, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return Roi(box.copy(), (z, int(ys[0]), int(xs[0])))  # a view would keep every whole mask in memory


def _flag(mean: Row, result: FitResult) -> str:
    """What to look at: a fallback, or a final Dice that falls behind the affine one."""
    flags = [] if result.fallback == "none" else [f"fallback_{result.fallback}"]
    if mean.get("dice") is not None and mean["dice"] < mean["dice_affine"] - WORSE_THAN_AFFINE:
        flags.append("worse_than_affine")
    return " ".join(flags)
