"""All pairs of a synthetic cohort matched and written by the study driver: time, memory and bytes per pair.

    python benchmarks/cohort_matching.py --subjects 1000 --slices 24 --rois 30 --out /tmp/cohort
    python benchmarks/cohort_matching.py --subjects 100 300 1000 --rois 10 30 100 --sample-pairs 5000 --out /tmp/cohort

Processor milliseconds a pair are split in one process into the bare float32 matrix product of the two prototype
matrices, matching with its own product, and the rest of the stage; beside them what driver and workers took in the run
from the first tile on, and Ray's own processes, which cost by the hour and not by the pair.

Each subject is a store entry as the prototype stage leaves it: prototypes, slices, moments and geometry. Features,
masks and ROI rows, which matching never reads, are left out; the "image" is a file with the subject's name, which the
run only digests. Subjects are noisy copies of one anatomy, a part of whose ROIs each replaces by its own, with the
statistics of M&Ms hearts under the default segmenter. The run is `samreg run --until match` on a folder whose
embeddings are done: everything but encoding is the real thing.
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
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.build import segmenter_signature
from pipeline.algorithms.matching import Matches
from pipeline.algorithms.staged import Staged
from pipeline.config import StudyConfig, load_config
from pipeline.folder import StudyFolder
from pipeline.in_step import in_step
from pipeline.inputs import DigestCache, InputDigests, digest_inputs
from pipeline.keys import PlannedPair, subject_keys
from pipeline.process import own_peak_memory
from pipeline.progress import Advance, Reporter
from pipeline.stages import match as stage
from pipeline.stages.roi_sets import SubjectRois, read_rois
from pipeline.study import run_study
from storage import tables
from storage.cohort import Cohort, Pair, Subject
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry

SPACING_MM = (10.0, 1.25, 1.25)
IN_PLANE = (256, 256)
SHARED = 0.5  # norm of the mean prototype of real ROIs
SPECTRUM = 0.86 ** np.arange(60)  # variance of real prototypes along their principal axes, near enough
COMMON, KINSHIP, STEADY = 0.45, 0.88, 0.97  # share of ROIs from the anatomy; correlation with it; from slice to slice
PLACE_MM, SPREAD_MM = 6.0, 60.0
RADIUS_MM, RADIUS_LOG_SD = 15.0, 0.7
MARKS = (0.1, 0.5, 1.0)
HEADER = (
    "| subjects | ROIs each | pairs | matches a pair | product ms | matching ms | rest ms | in the run ms | Ray ms "
    "| run s | driver CPU s | worker MiB at 10, 50, 100 % | driver MiB | written MB | bytes a match |"
)


@dataclass(frozen=True)
class Anatomy:
    """ROIs of one slice stack: latent [D, R, L], place [D, R, 2] mm, log radius [D, R]."""

    latent: npt.NDArray[np.float64]
    place: npt.NDArray[np.float64]
    radius: npt.NDArray[np.float64]


def random_anatomy(rng: np.random.Generator, slices: int, rois: int) -> Anatomy:
    """Structures that change slowly from slice to slice."""
    latent = rng.normal(size=(slices, rois, len(SPECTRUM)))
    place, radius = rng.normal(size=(slices, rois, 2)), rng.normal(size=(slices, rois))
    for z in range(1, slices):
        for values in (latent, place, radius):
            values[z] = STEADY * values[z - 1] + np.sqrt(1 - STEADY**2) * values[z]
    return Anatomy(latent, 160 + SPREAD_MM * place, np.log(RADIUS_MM) + RADIUS_LOG_SD * radius)


def subject_arrays(
    rng: np.random.Generator, atlas: Anatomy, axes: npt.NDArray[np.float64], mean: npt.NDArray[np.float64]
) -> dict[str, npt.NDArray[np.generic]]:
    """What the prototype stage writes of one subject."""
    slices, rois = atlas.radius.shape
    own = random_anatomy(rng, slices, rois)
    common = rng.random((slices, rois)) < COMMON
    kin = KINSHIP * atlas.latent + np.sqrt(1 - KINSHIP**2) * rng.normal(size=atlas.latent.shape)
    moved = atlas.place * rng.normal(1, 0.05, 2) + rng.normal(0, 8, 2) + rng.normal(0, PLACE_MM, atlas.place.shape)
    latent = np.where(common[..., None], kin, own.latent) * np.sqrt(SPECTRUM / SPECTRUM.sum() * (1 - SHARED**2))
    place = np.where(common[..., None], moved, own.place).reshape(-1, 2)
    radius = np.exp(np.where(common, atlas.radius + rng.normal(0, 0.1, common.shape), own.radius)).ravel()
    prototypes = mean + latent.reshape(-1, len(SPECTRUM)) @ axes
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    z = np.repeat(np.arange(slices), rois)
    stretch = rng.uniform(0.5, 2, radius.shape)
    return {
        "prototypes": prototypes.astype(np.float32),
        "roi": np.arange(slices * rois, dtype=np.int32),
        "slice": z.astype(np.int32),
        "track": np.tile(np.arange(rois, dtype=np.int32), slices),
        "centroid_mm": np.column_stack([z * SPACING_MM[0], place]),
        "area_mm2": np.pi * radius**2,
        "covariance_mm2": np.column_stack([stretch, np.zeros_like(radius), 1 / stretch]) * radius[:, None] ** 2 / 4,
    }


def write_cohort(config: StudyConfig, out: Path, subjects: int, slices: int, rois: int, channels: int) -> Cohort:
    """A cohort whose embeddings and prototypes are done, in `out/study`."""
    folder, store = StudyFolder(out / "study"), EmbeddingStore(out / "study" / "embeddings.zarr")
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    found = [Subject(f"s{number:05d}", str(images / f"s{number:05d}.txt")) for number in range(subjects)]
    for subject in found:
        Path(subject.image).write_text(subject.subject)
    folder.root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    atlas = random_anatomy(rng, slices, rois)
    basis = np.linalg.qr(rng.normal(size=(channels, len(SPECTRUM) + 1)))[0].T
    geometry = Geometry((slices, *IN_PLANE), SPACING_MM, (0.0, 0.0, 0.0))
    segmenter = segmenter_signature(config.segmenter)
    nothing = (np.zeros((1, 1, 1)), np.zeros((0, *IN_PLANE), bool), np.zeros(0), np.zeros(0))
    digests = digest_inputs(found, DigestCache(folder.root / ".digests.json"))
    for number, (name, digest) in enumerate(digests.items()):
        assert isinstance(digest, InputDigests)
        keys = subject_keys(config, segmenter, digest)
        extent = (float(IN_PLANE[0]), float(IN_PLANE[1]))
        with store.writer(name, keys.encode_signature, geometry, {"blocks": []}, extent, IN_PLANE) as writer:
            for z in range(slices):
                writer.add_slice(z, *nothing)
        arrays = subject_arrays(np.random.default_rng([1, number]), atlas, basis[1:], SHARED * basis[0])
        store.write_prototypes(name, keys.prototypes_signature, arrays)
        tables.write_part(folder.root, "rois", name, tables.table_from_rows("rois", []))
    return Cohort(tuple(found))


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
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
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


def measure(options: argparse.Namespace, subjects: int, rois: int) -> str:
    """One row of the table."""
    out = options.out / f"{subjects}x{options.slices}x{rois}x{options.channels}"
    execution = [f"execution.executor={options.executor}", f"execution.workers={options.workers}"]
    config = load_config(None, [*execution, *options.settings])
    shutil.rmtree(out, ignore_errors=True)
    print(f"writing {subjects} subjects", file=sys.stderr)
    cohort = write_cohort(config, out, subjects, options.slices, rois, options.channels)
    pairs = choose_pairs(cohort, config.execution.tile, options.sample_pairs)
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
    each, ray = (
        1e3 * (now - before) / timed
        for now, before in ((marks[-1].seconds, since.seconds), (marks[-1].overhead, since.overhead))
    )
    memory = ", ".join(f"{mark.resident / 2**20:.0f}" for mark in marks)
    return (
        f"| {subjects} | {options.slices * rois} | {len(pairs)} | {matches / len(pairs):.0f} | {product:.2f} "
        f"| {matching:.2f} | {rest:.2f} | {each:.2f} | {ray:.2f} | {seconds:.0f} | {used:.0f} | {memory} "
        f"| {peak / 2**20:.0f} | {size / 1e6:.0f} | {size / max(1, matches):.1f} |"
    )


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
    options = parser.parse_args()
    rows = [measure(options, subjects, rois) for subjects in options.subjects for rois in options.rois]
    print(HEADER, "|" + "---|" * (HEADER.count("|") - 1), *rows, sep="\n")


if __name__ == "__main__":
    main()
