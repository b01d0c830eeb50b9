"""A real study killed at random moments against one left alone: `python benchmarks/interrupted.py --out DIR`.

40 subjects of the hippocampus crops in ../shared/data and all their 780 pairs, with a short fit, on two Ray workers.
The driver is killed (SIGKILL) at ten moments, random in the number of finished units, and the same command started
again.
Prints whether the tables are equal, and how many pairs were done a second time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from storage import tables

FIT = {"levels": [{"stride": 2, "control": 8.0, "tau": 2.0, "iterations": 3}], "affine_iterations": 4}
TIMES = ["seconds_match", "seconds_fit", "seconds_refine", "seconds_inverse"]


def write_cohort(data: Path, out: Path, subjects: int) -> Path:
    """A manifest of the first so many crops, with their labels."""
    with (data / "cohorts.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["dataset"] == "msd_hippocampus"][:subjects]
    folder = (data / "msd_hippocampus").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "cohort.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["subject", "image", "label"])
        writer.writerows([Path(r["image"]).name.split(".")[0], folder / r["image"], folder / r["label"]] for r in rows)
    return out / "cohort.csv"


def command(cohort: Path, study: Path) -> list[str]:
    """The command of the study."""
    settings = ["--set", f"fit={json.dumps(FIT)}", "--set", "pairs.ordered=false", "--pairs", "all"]
    run = ["run", "--cohort", str(cohort), "--out", str(study), "--executor", "ray", "--workers", "2"]
    return [sys.executable, "-m", "pipeline.cli", *run, *settings]


def finished(study: Path) -> tuple[int, set[str], set[str]]:
    """Units that are done, pairs with a transform, pairs with metrics."""
    embedded = len(list(study.glob("embeddings.zarr/*/zarr.json")))
    transforms = {path.stem for path in study.glob("transforms/*.h5") if not path.name.startswith(".")}
    metrics = set(tables.read_table(study, "metrics", ["pair"]).column("pair").to_pylist())
    return embedded + len(transforms), transforms, metrics


def kill_at(line: list[str], study: Path, moment: int, log: Path) -> tuple[int, int]:
    """Run until so many units are done, kill the driver; pairs that were fitted but not recorded, and units done."""
    with log.open("ab") as stream, subprocess.Popen(line, stderr=stream, start_new_session=True) as process:
        while process.poll() is None and finished(study)[0] < moment:
            time.sleep(0.2)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    time.sleep(3)  # Ray's workers notice that their driver is gone
    done, transforms, metrics = finished(study)
    return len(transforms - metrics), done


def result_tables(study: Path) -> dict[str, object]:
    """Every table of results without the columns that hold times."""
    found = {}
    for name in ("rois", "correspondences", "unmatched", "metrics", "failures"):
        table = tables.read_table(study, name)
        found[name] = table.drop_columns([column for column in TIMES if column in table.column_names])
    return found


def main() -> None:
    """Both studies and their comparison, as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/interrupted"))
    parser.add_argument("--subjects", type=int, default=40)
    parser.add_argument("--kills", type=int, default=10)
    given = parser.parse_args()
    cohort = write_cohort(given.data, given.out, given.subjects)
    calm, hunted, log = given.out / "calm", given.out / "hunted", given.out / "hunted.log"
    for study in (calm, hunted):
        shutil.rmtree(study, ignore_errors=True)
    log.unlink(missing_ok=True)
    pairs = given.subjects * (given.subjects - 1) // 2
    chance = random.Random(2)
    moments = sorted(chance.randrange(1, given.subjects + pairs) for _ in range(given.kills))
    repeated = []
    for moment in moments:
        again, done = kill_at(command(cohort, hunted), hunted, moment, log)
        repeated.append(again)
        print(json.dumps({"killed_at": moment, "done": done, "fitted_but_not_recorded": again}), flush=True)
    for study in (hunted, calm):
        subprocess.run(command(cohort, study), check=True)
    left, right = result_tables(hunted), result_tables(calm)
    rows = {name: table.num_rows for name, table in right.items()}  # type: ignore[attr-defined]
    print(json.dumps({"equal": left == right, "pairs": pairs, "repeated": repeated, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
