"""The pair tables of a study: which rows still hold, and where the next ones go.

A part holds the rows of one tile of pairs, sorted by pair, so a table does not depend on the order in which its
rows were made. Every row carries the key of its pair; a row whose key is no longer wanted is dropped. A pair has
many rows, so whatever concerns pairs is asked of the distinct (pair, key) of a part, not of its rows.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage import tables

LOG = logging.getLogger("samreg")
MATCHED = ("correspondences", "unmatched")  # a matched pair has rows in one of them
_PAIR_KEY = ["pair", "key"]


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
        keys = _readable(root, name, part, _PAIR_KEY)
        found = set() if keys is None else _distinct(keys)
        if keys is not None and all(pair in untouched or wanted.get(pair) == (key, part) for pair, key in found):
            kept.update(pair for pair, _ in found)
            continue
        spoiled.append(part)
        targets = _by_target(part, found, wanted, untouched)
        table = _readable(root, name, part) if targets else None
        for target, holding in targets.items() if table is not None else ():
            moving[target].append(_rows_with(table, holding))
    _rewrite(root, name, spoiled, moving, kept)
    return kept


def _by_target(
    part: str, found: Iterable[tuple[str, str]], wanted: Mapping[str, tuple[str, str]], untouched: Set[str]
) -> dict[str, dict[str, str]]:
    """Pairs whose rows still hold, with their key, by the part that they belong to."""
    targets: dict[str, dict[str, str]] = defaultdict(dict)
    for pair, key in found:
        goal = (key, part) if pair in untouched else wanted.get(pair)
        if goal is not None and goal[0] == key:
            targets[goal[1]][pair] = key
    return targets


def _rewrite(root: Path, name: str, spoiled: list[str], moving: Mapping[str, list[pa.Table]], kept: set[str]) -> None:
    """Write the moved rows first and remove the emptied parts last, so that a kill in between loses none."""
    for target, pieces in moving.items():
        merged: pa.Table | None = None
        if target not in spoiled and tables.has_part(root, name, target):
            merged = tables.read_part(root, name, target)
        for piece in pieces:
            fresh = piece if merged is None else _without(piece, merged.column("pair").unique().to_pylist())
            merged = fresh if merged is None else pa.concat_tables([merged, fresh])
        assert merged is not None
        tables.write_part(root, name, target, sort_rows(merged))
        kept.update(merged.column("pair").unique().to_pylist())
    for part in spoiled:
        if part not in moving:
            tables.remove_part(root, name, part)


def merge_rows(root: Path, name: str, part: str, fresh: pa.Table, pairs: Iterable[str]) -> None:
    """Replace the rows of `pairs` in a part by those of `fresh`."""
    if tables.has_part(root, name, part):
        fresh = pa.concat_tables([_without(tables.read_part(root, name, part), pairs), fresh])
    if fresh.num_rows:
        tables.write_part(root, name, part, sort_rows(fresh))
    else:
        tables.remove_part(root, name, part)


def sort_rows(table: pa.Table) -> pa.Table:
    """Rows by pair; within a pair as they came."""
    pairs = table.column("pair")
    if pc.all(pc.less_equal(pairs.slice(0, max(0, len(pairs) - 1)), pairs.slice(1))).as_py():
        return table
    return table.take(pc.sort_indices(pairs))


def rows_of(root: Path, name: str, part: str, pairs: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of some pairs of a part, as dicts, by pair; a pair without rows has an empty list."""
    found: dict[str, list[dict[str, Any]]] = {pair: [] for pair in pairs}
    if tables.has_part(root, name, part):
        for row in tables.read_part(root, name, part).filter(_is_one_of("pair", found)).to_pylist():
            found[row["pair"]].append(row)
    return found


def lost_pairs(root: Path, part: str, matches: Mapping[str, Collection[Any]]) -> set[str]:
    """Pairs, of some with their correspondences, that have none and are not known as unmatched either."""
    empty = [pair for pair, rows in matches.items() if not rows]
    known = rows_of(root, "unmatched", part, empty) if empty else {}
    return {pair for pair in empty if not known[pair]}


def pair_keys(root: Path, name: str) -> Iterator[tuple[str, str]]:
    """The (pair, key) that have rows, a part at a time."""
    for part in tables.part_names(root, name):
        yield from _distinct(tables.read_part(root, name, part, _PAIR_KEY))


def held_keys(root: Path, name: str) -> Iterator[tuple[str, str]]:
    """As `pair_keys`, passing over parts that cannot be read, which `reconcile` reports."""
    for part in tables.part_names(root, name):
        with suppress(tables.TableError):
            yield from _distinct(tables.read_part(root, name, part, _PAIR_KEY))


def _distinct(table: pa.Table) -> set[tuple[str, str]]:
    """The (pair, key) of the rows, looked up only where they change from one row to the next."""
    columns = [table.column(name) for name in _PAIR_KEY]
    changed = pc.or_(*(pc.not_equal(c.slice(1), c.slice(0, max(0, len(c) - 1))) for c in columns))
    heads = [c.slice(0, 1).to_pylist() + c.slice(1).filter(changed).to_pylist() for c in columns]
    return set(zip(*heads, strict=True))


def _rows_with(table: pa.Table, holding: Mapping[str, str]) -> pa.Table:
    """Rows of the pairs under their key; no key is that of two pairs."""
    return table.filter(_is_one_of("pair", holding) & _is_one_of("key", set(holding.values())))


def _without(table: pa.Table, pairs: Iterable[str]) -> pa.Table:
    return table.filter(~_is_one_of("pair", pairs))


def _is_one_of(column: str, values: Iterable[str]) -> pc.Expression:
    return pc.field(column).isin(pa.array(list(values), pa.string()))


def _readable(root: Path, name: str, part: str, columns: Sequence[str] | None = None) -> pa.Table | None:
    """A part, or None for one that cannot be read: its rows are made again."""
    try:
        return tables.read_part(root, name, part, columns)
    except tables.TableError as error:
        LOG.warning("%s; its rows are made again", error)
        return None
