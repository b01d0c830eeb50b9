# mypy: disable-error-code="no-untyped-call"
"""Baseline: register one pair with one of the usual tools, and evaluate its field as the study's are."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from actors.input_config import InputConfig
from pipeline.baseline_images import PairImages, Registered, Volume, check_field
from pipeline.baseline_methods import Baseline, Register
from pipeline.dispatch import Task
from pipeline.stages.evaluate import Reference, Row, evaluate
from pipeline.stages.subject_files import read_reference, shown_intensities
from storage.cohort import Pair, Subject
from storage.images import read_image

_KEPT = 4  # subjects, since the pairs of one follow each other


@dataclass(frozen=True)
class BaselineUnit:
    """One pair and one method.

    Attributes:
        key: digest of everything that its rows depend on.
    """

    baseline: Baseline
    pair: Pair
    moving: Subject
    fixed: Subject
    key: str

    @property
    def unit(self) -> str:
        """Name in failure rows."""
        return f"{self.baseline.name} {self.pair.pair}"


@dataclass
class Took:
    """Seconds of what ran in `_timed`: by the clock, and of processors, those of other programs included."""

    seconds: float = field(default=0.0)
    processor_seconds: float = field(default=0.0)


def task(settings: InputConfig, threads: int) -> Task:
    """The task of the baselines, for `pipeline.dispatch`."""
    return Task("baseline", partial(_build, settings, threads))


def _build(settings: InputConfig, threads: int, device: str) -> Callable[[BaselineUnit], list[Row]]:
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)

    @lru_cache(maxsize=_KEPT)
    def read(subject: Subject) -> tuple[Reference, Volume]:
        image = read_image(subject.image, settings.slice_axis)
        return read_reference(subject, image.geometry), shown_intensities(image, settings)

    @lru_cache(maxsize=1)
    def load(baseline: Baseline) -> Register:
        return baseline.load()

    return partial(run_unit, read, load)


def run_unit(
    read: Callable[[Subject], tuple[Reference, Volume]], load: Callable[[Baseline], Register], unit: BaselineUnit
) -> list[Row]:
    """Register and evaluate one pair; its rows."""
    (fixed, here), (moving, there) = read(unit.fixed), read(unit.moving)
    images = PairImages(here, there, fixed.geometry, moving.geometry)
    register = load(unit.baseline)
    with _timed() as took:
        found = register(images)
    found = check_field(found, images)
    shared = {
        "method": unit.baseline.name,
        **unit.pair._asdict(),
        "seconds": took.seconds,
        "processor_seconds": took.processor_seconds,
        "key": unit.key,
    }
    return [{**row, **shared} for row in evaluate_field(fixed, moving, found)]


def evaluate_field(fixed: Reference, moving: Reference, found: Registered) -> list[Row]:
    """Rows of `evaluate`, without those columns of an affine step that the method does not have."""
    if found.affine is not None:
        return evaluate(fixed, moving, found)
    rows = evaluate(fixed, moving, replace(found, affine=np.eye(4)))
    return [{name: value for name, value in row.items() if not name.endswith("_affine")} for row in rows]


@contextmanager
def _timed() -> Iterator[Took]:
    took = Took()
    start, before = time.perf_counter(), os.times()
    yield took
    after: Any = os.times()
    took.seconds = time.perf_counter() - start
    took.processor_seconds = sum(after[:4]) - sum(before[:4])
