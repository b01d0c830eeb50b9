"""What a run would do: counts, what encode-once saves, store size and time, without running anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from actors.sam_variants import VARIANTS
from pipeline.algorithms.fit_config import FitConfig
from pipeline.dispatch import RAY_START_SECONDS
from pipeline.folder import StudyFolder
from pipeline.pairs import count_pairs
from pipeline.process import own_cores
from pipeline.request import Request
from storage import tables
from storage.cohort import Subject
from storage.images import ImageError, read_image

SAMPLE = 24  # images read to learn how many slices a subject has
Shape: TypeAlias = tuple[int, int, int]
PAPER_WINDOW = 11  # slices to either side, section 4.2

# Rules of thumb, before anything has been measured: one CPU core, data sets of 35 x 50 to 216 x 256 pixels a slice.
SLICE_SECONDS, PIXEL_SECONDS = 0.03, 4.2e-6  # component_tree, encoding and pooling
SAM_SLICE_SECONDS = 20.0
PAIR_SECONDS, PAIR_SLICE_SECONDS, PAIR_VOXEL_SECONDS = 0.1, 0.035, 2.5e-6
START_SECONDS = 2.0
CELL_BYTES, CELLS = 140, 64  # component_tree: bytes per feature cell with the masks; cells along the longer side
SAM_SLICE_BYTES = 2_200_000
TRANSFORM_BYTES = 5  # per node of a lattice, compressed; its step is mostly that of the plane alone


@dataclass(frozen=True)
class Plan:
    """The size of a study.

    Attributes:
        subjects: of the manifest.
        slices: of all subjects, extrapolated from `sampled` images.
        pairs: to register.
        literal_encodes: slice encodings if every pair encoded its windows anew, as Algorithm 1 is written.
        store_bytes: of the embedding store.
        transform_bytes: of the displacement fields.
        seconds: on `workers` workers, for all of it.
        measured: whether the time comes from earlier runs in this folder, not from rules of thumb.
        problems: images of the sample that cannot be read.
        unknown_pairs: pairs that name a subject outside the cohort.
    """

    subjects: int
    slices: int
    sampled: int
    pairs: int
    literal_encodes: int
    store_bytes: int
    transform_bytes: int
    seconds: float
    workers: int
    measured: bool
    problems: tuple[str, ...]
    unknown_pairs: int


def make_plan(request: Request, out: Path) -> Plan:
    """Estimate a study from its manifest, a sample of its images and, if there is one, its folder."""
    subjects, execution = request.cohort.subjects, request.config.execution
    shapes, problems = _sample_shapes(request, subjects)
    depth = _mean([shape[0] for shape in shapes])
    n_pairs = _count_pairs(request)
    workers = 1 if execution.executor == "serial" else execution.workers or own_cores()
    measured = _measured_rates(out)
    weight_free = request.config.segmenter.name not in VARIANTS
    per_subject, per_pair = measured or (
        _mean([_subject_seconds(shape, weight_free) for shape in shapes]),
        _mean([_pair_seconds(shape) for shape in shapes]),
    )
    if not measured:
        per_pair *= 1 + request.config.evaluate.pseudo_folds
    work = [(len(subjects) * per_subject, len(subjects)), (n_pairs * per_pair, n_pairs)]
    return Plan(
        subjects=len(subjects),
        slices=round(depth * len(subjects)),
        sampled=len(shapes) + len(problems),
        pairs=n_pairs,
        literal_encodes=round(n_pairs * _literal_encodes(round(depth))),
        store_bytes=round(len(subjects) * _mean([_subject_bytes(shape, weight_free) for shape in shapes])),
        transform_bytes=round(n_pairs * _transform_bytes(request.config.fit, shapes)),
        seconds=START_SECONDS + _wall_seconds(work, workers, execution.executor),
        workers=workers,
        measured=measured is not None,
        problems=tuple(problems),
        unknown_pairs=len(request.unknown),
    )


def _wall_seconds(work: Sequence[tuple[float, int]], workers: int, executor: str) -> float:
    """Seconds of (seconds of work, units) stages: in this process, on Ray, or whichever `auto` would choose."""
    serial = sum(seconds for seconds, _ in work)
    ray = RAY_START_SECONDS + sum(seconds / max(1, min(workers, units)) for seconds, units in work)
    return {"serial": serial, "ray": ray}.get(executor, min(serial, ray))


def _subject_seconds(shape: Shape, weight_free: bool) -> float:
    depth, height, width = shape
    return depth * (SLICE_SECONDS + height * width * PIXEL_SECONDS if weight_free else SAM_SLICE_SECONDS)


def _pair_seconds(shape: Shape) -> float:
    return PAIR_SECONDS + shape[0] * PAIR_SLICE_SECONDS + math.prod(shape) * PAIR_VOXEL_SECONDS


def _transform_bytes(fit: FitConfig, shapes: Sequence[Shape]) -> float:
    stride = fit.levels[-1].stride if fit.levels and fit.refine.method == "none" else 1
    return TRANSFORM_BYTES / stride**2 * _mean([math.prod(shape) for shape in shapes])


def _subject_bytes(shape: Shape, weight_free: bool) -> float:
    depth, height, width = shape
    shrink = min(1.0, CELLS / max(height, width))
    return depth * (height * width * shrink**2 * CELL_BYTES if weight_free else SAM_SLICE_BYTES)


def describe_plan(plan: Plan) -> str:
    """The plan as a few lines."""
    saved = plan.literal_encodes / plan.slices if plan.slices else 0.0
    source = "from earlier runs in this folder" if plan.measured else "rule of thumb"
    lines = [
        f"subjects  {plan.subjects}",
        f"slices    {plan.slices} (from {plan.sampled} images)",
        f"pairs     {plan.pairs}",
        f"encodes   {plan.slices}, where encoding anew for every pair takes {plan.literal_encodes} ({saved:.0f}x)",
        f"store     {_size(plan.store_bytes)}, transforms {_size(plan.transform_bytes)} (rule of thumb)",
        f"time      {_duration(plan.seconds)} on {plan.workers} workers ({source})",
    ]
    if plan.unknown_pairs:
        lines.append(f"problem   {plan.unknown_pairs} pairs name a subject that is not in the cohort")
    return "\n".join([*lines, *(f"problem   {problem}" for problem in plan.problems)])


def _sample_shapes(request: Request, subjects: Sequence[Subject]) -> tuple[list[Shape], list[str]]:
    """(slices, rows, columns) of evenly spaced subjects, and what is wrong with those that cannot be read."""
    step = max(1, len(subjects) // SAMPLE)
    shapes: list[Shape] = []
    problems: list[str] = []
    for subject in subjects[::step]:
        try:
            shapes.append(read_image(subject.image, request.config.input.slice_axis).geometry.shape)
        except ImageError as error:
            problems.append(f"{subject.subject}: {error}")
    return shapes, problems


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _count_pairs(request: Request) -> int:
    if request.pairs is not None:
        return len(request.pairs)
    return count_pairs(request.config.pairs, request.cohort)


def _literal_encodes(depth: int) -> int:
    """Encodings of one pair as Algorithm 1 is written: every moving slice, and its window of fixed slices."""
    window = sum(min(depth, z + PAPER_WINDOW + 1) - max(0, z - PAPER_WINDOW) for z in range(depth))
    return depth + window


def _measured_rates(out: Path) -> tuple[float, float] | None:
    """Worker seconds per subject and per pair, of the largest earlier run of each stage; None if one never ran."""
    rates: dict[str, float] = {}
    for row in sorted(tables.read_table(StudyFolder(out).root, "runs").to_pylist(), key=lambda row: row["units_done"]):
        if row["units_done"]:
            rates[row["stage"]] = row["seconds"] * row["workers"] / row["units_done"]
    if not rates.keys() >= {"encode", "prototypes", "match", "fit"}:
        return None
    return rates["encode"] + rates["prototypes"], rates["match"] + rates["fit"]


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
