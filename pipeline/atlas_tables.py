"""The rows of `atlas.parquet`: of one iteration, which mark it as done, and of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from pipeline.algorithms.warp import Array
from pipeline.atlas_folder import IterationFolder
from pipeline.stages.atlas_propagate import LONE
from storage import tables

NAME = "atlas"
_PART = "subjects"
_SHOWN = {
    "mean_displacement": "moved",
    "image_change": "change",
    "sharpness": "sharpness",
    "dice_pairwise": "Dice pairs",
    "dice_majority": "majority",
    "dice_propagated": "others to left-out",
    "dice_best_single": "best single",
    "dice_reference": "reference",
}


def read_rows(folder: IterationFolder, key: str, subjects: Sequence[str]) -> list[dict[str, Any]] | None:
    """Rows of a finished iteration of this key whose template is there, or None.

    Args:
        subjects: that are registered; where one of them has no row it failed later, and is tried again.
    """
    if not tables.has_part(folder.root, NAME, _PART):
        return None
    rows: list[dict[str, Any]] = tables.read_part(folder.root, NAME, _PART).to_pylist()
    whole = rows[0]["key"] == key and [row["subject"] for row in rows] == list(subjects)
    return rows if whole and folder.template.exists() else None


def write_rows(folder: IterationFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of an iteration, by which it is done."""
    tables.write_part(folder.root, NAME, _PART, tables.table_from_rows(NAME, rows))


def write_atlas(study: Path, folders: Sequence[IterationFolder]) -> None:
    """Write `atlas/atlas.parquet` of a study, which is its table `atlas`."""
    whole = pa.concat_tables([tables.read_part(folder.root, NAME, _PART) for folder in folders])
    tables.write_part(study, NAME, NAME, whole)


def with_agreement(
    rows: Sequence[dict[str, Any]], voters: Sequence[str], dice: Array, reference: str
) -> list[dict[str, Any]]:
    """Rows with their mean pairwise Dice [N, N] of the `voters`, and the Dice of labels of single subjects.

    The best single subject is the one whose labels have the highest mean Dice in the others, of those that were tried.
    """
    others = np.where(np.eye(len(dice), dtype=bool), np.nan, dice)
    pairwise = {name: float(np.nanmean(line)) for name, line in zip(voters, others, strict=True) if len(dice) > 1}
    tried: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.get(LONE, {}).items():
            tried.setdefault(name, []).append(value)
    best = max(tried, key=lambda name: float(np.nanmean(tried[name])), default=None)
    finished = []
    for row in rows:
        alone = row.pop(LONE, {})
        columns = {"dice_reference": alone.get(reference), "dice_best_single": alone.get(best), "best_single": best}
        finished.append({**row, "dice_pairwise": pairwise.get(row["subject"]), **columns})
    return finished


def describe(iterations: Sequence[Sequence[Mapping[str, Any]]]) -> Table:
    """Means over the subjects, a line per iteration."""
    shown = Table("iteration", "subjects", *_SHOWN.values())
    for rows in iterations:
        texts = []
        for name in _SHOWN:
            values = [row[name] for row in rows if row.get(name) is not None]
            texts.append(f"{np.nanmean(values):.4f}" if values else "")
        shown.add_row(str(rows[0]["iteration"]), str(rows[0]["n_subjects"]), *texts)
    return shown
