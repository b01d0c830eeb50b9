"""All pairs of a synthetic cohort matched and written by the study driver: time, memory and bytes per pair.

    python benchmarks/cohort_matching.py --subjects 1000 --slices 24 --rois 30 --out /tmp/cohort
    python benchmarks/cohort_matching.py --subjects 100 300 1000 --rois 10 30 100 --sample-pairs 5000 --out /tmp/cohort

Processor milliseconds a pair are split in one process into the bare float32 matrix product of the two prototype
matrices, matching with its own product, and the rest of the stage; beside them what driver and workers took in the run
from the first tile on, and Ray's own processes, which cost by the hour and not by the pair.

The run is `samreg run --until match` on a folder whose embeddings are done (`synthetic_cohort.py`): everything but
encoding is the real thing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.synthetic_cohort import write_cohort
from pipeline.algorithms.matching import Matches
from pipeline.algorithms.staged import Staged
from pipeline.config import StudyConfig, load_config
from pipeline.in_step import in_step
from pipeline.keys import PlannedPair
from pipeline.process import own_peak_memory
from pipeline.progress import Advance, Reporter
from pipeline.stages import match as stage
from pipeline.stages.roi_sets import SubjectRois, read_rois
from pipeline.study import run_study
from storage import tables
from storage.cohort import Cohort, Pair
from storage.embeddings import EmbeddingStore

MARKS = (0.1, 0.5, 1.0)


def choose_pairs(cohort: Cohort, tile: int, sample: int | None) -> list[Pair]:
    """All unordered pairs, or about `sample` of them: whole tiles, evenly spaced."""
    names = [subject.subject for subject in cohort.subjects]
    indices = list(itertools.combinations(range(len(names)), 2))
    if sample is not None and sample < len(indices):
        tiles = sorted({(i // tile, j // tile) for i, j in indices})
        chosen = set(tiles[:: max(1, len(tiles) * tile**2 // sample)])
        indices = [(i, j) for i, j in indices if (i // tile, j // tile) in chosen]
    return [Pair(f"{names[j]}__{names[i]}", names[j], names[i]) for i, j in indices]


@dataclass
class Process:
    """A process of this run, from /proc: processor seconds so far, resident bytes now."""

    title: str
    seconds: float
    resident: int


def processes() -> list[Process]:
    """This process, then its descendants."""
    parents, found = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
                title = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
            ticks = int(fields[11]) + int(fields[12])
            resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
            found[int(entry.name)] = Process(title, ticks / os.sysconf("SC_CLK_TCK"), resident)
    ours, size = {os.getpid()}, 0
    while size < len(ours):
        size = len(ours)
        ours |= {pid for pid, parent in parents.items() if parent in ours}
    return [found[os.getpid()], *(found[pid] for pid in ours - {os.getpid()} if pid in found)]


@dataclass(frozen=True)
class Sample:
    """The run after so many pairs.

    Attributes:
        seconds: processor seconds of the driver and the workers; `overhead` of Ray's other processes.
        resident: bytes of the largest worker.
    """

    pairs: int
    seconds: float
    overhead: float
    resident: int


@dataclass
class Probe(Reporter):
    """Samples the match stage at its start, after its first tile, when every worker is up, and at each mark."""

    samples: list[Sample] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, total: int, noun: str) -> Iterator[Advance]:
        """Sample as the stage advances."""
        done, marks = 0, [0.0, *MARKS]

        def sample() -> None:
            driver, *others = processes()
            workers = [p for p in others if p.title.startswith("ray::UnitProcess")]
            resident = max(p.resident for p in workers or [driver])
            seconds = driver.seconds + sum(p.seconds for p in workers)
            overhead = sum(p.seconds for p in others) - sum(p.seconds for p in workers)
            self.samples.append(Sample(done, seconds, overhead, resident))
            print(f"  {done} of {total} pairs", file=sys.stderr)

        def advance(count: int, failed: int = 0, running: int = 0) -> None:
            nonlocal done
            done += count
            while name == "match" and marks and done >= marks[0] * total:
                marks.pop(0)
                sample()

        if name == "match":
            sample()
        yield advance


@dataclass
class Stopwatch:
    """Processor seconds spent in a function."""

    function: Callable[..., Any]
    seconds: float = 0.0

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        start = time.process_time()
        try:
            return self.function(*arguments)
        finally:
            self.seconds += time.process_time() - start


def match_in_step(pairs: list[Pair], rois_of: Callable[[str], SubjectRois], config: StudyConfig) -> None:
    """Match the pairs as the stage does, and nothing else."""

    def stages(pair: Pair) -> Staged[Matches]:
        return stage.match_rois(rois_of(pair.moving), rois_of(pair.fixed), config.match)

    for found, _ in in_step(stages, pairs, stage.HOLD_BYTES):
        assert isinstance(found, Matches)


def split_ms(study: Path, config: StudyConfig, pairs: list[Pair]) -> tuple[float, float, float]:
    """Processor ms of a pair in one process: the bare float32 matrix product, `match`, and the rest of the stage.

    The rest is reading the subjects, making the table and writing it; measured on the pairs of the first subjects.
    """
    store, first = EmbeddingStore(study / "embeddings.zarr"), f"s{2 * config.execution.tile:05d}"
    few = [pair for pair in pairs if pair.moving < first and pair.fixed < first]
    planned = tuple(PlannedPair(*pair, f"{n:016x}", "", "timed") for n, pair in enumerate(few))
    rois_of = lru_cache(maxsize=None)(lambda name: read_rois(store, name))
    inside, whole = Stopwatch(match_in_step), Stopwatch(stage.run_unit)
    for _ in range(2):  # the first time loads libraries
        inside.seconds = whole.seconds = 0.0
        inside(few, rois_of, config)
        with TemporaryDirectory(dir=study) as scratch:
            read = lru_cache(maxsize=None)(lambda name: read_rois(store, name))
            whole(Path(scratch), read, config.match, stage.MatchUnit("timed", planned))
    product = Stopwatch(np.matmul)
    for pair in few:
        product(rois_of(pair.moving).rois.prototypes, rois_of(pair.fixed).rois.prototypes.T)
    spent = (product.seconds, inside.seconds, whole.seconds - inside.seconds)
    bare, matching, rest = (1e3 * seconds / len(few) for seconds in spent)
    return bare, matching, rest


def measure(
    out: Path,
    subjects: int,
    rois: int,
    *,
    slices: int = 24,
    channels: int = 153,
    sample: int | None = None,
    settings: tuple[str, ...] = ("execution.executor=ray", "execution.workers=2"),
) -> dict[str, str]:
    """One row of the table; the contents of `out` are replaced, `rois` are per slice."""
    config = load_config(None, settings)
    shutil.rmtree(out, ignore_errors=True)
    print(f"writing {subjects} subjects", file=sys.stderr)
    cohort = write_cohort(config, out, subjects, slices, rois, channels)
    pairs = choose_pairs(cohort, config.execution.tile, sample)
    probe, begun, used = Probe(), time.perf_counter(), time.process_time()
    summary = run_study(config, cohort, out / "study", pairs, until="match", reporter=probe)
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    counts = {stage.stage: (stage.done, stage.reused, stage.failed) for stage in summary.stages}
    assert counts["prototypes"] == (0, subjects, 0)
    assert counts["match"] == (len(pairs), 0, 0)
    peak = own_peak_memory()
    parts = list((out / "study" / "correspondences").glob("*.parquet"))
    size = sum(path.stat().st_size for path in parts)
    matches = sum(tables.read_part(out / "study", "correspondences", p.stem, ["rank"]).num_rows for p in parts)
    product, matching, rest = split_ms(out / "study", config, pairs)
    start, first, *marks = probe.samples
    since = first if first.pairs < len(pairs) else start
    timed = len(pairs) - since.pairs
    return {
        "subjects": f"{subjects}",
        "ROIs each": f"{slices * rois}",
        "pairs": f"{len(pairs)}",
        "matches a pair": f"{matches / len(pairs):.0f}",
        "product ms": f"{product:.2f}",
        "matching ms": f"{matching:.2f}",
        "rest ms": f"{rest:.2f}",
        "in the run ms": f"{1e3 * (marks[-1].seconds - since.seconds) / timed:.2f}",
        "Ray ms": f"{1e3 * (marks[-1].overhead - since.overhead) / timed:.2f}",
        "run s": f"{seconds:.0f}",
        "driver CPU s": f"{used:.0f}",
        "worker MiB at 10, 50, 100 %": ", ".join(f"{mark.resident / 2**20:.0f}" for mark in marks),
        "driver MiB": f"{peak / 2**20:.0f}",
        "written MB": f"{size / 1e6:.0f}",
        "bytes a match": f"{size / max(1, matches):.1f}",
    }


def markdown(rows: list[dict[str, str]]) -> str:
    """A table of rows with the same columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace(" --- ", "---")


def main() -> None:
    """Print a row per combination of the numbers given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, nargs="+", default=[100])
    parser.add_argument("--rois", type=int, nargs="+", default=[30], help="per slice")
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--channels", type=int, default=153)
    parser.add_argument("--sample-pairs", type=int, help="match about so many pairs, whole tiles; default all")
    parser.add_argument("--executor", default="ray", choices=("ray", "serial"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder; its contents are replaced")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    given = parser.parse_args()
    settings = (f"execution.executor={given.executor}", f"execution.workers={given.workers}", *given.settings)
    size = {"slices": given.slices, "channels": given.channels, "sample": given.sample_pairs}
    rows = [
        measure(
            given.out / f"{subjects}x{given.slices}x{rois}x{given.channels}", subjects, rois, settings=settings, **size
        )
        for subjects in given.subjects
        for rois in given.rois
    ]
    print(markdown(rows))


if __name__ == "__main__":
    main()
