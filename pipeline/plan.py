"""What a run would do: counts, what encode-once saves, store size and time, without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.folder import StudyFolder
from pipeline.pairs import choose_pairs
from pipeline.process import own_cores
from pipeline.request import Request
from storage import tables
from storage.cohort import Subject
from storage.images import ImageError, read_image

SAMPLE = 24  # images read to learn how many slices a subject has
PAPER_WINDOW = 11  # slices to either side, section 4.2
SECONDS_PER_SLICE = {"component_tree": 0.5, "sam": 20.0}  # one CPU core, before anything has been measured
SECONDS_PER_PAIR = 1.5
BYTES_PER_SLICE = {"component_tree": 1 << 19, "sam": 2_200_000}


@dataclass(frozen=True)
class Plan:
    """The size of a study.

    Attributes:
        subjects: of the manifest.
        slices: of all subjects, extrapolated from `sampled` images.
        pairs: to register.
        literal_encodes: slice encodings if every pair encoded its windows anew, as Algorithm 1 is written.
        store_bytes: of the embedding store.
        seconds: on `workers` workers, for all of it.
        measured: whether size and time come from earlier runs in this folder, not from rules of thumb.
        problems: images of the sample that cannot be read.
        unknown_pairs: pairs that name a subject outside the cohort.
    """

    subjects: int
    slices: int
    sampled: int
    pairs: int
    literal_encodes: int
    store_bytes: int
    seconds: float
    workers: int
    measured: bool
    problems: tuple[str, ...]
    unknown_pairs: int


def make_plan(request: Request, out: Path) -> Plan:
    """Estimate a study from its manifest, a sample of its images and, if there is one, its folder."""
    subjects = request.cohort.subjects
    depths, problems = _sample_depths(request, subjects)
    depth = sum(depths) / max(1, len(depths))
    slices = round(depth * len(subjects))
    n_pairs = _count_pairs(request)
    workers = request.config.execution.workers or own_cores()
    name = request.config.segmenter.name
    rates = _measured_rates(out, slices)
    per_slice, per_pair = rates or (SECONDS_PER_SLICE.get(name, 1.0), SECONDS_PER_PAIR)
    return Plan(
        subjects=len(subjects),
        slices=slices,
        sampled=len(depths) + len(problems),
        pairs=n_pairs,
        literal_encodes=round(n_pairs * _literal_encodes(round(depth))),
        store_bytes=round(slices * BYTES_PER_SLICE.get(name, 1 << 20)),
        seconds=(slices * per_slice + n_pairs * per_pair) / workers,
        workers=workers,
        measured=rates is not None,
        problems=tuple(problems),
        unknown_pairs=len(request.unknown),
    )


def describe_plan(plan: Plan) -> str:
    """The plan as a few lines."""
    saved = plan.literal_encodes / plan.slices if plan.slices else 0.0
    source = "from earlier runs in this folder" if plan.measured else "rule of thumb"
    lines = [
        f"subjects  {plan.subjects}",
        f"slices    {plan.slices} (from {plan.sampled} images)",
        f"pairs     {plan.pairs}",
        f"encodes   {plan.slices}, where encoding anew for every pair takes {plan.literal_encodes} ({saved:.0f}x)",
        f"store     {plan.store_bytes / 2**30:.2f} GiB (rule of thumb)",
        f"time      {_duration(plan.seconds)} on {plan.workers} workers ({source})",
    ]
    if plan.unknown_pairs:
        lines.append(f"problem   {plan.unknown_pairs} pairs name a subject that is not in the cohort")
    return "\n".join([*lines, *(f"problem   {problem}" for problem in plan.problems)])


def _sample_depths(request: Request, subjects: Sequence[Subject]) -> tuple[list[int], list[str]]:
    """Number of slices of evenly spaced subjects, and what is wrong with those that cannot be read."""
    step = max(1, len(subjects) // SAMPLE)
    depths: list[int] = []
    problems: list[str] = []
    for subject in subjects[::step]:
        try:
            depths.append(read_image(subject.image, request.config.input.slice_axis).geometry.shape[0])
        except ImageError as error:
            problems.append(f"{subject.subject}: {error}")
    return depths, problems


def _count_pairs(request: Request) -> int:
    if request.pairs is not None:
        return len(request.pairs)
    pairs = request.config.pairs
    if pairs.mode == "knn":
        return len(request.cohort.subjects) * min(pairs.k, len(request.cohort.subjects) - 1)
    return len(choose_pairs(pairs, request.cohort))


def _literal_encodes(depth: int) -> int:
    """Encodings of one pair as Algorithm 1 is written: every moving slice, and its window of fixed slices."""
    window = sum(min(depth, z + PAPER_WINDOW + 1) - max(0, z - PAPER_WINDOW) for z in range(depth))
    return depth + window


def _measured_rates(out: Path, slices: int) -> tuple[float, float] | None:
    """Worker seconds per slice and per pair of the largest earlier runs, or None without any."""
    rows = [row for row in tables.read_table(StudyFolder(out).root, "runs").to_pylist() if row["units_done"]]
    encode = [row for row in rows if row["stage"] == "encode"]
    pairs = [row for row in rows if row["stage"] in ("match", "fit")]
    if not encode or not pairs or not slices:
        return None
    largest = max(encode, key=lambda row: row["units_done"])
    per_slice = largest["seconds"] * largest["workers"] / slices
    done = max(row["units_done"] for row in pairs)
    per_pair = sum(row["seconds"] * row["workers"] for row in pairs if row["units_done"] == done) / done
    return per_slice, per_pair


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
