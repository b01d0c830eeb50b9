"""Match: Algorithm 1 (Case 2), or by class (Case 1), on a tile of pairs.

Reads what the prototype stage wrote, and nothing else, and writes one part of correspondences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import results
from pipeline.algorithms.class_rois import match_classes
from pipeline.algorithms.matching import MatchConfig, Matches, match_in_stages
from pipeline.algorithms.staged import Staged
from pipeline.config import StudyConfig
from pipeline.dispatch import Failure, Task
from pipeline.in_step import in_step
from pipeline.keys import PlannedPair
from pipeline.stages.roi_sets import SubjectRois, read_rois
from storage import tables
from storage.embeddings import EmbeddingStore
from storage.geometry import moving_to_fixed

Columns = Mapping[str, npt.NDArray[Any]]
HOLD_BYTES = 2 << 20
_NAMES = {"pair": "pair", "moving": "moving", "fixed": "fixed", "key": "match_key"}


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
    return Task("match", partial(_build, config.match, config.execution.tile, root, store))


def _build(
    config: MatchConfig, tile: int, root: Path, store: EmbeddingStore, device: str
) -> Callable[[MatchUnit], list[float | Failure]]:
    """Subjects are kept from tile to tile: the fixed ones of a row of tiles, the moving ones of the last two."""
    rois_of = lru_cache(maxsize=3 * tile)(partial(read_rois, store))
    return partial(run_unit, root, rois_of, config)


def run_unit(
    root: Path, rois_of: Callable[[str], SubjectRois], config: MatchConfig, unit: MatchUnit
) -> list[float | Failure]:
    """Match the pairs of a tile and merge their rows into its part; seconds or Failure of each pair."""

    def columns_of(item: _Named) -> Staged[Columns]:
        moving, fixed = rois_of(item.pair.moving), rois_of(item.pair.fixed)
        return _columns(moving, fixed, (yield from match_rois(moving, fixed, config)))

    found: dict[PlannedPair, Columns] = {}
    outcomes: list[float | Failure] = []
    results_of = in_step(columns_of, map(_Named, unit.pairs), HOLD_BYTES)
    for pair, (result, seconds) in zip(unit.pairs, results_of, strict=True):
        if isinstance(result, Failure):
            outcomes.append(result)
        else:
            found[pair] = result
            outcomes.append(seconds)
    matched = [pair.pair for pair in found]
    results.merge_rows(root, "correspondences", unit.part, _table(found), matched)
    results.merge_rows(root, "unmatched", unit.part, _unmatched(found), matched)
    return outcomes


def match_rois(moving: SubjectRois, fixed: SubjectRois, config: MatchConfig) -> Staged[Matches]:
    """Match by class where the ROIs are classes, else by prototype; in stages.

    Raises:
        NoSharedClassError: naming the classes of both.
    """
    if moving.roi_class is None or fixed.roi_class is None:
        between = moving_to_fixed(fixed.geometry, moving.geometry)
        return (yield from match_in_stages(moving.rois, fixed.rois, between, config))
    assert moving.probability is not None
    assert fixed.probability is not None
    return match_classes(moving.roi_class, fixed.roi_class, moving.probability, fixed.probability)


def _columns(moving: SubjectRois, fixed: SubjectRois, found: Matches) -> Columns:
    """Columns of the correspondences of one pair, but for the names."""
    i, j = found.moving_index, found.fixed_index
    columns: dict[str, npt.NDArray[Any]] = {}
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


def _table(found: Mapping[PlannedPair, Columns]) -> pa.Table:
    """The correspondences of a tile, sorted by pair."""
    if not found:
        return tables.table_from_rows("correspondences", [])
    pairs = sorted(found, key=lambda pair: pair.pair)
    parts = [found[pair] for pair in pairs]
    which = pa.array(np.repeat(np.arange(len(pairs)), [len(part["rank"]) for part in parts]))
    names = {column: _names(pairs, attribute).take(which) for column, attribute in _NAMES.items()}
    values = {column: pa.array(np.concatenate([part[column] for part in parts])) for column in parts[0]}
    schema = tables.CORRESPONDENCES
    return pa.table(names | values).select(schema.names).cast(schema)


def _unmatched(found: Mapping[PlannedPair, Columns]) -> pa.Table:
    """The pairs of a tile without any match."""
    pairs = [pair for pair, columns in found.items() if not len(columns["rank"])]
    names = {column: _names(pairs, attribute) for column, attribute in _NAMES.items()}
    return pa.table(names, schema=tables.UNMATCHED)


def _names(pairs: Sequence[PlannedPair], attribute: str) -> pa.Array:
    return pa.array([getattr(pair, attribute) for pair in pairs], pa.string())
