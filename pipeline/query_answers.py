"""The answers to a query: a region, looked for in every subject of an index, straight and through other subjects.

Where the region was found surely, it is a region itself, and a subject that is little like the one asked about may be
like that one. So a few of the surest subjects ask again (query expansion, Chum et al., ICCV 2007), and a ROI is
believed by the mean of the confidences that it got.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.matching import MatchConfig
from pipeline.algorithms.query import (
    Answers,
    Block,
    QueryConfig,
    Regions,
    answer,
    choose_context,
    mean_of_passes,
    subject_confidence,
)
from pipeline.process import own_cores
from pipeline.query_region import Region
from storage.query_index import QueryIndex

_BLOCK = 16  # subjects at once: what they need stays near the processor
_DOUBTFUL = 0.1  # confidence from which an answer counts in the mean
_SURE = 0.5  # confidence of a subject that may ask again
_ASKED = 1000  # subjects asked in all, by which the number of relays is chosen
_MOST_RELAYS = 6


@dataclass(frozen=True)
class Found:
    """Answers of a whole cohort, by subject and slice.

    Attributes:
        subject: int64 [n], position in the index; the other arrays [n] likewise per answer.
        row: int64, row in the index. region: int64, of the query region's masks.
        similarity, overlap, confidence: float32, 0..1.
        total: float64 [S], confidence of every subject.
    """

    subject: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    region: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float32]
    overlap: npt.NDArray[np.float32]
    confidence: npt.NDArray[np.float32]
    total: npt.NDArray[np.float64]

    def ranked(self, without: int) -> npt.NDArray[np.int64]:
        """Positions of the subjects but one, the surest first."""
        order = np.argsort(-self.total, kind="stable")
        return np.asarray(order[order != without])

    def of_subject(self, position: int) -> npt.NDArray[np.int64]:
        """Positions of the answers of one subject."""
        low, high = np.searchsorted(self.subject, [position, position + 1])
        return np.arange(low, high)


def answer_with_relays(
    index: QueryIndex, subject: str, region: Region, match: MatchConfig, settings: QueryConfig
) -> Found:
    """The region in every subject of an index, itself included, straight and by way of the surest subjects."""
    count, number = len(index.subjects), index.subjects.index(subject)
    relays = max(0, min(_MOST_RELAYS, _ASKED // count - 1)) if settings.relays is None else settings.relays
    if not relays:
        return answer_all(index, subject, region, match, settings)
    doubtful = replace(settings, min_confidence=min(_DOUBTFUL, settings.min_confidence))
    first = answer_all(index, subject, region, match, doubtful)
    passes, weights = [first], [1.0]
    for position in first.ranked(number)[:relays].tolist():
        if first.total[position] < _SURE:
            break
        here = first.of_subject(position)
        found = answer_all(index, index.subjects[position], _as_region(index, first.row[here]), match, doubtful)
        passes.append(replace(found, region=first.region[here][found.region]))
        weights.append(float(first.total[position]) ** 2)
    rows = np.concatenate([found.row for found in passes])
    weight = np.repeat(weights, [len(found.row) for found in passes])
    merged = {
        name: np.concatenate([getattr(found, name) for found in passes])
        for name in ("subject", "region", "similarity", "overlap", "confidence")
    }
    kept, confidence = mean_of_passes(
        rows, index.columns["slice"][rows], merged["subject"], merged["confidence"], weight, sum(weights)
    )
    sure = confidence >= settings.min_confidence
    kept, confidence = kept[sure], confidence[sure]
    total = _totals(index, merged["subject"][kept], rows[kept], confidence)
    columns = {name: merged[name][kept] for name in ("subject", "region", "similarity", "overlap")}
    return Found(row=rows[kept], confidence=confidence, total=total, **columns)


def answer_all(
    index: QueryIndex,
    subject: str,
    region: Region,
    match: MatchConfig,
    settings: QueryConfig,
    threads: int | None = None,
) -> Found:
    """The region in every subject of an index, itself included; `threads` None is one for every processor."""
    regions = _with_context(index, subject, region, settings)
    spans = [(low, min(low + _BLOCK, len(index.subjects))) for low in range(0, len(index.subjects), _BLOCK)]

    def answer_span(span: tuple[int, int]) -> tuple[Answers, tuple[int, int]]:
        return answer(regions, _block(index, *span), match.epsilon, match.spatial, settings), span

    with ThreadPoolExecutor(threads or own_cores()) as pool:
        parts = list(pool.map(answer_span, spans))
    subject_of = np.concatenate([found.subject + low for found, (low, _) in parts])
    row = index.start[subject_of] + np.concatenate([found.roi for found, _ in parts])
    columns = {
        name: np.concatenate([getattr(found, name) for found, _ in parts])
        for name in ("region", "similarity", "overlap", "confidence")
    }
    return Found(subject_of, row, **columns, total=_totals(index, subject_of, row, columns["confidence"]))


def _totals(
    index: QueryIndex, subject: npt.NDArray[np.int64], row: npt.NDArray[np.int64], confidence: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    area = np.asarray(index.columns["area_mm2"][row], np.float64)
    return subject_confidence(subject, area, confidence, len(index.subjects))


def _as_region(index: QueryIndex, rows: npt.NDArray[np.int64]) -> Region:
    """ROIs of one subject as a region; what they look like is not asked for, so there are no masks."""
    places = (
        np.asarray(index.columns[name][rows], np.float64) for name in ("centroid_mm", "covariance_mm2", "area_mm2")
    )
    prototypes = np.asarray(index.columns["prototypes"][rows], np.float32)
    return Region(np.asarray(index.columns["slice"][rows]), np.zeros((len(rows), 0, 0), bool), prototypes, *places)


def _with_context(index: QueryIndex, subject: str, region: Region, settings: QueryConfig) -> Regions:
    """The region's slices as regions asked for, then the ROIs of its subject that lie nearest."""
    rows, number = index.rows(subject), index.subjects.index(subject)
    centroid = np.asarray(index.columns["centroid_mm"][rows], np.float64)
    around = choose_context(centroid, region.centroid_mm, settings.context)
    slices = np.concatenate([region.slices, index.columns["slice"][rows][around]])

    def both(own: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        return np.concatenate([own, index.columns[name][rows][around].astype(own.dtype)])

    return Regions(
        both(region.prototypes, "prototypes"),
        both(region.centroid_mm, "centroid_mm"),
        both(region.covariance_mm2, "covariance_mm2"),
        (slices + 0.5) / index.n_slices[number],
        len(region.slices),
    )


def _block(index: QueryIndex, low: int, high: int) -> Block:
    """The subjects from `low` to `high`, padded to the largest."""
    counts = np.diff(index.start[low : high + 1])
    inside = np.arange(counts.max(initial=0)) < counts[:, None]
    rows = slice(int(index.start[low]), int(index.start[high]))

    def padded(name: str, empty: Sequence[float]) -> npt.NDArray[np.float64]:
        values = index.columns[name][rows]
        full = np.empty((*inside.shape, *values.shape[1:]))
        full[~inside] = empty
        full[inside] = values
        return full

    return Block(
        np.asarray(index.columns["prototypes"][rows], np.float32),
        inside,
        padded("centroid_mm", [0, 0, 0]),
        padded("covariance_mm2", [1, 0, 1]),
        np.where(inside, (padded("slice", [0]) + 0.5) / index.n_slices[low:high, None], -9.0),
        index.height_mm[low:high],
    )
