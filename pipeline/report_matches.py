"""The matches and ROIs of a study in figures per pair and subject, read a part at a time: memory is that of a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.algorithms import quality
from storage import tables

Values = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

BINS = 50  # of the scores 0 .. 1, over all matches
SCORES = ("similarity", "confidence")
_PLACES = {role: [f"{role}_centroid_{axis}_mm" for axis in "zyx"] for role in ("fixed", "moving")}


@dataclass(frozen=True)
class Matches:
    """What the correspondences table says of each pair.

    Attributes:
        pairs: pair, part (of the table), n_matches, median similarity and confidence, residual: median distance of
            the matches from one affine map, mm (px without spacing), see `quality.affine_residuals`.
        counts: matches of all pairs by similarity and by confidence, int64 [BINS] each, over 0 .. 1.
    """

    pairs: pa.Table
    counts: dict[str, Counts]

    @property
    def total(self) -> int:
        """Matches of all pairs."""
        return int(pc.sum(self.pairs.column("n_matches")).as_py() or 0)


_PAIRS = pa.schema(
    [
        *((name, pa.string()) for name in ("pair", "part")),
        ("n_matches", pa.int64()),
        *((name, pa.float64()) for name in (*SCORES, "residual")),
    ]
)


def read_matches(root: Path) -> Matches:
    """Read the correspondences of a study.

    Raises:
        TableError: naming the part that is truncated or of another schema version.
    """
    columns = ["pair", *SCORES, *_PLACES["fixed"], *_PLACES["moving"]]
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in SCORES}
    pieces = []
    for part in tables.part_names(root, "correspondences"):
        table = tables.read_part(root, "correspondences", part, columns)
        if not table.num_rows:
            continue
        for name in SCORES:
            scores = _column(table, name)
            counts[name] += np.histogram(np.clip(scores[np.isfinite(scores)], 0, 1), BINS, (0, 1))[0]
        pieces.append(_by_pair(part, table))
    return Matches(pa.concat_tables(pieces) if pieces else pa.Table.from_batches([], _PAIRS), counts)


def read_roi_counts(root: Path) -> dict[str, tuple[int, float]]:
    """ROIs of every subject, and the median of their quality."""
    found = {}
    for part in tables.part_names(root, "rois"):
        table = tables.read_part(root, "rois", part, ["subject", "quality"])
        for name in table.column("subject").unique().to_pylist():
            values = _column(table.filter(pc.equal(table.column("subject"), name)), "quality")
            known = values[np.isfinite(values)]
            found[name] = (len(values), float(np.median(known)) if len(known) else np.nan)
    return found


def _by_pair(part: str, table: pa.Table) -> pa.Table:
    """One row per pair of a part, whose rows are in the order of their pairs."""
    pairs = table.column("pair").combine_chunks().dictionary_encode()
    codes = pairs.indices.to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1])
    places = {role: np.column_stack([_column(table, name) for name in names]) for role, names in _PLACES.items()}
    known = np.logical_and.reduceat(np.isfinite(np.hstack(list(places.values()))).all(axis=1), starts)
    residual = quality.affine_residuals(np.nan_to_num(places["fixed"]), np.nan_to_num(places["moving"]), starts)
    columns = [
        pairs.dictionary.take(pa.array(codes[starts])),
        pa.array([part] * len(starts), pa.string()),
        np.diff(starts, append=len(codes)),
        *(_medians(_column(table, name), starts) for name in SCORES),
        np.where(known, residual, np.nan),
    ]
    return pa.table(columns, schema=_PAIRS)


def _medians(values: Values, starts: Counts) -> Values:
    known = np.logical_and.reduceat(np.isfinite(values), starts)
    return np.where(known, quality.group_medians(np.nan_to_num(values), starts), np.nan)


def _column(table: pa.Table, name: str) -> Values:
    """A column as float64, NaN where it is null."""
    return np.asarray(table.column(name).to_numpy(), dtype=np.float64)


def medians_by(codes: Sequence[Counts], values: Values, size: int) -> Values:
    """Median of the known values of each of `size` groups; a value counts once for its group in each of `codes`."""
    known = np.isfinite(values)
    group = np.concatenate([found[known] for found in codes])
    order = np.argsort(group, kind="stable")
    present, starts = np.unique(group[order], return_index=True)
    medians = np.full(size, np.nan)
    if len(present):
        medians[present] = quality.group_medians(np.tile(values[known], len(codes))[order], starts)
    return medians
