"""Planned against measured: `python benchmarks/plan_accuracy.py [--data ../shared/data] [--out DIR]`.

Three cohorts of different size. For each: `samreg plan`, `samreg plan --probe`, then the study in this process, one
thread. Seconds are those of the processor, so that other load does not count. Prints ratios planned / measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

from pipeline.config import make_config
from pipeline.plan import START_SECONDS, make_plan
from pipeline.probe import folder_bytes
from pipeline.request import make_request
from pipeline.study import run_study
from storage import tables

COHORTS = {"cardiac_2d_cohort": 16, "msd_hippocampus": 12, "mnms_cardiac": 8}  # subjects of each


def write_manifest(data: Path, dataset: str, subjects: int, target: Path) -> Path:
    """The first subjects of a data set, with their labels."""
    with (data / "cohorts.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["dataset"] == dataset][:subjects]
    folder = (data / dataset).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["subject", "image", "label"])
        writer.writerows([f"s{n:02d}", folder / row["image"], folder / row["label"]] for n, row in enumerate(rows))
    return target


def main() -> None:
    """A line of JSON per cohort."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/plan"))
    given = parser.parse_args()
    config = make_config({"execution": {"executor": "serial"}})
    for dataset, subjects in COHORTS.items():
        study = given.out / dataset
        shutil.rmtree(study, ignore_errors=True)
        cohort = write_manifest(given.data, dataset, subjects, given.out / f"{dataset}.csv")
        request = make_request(config, cohort, "star")
        plans = {"rule": make_plan(request, study), "probe": make_plan(request, study, probe=True)}
        run_study(request.config, request.cohort, study, request.pairs, request.unknown)
        units = tables.read_table(study, "units").to_pylist()
        measured = {
            "seconds": sum(row["processor_seconds"] for row in units),
            "worker_bytes": max(row["peak_memory_bytes"] for row in units),
            "store_bytes": folder_bytes(study / "embeddings.zarr"),
            "transform_bytes": folder_bytes(study / "transforms"),
        }
        by_stage = {
            stage: round(sum(row["processor_seconds"] for row in units if row["stage"] == stage), 2)
            for stage in ("encode", "prototypes", "match", "fit")
        }
        ratios = {
            name: {
                what: round((getattr(plan, what) - (START_SECONDS if what == "seconds" else 0)) / value, 2)
                for what, value in measured.items()
            }
            for name, plan in plans.items()
        }
        shown = {"cohort": dataset, "slices": plans["rule"].slices, "measured": measured, "stages": by_stage}
        print(json.dumps({**shown, "planned / measured": ratios}), flush=True)


if __name__ == "__main__":
    main()
