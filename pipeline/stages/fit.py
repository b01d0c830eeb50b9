"""Fit: the displacement field of a few pairs from their matched ROIs, written as transforms, and its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actors.input_config import InputConfig
from pipeline import results
from pipeline.algorithms.metrics import log_jacobian
from pipeline.algorithms.warp import affine_ddf
from pipeline.config import StudyConfig
from pipeline.dispatch import Failure, Task, attempt
from pipeline.folder import StudyFolder
from pipeline.keys import PlannedPair
from pipeline.stages.evaluate import WORSE_THAN_AFFINE, Reference, Row, evaluate
from pipeline.stages.inverse import Inverted, invert_transform, without_folds
from pipeline.stages.refine import Volume, refine
from storage.cohort import Subject
from storage.embeddings import EmbeddingStore, SubjectEmbedding
from storage.geometry import Geometry, moving_to_fixed
from storage.images import read_image, read_labels, to_uint8
from storage.landmarks import read_landmarks
from storage.transforms import make_transform, read_transform, write_transform
from storage.warping import from_analysis, write_image

if TYPE_CHECKING:  # these load torch, which only a process that fits needs
    from pipeline.algorithms.ddf import FitResult
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
    return Task("fit", partial(_build, config, folder))


def _build(config: StudyConfig, folder: StudyFolder, device: str) -> Callable[[FitUnit], list[list[Row] | Failure]]:
    return partial(run_unit, folder, EmbeddingStore(folder.embeddings), config)


def run_unit(
    folder: StudyFolder, store: EmbeddingStore, config: StudyConfig, unit: FitUnit
) -> list[list[Row] | Failure]:
    """Fit and evaluate each pair; its metrics rows, or the Failure, of each."""
    names = [pair.pair for pair in unit.pairs]
    matches = results.rows_of(folder.root, "correspondences", unit.part, names)

    @lru_cache(maxsize=2 * len(unit.pairs))
    def reference(name: str) -> Reference:
        return read_reference(store, unit.subjects[name])

    @lru_cache(maxsize=2 * len(unit.pairs))
    def intensities(name: str) -> Volume:
        return read_intensities(unit.subjects[name], config.input)

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
    geometry = store.geometry(subject.subject)
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
    config: StudyConfig,
    item: _PairUnit,
    reference: Callable[[str], Reference],
    intensities: Callable[[str], Volume],
) -> list[Row]:
    """Fit one pair, refine it if asked to, write its transform, and return its metrics rows."""
    from pipeline.algorithms.ddf import fit_ddf
    from pipeline.algorithms.pseudo_rois import Grids, held_out_columns

    pair = item.pair
    fixed, moving = store.read(pair.fixed), store.read(pair.moving)
    known_fixed, known_moving = reference(pair.fixed), reference(pair.moving)
    here, there = fixed.geometry, moving.geometry
    grids = (here.shape, here.spacing_mm, there.spacing_mm, moving_to_fixed(here, there))

    def fit(pairs: list[RoiPair]) -> FitResult:
        return fit_ddf(pairs, *grids, config.fit)

    start = time.perf_counter()
    rois = roi_pairs(fixed, moving, item.matches)
    result = fit(rois)
    seconds = time.perf_counter() - start
    refined, seconds_refine = None, None
    if config.fit.refine.method != "none":
        volumes = intensities(pair.fixed), intensities(pair.moving)
        start = time.perf_counter()
        refined = refine(*volumes, result.ddf, grids[1], grids[2], grids[3], config.fit.refine)
        if config.fit.diffeomorphic:
            refined, damped = without_folds(refined, result.affine, here.spacing_mm)
            result = replace(result, damped=result.damped or damped)
        seconds_refine = time.perf_counter() - start
    rows = evaluate(known_fixed, known_moving, result, refined, rois)
    inverted = _write(folder, config, pair, result, refined, here, there)
    shared = {
        "pair": pair.pair,
        "moving": pair.moving,
        "fixed": pair.fixed,
        "n_rois": len(item.matches),
        "n_slices": len({z for pair in rois for z in _slices(pair.fixed)}),
        "fallback": result.fallback,
        "flag": _flag(rows[0], result, labels_in_fit(item.matches, rois, known_fixed, known_moving), inverted),
        **held_out_columns(rois, fit, Grids(*grids), config.evaluate.pseudo_folds, here.has_spacing),
        "seconds_match": item.seconds_match,
        "seconds_fit": seconds,
        "seconds_refine": seconds_refine,
        **(inverted.columns if inverted else {}),
        "key": pair.fit_key,
    }
    return [{**row, **shared} for row in rows]


def _write(
    folder: StudyFolder,
    config: StudyConfig,
    pair: PlannedPair,
    result: FitResult,
    refined: Volume | None,
    here: Geometry,
    there: Geometry,
) -> Inverted | None:
    """Write the files of a pair where they are kept, and check and invert its field if asked to."""
    outputs = config.outputs() if folder.keep_transforms else ()
    paths = {name: folder.output(name, pair.pair) for name in outputs}
    signature = {"pair": pair.pair, "moving": pair.moving, "fixed": pair.fixed, "key": pair.fit_key}
    field = (result.affine, result.lattice, result.step_mm, here)
    if refined is not None:
        lattice = refined - affine_ddf(result.affine, here.shape, here.spacing_mm)
        field = (result.affine, lattice, here.spacing_mm, here)
    if "transforms" in paths:
        write_transform(paths["transforms"], *field, signature, there)
    if "jacobians" in paths:
        logarithm = log_jacobian(result.ddf if refined is None else refined, here.spacing_mm)
        write_image(from_analysis(logarithm.astype(np.float32), here), paths["jacobians"])
    if not config.fit.diffeomorphic:
        return None
    stored = read_transform(paths["transforms"]) if paths else make_transform(*field, there)
    exchanged = {**signature, "moving": pair.fixed, "fixed": pair.moving}
    return invert_transform(stored, here, there, paths.get("inverses"), exchanged)


def roi_pairs(fixed: SubjectEmbedding, moving: SubjectEmbedding, matches: list[dict[str, Any]]) -> list[RoiPair]:
    """Matched ROIs as crops of their slices, or of all slices of a class, weighted by confidence."""
    from pipeline.algorithms.roi_fields import RoiPair

    here = _rois(fixed, [row["fixed_roi"] for row in matches])
    there = _rois(moving, [row["moving_roi"] for row in matches])
    return [RoiPair(here[row["fixed_roi"]], there[row["moving_roi"]], float(row["confidence"])) for row in matches]


def _rois(embedding: SubjectEmbedding, rows: list[int]) -> dict[int, Roi]:
    wanted = sorted(set(rows))
    if embedding.roi_class.any():
        return {row: _class_roi(embedding, int(embedding.roi_class[row])) for row in wanted}
    masks = embedding.masks(wanted)
    return {row: _crop(mask[None], int(embedding.roi_slice[row])) for row, mask in zip(wanted, masks, strict=True)}


def _class_roi(embedding: SubjectEmbedding, value: int) -> Roi:
    """All slices of a class as one ROI."""
    rows = np.flatnonzero(embedding.roi_class == value)
    slices = embedding.roi_slice[rows]
    volume = np.zeros((slices.max() - slices.min() + 1, *embedding.mask_shape), bool)
    volume[slices - slices.min()] = embedding.masks(rows)
    return _crop(volume, int(slices.min()))


def _crop(mask: npt.NDArray[np.bool_], z: int) -> Roi:
    """The mask [d, H, W] from slice z on, cut to its bounding box in plane."""
    from pipeline.algorithms.roi_fields import Roi

    ys, xs = np.flatnonzero(mask.any(axis=(0, 2))), np.flatnonzero(mask.any(axis=(0, 1)))
    box = mask[:, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return Roi(box.copy(), (z, int(ys[0]), int(xs[0])))  # a view would keep every whole mask in memory


def _slices(roi: Roi) -> npt.NDArray[np.int64]:
    """Slices that a ROI occupies."""
    return np.flatnonzero(roi.mask.any(axis=(1, 2))) + roi.offset[0]


def labels_in_fit(matches: list[dict[str, Any]], pairs: list[RoiPair], fixed: Reference, moving: Reference) -> bool:
    """Whether a class ROI of the fit is a label that is evaluated, voxel for voxel, in either image."""
    classes = [row["roi_class"] for row in matches]
    sides = [(pair.fixed, fixed.labels) for pair in pairs] + [(pair.moving, moving.labels) for pair in pairs]
    return any(
        labels is not None and value != 0 and _is_label(roi, labels == value)
        for value, (roi, labels) in zip(classes * 2, sides, strict=True)
    )


def _is_label(roi: Roi, label: npt.NDArray[np.bool_]) -> bool:
    box = tuple(slice(o, o + n) for o, n in zip(roi.offset, roi.mask.shape, strict=True))
    return bool(label.sum() == roi.mask.sum() and np.array_equal(label[box], roi.mask))


def _flag(mean: Row, result: FitResult, in_fit: bool, inverted: Inverted | None) -> str:
    """What to look at: a fallback, a final Dice behind the affine one, labels that were fitted to, a damped field."""
    flags = [] if result.fallback == "none" else [f"fallback_{result.fallback}"]
    if mean.get("dice") is not None and mean["dice"] < mean["dice_affine"] - WORSE_THAN_AFFINE:
        flags.append("worse_than_affine")
    if in_fit:
        flags.append("labels_in_fit")
    if result.damped:
        flags.append("damped")
    if inverted is not None and inverted.damped:
        flags.append("inverse_damped")
    return " ".join(flags)
