"""What a run would do: counts, what encode-once saves, store size and time, without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.sam_variants import VARIANTS
from pipeline.config import StudyConfig
from pipeline.dispatch import RAY_START_SECONDS
from pipeline.folder import StudyFolder
from pipeline.pairs import count_pairs
from pipeline.probe import Rule, Shape, mean, probed
from pipeline.process import own_cores
from pipeline.record import refuse_credentials
from pipeline.request import Request
from storage import tables
from storage.cohort import Subject
from storage.images import ImageError, read_image

SAMPLE = 24  # images read to learn how many slices a subject has
PAPER_WINDOW = 11  # slices to either side, section 4.2
START_SECONDS = 2.0


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
        worker_bytes: most memory of a worker, which the largest of the sampled subjects decides.
        source: what the figures come from.
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
    worker_bytes: int
    source: str
    problems: tuple[str, ...]
    unknown_pairs: int


def make_plan(request: Request, out: Path, probe: bool = False) -> Plan:
    """Estimate a study from its manifest, a sample of its images and, if there is one, its folder.

    Args:
        probe: run the stages on a few subjects first, in a temporary folder, and scale what that took.

    Raises:
        FolderError: for a URI with credentials, as a run.
        UsageError: when the probe fails.
    """
    refuse_credentials(request.config, request.cohort)
    subjects, config = request.cohort.subjects, request.config
    sample, problems = _sample_shapes(request, subjects)
    shapes = list(sample.values())
    depth, n_pairs = mean([shape[0] for shape in shapes]), _count_pairs(request)
    workers = 1 if config.execution.executor == "serial" else config.execution.workers or own_cores()
    measured = None if probe else _measured_rates(out)
    rule, source = _rule(config), "rule of thumb"
    if probe:
        rule, source = probed(config, request.cohort, sample, rule), "from a probe"
    per_subject, per_pair = measured or (
        mean([rule.subject_seconds(shape) for shape in shapes]),
        mean([rule.pair_seconds(shape) for shape in shapes]),
    )
    work = [(len(subjects) * per_subject, len(subjects)), (n_pairs * per_pair, n_pairs)]
    return Plan(
        subjects=len(subjects),
        slices=round(depth * len(subjects)),
        sampled=len(shapes) + len(problems),
        pairs=n_pairs,
        literal_encodes=round(n_pairs * _literal_encodes(round(depth))),
        store_bytes=round(len(subjects) * mean([rule.subject_bytes(shape) for shape in shapes])),
        transform_bytes=round(n_pairs * mean([rule.pair_bytes(shape) for shape in shapes])),
        seconds=START_SECONDS + _wall_seconds(work, workers, config.execution.executor),
        workers=workers,
        worker_bytes=round(max((rule.worker_bytes(shape) for shape in shapes), default=0)),
        source="from earlier runs in this folder" if measured else source,
        problems=tuple(problems),
        unknown_pairs=len(request.unknown),
    )


def _wall_seconds(work: Sequence[tuple[float, int]], workers: int, executor: str) -> float:
    """Seconds of (seconds of work, units) stages: in this process, on Ray, or whichever `auto` would choose."""
    serial = sum(seconds for seconds, _ in work)
    ray = RAY_START_SECONDS + sum(seconds / max(1, min(workers, units)) for seconds, units in work)
    return {"serial": serial, "ray": ray}.get(executor, min(serial, ray))


def describe_plan(plan: Plan) -> str:
    """The plan as a few lines."""
    saved = plan.literal_encodes / plan.slices if plan.slices else 0.0
    sizes = "from a probe" if plan.source == "from a probe" else "rule of thumb"
    lines = [
        f"subjects  {plan.subjects}",
        f"slices    {plan.slices} (from {plan.sampled} images)",
        f"pairs     {plan.pairs}",
        f"encodes   {plan.slices}, where encoding anew for every pair takes {plan.literal_encodes} ({saved:.0f}x)",
        f"store     {_size(plan.store_bytes)}, transforms {_size(plan.transform_bytes)} ({sizes})",
        f"memory    {_size(plan.worker_bytes)} a worker, for the largest of the subjects looked at ({sizes})",
        f"time      {_duration(plan.seconds)} on {plan.workers} workers ({plan.source})",
    ]
    if plan.unknown_pairs:
        lines.append(f"problem   {plan.unknown_pairs} pairs name a subject that is not in the cohort")
    return "\n".join([*lines, *(f"problem   {problem}" for problem in plan.problems)])


def _rule(config: StudyConfig) -> Rule:
    """The rule of thumb of this configuration."""
    weight_free = config.segmenter.name not in VARIANTS
    taken = [level.stride for level in config.fit.levels if level.below >= 1]  # the others are for few fits
    stride = taken[-1] if taken and config.fit.refine.method == "none" else 1
    return Rule(weight_free, stride, pair_factor=1.0 + config.evaluate.pseudo_folds)


def _sample_shapes(request: Request, subjects: Sequence[Subject]) -> tuple[dict[str, Shape], list[str]]:
    """(slices, rows, columns) of evenly spaced subjects, and what is wrong with those that cannot be read."""
    step = max(1, len(subjects) // SAMPLE)
    shapes: dict[str, Shape] = {}
    problems: list[str] = []
    for subject in subjects[::step]:
        try:
            shapes[subject.subject] = read_image(subject.image, request.config.input.slice_axis).geometry.shape
        except ImageError as error:
            problems.append(f"{subject.subject}: {error}")
    return shapes, problems


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
