"""`samreg baseline`: the usual tools on the pairs of a study, in a table with the columns of its metrics.

    study/baselines/
      baseline_metrics/   a row per method, pair and label
      failures/           what failed in the latest call

A row carries a key of everything that it depends on, so the same command again registers only what is missing or has
changed. Rows of methods that are not asked for stay, as do those of subjects that cannot be read for the moment. The
images are read anew; nothing of the study but its pairs and its `input` settings is used, so that of a study made by
`samreg run --until encode` will do.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.baseline_methods import Baseline
from pipeline.config import StudyConfig, make_config, with_settings
from pipeline.dispatch import Failure, open_executor
from pipeline.errors import StudyError
from pipeline.failures import FailureLog
from pipeline.folder import StudyFolder
from pipeline.inputs import DigestCache, InputDigests, digest_inputs
from pipeline.lock import hold
from pipeline.pair_files import StudyPairs, read_study_pairs
from pipeline.progress import Reporter
from pipeline.results import merge_rows
from pipeline.stages import baseline as stage
from storage import tables
from storage.atomic import clear_abandoned
from storage.signature import digest

LOG = logging.getLogger("samreg")
TABLE = "baseline_metrics"


@dataclass(frozen=True)
class BaselineSummary:
    """What a call did: pairs registered now and reused from before, by method."""

    root: Path
    done: Mapping[str, int]
    reused: Mapping[str, int]
    n_failures: int
    seconds: float


def run_baselines(
    root: str | Path,
    baselines: Sequence[Baseline],
    *,
    execution: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> BaselineSummary:
    """Run or resume baselines on the pairs of a study's latest run.

    Args:
        root: the study folder.
        execution: settings of `execution` in place of those of the study.

    Raises:
        UsageError: for a folder without pairs.
        StudyError: when the disk is full.
    """
    start = time.time()
    folder = StudyFolder(Path(root).absolute())
    known, (run, _) = read_study_pairs(folder.root), folder.latest_run()
    given = {f"execution.{name}": value for name, value in (execution or {}).items()}
    config = with_settings(make_config(run["config"]), given)
    out = folder.root / "baselines"
    cache = DigestCache(out / ".digests.json", folder.root / ".digests.json")
    failures = FailureLog(out)
    with hold(out) as lock, open_executor(config.execution, lock.check) as executor:
        clear_abandoned([out / TABLE, out / "failures"])
        units = list(_plan(config, known, baselines, digest_inputs(known.subjects.values(), cache), failures))
        missing = _missing(out, units, known.pairs.keys() - {unit.pair.pair for unit in units})
        done: Counter[str] = Counter()
        work = stage.task(config.input, config.execution.threads)
        try:
            with (reporter or Reporter()).stage("baseline", len(missing), "pairs") as advance:
                for unit, outcome in executor.map_units(work, missing):
                    peak = {usage.unit: usage.peak_memory_bytes for usage in executor.ledger}
                    executor.ledger.clear()
                    if isinstance(outcome, Failure):
                        _fail(failures, unit, outcome, out)
                    else:
                        rows = [{**row, "peak_memory_bytes": peak.get(unit.unit)} for row in outcome]
                        fresh = tables.table_from_rows(TABLE, rows)
                        merge_rows(out, TABLE, _part(unit), fresh, [unit.pair.pair])
                        done[unit.baseline.name] += 1
                    advance(1, failures.total, executor.running)
        finally:
            failures.write()
    waiting = {unit.unit for unit in missing}
    reused = Counter(unit.baseline.name for unit in units if unit.unit not in waiting)
    return BaselineSummary(out, done, reused, failures.total, time.time() - start)


def _plan(
    config: StudyConfig,
    known: StudyPairs,
    baselines: Sequence[Baseline],
    inputs: Mapping[str, InputDigests | Failure],
    failures: FailureLog,
) -> Iterator[stage.BaselineUnit]:
    """Every pair with every method; a pair of a subject that is unknown or cannot be read goes to the failures."""
    signatures = {baseline.name: baseline.signature() for baseline in baselines}
    settings = digest(dataclasses.asdict(config.input))
    for baseline in baselines:
        for pair in known.pairs.values():
            lost = [name for name in (pair.moving, pair.fixed) if not isinstance(inputs.get(name), InputDigests)]
            if lost:
                reason = inputs.get(lost[0])
                why = reason.message if isinstance(reason, Failure) else "not in the cohort"
                name = f"{baseline.name} {pair.pair}"
                failures.add_pair(baseline.name, pair, Failure(name, "SubjectFailed", f"{lost[0]}: {why}", ""), lost[0])
                continue
            files = [dataclasses.asdict(inputs[name]) for name in (pair.moving, pair.fixed)]
            key = digest([signatures[baseline.name], settings, *pair, *files])
            subjects = known.subjects[pair.moving], known.subjects[pair.fixed]
            yield stage.BaselineUnit(baseline, pair, *subjects, key)


def _missing(out: Path, units: Sequence[stage.BaselineUnit], untouched: Set[str]) -> list[stage.BaselineUnit]:
    """Units without rows of their key; other rows are dropped, but for those of untouched pairs."""
    wanted: dict[str, set[str]] = {unit.baseline.name: set() for unit in units}
    for unit in units:
        wanted[unit.baseline.name].add(unit.key)
    found: set[str] = set()
    for part in tables.part_names(out, TABLE):
        keys = wanted.get(part.rpartition("-")[0])
        if keys is None:
            continue
        try:
            table = tables.read_part(out, TABLE, part)
        except tables.TableError as error:
            LOG.warning("%s; its rows are made again", error)
            tables.remove_part(out, TABLE, part)
            continue
        held, pairs = (table.column(name).to_pylist() for name in ("key", "pair"))
        kept = table.filter([key in keys or pair in untouched for key, pair in zip(held, pairs, strict=True)])
        if kept.num_rows < table.num_rows:
            tables.write_part(out, TABLE, part, kept) if kept.num_rows else tables.remove_part(out, TABLE, part)
        found.update(held)
    return [unit for unit in units if unit.key not in found]


def _part(unit: stage.BaselineUnit) -> str:
    """One of 256 parts of a method, by the pair alone, so that a pair's rows never move."""
    return f"{unit.baseline.name}-{digest(unit.pair.pair)[:2]}"


def _fail(failures: FailureLog, unit: stage.BaselineUnit, failure: Failure, out: Path) -> None:
    if failure.disk_full:
        raise StudyError(f"no space left for {out}: {failure.message}. Free some space and run the same command again")
    failures.add_pair(unit.baseline.name, unit.pair, failure)
    LOG.warning("baseline: %s failed: %s", unit.unit, failure.message)
