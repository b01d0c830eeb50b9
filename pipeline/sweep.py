"""A sweep: the pairs of an encoded study, matched and fitted once for every combination of a grid of settings.

    study/sweeps/<name>/
      sweep.parquet     one row per combination and label, settings as columns; <setting>.png draws it
      pairs.parquet     the metrics of every pair under every combination
      sweep.yaml        the settings of the study, the grid, versions
      combinations/     the correspondences, metrics and failures tables of each
      pooled/           prototypes of other `rois`, `prototypes` or `tracks` settings than the study's

Each combination is a study folder that reads the embeddings of the study, so its rows carry the same keys, and a
sweep resumes as a study does. Images are never opened: what they were is written in the store.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline import record, sweep_tables
from pipeline.config import StudyConfig, make_config, with_settings
from pipeline.dispatch import Failure, RayExecutor, SerialExecutor, open_executor
from pipeline.errors import UsageError
from pipeline.folder import StudyFolder
from pipeline.inputs import DigestCache, InputDigests, digest_inputs
from pipeline.keys import SubjectKeys, encoded_keys, plan_pairs
from pipeline.pair_stages import run_pairs
from pipeline.pairs import choose_pairs
from pipeline.progress import Reporter
from pipeline.request import Request, request_pairs
from pipeline.study import StageCount, Study, stopped_by_full_disk
from pipeline.sweep_grid import POOLED, Combination, Grid, section_digest
from storage import tables
from storage.atomic import clear_abandoned, replace_file
from storage.cohort import Cohort, Pair, Subject, subject_key
from storage.signature import check_signature

LOG = logging.getLogger("samreg")


class NotEncodedError(ValueError):
    """A subject of the study has no embeddings to sweep over."""


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep did.

    Attributes:
        root: its folder.
        results: the counts of every combination, by stage.
    """

    root: Path
    results: tuple[tuple[Combination, Mapping[str, StageCount]], ...]
    n_failures: int
    seconds: float


def run_sweep(
    root: str | Path,
    grid: Grid,
    *,
    name: str | None = None,
    pairs: str | None = None,
    execution: Mapping[str, Any] | None = None,
    keep_transforms: bool = False,
    reporter: Reporter | None = None,
) -> SweepSummary:
    """Run or resume a sweep over a study.

    Args:
        root: the study folder, which a run has written.
        name: of the sweep; None takes that of the grid.
        pairs: a pairs file or a mode of `pairs:`; None takes the pairs of the study's latest run.
        execution: settings of `execution` in place of those of the run.
        keep_transforms: keep the displacement fields of every combination.

    Raises:
        UsageError: for a folder that is no study, or a grid, pairs or execution that cannot be carried out.
        StudyError: when the disk is full.
    """
    start = time.time()
    folder = StudyFolder(Path(root).absolute())
    run, plan = folder.latest_run()
    changed = {**(execution or {}), "keep": "features"}
    config = with_settings(make_config(run["config"]), {f"execution.{key}": value for key, value in changed.items()})
    combinations = grid.combinations(config)
    request = _request(config, plan, pairs)
    with (
        stopped_by_full_disk(folder),
        folder.lock() as lock,
        open_executor(config.execution, lock.check, rounds=len(combinations)) as executor,
    ):
        out = folder.root / "sweeps" / subject_key(name or grid.name)
        sweep = Sweep(folder, out, run["encode"], request, executor, reporter or Reporter(), keep_transforms)
        done = sweep.run(combinations)
        _write_record(out, config, grid, sweep.pairs)
        sweep_tables.write_results(out, list(grid.axes), done)
    counts = tuple((combination, study.counts) for combination, study in done)
    return SweepSummary(out, counts, sum(study.failures.total for _, study in done), time.time() - start)


def _request(config: StudyConfig, plan: Mapping[str, Any], pairs: str | None) -> Request:
    cohort = Cohort(record.planned_subjects(plan))
    if pairs is not None:
        return request_pairs(config, cohort, pairs)
    planned = record.planned_pairs(plan)
    if planned is None:
        raise UsageError("the study has not come to its pairs; finish it with samreg run, or give --pairs")
    return Request(config, cohort, planned, ())


def _write_record(out: Path, config: StudyConfig, grid: Grid, pairs: Sequence[Pair]) -> None:
    """Write `sweep.yaml`."""
    study = {name: value for name, value in config.resolved().items() if name != "execution"}
    swept = {"set": dict(grid.base), **{path: list(values) for path, values in grid.axes.items()}}
    text = yaml.safe_dump(
        {"grid": swept, "pairs": len(pairs), "study": study, "versions": record.versions()},
        sort_keys=False,
        allow_unicode=True,
    )
    with replace_file(out / "sweep.yaml") as temporary:
        temporary.write_text(text, encoding="utf-8")


@dataclass
class Sweep:
    """One run of a sweep, with what its combinations share.

    Attributes:
        study: the folder of the encoded study.
        root: folder of the sweep.
        encoded_with: what the embeddings must have been made with, as in `run.yaml`.
        request: the study's configuration, its cohort and the pairs.
    """

    study: StudyFolder
    root: Path
    encoded_with: dict[str, Any]
    request: Request
    executor: RayExecutor | SerialExecutor
    reporter: Reporter
    keep_transforms: bool
    matched: dict[str, Path] = field(default_factory=dict)
    """Folder that holds the matches, by digest of the settings they depend on."""

    def __post_init__(self) -> None:
        config = self.request.config
        self.store = self.study.store
        self.pooled_with = section_digest(config, *POOLED)
        self.matched[section_digest(config, *POOLED, "match")] = self.study.root
        self.signatures: dict[str, dict[str, Any]] = {}
        self.inputs: dict[str, InputDigests] = {}
        self.unusable: dict[str, Failure] = {}
        self.pairs: tuple[Pair, ...] = ()

    def run(self, combinations: Sequence[Combination]) -> list[tuple[Combination, Study]]:
        """Every combination, one after the other."""
        clear_abandoned([self.root])
        self._digest_inputs()
        self.pairs = self._choose_pairs()
        done = []
        for number, combination in enumerate(combinations, 1):
            LOG.info("combination %d of %d: %s", number, len(combinations), combination)
            done.append((combination, self._run_combination(combination)))
        return done

    def _digest_inputs(self) -> None:
        """Digests of the labels and landmarks as they are now, of the images as they were encoded."""
        cache = DigestCache(self.root / ".digests.json")
        for name, outcome in digest_inputs(self.request.cohort.subjects, cache, self._encoded_image).items():
            if isinstance(outcome, Failure):
                self.unusable[name] = outcome
            else:
                self.inputs[name] = outcome

    def _encoded_image(self, subject: Subject) -> str:
        """Digest of the image that a subject was encoded from.

        Raises:
            NotEncodedError: for a subject without embeddings.
            SignatureMismatch: for embeddings that were made with other settings than the rest.
        """
        signature = self.store.signature(subject.subject)
        if signature is None:
            raise NotEncodedError("it has no embeddings; a sweep never encodes, so finish the study with samreg run")
        made_with = {name: value for name, value in signature.items() if name not in ("image", "segmentation")}
        check_signature(f"embedding of subject {subject.subject!r}", made_with, self.encoded_with)
        self.signatures[subject.subject] = signature
        return str(signature["image"])

    def _choose_pairs(self) -> tuple[Pair, ...]:
        config, cohort, pairs = self.request.config, self.request.cohort, self.request.pairs
        if pairs is not None:
            return pairs
        chosen = choose_pairs(config.pairs, cohort)
        if chosen is not None:
            return chosen
        study = Study(config, cohort, self.study, self.executor, self.reporter)
        self._pool(study, self.study)
        return study.similar()

    def _run_combination(self, combination: Combination) -> Study:
        config, cohort = combination.config, self.request.cohort
        pooled = self._pooled(combination)
        folder = StudyFolder(
            self.root / "combinations" / combination.key, self.study.root, pooled.pooled, self.keep_transforms
        )
        folder.clear_abandoned()
        study = Study(config, cohort, folder, self.executor, self.reporter)
        try:
            keys = self._pool(study, pooled)
            planned = plan_pairs(config, self.pairs, list(study.subjects), self.inputs, keys)
            self._adopt_matches(config, folder.root)
            study.record_unknown(self.request.unknown)
            run_pairs(study, self.pairs, planned)
        finally:
            study.write_failures()
        return study

    def _pool(self, study: Study, pooled: StudyFolder) -> dict[str, SubjectKeys]:
        """Pool what is missing in the folder of the prototypes; the keys of every usable subject."""
        study.start_stage("encode", reused=len(self.inputs))
        for name, failure in self.unusable.items():
            study.fail_subject("encode", name, failure)
        keys = {name: encoded_keys(study.config, self.signatures[name]) for name in self.inputs}
        pooling = dataclasses.replace(study, folder=pooled)
        pooling.failures = study.failures
        pooling.pool(keys)
        return keys

    def _pooled(self, combination: Combination) -> StudyFolder:
        """Where the prototypes of a combination lie: in the study, or, made otherwise, in the sweep."""
        made = section_digest(combination.config, *POOLED)
        if made == self.pooled_with:
            return self.study
        root = self.root / "pooled" / made
        return StudyFolder(root, self.study.root, root / "prototypes.zarr")

    def _adopt_matches(self, config: StudyConfig, root: Path) -> None:
        """Copy the matches of a folder made with the same settings up to the matching; their keys are the same."""
        source = self.matched.setdefault(section_digest(config, *POOLED, "match"), root)
        for part in tables.part_names(source, "correspondences") if source != root else ():
            if not tables.has_part(root, "correspondences", part):
                tables.write_part(root, "correspondences", part, tables.read_part(source, "correspondences", part))
