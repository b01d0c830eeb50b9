"""Fit: the displacement field of a few pairs from their matched ROIs, written as transforms, and its metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import results
from pipeline.algorithms.metrics import log_jacobian
from pipeline.algorithms.warp import affine_ddf
from pipeline.config import StudyConfig
from pipeline.dispatch import Failure, Task, attempt
from pipeline.errors import StudyError
from pipeline.folder import StudyFolder
from pipeline.keys import PlannedPair
from pipeline.stages.evaluate import WORSE_THAN_AFFINE, Reference, Row, evaluate
from pipeline.stages.inverse import Inverted, invert_transform, without_folds
from pipeline.stages.matched_rois import labels_in_fit, roi_pairs, slices
from pipeline.stages.refine import Volume, refine
from pipeline.stages.subject_files import read_reference, shown_intensities
from storage.cohort import Subject
from storage.embeddings import EmbeddingStore, SubjectEmbedding
from storage.geometry import Geometry, moving_to_fixed
from storage.images import read_image
from storage.places import remove
from storage.transforms import make_transform, read_transform, write_transform
from storage.warping import from_analysis, write_image

if TYPE_CHECKING:  # these load torch, which only a process that fits needs
    from pipeline.algorithms.ddf import FitResult
    from pipeline.algorithms.fit_problem import Problem


_VOXELS_AT_ONCE = 1 << 21  # of fixed images whose fields, of 12 bytes a voxel, are held together


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


@dataclass(frozen=True)
class _Prepared:
    """A pair whose ROIs are read, in so many seconds."""

    item: _PairUnit
    fixed: SubjectEmbedding
    moving: SubjectEmbedding
    problem: Problem
    seconds: float

    @property
    def unit(self) -> str:
        return self.item.unit


@dataclass(frozen=True)
class _Pack:
    prepared: tuple[_Prepared, ...]

    @property
    def unit(self) -> str:
        return self.prepared[0].unit


@dataclass(frozen=True)
class _Fitted:
    prepared: _Prepared
    result: FitResult
    seconds: float

    @property
    def unit(self) -> str:
        return self.prepared.unit


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
    lost = results.lost_pairs(folder.root, unit.part, matches)

    @lru_cache(maxsize=2 * len(unit.pairs))
    def reference(name: str) -> Reference:
        return read_reference(unit.subjects[name], store.geometry(name))

    @lru_cache(maxsize=2 * len(unit.pairs))
    def intensities(name: str) -> Volume:
        return shown_intensities(read_image(unit.subjects[name].image, config.input.slice_axis), config.input)

    def prepare(item: _PairUnit) -> _Prepared:
        if item.unit in lost:
            raise StudyError("neither matches nor a row in unmatched/, deleted meanwhile? Run the same command again")
        return _prepare(store, item)

    def finish(fitted: _Fitted) -> list[Row]:
        return _finish(folder, config, fitted, reference, intensities)

    items = [
        _PairUnit(pair, matches[pair.pair], seconds)
        for pair, seconds in zip(unit.pairs, unit.seconds_match, strict=True)
    ]
    found: dict[str, list[Row] | Failure] = {}
    prepared = []
    for item in items:
        outcome = attempt(prepare, item)
        if isinstance(outcome, Failure):
            found[item.unit] = outcome
        else:
            prepared.append(outcome)
    for pack in _packs(prepared):
        for one, fitted in zip(pack, _fit_pack(pack, config), strict=True):
            found[one.unit] = fitted if isinstance(fitted, Failure) else attempt(finish, fitted)
    return [found[item.unit] for item in items]


def _packs(prepared: Sequence[_Prepared]) -> Iterator[list[_Prepared]]:
    """Pairs to be fitted together: so many as their fields may take memory."""
    pack: list[_Prepared] = []
    voxels = 0
    for one in prepared:
        size = math.prod(one.fixed.geometry.shape)
        if pack and voxels + size > _VOXELS_AT_ONCE:
            yield pack
            pack, voxels = [], 0
        pack.append(one)
        voxels += size
    if pack:
        yield pack


def _fit_pack(pack: Sequence[_Prepared], config: StudyConfig) -> list[_Fitted | Failure]:
    """Fit the pairs of a pack at once; should that fail, one by one, so that only the culprit is blamed."""
    together = attempt(partial(_fit, config=config), _Pack(tuple(pack)))
    if not isinstance(together, Failure):
        return list(together)
    alone = [attempt(partial(_fit, config=config), _Pack((one,))) for one in pack]
    return [outcome if isinstance(outcome, Failure) else outcome[0] for outcome in alone]


def _fit(pack: _Pack, config: StudyConfig) -> list[_Fitted]:
    from pipeline.algorithms.ddf import fit_ddfs

    start = time.perf_counter()
    results = fit_ddfs([one.problem for one in pack.prepared], config.fit)
    share = (time.perf_counter() - start) / len(results)
    return [_Fitted(one, result, one.seconds + share) for one, result in zip(pack.prepared, results, strict=True)]


def _prepare(store: EmbeddingStore, item: _PairUnit) -> _Prepared:
    from pipeline.algorithms.fit_problem import Problem

    start = time.perf_counter()
    fixed, moving = store.read(item.pair.fixed), store.read(item.pair.moving)
    here, there = fixed.geometry, moving.geometry
    rois = roi_pairs(fixed, moving, item.matches)
    problem = Problem(rois, here.shape, here.spacing_mm, there.spacing_mm, moving_to_fixed(here, there))
    return _Prepared(item, fixed, moving, problem, time.perf_counter() - start)


def _finish(
    folder: StudyFolder,
    config: StudyConfig,
    fitted: _Fitted,
    reference: Callable[[str], Reference],
    intensities: Callable[[str], Volume],
) -> list[Row]:
    """Refine the field of a pair if asked to, write its transform, and return its metrics rows."""
    from pipeline.algorithms.ddf import fit_ddfs
    from pipeline.algorithms.pseudo_rois import held_out_columns

    item, problem, result = fitted.prepared.item, fitted.prepared.problem, fitted.result
    pair, rois = item.pair, problem.pairs
    known_fixed, known_moving = reference(pair.fixed), reference(pair.moving)
    here, there = fitted.prepared.fixed.geometry, fitted.prepared.moving.geometry

    def fit(part: Problem) -> FitResult:
        return fit_ddfs([part], config.fit)[0]

    refined, seconds_refine = None, None
    if config.fit.refine.method != "none":
        volumes = intensities(pair.fixed), intensities(pair.moving)
        start = time.perf_counter()
        steps, between = (problem.spacing_mm, problem.moving_spacing_mm), problem.moving_to_fixed
        refined = refine(*volumes, result.ddf, *steps, between, config.fit.refine)
        if config.fit.diffeomorphic:
            refined, damped = without_folds(refined, result.affine, here.spacing_mm)
            result = replace(result, damped=result.damped or damped)
        seconds_refine = time.perf_counter() - start
    rows = evaluate(known_fixed, known_moving, result, refined, rois)
    held_out = held_out_columns(problem, fit, config.evaluate.pseudo_folds, here.has_spacing)
    inverted = _write(folder, config, pair, result, refined, here, there)
    shared = {
        "pair": pair.pair,
        "moving": pair.moving,
        "fixed": pair.fixed,
        "n_rois": len(item.matches),
        "n_slices": len({z for pair in rois for z in slices(pair.fixed)}),
        "fallback": result.fallback,
        "flag": _flag(rows[0], result, labels_in_fit(item.matches, rois, known_fixed, known_moving), inverted),
        **held_out,
        "seconds_match": item.seconds_match,
        "seconds_fit": fitted.seconds,
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
    """Write the files of a pair where they are kept, and check and invert its field if asked to; all files or none."""
    outputs = config.outputs() if folder.keep_transforms else ()
    paths = {name: folder.output(name, pair.pair) for name in outputs}
    signature = {"pair": pair.pair, "moving": pair.moving, "fixed": pair.fixed, "key": pair.fit_key}
    field = (result.affine, result.lattice, result.step_mm, here)
    if refined is not None:
        lattice = refined - affine_ddf(result.affine, here.shape, here.spacing_mm)
        field = (result.affine, lattice, here.spacing_mm, here)
    inverted = None
    with ExitStack() as unfinished:
        for path in paths.values():
            unfinished.callback(remove, path)
        if "transforms" in paths:
            write_transform(paths["transforms"], *field, signature, there)
        if "jacobians" in paths:
            logarithm = log_jacobian(result.ddf if refined is None else refined, here.spacing_mm)
            write_image(from_analysis(logarithm.astype(np.float32), here), paths["jacobians"])
        if config.fit.diffeomorphic:
            stored = read_transform(paths["transforms"]) if paths else make_transform(*field, there)
            exchanged = {**signature, "moving": pair.fixed, "fixed": pair.moving}
            inverted = invert_transform(stored, here, there, paths.get("inverses"), exchanged)
        unfinished.pop_all()
    return inverted


def _flag(mean: Row, result: FitResult, in_fit: bool, inverted: Inverted | None) -> str:
    """What to look at: a fallback, a final Dice behind the affine one, labels that were fitted to, a damped field."""
    flags = [] if result.fallback == "none" else [f"fallback_{result.fallback}"]
    final = mean.get("dice_refined", mean.get("dice"))
    if final is not None and final < mean["dice_affine"] - WORSE_THAN_AFFINE:
        flags.append("worse_than_affine")
    if in_fit:
        flags.append("labels_in_fit")
    if result.damped:
        flags.append("damped")
    if inverted is not None and inverted.damped:
        flags.append("inverse_damped")
    return " ".join(flags)
