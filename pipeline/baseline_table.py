"""The methods of a study beside each other: its own fields and the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
_SMALL = 0.01


def method_rows(study: str | Path) -> dict[str, list[Row]]:
    """The rows of label 0, the mean over labels, by method: `samreg`, `samreg refined`, then the baselines.

    Raises:
        TableError: for a table that cannot be read.
    """
    own = [row for row in tables.read_table(study, "metrics").to_pylist() if row["label"] == 0]
    found: dict[str, list[Row]] = {"samreg": own} if own else {}
    refined = [_refined(row) for row in own if row["seconds_refine"] is not None]
    if refined:
        found["samreg refined"] = refined
    for row in tables.read_table(Path(study) / "baselines", "baseline_metrics").to_pylist():
        if row["label"] == 0:
            found.setdefault(row["method"], []).append(row)
    return found


def describe_baselines(study: str | Path) -> Table:
    """A row per method: its pairs and the means over them."""
    shown = Table("method", "pairs", *_SHOWN)
    for method, rows in method_rows(study).items():
        shown.add_row(method, str(len(rows)), *(_mean(rows, names) for names in _SHOWN.values()))
    return shown


def _refined(row: Row) -> Row:
    ending = "_refined"
    columns = {name.removesuffix(ending): value for name, value in row.items() if name.endswith(ending)}
    return {**row, **columns, "seconds_fit": row["seconds_fit"] + row["seconds_refine"]}


def _mean(rows: Sequence[Row], names: Sequence[str]) -> str:
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            mean = float(np.mean(values))
            return f"{mean:.3f}" if mean == 0 or abs(mean) > _SMALL else f"{mean:.1e}"
    return "–"
