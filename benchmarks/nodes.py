"""Throughput of encoding on two local nodes against one: `python benchmarks/nodes.py [--data DIR] [--subjects 16]`.

Real encoding of hearts, on a Ray cluster of one worker per node; all nodes are processes of this machine, which should
have a core for each. Throughput counts from the start of the first unit to the end of the last, so Ray's own start is
left out; what the units do not explain (time of the span times the workers, less the seconds of the units) is the
overhead.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
from ray.cluster_utils import Cluster

from storage import tables


def write_cohort(data: Path, out: Path, subjects: int) -> Path:
    """A manifest of so many hearts."""
    with (data / "cohorts.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["dataset"] == "mnms_cardiac"][:subjects]
    with (out / "cohort.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["subject", "image"])
        writer.writerows(
            [Path(row["image"]).name.split(".")[0], (data / "mnms_cardiac" / row["image"]).resolve()] for row in rows
        )
    return out / "cohort.csv"


def encode(cohort: Path, study: Path, nodes: int) -> dict[str, object]:
    """Encode on a cluster of so many nodes of one worker; what its units took."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        run = ["run", "--cohort", str(cohort), "--out", str(study), "--executor", "ray", "--until", "prototypes"]
        variables = {**os.environ, "RAY_ADDRESS": cluster.address}
        subprocess.run([sys.executable, "-m", "pipeline.cli", *run], env=variables, check=True)
    finally:
        cluster.shutdown()
    units = tables.read_table(study, "units").filter(pc.field("stage") == "encode")
    starts = [moment.timestamp() for moment in units.column("started").to_pylist()]
    seconds = units.column("seconds").to_pylist()
    span = max(start + taken for start, taken in zip(starts, seconds, strict=True)) - min(starts)
    return {
        "nodes": nodes,
        "subjects": len(starts),
        "span_seconds": round(span, 2),
        "unit_seconds": round(sum(seconds), 2),
        "processor_seconds": round(sum(units.column("processor_seconds").to_pylist()), 2),
        "overhead_ms_per_unit": round(1000 * (span * nodes - sum(seconds)) / len(starts), 1),
    }


def main() -> None:
    """A line of JSON for each run, in turn one node and two, then the ratio of the fastest of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    best: Counter[int] = Counter()
    with tempfile.TemporaryDirectory(prefix="nodes") as folder:
        cohort = write_cohort(given.data, Path(folder), given.subjects)
        for _ in range(given.repeats):
            for nodes in (1, 2):
                study = Path(folder) / "study"
                found = encode(cohort, study, nodes)
                print(json.dumps(found), flush=True)
                best[nodes] = max(best[nodes], given.subjects / float(str(found["span_seconds"])))
                shutil.rmtree(study)
    print(json.dumps({"ratio": round(best[2] / best[1], 3)}))


if __name__ == "__main__":
    main()
