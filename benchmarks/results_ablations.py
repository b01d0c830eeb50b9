"""The ablations of the paper's Tables 2 to 6, for RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import accuracy
import numpy as np
import provenance
import pyarrow.parquet as pq

from pipeline.sweep import run_sweep
from pipeline.sweep_grid import read_grid
from storage import tables

SWEPT = (3, 4, 5, 6)
SEGMENTERS = {"component_tree": "default segmenter", "labels": "labels as masks"}
FOLDS = 10
_TABLE2 = ("dice", "tre_mm", "pseudo_dice", "pseudo_tre_mm")


def sweep(target: Path) -> None:
    """Tables 3 to 6 on the study of a data set, without the refinement."""
    for table in SWEPT:
        grid = read_grid(provenance.REPO / f"configs/sweeps/table{table}.yaml", (), ["fit.refine.method=none"])
        summary = run_sweep(target / "study", grid, name=f"table{table}", execution={"executor": "serial"})
        anew = any(count.done for _, counts in summary.results for count in counts.values())
        provenance.remember(target, f"table{table}", anew)


def segment(folder: Path, rows: list[tuple[str, accuracy.Row]], target: Path) -> None:
    """Table 2: the data set with each segmenter, and held-out ROIs."""
    for name in SEGMENTERS:
        out, settings = target / "table2" / name, [f"segmenter={name}", f"evaluate.pseudo_folds={FOLDS}"]
        before = measured(out)
        accuracy.run_group(folder, rows, out, ["execution.executor=serial", *settings])
        provenance.remember(out, "samreg", measured(out) != before)


def measured(target: Path) -> list[str]:
    """Keys of the pairs of a study that are done."""
    return sorted(set(tables.read_table(target / "study", "metrics", ["key"]).column("key").to_pylist()))


def text(folders: Mapping[str, Path]) -> list[str]:
    """The section: what there is of the data sets."""
    parts = [part for name, folder in folders.items() for part in (*_segmenters(name, folder), *_sweeps(name, folder))]
    if not parts:
        return []
    introduction = (
        "Table 2 has the preset `recommended`; the others the paper's matching (Algorithm 1, `configs/sweeps/`); none "
        "is refined. The pseudo ROIs of Table 2 are those of the fit itself, each left out in one of "
        f"{FOLDS} fits. In place of the paper's trained networks stand the labels themselves, which is what a perfect "
        "network would give (Case 1).\n"
    )
    return [f"## Ablations\n\n{introduction}", *parts]


def missing(folders: Mapping[str, Path]) -> list[str]:
    """What there is not."""
    lines = []
    for name, folder in folders.items():
        lost = [f"Table {table}" for table in SWEPT if f"table{table}" not in provenance.remembered(folder)]
        if not any(_segmenters(name, folder)):
            lost.insert(0, "Table 2")
        lines += [f"- ablations on {name}: {', '.join(lost)}"] if lost else []
    return lines


def _segmenters(name: str, folder: Path) -> Iterator[str]:
    lines, sources = [], []
    for segmenter, shown in SEGMENTERS.items():
        place = folder / "table2" / segmenter
        rows = [row for row in tables.read_table(place / "study", "metrics").to_pylist() if row["label"] == 0]
        if rows:
            sources.append(provenance.shown(provenance.remembered(place)["samreg"]))
            values = [_mean([row[column] for row in rows]) for column in _TABLE2]
            lines.append(f"| {shown} | {len(rows)} | {' | '.join(values)} |")
    if lines:
        head = "| segmenter | pairs | label Dice | label TRE mm | pseudo Dice | pseudo TRE mm |"
        yield f"**Table 2** on {name} ({'; '.join(dict.fromkeys(sources))}):\n"
        yield "\n".join([head, "|---|---|---|---|---|---|", *lines]) + "\n"


def _sweeps(name: str, folder: Path) -> Iterator[str]:
    for table in SWEPT:
        run = provenance.remembered(folder).get(f"table{table}")
        if run is None:  # a sweep that was cut short has a table, too
            continue
        path = folder / f"study/sweeps/table{table}/sweep.parquet"
        rows = [row for row in pq.read_table(path).to_pylist() if row["label"] == 0]
        axis = list(rows[0])[1]
        lines = [f"| `{axis}` | pairs | failed | Dice | ROI pairs |", "|---|---|---|---|---|"]
        for row in rows:
            cells = [row["n_pairs"], row["n_failed"], f"{row['dice']:.3f} ± {row['dice_sd'] or 0:.3f}"]
            lines.append(f"| {row[axis]} | " + " | ".join(map(str, cells)) + f" | {row['n_rois']:.0f} |")
        yield f"**Table {table}** on {name} ({provenance.shown(run)}):\n"
        yield "\n".join(lines) + "\n"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f} ± {np.std(known, ddof=min(1, len(known) - 1)):.3f}" if known else "–"
