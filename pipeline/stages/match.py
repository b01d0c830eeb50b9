"""Match: Algorithm 1 (Case 2), or by class (Case 1), on a tile of pairs.

Reads what the prototype stage wrote, and nothing else, and writes one part of correspondences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import results
from pipeline.algorithms.class_rois import match_classes
from pipeline.algorithms.matching import MatchConfig, Matches, match
from pipeline.config import StudyConfig
from pipeline.dispatch import Failure, Task, attempt
from pipeline.keys import PlannedPair
from pipeline.stages.roi_sets import SubjectRois, read_rois
from storage import tables
from storage.embeddings import EmbeddingStore
from storage.geometry import moving_to_fixed


@dataclass(frozen=True)
class MatchUnit:
    """The pairs of one tile that are still to match."""

    part: str
    pairs: tuple[PlannedPair, ...]

    @property
    def unit(self) -> str:
        """Name in failure rows."""
        return self.part


@dataclass(frozen=True)
class _Named:
    pair: PlannedPair

    @property
    def unit(self) -> str:
        return self.pair.pair


def task(config: StudyConfig, root: Path, store: EmbeddingStore) -> Task:
    """The task of matching, for `pipeline.dispatch`."""
    return Task("match", partial(_build, config.match, root, store))


def _build(
    config: MatchConfig, root: Path, store: EmbeddingStore, device: str
) -> Callable[[MatchUnit], list[float | Failure]]:
    return partial(run_unit, root, store, config)


def run_unit(root: Path, store: EmbeddingStore, config: MatchConfig, unit: MatchUnit) -> list[float | Failure]:
    """Match the pairs of a tile and merge their rows into its part; seconds or Failure of each pair."""
    subjects: dict[str, SubjectRois] = {}
    names = tables.CORRESPONDENCES.names
    pieces = [tables.table_from_rows("correspondences", [])]

    def rois_of(name: str) -> SubjectRois:
        if name not in subjects:
            subjects[name] = read_rois(store, name)
        return subjects[name]

    def match_pair(named: _Named) -> float:
        moving, fixed = rois_of(named.pair.moving), rois_of(named.pair.fixed)
        start = time.perf_counter()
        found = match_rois(moving, fixed, config)
        seconds = time.perf_counter() - start
        pieces.append(pa.table(_rows(named.pair, moving, fixed, found)).select(names).cast(pieces[0].schema))
        return seconds

    outcomes = [attempt(match_pair, _Named(pair)) for pair in unit.pairs]
    matched = [pair.pair for pair, out in zip(unit.pairs, outcomes, strict=True) if not isinstance(out, Failure)]
    results.merge_rows(root, "correspondences", unit.part, pa.concat_tables(pieces), matched)
    return outcomes


def match_rois(moving: SubjectRois, fixed: SubjectRois, config: MatchConfig) -> Matches:
    """Match by class where the ROIs are classes, else by prototype.

    Raises:
        NoSharedClassError: naming the classes of both.
    """
    if moving.roi_class is None or fixed.roi_class is None:
        return match(moving.rois, fixed.rois, moving_to_fixed(fixed.geometry, moving.geometry), config)
    assert moving.probability is not None
    assert fixed.probability is not None
    return match_classes(moving.roi_class, fixed.roi_class, moving.probability, fixed.probability)


def _rows(
    pair: PlannedPair, moving: SubjectRois, fixed: SubjectRois, found: Matches
) -> dict[str, npt.NDArray[Any] | list[str]]:
    """Columns of the correspondences of one pair."""
    i, j = found.moving_index, found.fixed_index
    columns: dict[str, npt.NDArray[Any] | list[str]] = {
        name: [value] * len(i)
        for name, value in (
            ("pair", pair.pair),
            ("moving", pair.moving),
            ("fixed", pair.fixed),
            ("key", pair.match_key),
        )
    }
    for role, rois, chosen in (("moving", moving, i), ("fixed", fixed, j)):
        columns[f"{role}_roi"] = rois.roi[chosen]
        columns[f"{role}_slice"] = rois.rois.slice[chosen]
        columns[f"{role}_area_mm2"] = rois.rois.area_mm2[chosen]
        for axis, name in enumerate("zyx"):
            columns[f"{role}_centroid_{name}_mm"] = rois.rois.centroid_mm[chosen, axis]
    columns["roi_class"] = np.zeros(len(i), np.int32) if moving.roi_class is None else moving.roi_class[i]
    for name in ("similarity", "margin", "confidence"):
        columns[name] = getattr(found, name)
    columns["rank"] = np.arange(len(i), dtype=np.int32)
    return columns
