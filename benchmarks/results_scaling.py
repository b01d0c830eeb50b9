"""Cost of matching by subjects and by ROIs, for RESULTS.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cohort_matching
import provenance
from matplotlib.figure import Figure

SUBJECTS, ROIS_PER_SLICE = (100, 300, 1000), (10, 30, 100)
SAMPLE = 2000
COLUMNS = ("product ms", "in the run ms")


def run(out: Path) -> None:
    """Match about SAMPLE pairs of synthetic cohorts of every size; sizes that are done are kept."""
    out.mkdir(parents=True, exist_ok=True)
    for subjects in SUBJECTS:
        for rois in ROIS_PER_SLICE:
            path = out / f"{subjects}x{rois}.json"
            if path.exists():
                continue
            scratch = out / "scratch"
            row = cohort_matching.measure(scratch, subjects, rois, sample=SAMPLE)
            shutil.rmtree(scratch)
            path.write_text(json.dumps({"row": row, "run": provenance.provenance()}), encoding="utf-8")


def text(out: Path, figures: Path) -> list[str]:
    """The section and its figure; nothing when nothing was measured."""
    paths = [out / f"{subjects}x{rois}.json" for subjects in SUBJECTS for rois in ROIS_PER_SLICE]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    if not found:
        return []
    rows = [each["row"] for each in found]
    _figure(rows).savefig(figures / "results_scaling.png", dpi=90)
    sources = sorted({provenance.shown(each["run"]) for each in found})
    return [
        "## Cost of matching\n",
        f"Synthetic cohorts of 24 slices, about {SAMPLE:,} of their pairs (whole tiles), two Ray workers "
        "(`benchmarks/cohort_matching.py`). Milliseconds are those of the processor, of one pair; `product` is the "
        f"bare product of the two prototype matrices. {'; '.join(sources)}.\n",
        cohort_matching.markdown(rows) + "\n",
        "![Cost of a pair by ROIs](docs/figures/results_scaling.png)\n",
    ]


def _figure(rows: list[dict[str, str]]) -> Figure:
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for place, subjects in enumerate(sorted({int(row["subjects"]) for row in rows})):
        own = [row for row in rows if int(row["subjects"]) == subjects]
        rois = [int(row["ROIs each"]) for row in own]
        for column, style in zip(COLUMNS, ("--", "-o"), strict=True):
            label = f"{subjects} subjects, {column.removesuffix(' ms')}"
            axes.loglog(rois, [float(row[column]) for row in own], style, ms=3, color=f"C{place}", label=label)
    axes.set_xlabel("ROIs of a subject")
    axes.set_ylabel("processor ms a pair")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    return figure
