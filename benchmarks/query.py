"""Queries: how good the answers are on hearts with labels, and how fast on a synthetic cohort.

    python benchmarks/query.py --data ../shared/data --out benchmarks/out/query
    python benchmarks/query.py --synthetic 1000 --out /tmp/query

Quality: every subject is asked for a label, all others answer. `found` is the share of subjects with an answer, `right`
the share of these more than half of which is the label, `Dice` that of answer and label in 3D with 0 where nothing was
found, `ROIs` the same for the best stored ROI of every slice, which is what any answer can reach; `surer half` are the
answers of the upper half of each cohort by confidence. Confidence is judged on the labels that ROIs show. `straight` is
without relays, `alone` that by similarity without agreement in space. Speed: opening the store with and without an
index, then queries for tracks of different subjects; seconds of the clock and of the processor (both cores together),
which is what another load on the machine leaves alone.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import csv
import itertools
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.synthetic_cohort import write_cohort
from pipeline.algorithms.metrics import dice
from pipeline.algorithms.query import QueryConfig
from pipeline.config import load_config
from pipeline.query import Study, ask, open_study
from pipeline.query_answers import answer_with_relays
from pipeline.query_region import Region, Seed
from pipeline.study import run_study
from storage.cohort import read_cohort
from storage.images import read_labels

GROUPS = {"mnms_cardiac": (1, 2, 3), "cardiac_2d_cohort": (1, 2, 3), "msd_hippocampus": (1, 2)}
BINS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
Labels = dict[str, npt.NDArray[np.int32]]


def encoded(data: Path, group: str, out: Path, limit: int) -> Study:
    """The cohort of a group, encoded."""
    out.mkdir(parents=True, exist_ok=True)
    with (data / "cohorts.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["dataset"] == group][:limit]
    with (out / "cohort.csv").open("w", newline="") as stream:
        files = [
            [Path(r["image"]).name.split(".")[0], *((data / group / r[c]).resolve() for c in ("image", "label"))]
            for r in rows
        ]
        csv.writer(stream).writerows([["subject", "image", "label"], *files])
    run_study(
        load_config(None, ["execution.executor=serial"]),
        read_cohort(out / "cohort.csv"),
        out / "study",
        until="prototypes",
    )
    return open_study(out / "study")


def best_rois(study: Study, name: str, truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The stored ROI of every slice that overlaps the label best."""
    rows, stored = study.index.rows(name), study.folder.store.read(name)
    masks, slices = stored.masks(study.index.columns["roi"][rows]), study.index.columns["slice"][rows]
    found = np.zeros_like(truth)
    for z in np.flatnonzero(truth.any(axis=(1, 2))):
        here = masks[slices == z]
        if len(here):
            found[z] = here[np.argmax((here & truth[z]).sum(axis=(1, 2)) / (here | truth[z]).sum(axis=(1, 2)))]
    return found


def quality(
    study: Study, settings: QueryConfig, label: int, labels: Labels
) -> tuple[str, list[tuple[float, float]], float]:
    """A row of the table, (confidence, share of the answer that is right) of every answer, and what ROIs can reach."""
    index, reach = study.index, []
    rows: list[tuple[float, float, float, float]] = []
    masks = {n: study.folder.store.read(n).masks(index.columns["roi"][index.rows(n)]) for n in index.subjects}
    seconds = 0.0
    for name in index.subjects:
        truth = labels[name] == label
        if not truth.any():
            continue
        reach.append(dice(best_rois(study, name, truth), truth))
        start = time.process_time()
        result = ask(study, name, Seed("label", (label,)), settings)
        seconds += time.process_time() - start
        half = len(result.ranked) // 2
        for rank, position in enumerate(result.ranked.tolist()):
            other = index.subjects[position]
            answers = result.found.of_subject(position)
            found, sought = np.zeros_like(labels[other], bool), labels[other] == label
            for row in result.found.row[answers].tolist():
                found[index.columns["slice"][row]] |= masks[other][row - index.start[position]]
            right = float((found & sought).sum() / max(1, found.sum()))
            rows.append((float(result.found.total[position]), right, float(dice(found, sought)), float(rank < half)))
    values = np.array(rows)
    answered = values[values[:, 0] > 0]
    line = (
        f"| {label} | {len(values)} | {len(answered) / len(values):.2f} | {(answered[:, 1] > 0.5).mean():.2f} "
        f"| {values[:, 2].mean():.3f} | {values[values[:, 3] > 0, 2].mean():.3f} | {np.mean(reach):.3f} "
        f"| {1000 * seconds / len(reach):.0f} |"
    )
    return line, [(row[0], row[1]) for row in answered], float(np.mean(reach))


def print_quality(options: argparse.Namespace) -> None:
    """Two tables: quality by group and label, and what confidence means."""
    print("| group | label | answers asked | found | right | Dice | surer half | ROIs | ms a query |\n|" + "---|" * 9)
    known: list[tuple[float, float]] = []
    for group, values in GROUPS.items():
        study = encoded(options.data, group, options.out / group, options.subjects)
        labels = {
            name: read_labels(study.subject(name).label, study.folder.store.geometry(name))
            for name in study.index.subjects
        }
        spatial = replace(study.config.match.spatial, min_overlap=-1.0, calibration=(-6.0, 8.0, 0.0))
        config = study.config.model_copy(update={"match": replace(study.config.match, spatial=spatial)})
        straight = QueryConfig(relays=0)
        variants = {
            "": (study, QueryConfig()),
            ", straight": (study, straight),
            ", alone": (replace(study, config=config), straight),
        }
        for title, (variant, settings) in variants.items():
            for label in values:
                line, pairs, reach = quality(variant, settings, label, labels)
                print(f"| {group}{title} {line}", flush=True)
                known += pairs if not title and reach > 0.5 else []
    if not known:
        return
    confidence, right = np.array(known).T
    print("\n| confidence of a subject | subjects | mean | share of the answer that is right |\n|---|---|---|---|")
    for low, high in itertools.pairwise(BINS):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            means = f"{confidence[inside].mean():.2f} | {right[inside].mean():.2f}"
            print(f"| {low:.1f} to {high:.1f} | {inside.sum()} | {means} |")


def synthetic(subjects: int, out: Path) -> Path:
    """A study of 24 slices and 30 ROIs in each, of 153 numbers, as the prototype stage leaves it; made once."""
    if not (out / "study" / "run.yaml").exists():
        shutil.rmtree(out, ignore_errors=True)
        config = load_config(None, ["execution.executor=serial"])
        cohort = write_cohort(config, out, subjects, 24, 30, 153)
        run_study(config, cohort, out / "study", until="prototypes")
    return out / "study"


def print_speed(root: Path, queries: int) -> None:
    """Clock and processor seconds of opening and of asking."""

    def timed(what: str, start: tuple[float, float], note: str = "") -> None:
        wall, used = time.perf_counter() - start[0], time.process_time() - start[1]
        print(f"| {what} | {wall:.2f} | {used:.2f} | {note} |", flush=True)

    shutil.rmtree(root / "query_index", ignore_errors=True)
    print("| | s | processor s | |\n|---|---|---|---|")
    for what in ("opening, the first time", "opening"):
        start = time.perf_counter(), time.process_time()
        study = open_study(root)
        size = sum(column.nbytes for column in study.index.columns.values()) / 2**20
        timed(
            what,
            start,
            f"{len(study.index.subjects)} subjects, {int(study.index.start[-1])} ROIs, index {size:.0f} MiB",
        )
    columns = study.index.columns
    for number in range(queries):
        name = study.index.subjects[number * 7 % len(study.index.subjects)]
        rows = study.index.rows(name)
        track = np.flatnonzero(columns["track"][rows] == number)
        start = time.perf_counter(), time.process_time()
        own = {
            key: np.asarray(columns[key][rows][track], np.float64)
            for key in ("centroid_mm", "covariance_mm2", "area_mm2")
        }
        prototypes = columns["prototypes"][rows][track].astype(np.float32)
        region = Region(columns["slice"][rows][track], np.zeros((len(track), 1, 1), bool), prototypes, **own)
        found = answer_with_relays(study.index, name, region, study.config.match, QueryConfig())
        timed(f"region of {len(track)} slices", start, f"found in {(found.total > 0).mean():.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/query"))
    parser.add_argument("--subjects", type=int, default=20, help="of a group, at most")
    parser.add_argument("--synthetic", type=int, help="measure the speed on so many synthetic subjects instead")
    parser.add_argument("--queries", type=int, default=5)
    options = parser.parse_args()
    if options.synthetic:
        print_speed(synthetic(options.synthetic, options.out / f"{options.synthetic}"), options.queries)
    else:
        print_quality(options)


if __name__ == "__main__":
    main()
