"""The study driver: plans each stage, dispatches what is missing, and records what failed.

Stages meet only in the study folder. Workers write embeddings, ROI tables, correspondences and transforms; the
driver alone writes the metrics and failures tables, a row only after its transform is in place. So a driver or
worker killed at any moment leaves nothing half done, and the same command again does exactly the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.build import finds_classes, reads_segmentations, segmenter_signature
from pipeline import cohort_rois, record
from pipeline.config import StudyConfig
from pipeline.dispatch import DISK_FULL, Failure, RayExecutor, SerialExecutor, Task, open_executor
from pipeline.errors import StudyError, UsageError
from pipeline.failures import FailureLog
from pipeline.folder import STAGES, StudyFolder, study_root
from pipeline.inputs import DigestCache, InputDigests, digest_inputs
from pipeline.keys import PlannedPair, SubjectKeys, plan_pairs, subject_keys
from pipeline.pair_stages import check_removal, run_pairs
from pipeline.pairs import PairsError, choose_pairs, similar_pairs
from pipeline.progress import Reporter
from pipeline.stages import encode, prototypes
from storage.cohort import Cohort, Pair

LOG = logging.getLogger("samreg")

UNITS_PER_PART = 5000

UnknownPair = tuple[int, Pair, str]


@dataclass
class StageCount:
    """How many units of a stage were done now, reused from before, or failed."""

    stage: str
    done: int = 0
    reused: int = 0
    failed: int = 0
    seconds: float = 0.0
    workers: int = 1
    peak_memory_bytes: int | None = None
    parts: int = 0


@dataclass(frozen=True)
class StudySummary:
    """What a run did."""

    stages: tuple[StageCount, ...]
    n_failures: int
    seconds: float


def run_study(
    config: StudyConfig,
    cohort: Cohort,
    out: str | Path,
    pairs: Sequence[Pair] | None = None,
    unknown: Sequence[UnknownPair] = (),
    *,
    overwrite: bool = False,
    until: str = STAGES[-1],
    reporter: Reporter | None = None,
) -> StudySummary:
    """Run or resume a study.

    Args:
        pairs: what to register; None follows `config.pairs`.
        unknown: pairs that name a subject outside the cohort, recorded as failures.
        overwrite: accept a folder made with other input or segmenter settings and encode again; remove fitted
            pairs that are not made again.
        until: the last stage to run.

    Raises:
        UsageError: for a stage that does not exist.
        FolderError: for a folder in use or made otherwise.
        PairsError, ExecutionError: for settings that cannot be carried out here.
        StudyError: when the disk is full.
    """
    if until not in STAGES:
        raise UsageError(f"until is {until!r}, which is no stage; stages are {', '.join(STAGES)}")
    folder = StudyFolder(study_root(out))
    with stopped_by_full_disk(folder), folder.lock() as lock, open_executor(config.execution, lock.check) as executor:
        folder.clear_abandoned()
        study = Study(config, cohort, folder, executor, reporter or Reporter(), until)
        return study.run(pairs, unknown, overwrite)


@contextmanager
def stopped_by_full_disk(folder: StudyFolder) -> Iterator[None]:
    """Turn the error of a full disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise _disk_full(folder, str(error)) from error
        raise


@contextmanager
def _less_than_the_error(table: str) -> Iterator[None]:
    """A table that a full disk keeps from being written, which has an error of its own already under way."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        LOG.error("the %s table could not be written: %s", table, error)


def _disk_full(folder: StudyFolder, message: str) -> StudyError:
    return StudyError(
        f"no space left for {folder.root}: {message}. "
        "Nothing finished is lost: free some space and run the same command again"
    )


@dataclass
class Study:
    """One run of a study, with what its stages share."""

    config: StudyConfig
    cohort: Cohort
    folder: StudyFolder
    executor: RayExecutor | SerialExecutor
    reporter: Reporter
    until: str = STAGES[-1]
    counts: dict[str, StageCount] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.failures = FailureLog(self.folder.root)
        self.store = self.folder.store
        self.subjects = self.cohort.by_name()
        self.started = time.time()
        self.run_id = record.run_id(self.started)

    def run(self, pairs: Sequence[Pair] | None, unknown: Sequence[UnknownPair], overwrite: bool) -> StudySummary:
        """Every stage that is asked for, in order."""
        if pairs is None and self.config.pairs.by_similarity and finds_classes(self.config.segmenter):
            raise PairsError(
                f"pairs {self.config.pairs.mode!r} compare prototypes, which class ROIs do not have; choose others"
            )
        if pairs is None:
            pairs = choose_pairs(self.config.pairs, self.cohort)
        record.refuse_credentials(self.config, self.cohort)
        segmenter = segmenter_signature(self.config.segmenter)
        record.check_settings(self.folder, self.config, segmenter, overwrite)
        inputs = self._digest_inputs()
        keys = {name: subject_keys(self.config, segmenter, found) for name, found in inputs.items()}
        planned = plan_pairs(self.config, pairs or (), list(self.subjects), inputs, keys)
        if pairs is not None and self.asks_for("match"):
            check_removal(self, pairs, planned, overwrite)
        chosen_before = overwrite or record.chose_pairs_alike(self.folder, self.config)
        written = record.write_run(self.folder, self.config, segmenter, inputs)
        self.write_failures()
        finished: float | None = None
        try:
            self._write_plan(keys, pairs, planned)
            self._encode(keys)
            if self.asks_for("prototypes"):
                self.pool(keys)
            if self.asks_for("match"):
                if pairs is None:
                    pairs = self.similar()
                    planned = plan_pairs(self.config, pairs, list(self.subjects), inputs, keys)
                    self._write_plan(keys, pairs, planned)
                    check_removal(self, pairs, planned, chosen_before)
                self.record_unknown(unknown)
                run_pairs(self, pairs, planned)
                if cohort_rois.remove_stale(self.folder.root):
                    LOG.warning("the matches have changed: run samreg cohort rois %s again", self.folder.root)
            finished = time.time()
        finally:
            self.write_failures()
            if finished is None:
                with _less_than_the_error("runs"):
                    self._record_run(written, None)
        self._record_run(written, finished)
        return StudySummary(tuple(self.counts.values()), self.failures.total, finished - self.started)

    def _record_run(self, written: Mapping[str, Any], finished: float | None) -> None:
        record.append_run(self.folder, written, self.run_id, (self.started, finished), list(self.counts.values()))

    def asks_for(self, stage: str) -> bool:
        """Whether the run goes as far as a stage."""
        return STAGES.index(stage) <= STAGES.index(self.until)

    def start_stage(self, stage: str, reused: int) -> StageCount:
        """A fresh count for a stage."""
        self.counts[stage] = StageCount(stage, reused=reused)
        return self.counts[stage]

    def disk_full(self, message: str) -> StudyError:
        """The error of a run that ran out of space."""
        return _disk_full(self.folder, message)

    def outcomes(
        self, task: Task, units: Sequence[Any], noun: str, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[Any, Any | Failure]]:
        """Dispatch a stage under its progress bar; a full disk stops the run instead of failing every unit."""
        size = dict(zip((unit.unit for unit in units), sizes or [1] * len(units), strict=True))
        start, count = time.perf_counter(), self.counts[task.name]
        try:
            with self.reporter.stage(task.name, sum(size.values()), noun) as advance:
                for unit, outcome in self.executor.map_units(task, units):
                    if isinstance(outcome, Failure) and outcome.disk_full:
                        raise self.disk_full(outcome.message)
                    yield unit, outcome
                    advance(size[unit.unit], count.failed, self.executor.running)
                    if len(self.executor.ledger) >= UNITS_PER_PART:
                        self._record_units(count)
        finally:
            count.seconds = time.perf_counter() - start
            count.workers = self.executor.active_workers
            self._record_units(count)

    def _record_units(self, count: StageCount) -> None:
        """Move the executor's ledger to the units table."""
        used, self.executor.ledger[:] = list(self.executor.ledger), []
        if not used:
            return
        peaks = [usage.peak_memory_bytes for usage in used if usage.peak_memory_bytes is not None]
        count.peak_memory_bytes = max([*peaks, count.peak_memory_bytes or 0])
        with _less_than_the_error("units"):
            record.append_units(self.folder, self.run_id, count.stage, count.parts, used)
        count.parts += 1

    def _write_plan(
        self, keys: Mapping[str, SubjectKeys], pairs: Sequence[Pair] | None, planned: Sequence[PlannedPair]
    ) -> None:
        record.write_plan(self.folder, self.cohort, keys, pairs, planned, self.until, self.config.outputs())

    def _digest_inputs(self) -> dict[str, InputDigests]:
        self.start_stage("encode", reused=0)
        cache = DigestCache(self.folder.root / ".digests.json")
        reads = reads_segmentations(self.config.segmenter)
        found = digest_inputs(self.cohort.subjects, cache, segmentations=reads, reporter=self.reporter)
        good: dict[str, InputDigests] = {}
        for name, outcome in found.items():
            if isinstance(outcome, Failure) and outcome.disk_full:
                raise self.disk_full(outcome.message)
            if isinstance(outcome, Failure):
                self.fail_subject("encode", name, outcome)
            else:
                good[name] = outcome
        return good

    def _encode(self, keys: Mapping[str, SubjectKeys]) -> None:
        """Encode every subject whose embeddings are missing or made otherwise."""
        units = encode.plan(self.store, self.subjects, keys)
        self.counts["encode"].reused = len(keys) - len(units)
        for unit, outcome in self.outcomes(encode.task(self.config, self.folder.embeddings), units, "subjects"):
            self._count_subject("encode", unit.subject, outcome)

    def pool(self, keys: Mapping[str, SubjectKeys]) -> None:
        """Pool every encoded subject whose prototypes are missing or made otherwise."""
        encoded = {name: key for name, key in keys.items() if name not in self.failures.subjects}
        pooling = prototypes.plan(self.folder.root, self.store, encoded)
        self.start_stage("prototypes", reused=len(encoded) - len(pooling))
        task = prototypes.task(self.config, self.folder.root, self.store)
        for unit, outcome in self.outcomes(task, pooling, "subjects"):
            self._count_subject("prototypes", unit.subject, outcome)
        if self.config.execution.keep == "prototypes":
            for name in encoded.keys() - self.failures.subjects.keys():
                self.store.drop_features(name)
        prototypes.remove_stale(self.folder.root, self.subjects, self.failures.subjects.keys() & keys.keys())

    def _count_subject(self, stage: str, subject: str, outcome: object) -> None:
        if isinstance(outcome, Failure):
            self.fail_subject(stage, subject, outcome)
        else:
            self.counts[stage].done += 1

    def fail_subject(self, stage: str, subject: str, failure: Failure) -> None:
        """Record that a subject failed at a stage, and with it its pairs."""
        self.counts[stage].failed += 1
        self.failures.add_subject(stage, subject, failure)
        LOG.warning("%s: %s failed: %s", stage, subject, failure.message)

    def similar(self) -> tuple[Pair, ...]:
        """Pairs chosen by what the subjects that could be encoded look like."""
        good = [name for name in self.subjects if name not in self.failures.subjects]
        return similar_pairs(self.config.pairs, good, prototypes.similarity(self.store, good))

    def record_unknown(self, unknown: Sequence[UnknownPair]) -> None:
        """Record the pairs of a file that name a subject outside the cohort as failures."""
        for row, pair, subject in unknown:
            message = f"row {row} of the pairs file: subject {subject!r} is not in the cohort"
            self.failures.add_pair("match", pair, Failure(pair.pair, "UnknownSubject", message, ""), subject)

    def write_failures(self) -> None:
        """Write the failures so far in place of those of an earlier run."""
        with _less_than_the_error("failures"):
            self.failures.write()
