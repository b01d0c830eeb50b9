"""What subjects and pairs take, by the size of their images: rules of thumb, corrected by running a few of them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from pipeline.config import StudyConfig, with_settings
from pipeline.errors import UsageError
from pipeline.folder import StudyFolder
from pipeline.progress import SilentReporter
from pipeline.study import run_study
from storage import tables
from storage.cohort import Cohort, Pair

Shape: TypeAlias = tuple[int, int, int]
PROBED = 3  # subjects: the largest, the smallest, and the one between
GIB = 2**30

# One CPU core and thread, data sets of 35 x 50 to 216 x 256 pixels a slice.
SLICE_SECONDS, PIXEL_SECONDS = 0.05, 1.9e-6  # component_tree, encoding and pooling
SAM_SLICE_SECONDS = 20.0
PAIR_SECONDS, PAIR_SLICE_SECONDS, PAIR_VOXEL_SECONDS = 0.1, 0.055, 2.5e-6
CELL_BYTES, CELLS = 140, 64  # component_tree: bytes per feature cell with the masks; cells along the longer side
SAM_SLICE_BYTES = 2_200_000
TRANSFORM_BYTES = 5  # per node of a lattice, compressed; its step is mostly that of the plane alone
PROCESS_BYTES, VOXEL_BYTES, SAM_BYTES = 900 << 20, 250, int(2.4 * GIB)  # with the code of every stage loaded


@dataclass(frozen=True)
class Rule:
    """What a subject or pair of a shape (slices, rows, columns) takes, on one core.

    Attributes:
        weight_free: whether the segmenter is no SAM variant.
        stride: step of the lattice that a transform is written on, in the plane.
    """

    weight_free: bool
    stride: int
    subject_factor: float = 1.0
    pair_factor: float = 1.0
    store_factor: float = 1.0
    transform_factor: float = 1.0
    memory_factor: float = 1.0

    def subject_seconds(self, shape: Shape) -> float:
        """Of encoding and pooling."""
        depth, height, width = shape
        slice_seconds = SLICE_SECONDS + height * width * PIXEL_SECONDS if self.weight_free else SAM_SLICE_SECONDS
        return self.subject_factor * depth * slice_seconds

    def pair_seconds(self, shape: Shape) -> float:
        """Of matching and fitting to a fixed image."""
        seconds = PAIR_SECONDS + shape[0] * PAIR_SLICE_SECONDS + math.prod(shape) * PAIR_VOXEL_SECONDS
        return self.pair_factor * seconds

    def subject_bytes(self, shape: Shape) -> float:
        """Of the embedding store."""
        depth, height, width = shape
        shrink = min(1.0, CELLS / max(height, width))
        cells = height * width * shrink**2 * CELL_BYTES
        return self.store_factor * depth * (cells if self.weight_free else SAM_SLICE_BYTES)

    def pair_bytes(self, shape: Shape) -> float:
        """Of the transform."""
        return self.transform_factor * TRANSFORM_BYTES / self.stride**2 * math.prod(shape)

    def worker_bytes(self, shape: Shape) -> float:
        """Most resident memory of a worker."""
        fitting = PROCESS_BYTES + math.prod(shape) * VOXEL_BYTES
        return self.memory_factor * max(fitting, 0 if self.weight_free else SAM_BYTES)


def probed(config: StudyConfig, cohort: Cohort, shapes: Mapping[str, Shape], rule: Rule) -> Rule:
    """The rule with the factors that a study of a few of these subjects, run here and thrown away, shows.

    Raises:
        UsageError: when fewer than two subjects can be read, or a stage fails.
    """
    by_size = sorted(shapes, key=lambda name: math.prod(shapes[name]))
    if len(by_size) < 2:
        raise UsageError("a probe needs two subjects whose images can be read; plan without --probe")
    chosen = list(dict.fromkeys([by_size[-1], by_size[len(by_size) // 2], by_size[0]]))[:PROBED]
    subjects = cohort.by_name()
    few = Cohort(tuple(subjects[name] for name in chosen))
    pairs = [Pair(f"{m}__{f}", m, f) for f in chosen for m in chosen if m != f]
    serial = with_settings(config, {"execution.executor": "serial", "execution.keep": "features"})
    with tempfile.TemporaryDirectory(prefix="samreg-") as folder:
        root = Path(folder)
        summary = run_study(serial, few, root, pairs, reporter=SilentReporter())
        if summary.n_failures:
            first = tables.read_table(root, "failures").to_pylist()[0]
            raise UsageError(f"the probe failed at {first['stage']} of {first['unit']}: {first['message']}")
        return _corrected(rule, root, [shapes[name] for name in chosen], [shapes[pair.fixed] for pair in pairs])


def _corrected(rule: Rule, root: Path, subjects: list[Shape], pairs: list[Shape]) -> Rule:
    took: dict[str, list[float]] = {}
    peaks = []
    for row in tables.read_table(root, "units").to_pylist():
        took.setdefault(row["stage"], []).append(row["processor_seconds"])
        peaks.append(row["peak_memory_bytes"])
    each = sum(_without_start(took[stage]) for stage in ("encode", "prototypes"))
    pair = sum(took["match"]) / len(pairs) + _without_start(took["fit"]) * len(took["fit"]) / len(pairs)
    plain = Rule(rule.weight_free, rule.stride)
    folder = StudyFolder(root)
    return replace(
        rule,
        subject_factor=each / mean([plain.subject_seconds(shape) for shape in subjects]),
        pair_factor=pair / mean([plain.pair_seconds(shape) for shape in pairs]),
        store_factor=folder_bytes(folder.embeddings) / sum(plain.subject_bytes(shape) for shape in subjects),
        transform_factor=folder_bytes(folder.transforms) / sum(plain.pair_bytes(shape) for shape in pairs),
        memory_factor=max(peaks) / max(plain.worker_bytes(shape) for shape in subjects),
    )


def _without_start(seconds: list[float]) -> float:
    """Mean of a stage's units but the first, which also loads code."""
    return mean(seconds[1:] or seconds)


def mean(values: Sequence[float]) -> float:
    """Of numbers; 0 of none."""
    return sum(values) / max(1, len(values))


def folder_bytes(folder: Path) -> int:
    """Of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
