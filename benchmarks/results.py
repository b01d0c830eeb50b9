"""Regenerate RESULTS.md and its figures from the development data: `python benchmarks/results.py`.

Registers up to --pairs pairs of each data set with the recommended settings and `fit.refine.method=demons`, runs every
baseline that is here on the same pairs, sweeps the paper's ablations, and writes the page from all that is under --out.
Everything resumes; `--only NAME` (repeatable: a part of the name of a data set, `ablations`, `scaling` or `page`) runs
a part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import accuracy
import results_ablations
import results_page
import results_scaling
from provenance import REPO, remember

from pipeline.baseline_methods import METHODS, choose
from pipeline.baselines import run_baselines

SETTINGS = ("preset=recommended", "fit.refine.method=demons", "execution.executor=serial")
ABLATED = ("ACDC, ES to ED", "hippocampus, between subjects")
SERIAL = {"executor": "serial"}


def run_data_set(name: str, data: Path, out: Path, pairs: int, methods: list[str]) -> None:
    """The study of a data set, then its baselines."""
    folder, rows = accuracy.groups(data)[name]
    target = out / accuracy.slug(name)
    before = results_ablations.measured(target)
    accuracy.run_group(folder, rows[:pairs], target, list(SETTINGS))
    remember(target, "samreg", anew=results_ablations.measured(target) != before)
    run_methods(name, target, methods)


def run_landmarks(name: str, data: Path, out: Path, methods: list[str]) -> None:
    """The same of a data set with landmarks, and with the baselines that its table shows."""
    folder, rows = accuracy.landmark_groups(data)[name]
    target = out / accuracy.slug(name)
    before = results_ablations.measured(target)
    accuracy.run_landmarks(folder, rows, target, list(SETTINGS))
    remember(target, "samreg", anew=results_ablations.measured(target) != before)
    run_methods(name, target, [method for method in methods if method in results_page.POINTED])


def run_methods(name: str, target: Path, methods: list[str]) -> None:
    """Baselines of a study."""
    for method in methods:
        summary = run_baselines(target / "study", choose([method]), execution=SERIAL)
        remember(target, method, anew=bool(summary.done))
        print(f"{name}: {method} {dict(summary.done)}, {summary.n_failures} failures", flush=True)


def run_ablations(data: Path, out: Path, pairs: int) -> None:
    """Tables 2 to 6 of the paper on the data sets of ABLATED."""
    for name in ABLATED:
        folder, rows = accuracy.groups(data)[name]
        run_data_set(name, data, out, pairs, [])
        results_ablations.segment(folder, rows[:pairs], out / accuracy.slug(name))
        results_ablations.sweep(out / accuracy.slug(name))


def main() -> None:
    """Run what is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPO / "../shared/data")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks/out/results")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--method", action="append", default=[], help="baselines; every one that is here")
    parser.add_argument("--pairs", type=int, default=10, help="of a data set, at most")
    given = parser.parse_args()

    def asked(name: str) -> bool:
        return not given.only or any(part.lower() in name.lower() for part in given.only)

    methods = [baseline.name for baseline in choose(given.method or ["all"])]
    labelled, pointed = accuracy.groups(given.data), accuracy.landmark_groups(given.data)
    for name in filter(asked, labelled):
        run_data_set(name, given.data, given.out, given.pairs, methods)
    for name in filter(asked, pointed):
        run_landmarks(name, given.data, given.out, methods)
    if asked("ablations"):
        run_ablations(given.data, given.out, given.pairs)
    if asked("scaling"):
        results_scaling.run(given.out / "scaling")
    folders = {name: given.out / accuracy.slug(name) for name in (*labelled, *pointed)}
    absent = {name: method.missing() for name, method in METHODS.items() if method.missing()}
    listed = accuracy.read_csv(given.data / "baseline_ants_syn.csv")
    results_page.write(
        REPO / "RESULTS.md",
        REPO / "docs/figures",
        {name: folders[name] for name in labelled},
        ABLATED,
        absent,
        {row["pair"]: float(row["dice_syn"]) for row in listed},
        {name: folders[name] for name in pointed},
        given.out / "scaling",
    )


if __name__ == "__main__":
    main()
