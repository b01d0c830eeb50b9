"""The methods of a study beside each other: its own fields and the baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.table import Table

from storage import tables

Row = Mapping[str, Any]
_SHOWN = {
    "Dice": ("dice",),
    "HD95": ("hd95_mm", "hd95_vox"),
    "landmarks": ("landmark_tre_mm", "landmark_tre_vox"),
    "folds": ("fold_fraction",),
    "s": ("seconds", "seconds_fit"),
    "processor s": ("processor_seconds",),
}
_NEEDED = ("label", "method", "seconds_fit", "seconds_refine")
_REFINED = "_refined"
_SMALL = 0.01


def method_rows(study: str | Path, columns: Iterable[str] | None = None) -> dict[str, list[Row]]:
    """The rows of label 0, the mean over labels, by method: `samreg`, `samreg refined`, then the baselines.

    Args:
        columns: those that are needed, of either table; None is all.

    Raises:
        TableError: for a table that cannot be read.
    """
    own = _mean_rows(study, "metrics", columns)
    found: dict[str, list[Row]] = {"samreg": own} if own else {}
    refined = [_refined(row) for row in own if row["seconds_refine"] is not None]
    if refined:
        found["samreg refined"] = refined
    for row in _mean_rows(Path(study) / "baselines", "baseline_metrics", columns):
        found.setdefault(row["method"], []).append(row)
    return found


def describe_baselines(study: str | Path) -> Table:
    """A row per method: its pairs and the means over them."""
    shown = Table("method", "pairs", *_SHOWN)
    for method, rows in method_rows(study, chain(*_SHOWN.values())).items():
        shown.add_row(method, str(len(rows)), *(_mean(rows, names) for names in _SHOWN.values()))
    return shown


def _mean_rows(root: str | Path, table: str, columns: Iterable[str] | None) -> list[Row]:
    """Rows of label 0, read a part at a time; of `columns` those that the table has, and their refined ones."""
    wanted = None
    if columns is not None:
        asked = {*columns, *_NEEDED}
        wanted = [name for name in tables.SCHEMAS[table].names if name.removesuffix(_REFINED) in asked]
    parts = (tables.read_part(root, table, part, wanted) for part in tables.part_names(root, table))
    return [row for part in parts for row in part.filter(pc.field("label") == 0).to_pylist()]


def _refined(row: Row) -> Row:
    columns = {name.removesuffix(_REFINED): value for name, value in row.items() if name.endswith(_REFINED)}
    return {**row, **columns, "seconds_fit": row["seconds_fit"] + row["seconds_refine"]}


def _mean(rows: Sequence[Row], names: Sequence[str]) -> str:
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            mean = float(np.mean(values))
            return f"{mean:.3f}" if mean == 0 or abs(mean) > _SMALL else f"{mean:.1e}"
    return "–"
