"""Regenerate RESULTS.md and its figures from the development data: `python benchmarks/results.py`.

Registers up to --pairs pairs of each data set with the recommended settings and `fit.refine.method=demons`, runs every
baseline that is here on the same pairs, sweeps the paper's ablations, and writes the page from all that is under --out.
Everything resumes; `--only NAME` (repeatable: a part of the name of a data set, `ablations` or `page`) runs a part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import accuracy
import results_page

from pipeline.baseline_methods import METHODS, choose
from pipeline.baselines import run_baselines
from pipeline.process import own_cores
from pipeline.sweep import run_sweep
from pipeline.sweep_grid import read_grid
from storage import tables

REPO = Path(__file__).resolve().parents[1]
SETTINGS = ("preset=recommended", "fit.refine.method=demons", "execution.executor=serial")
ABLATED = ("ACDC, ES to ED", "hippocampus, between subjects")
SERIAL = {"executor": "serial"}


def provenance() -> dict[str, str]:
    """Where and when something was measured, by which commit."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()

    computing = ("storage", "actors", "pipeline", "configs")
    changed = " with changes" if git("status", "--porcelain", "--", *computing) else ""
    return {
        "machine": f"{_processor()}, {own_cores()} cores, load {os.getloadavg()[0]:.0f}",
        "commit": git("rev-parse", "--short=10", "HEAD") + changed,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def remember(folder: Path, what: str, anew: bool = True) -> None:
    """Note the provenance of something under a data set's folder, if it was measured anew or has none yet."""
    path = folder / "provenance.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if what in known and not anew:
        return
    path.write_text(json.dumps({**known, what: provenance()}, indent=1), encoding="utf-8")


def run_data_set(name: str, data: Path, out: Path, pairs: int, methods: list[str]) -> None:
    """The study of a data set, then its baselines."""
    folder, rows = accuracy.groups(data)[name]
    target = out / accuracy.slug(name)
    before = _measured(target)
    accuracy.run_group(folder, rows[:pairs], target, list(SETTINGS))
    remember(target, "samreg", anew=_measured(target) != before)
    for method in methods:
        summary = run_baselines(target / "study", choose([method]), execution=SERIAL)
        remember(target, method, anew=bool(summary.done))
        print(f"{name}: {method} {dict(summary.done)}, {summary.n_failures} failures", flush=True)


def _measured(target: Path) -> list[str]:
    """Keys of the pairs of a study that are done."""
    return sorted(set(tables.read_table(target / "study", "metrics", ["key"]).column("key").to_pylist()))


def run_ablations(data: Path, out: Path, pairs: int) -> None:
    """Tables 3 to 6 of the paper, without the refinement, on the data sets of ABLATED."""
    for name in ABLATED:
        run_data_set(name, data, out, pairs, [])
        target = out / accuracy.slug(name)
        for table in (3, 4, 5, 6):
            grid = read_grid(REPO / f"configs/sweeps/table{table}.yaml", (), ["fit.refine.method=none"])
            run_sweep(target / "study", grid, name=f"table{table}", execution=SERIAL)
            remember(target, f"table{table}")


def main() -> None:
    """Run what is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPO / "../shared/data")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks/out/results")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--method", action="append", default=[], help="baselines; every one that is here")
    parser.add_argument("--pairs", type=int, default=10, help="of a data set, at most")
    given = parser.parse_args()
    methods = [baseline.name for baseline in choose(given.method or ["all"])]
    for name in accuracy.groups(given.data):
        if not given.only or any(part.lower() in name.lower() for part in given.only):
            run_data_set(name, given.data, given.out, given.pairs, methods)
    if not given.only or "ablations" in given.only:
        run_ablations(given.data, given.out, given.pairs)
    names = {name: given.out / accuracy.slug(name) for name in accuracy.groups(given.data)}
    absent = {name: method.missing() for name, method in METHODS.items() if method.missing()}
    listed = accuracy.read_csv(given.data / "baseline_ants_syn.csv")
    elsewhere = {row["pair"]: float(row["dice_syn"]) for row in listed}
    results_page.write(REPO / "RESULTS.md", REPO / "docs/figures", names, ABLATED, absent, elsewhere)


if __name__ == "__main__":
    main()
