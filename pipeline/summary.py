"""The summary that a run prints: counts per stage and mean metrics per label."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from storage import tables

if TYPE_CHECKING:
    from pipeline.study import StudySummary

COLUMNS = {
    "dice_before": "Dice before",
    "dice_centered": "centred",
    "dice_affine": "affine",
    "dice": "after",
    "tre_mm_before": "TRE mm before",
    "tre_mm": "after",
    "fold_fraction": "folded",
}


def print_summary(console: Console, out: Path, summary: StudySummary) -> None:
    """Print the counts of every stage and, where labels exist, the mean metrics."""
    counts = Table("stage", "done", "reused", "failed", "seconds")
    for stage in summary.stages:
        values = (stage.done, stage.reused, stage.failed)
        counts.add_row(stage.stage, *(str(v) for v in values), f"{stage.seconds:.1f}")
    console.print(str(out), soft_wrap=True)
    console.print(counts)
    metrics = tables.read_table(out, "metrics", ["label", *COLUMNS])
    if metrics.num_rows and metrics.column("dice").null_count < metrics.num_rows:
        console.print(_metrics_table(metrics))
    note = f"; {summary.n_failures} failures, see samreg status {out}" if summary.n_failures else ""
    console.print(f"{summary.seconds:.1f} s{note}")


def _metrics_table(metrics: pa.Table) -> Table:
    """Means over pairs, one row per label; label 0 is the mean over labels."""
    shown = Table("label", "pairs", *COLUMNS.values())
    for label in sorted(pc.unique(metrics.column("label")).to_pylist()):
        rows = metrics.filter(pc.equal(metrics.column("label"), label))
        means = [pc.mean(rows.column(name)).as_py() for name in COLUMNS]
        texts = ["" if value is None else f"{value:.3f}" for value in means]
        shown.add_row("mean" if label == 0 else str(label), str(rows.num_rows), *texts)
    return shown
