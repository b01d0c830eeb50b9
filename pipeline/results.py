"""The pair tables of a study: which rows still hold, and where the next ones go.

A part holds the rows of one tile of pairs, sorted by pair, so a table does not depend on the order in which its
rows were made. Every row carries the key of its pair; a row whose key is no longer wanted is dropped.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage import tables

LOG = logging.getLogger("samreg")


def reconcile(
    root: Path, name: str, wanted: Mapping[str, tuple[str, str]], untouched: Set[str] = frozenset()
) -> set[str]:
    """Drop the rows that are not wanted and move the others to their part.

    Args:
        root: the study folder.
        name: of a table with the columns `pair` and `key`.
        wanted: pair -> (key, part).
        untouched: pairs whose rows stay as and where they are.

    Returns:
        The pairs that have rows of the wanted key, or rows left untouched.
    """
    kept: set[str] = set()
    moving: dict[str, list[pa.Table]] = defaultdict(list)
    spoiled: list[str] = []
    for part in tables.part_names(root, name):
        table = _readable(root, name, part)
        pairs, keys = ([] if table is None else table.column(c).to_pylist() for c in ("pair", "key"))
        here = [pair in untouched or wanted.get(pair) == (key, part) for pair, key in zip(pairs, keys, strict=True)]
        if table is not None and all(here):
            kept.update(pairs)
            continue
        spoiled.append(part)
        if table is None:
            continue
        for target, rows in _by_target(part, pairs, keys, wanted, untouched).items():
            moving[target].append(table.take(pa.array(rows)))
    _rewrite(root, name, spoiled, moving, kept)
    return kept


def _by_target(
    part: str,
    pairs: list[str],
    keys: list[str],
    wanted: Mapping[str, tuple[str, str]],
    untouched: Set[str],
) -> dict[str, list[int]]:
    """Rows that still hold, by the part they belong to."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, (pair, key) in enumerate(zip(pairs, keys, strict=True)):
        goal = (key, part) if pair in untouched else wanted.get(pair)
        if goal is not None and goal[0] == key:
            rows[goal[1]].append(row)
    return rows


def _rewrite(root: Path, name: str, spoiled: list[str], moving: Mapping[str, list[pa.Table]], kept: set[str]) -> None:
    """Write the moved rows first and remove the emptied parts last, so that a kill in between loses none."""
    for target, pieces in moving.items():
        merged: pa.Table | None = None
        if target not in spoiled and tables.has_part(root, name, target):
            merged = tables.read_part(root, name, target)
        for piece in pieces:
            fresh = piece if merged is None else _without(piece, set(merged.column("pair").to_pylist()))
            merged = fresh if merged is None else pa.concat_tables([merged, fresh])
        assert merged is not None
        tables.write_part(root, name, target, sort_rows(merged))
        kept.update(merged.column("pair").to_pylist())
    for part in spoiled:
        if part not in moving:
            tables.remove_part(root, name, part)


def merge_rows(root: Path, name: str, part: str, fresh: pa.Table, pairs: Iterable[str]) -> None:
    """Replace the rows of `pairs` in a part by those of `fresh`."""
    if tables.has_part(root, name, part):
        fresh = pa.concat_tables([_without(tables.read_part(root, name, part), set(pairs)), fresh])
    if fresh.num_rows:
        tables.write_part(root, name, part, sort_rows(fresh))
    else:
        tables.remove_part(root, name, part)


def sort_rows(table: pa.Table) -> pa.Table:
    """Rows by pair; within a pair as they came."""
    names = table.column("pair").to_pylist()
    return table.take(pa.array(sorted(range(len(names)), key=names.__getitem__), pa.int64()))


def rows_of(root: Path, name: str, part: str, pairs: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of some pairs of a part, as dicts, by pair; a pair without rows has an empty list."""
    found: dict[str, list[dict[str, Any]]] = {pair: [] for pair in pairs}
    if tables.has_part(root, name, part):
        table = tables.read_part(root, name, part)
        chosen = table.filter(pc.is_in(table.column("pair"), value_set=pa.array(list(found), pa.string())))
        for row in chosen.to_pylist():
            found[row["pair"]].append(row)
    return found


def pairs_without_rois(root: Path) -> set[str]:
    """Pairs of the metrics table that no ROI pair was found for."""
    table = tables.read_table(root, "metrics")
    return set(table.filter(pc.equal(table.column("n_rois"), 0)).column("pair").to_pylist())


def _without(table: pa.Table, pairs: set[str]) -> pa.Table:
    inside = pc.is_in(table.column("pair"), value_set=pa.array(sorted(pairs), pa.string()))
    return table.filter(pc.invert(inside))


def _readable(root: Path, name: str, part: str) -> pa.Table | None:
    """A part, or None for one that cannot be read: its rows are made again."""
    try:
        return tables.read_part(root, name, part)
    except tables.TableError as error:
        LOG.warning("%s; its rows are made again", error)
        return None
