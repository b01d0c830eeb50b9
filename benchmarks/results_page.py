"""The text of RESULTS.md and its figures, from the studies that benchmarks/results.py has made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import results_ablations
import results_scaling
import yaml
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from pipeline.baseline_methods import METHODS
from pipeline.baseline_table import method_rows
from storage import tables

Row = Mapping[str, Any]
OURS, REFINED, SYN = "samreg", "samreg refined", "ants-syn"
FIRST = ("before", "samreg affine", OURS, REFINED)
EXPECTED = ("identity", "centre", "moments", "affine", "bspline", "demons", SYN, "elastix")
POINTED = ("before", "samreg affine", OURS, REFINED, "affine", SYN)
MIB = 2**20

INTRODUCTION = """# Results

Written by `python benchmarks/results.py` from the development data, which are not part of this repository. Default
segmenter (`component_tree`, which needs no weights), preset `recommended`, nothing tuned per data set.

- `samreg` is the field of the matched regions alone, `samreg affine` its affine part, `samreg refined` the same field
  after `fit.refine.method=demons`. Baselines are those of `samreg baseline` with their defaults, on the same pairs,
  intensities and labels, one thread each. The baseline `demons` is the refinement itself from an affine registration by
  mutual information: what it lacks against `samreg refined` is the regions.
- Every method sees the 8-bit intensities of the study. `SyN elsewhere` is ANTs SyN on the original ones, run by others;
  its Dice came with the data. `folds` of 100 % in a pair is an affine map that mirrors.
- Dice is the mean over the labels of a pair, then mean ± standard deviation over pairs; `30th` is the Dice that 30 % of
  the pairs do not reach. `p` is of a two-sided Wilcoxon signed-rank test of the pairs' Dice against `samreg refined`;
  with fewer than six pairs it cannot fall below .05, and so is left out. `won` counts the pairs in which `samreg
  refined` has the higher Dice.
- `s` is wall time of the registration alone on a machine with other load; `processor s` hardly depends on that. For
  `samreg refined` it counts everything from the encoded images to the written metrics, and in brackets with encoding,
  whose cost is shared by all pairs of a subject. `MiB` is the largest memory of the process until then, with libraries
  and whatever it had run before.
"""

PAPER = """## The paper's own numbers

Table 1 of the paper, cardiac (ACDC, ES to ED), Dice in %, as quoted:

| NiftyReg | VoxelMorph | LabelReg | SAMReg with SAM | with MedSAM | with SAMed2D | with SAMSlim | with SAMHQ |
|---|---|---|---|---|---|---|---|
| 9.93±2.21 | 60.10±3.95 | 78.97±2.42 | 80.28±3.67 | 78.66±3.71 | 77.52±3.75 | 78.23±3.67 | 79.11±3.62 |

These are not comparable with the numbers above, because they come from other images (up to 150 exams, of which two
are here), another segmenter (SAM's weights are not here) and, it seems, another way to measure: NiftyReg's 9.93 % is
far below what pairs of this kind have here without any registration.
"""


def write(
    page: Path,
    figures: Path,
    names: Mapping[str, Path],
    ablated: Sequence[str],
    absent: Mapping[str, str],
    elsewhere: Mapping[str, float],
    landmarks: Mapping[str, Path],
    scaling: Path,
) -> None:
    """Write the page and its figures.

    Args:
        names: folder of each data set with labels; `landmarks` of each with points, `scaling` of the cost of matching.
        ablated: data sets with sweeps.
        absent: why baselines cannot run here.
        elsewhere: Dice of ANTs SyN by pair that came with the data.
    """
    found = {
        name: _methods(folder / "study") for name, folder in names.items() if (folder / "provenance.json").exists()
    }
    figures.mkdir(parents=True, exist_ok=True)
    _dice_figure(found).savefig(figures / "results_dice.png", dpi=90)
    parts = [INTRODUCTION, "![Dice of every pair by method](docs/figures/results_dice.png)\n"]
    for name, methods in found.items():
        parts += [f"## {name}\n", _source(names[name]), _summary(names[name] / "study", methods)]
        parts += [_per_label(names[name] / "study"), _against_syn(methods, elsewhere)]
    ablations = {name: names[name] for name in ablated}
    parts += [*_landmarks(landmarks), PAPER, *results_ablations.text(ablations)]
    parts += results_scaling.text(scaling, figures)
    parts.append(_not_run(names, found, absent, results_ablations.missing(ablations)))
    page.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _methods(study: Path) -> dict[str, dict[str, Row]]:
    """Rows of label 0 by method and pair; `before` and `samreg affine` are columns of the study's own."""
    rows = {method: {row["pair"]: row for row in found} for method, found in method_rows(study).items()}
    own = rows.get(OURS, {})
    for method, ending in (("before", "_before"), ("samreg affine", "_affine")):
        rows[method] = {
            pair: {"dice": row[f"dice{ending}"], "hd95_mm": row.get(f"hd95_mm{ending}")} for pair, row in own.items()
        }
    return {method: rows[method] for method in (*FIRST, *METHODS) if method in rows}


def _dice(rows: Mapping[str, Row], pairs: Iterable[str]) -> np.ndarray:
    return np.array([rows[pair]["dice"] for pair in pairs])


def _source(folder: Path) -> str:
    """Which machine, commit, configuration and day the numbers are of."""
    digest = yaml.safe_load((folder / "study/run.yaml").read_text(encoding="utf-8"))["digests"]["config"]
    by_run: dict[str, list[str]] = {}
    for what, run in provenance.remembered(folder).items():
        if not what.startswith("table"):
            by_run.setdefault(provenance.shown(run), []).append(what)
    lines = [f"{', '.join(whats)}: {run}" for run, whats in by_run.items()]
    return f"Configuration {digest[:12]}. " + ". ".join(lines) + ".\n"


def _summary(study: Path, methods: Mapping[str, Mapping[str, Row]]) -> str:
    best = methods.get(REFINED, {})
    lines = [
        "| method | pairs | Dice | 30th | HD95 mm | folds | s | processor s | MiB | p | won |",
        "|---|" + "---|" * 10,
    ]
    for method, rows in methods.items():
        dice = _dice(rows, rows)
        cells = [f"{len(rows)}", f"{dice.mean():.3f} ± {dice.std(ddof=min(1, len(dice) - 1)):.3f}"]
        cells += [f"{np.percentile(dice, 30):.3f}", _mean(rows, "hd95_mm", ".2f"), _mean(rows, "fold_fraction", ".3%")]
        cells += [
            _mean(rows, "seconds", ".2f")
            if "seconds" in next(iter(rows.values()))
            else _mean(rows, "seconds_fit", ".2f")
        ]
        cells += list(_cost(study, method, rows)) + list(_compared(best, rows) if method != REFINED else ("", ""))
        lines.append(f"| {f'**{method}**' if method == REFINED else method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: Mapping[str, Row], name: str, shown: str) -> str:
    values = [row[name] for row in rows.values() if row.get(name) is not None]
    return format(float(np.mean(values)), shown) if values else "–"


def _cost(study: Path, method: str, rows: Mapping[str, Row]) -> tuple[str, str]:
    """Processor seconds of a pair and the largest memory, MiB."""
    if method != REFINED:
        peaks = [row["peak_memory_bytes"] for row in rows.values() if row.get("peak_memory_bytes")]
        return _mean(rows, "processor_seconds", ".2f"), f"{max(peaks) / MIB:.0f}" if peaks else "–"
    made_by = {run["run"]: run["config_digest"] for run in tables.read_table(study, "runs").to_pylist()}
    done = [row for row in tables.read_table(study, "units").to_pylist() if not row["failed"]]
    newest = {row["stage"]: made_by[row["run"]] for row in sorted(done, key=lambda row: row["run"])}
    units = [row for row in done if made_by[row["run"]] == newest[row["stage"]]]  # stages that went on are not repeated
    seconds: Counter[str] = Counter()
    for row in units:
        seconds[row["stage"]] += row["processor_seconds"]
    of_pairs = seconds["match"] + seconds["fit"]
    peak = max(row["peak_memory_bytes"] or 0 for row in units)
    return f"{of_pairs / len(rows):.2f} ({sum(seconds.values()) / len(rows):.2f})", f"{peak / MIB:.0f}"


def _compared(best: Mapping[str, Row], rows: Mapping[str, Row]) -> tuple[str, str]:
    """p of the paired test, and how many pairs `samreg refined` wins."""
    both = [pair for pair in best if pair in rows]
    if not both:
        return "–", "–"
    difference = _dice(best, both) - _dice(rows, both)
    testable = len(both) >= 6 and difference.any()
    return f"{wilcoxon(difference).pvalue:.2g}" if testable else "–", f"{int((difference > 0).sum())} of {len(both)}"


def _per_label(study: Path) -> str:
    """Mean Dice of each label by method."""
    own = tables.read_table(study, "metrics").to_pylist()
    others = tables.read_table(study / "baselines", "baseline_metrics").to_pylist()
    cells: dict[str, dict[int, list[float]]] = {}
    for row in own:
        for method, column in zip(FIRST, ("dice_before", "dice_affine", "dice", "dice_refined"), strict=True):
            if row[column] is not None:
                cells.setdefault(method, {}).setdefault(row["label"], []).append(row[column])
    for row in others:
        if row["dice"] is not None:
            cells.setdefault(row["method"], {}).setdefault(row["label"], []).append(row["dice"])
    cells = {method: cells[method] for method in (*FIRST, *METHODS) if method in cells}
    labels = sorted({label for found in cells.values() for label in found} - {0})
    lines = ["| Dice of label | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    for label in labels:
        shown = (f"{np.mean(found[label]):.3f}" if label in found else "–" for found in cells.values())
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _against_syn(methods: Mapping[str, Mapping[str, Row]], elsewhere: Mapping[str, float]) -> str:
    """Pair by pair."""
    if SYN not in methods or REFINED not in methods:
        return ""
    syn, ours, best = methods[SYN], methods[OURS], methods[REFINED]
    both = [pair for pair in best if pair in syn]
    gain = float((_dice(best, both) - _dice(syn, both)).mean())
    verdict = "at or above" if gain >= 0 else "below"
    lines = [
        f"Pair by pair against ANTs SyN: `samreg refined` is {verdict} it in mean Dice ({gain:+.3f})."
        f"{_against(elsewhere, best)}\n",
        "| pair | before | samreg | samreg refined | SyN | refined − SyN | SyN elsewhere |",
        "|---|---|---|---|---|---|---|",
    ]
    for pair in both:
        values = [found[pair]["dice"] for found in (methods["before"], ours, best, syn)]
        shown = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| `{pair}` | {shown} | {values[2] - values[3]:+.3f} | {elsewhere.get(pair, '–')} |")
    return "\n".join(lines) + "\n"


def _against(elsewhere: Mapping[str, float], best: Mapping[str, Row]) -> str:
    """The same against SyN on the original intensities, where every pair has that."""
    if not all(pair in elsewhere for pair in best):
        return ""
    theirs = np.array([elsewhere[pair] for pair in best])
    gain = float((_dice(best, best) - theirs).mean())
    return f" Against SyN elsewhere, with a mean of {theirs.mean():.3f}: {gain:+.3f}."


def _landmarks(names: Mapping[str, Path]) -> list[str]:
    """Mean landmark distance of every method on the data sets that have points in place of labels."""
    lines, sources = [], []
    for name, folder in names.items():
        methods = method_rows(folder / "study")
        own = methods.get(OURS)
        if not own:
            continue
        unit = "mm" if own[0]["landmark_tre_mm"] is not None else "vox"
        for method, ending in (("before", "_before"), ("samreg affine", "_affine")):
            methods[method] = [{f"landmark_tre_{unit}": row[f"landmark_tre_{unit}{ending}"]} for row in own]
        cells = [_mean({str(n): row for n, row in enumerate(methods.get(m, []))}, f"landmark_tre_{unit}", ".1f")
                 for m in POINTED]  # fmt: skip
        lines.append(f"| {name} | {len(own)} | {'mm' if unit == 'mm' else 'px'} | {' | '.join(cells)} |")
        sources += [provenance.shown(run) for run in provenance.remembered(folder).values()]
    if not lines:
        return []
    head = f"| data | pairs | | {' | '.join(POINTED)} |"
    return [
        f"## Landmarks\n\nMean distance of landmarks. {'; '.join(dict.fromkeys(sources))}.\n",
        "\n".join([head, "|---|---|---|" + "---|" * len(POINTED), *lines]) + "\n",
    ]


def _not_run(
    names: Mapping[str, Path], found: Mapping[str, Any], absent: Mapping[str, str], ablations: Sequence[str]
) -> str:
    """What the page lacks, so that nobody takes silence for a result."""
    lines = [f"- {name}: nothing" for name in names if name not in found]
    for name, methods in found.items():
        pairs = len(methods.get(OURS, {}))
        lost = [f"{m} ({len(methods.get(m, {}))} of {pairs})" for m in EXPECTED if len(methods.get(m, {})) < pairs]
        lines += [f"- {name}: {', '.join(lost)}"] if lost else []
    lines += [*ablations, *(f"- {name}: {why}" for name, why in absent.items())]
    lines.append("- the networks of Table 2 and any SAM variant: their weights are not here")
    return "## What was not run\n\n" + "\n".join(lines) + "\n"


def _dice_figure(found: Mapping[str, Mapping[str, Mapping[str, Row]]]) -> Figure:
    figure = Figure(figsize=(3.2 * max(1, len(found)), 3.4), layout="constrained")
    for panel, (name, methods) in enumerate(found.items(), 1):
        axes = figure.add_subplot(1, len(found), panel)
        for place, rows in enumerate(methods.values()):
            dice = _dice(rows, rows)
            axes.plot(np.full(len(dice), place), dice, "o", ms=3, alpha=0.5, color="C0")
            axes.plot(place, dice.mean(), "_", ms=16, mew=2, color="C1")
        axes.set_xticks(range(len(methods)), list(methods), rotation=90, fontsize=7)
        axes.set_title(name, fontsize=8)
        axes.set_ylabel("Dice" if panel == 1 else "", fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    return figure
