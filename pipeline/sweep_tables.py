"""The tables of a sweep: every pair under every combination, and their means with the settings as columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from storage import tables
from storage.atomic import replace_file
from storage.cohort import subject_key

if TYPE_CHECKING:
    from pipeline.study import Study
    from pipeline.sweep_grid import Combination

DISTANCES = ("tre_mm", "tre_vox", "landmark_tre_mm", "landmark_tre_vox")
_SPREAD = {"dice": 30, **dict.fromkeys(DISTANCES, 70)}
_MEAN = (
    *("dice_before", "dice_affine"),
    *(f"{name}{stage}" for name in DISTANCES for stage in ("_before", "_affine")),
    *("fold_fraction", "n_rois", "seconds_match", "seconds_fit"),
)
Done = Sequence[tuple["Combination", "Study"]]


def write_results(root: Path, axes: Sequence[str], done: Done) -> None:
    """Write `pairs.parquet`, `sweep.parquet` and a figure per axis."""
    from pipeline.sweep_figures import axis_figure

    _write(root / "pairs.parquet", _pair_table(axes, done))
    table = sweep_table(axes, done)
    _write(root / "sweep.parquet", table)
    for axis in axes:
        with replace_file(root / f"{subject_key(axis)}.png") as temporary:
            temporary.write_bytes(axis_figure(table, axis, [other for other in axes if other != axis]))


def sweep_table(axes: Sequence[str], done: Done) -> pa.Table:
    """One row per combination and label, in the order of the grid; label 0 is the mean over labels.

    Columns: `combination`, the axes, `label`, `n_pairs`, `n_failed` (of the combination), then over pairs the mean
    of each metric, for Dice and distances also the standard deviation (`_sd`) and what 30 % of the pairs do worse
    than: `dice_p30`, and `_p70` of a distance. A metric that no pair has is null.
    """
    rows = []
    for combination, study in done:
        metrics = tables.read_table(study.folder.root, "metrics")
        for label in sorted({0, *metrics.column("label").to_pylist()}):
            of_label = metrics.filter(pc.equal(metrics.column("label"), label))
            counts = {"label": label, "n_pairs": of_label.num_rows, "n_failed": len(study.failures.pairs)}
            rows.append({"combination": combination.key, **counts, **_statistics(of_label)})
    chosen = [combination for combination, _ in done]
    repeats = [next(n for n, found in enumerate(chosen) if found.key == row["combination"]) for row in rows]
    names = ["label", "n_pairs", "n_failed", *_statistics(pa.Table.from_batches([], tables.METRICS))]
    columns = {"combination": pa.array([row["combination"] for row in rows], pa.string())}
    columns |= {axis: values.take(pa.array(repeats)) for axis, values in _setting_columns(axes, chosen).items()}
    for name in names:
        kind = pa.int64() if name in ("label", "n_pairs", "n_failed") else pa.float64()
        columns[name] = pa.array([row[name] for row in rows], kind)
    return pa.table(columns)


def _statistics(metrics: pa.Table) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in (*_SPREAD, *_MEAN):
        values = np.asarray(metrics.column(name).drop_null().to_numpy(), dtype=np.float64)
        found[name] = float(values.mean()) if len(values) else None
        if name in _SPREAD:
            share = _SPREAD[name]
            found[f"{name}_sd"] = float(values.std()) if len(values) else None
            found[f"{name}_p{share}"] = float(np.percentile(values, share)) if len(values) else None
    return found


def _pair_table(axes: Sequence[str], done: Done) -> pa.Table:
    """The metrics tables of all combinations below each other, with the settings as columns."""
    settings = _setting_columns(axes, [combination for combination, _ in done])
    pieces = []
    for number, (combination, study) in enumerate(done):
        metrics = tables.read_table(study.folder.root, "metrics")
        rows: npt.NDArray[np.int64] = np.full(metrics.num_rows, number)
        columns = {"combination": pa.array([combination.key] * len(rows), pa.string())}
        columns |= {axis: values.take(pa.array(rows)) for axis, values in settings.items()}
        pieces.append(pa.table(columns | dict(zip(metrics.column_names, metrics.columns, strict=True))))
    return pa.concat_tables(pieces)


def _setting_columns(axes: Sequence[str], combinations: Sequence[Combination]) -> dict[str, pa.Array]:
    """A column per axis, one value per combination; JSON where the values are of several kinds or nested."""
    columns = {}
    for axis in axes:
        values = [combination.settings[axis] for combination in combinations]
        kinds = {type(value) for value in values} - {type(None)}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1 or kinds & {list, dict}:
            values = [json.dumps(value) for value in values]
        columns[axis] = pa.array(values)
    return columns


def _write(path: Path, table: pa.Table) -> None:
    with replace_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def best_distance(table: pa.Table) -> str:
    """The target registration error that the sweep has: of landmarks before labels, in mm before voxels."""
    order = ("landmark_tre_mm", "tre_mm", "landmark_tre_vox", "tre_vox")
    return next((name for name in order if table.column(name).null_count < table.num_rows), order[1])


def describe_sweep(table: pa.Table, axes: Sequence[str]) -> Table:
    """The mean over labels as a table to print; the best Dice and distance are bold."""
    rows = table.filter(pc.equal(table.column("label"), 0)).to_pylist()
    distance = best_distance(table)
    unit = "mm" if distance.endswith("mm") else "voxel"
    titles = ("pairs", "failed", "Dice affine", "Dice", "p30", f"TRE {unit}", "p70", "ROIs", "folded", "s fit")
    before = [_number(_first(rows, f"{name}_before")) for name in ("dice", distance)]
    caption = f"before registration: Dice {before[0]}, TRE {before[1]} {unit}" if all(before) else None
    shown = Table(*(axis.replace(".", ".\n") for axis in axes), *titles, caption=caption)
    best = {"dice": _extreme(rows, "dice", max), distance: _extreme(rows, distance, min)}
    for row in rows:
        cells = [str(row["n_pairs"]), str(row["n_failed"]), _number(row["dice_affine"])]
        for name, percentile in (("dice", "dice_p30"), (distance, f"{distance}_p70")):
            text = "" if row[name] is None else f"{row[name]:.3f} ± {row[f'{name}_sd']:.3f}"
            is_best = row[name] is not None and row[name] == best[name]
            cells += [f"[bold]{text}[/bold]" if is_best else text, _number(row[percentile])]
        cells += [_number(row["n_rois"], 1), _number(row["fold_fraction"], 4), _number(row["seconds_fit"], 2)]
        shown.add_row(*(str(row[axis]) for axis in axes), *cells)
    return shown


def _first(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in rows if row[name] is not None), None)


def _extreme(rows: Sequence[dict[str, Any]], name: str, choose: Any) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return choose(values) if values else None


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
