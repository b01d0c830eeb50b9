"""The half of a study that costs pairs: what is still to match and fit, and where the results go."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import results
from pipeline.dispatch import Failure
from pipeline.errors import StudyError
from pipeline.failures import FailureLog
from pipeline.folder import OUTPUTS, StudyFolder
from pipeline.keys import PlannedPair
from pipeline.stages import fit, match
from storage import tables
from storage.cohort import Pair
from storage.places import names, remove

if TYPE_CHECKING:
    from pipeline.study import StageCount, Study

LOG = logging.getLogger("samreg")
GROUP = 16  # most pairs in one unit of fitting


class IncompleteStudyError(StudyError):
    """Rows are missing although every unit ended, as when someone deletes files during a run."""


def run_pairs(study: Study, pairs: Sequence[Pair], planned: Sequence[PlannedPair]) -> None:
    """Match and, unless the run ends there, fit every pair whose rows are missing or made otherwise.

    A pair whose subject failed is recorded as failed. If that subject's file cannot even be read, its earlier
    rows stay, since nothing says that they are out of date; rows of pairs that are no longer asked for go.
    """
    if study.failures.subjects:
        for pair in pairs:
            study.failures.block(pair)
    known = {pair.pair for pair in planned}
    unreadable = {pair.pair for pair in pairs if pair.pair not in known}
    ready = [pair for pair in planned if pair.pair not in study.failures.pairs]
    outputs = study.config.outputs() if study.folder.keep_transforms else ()
    fitted = _holding(study.folder, outputs, planned, unreadable)
    seconds = _match(study, ready, planned, unreadable)
    if study.asks_for("fit"):
        _fit(study, ready, fitted, seconds)
        wanted = {pair.pair: pair.fit_key for pair in ready}
        _check_complete(study.folder.root, ("metrics",), wanted, study.failures)
    else:
        wanted = {pair.pair: pair.match_key for pair in ready}
        _check_complete(study.folder.root, results.MATCHED, wanted, study.failures)


def _holding(
    folder: StudyFolder, outputs: Sequence[str], planned: Sequence[PlannedPair], unreadable: set[str]
) -> set[str]:
    """Pairs whose metrics and files still hold; other rows, and files of other pairs, are removed."""
    present = {name: set(names(folder.root / name)) for name in OUTPUTS}

    def has(name: str, pair: str) -> bool:
        return folder.output(name, pair).name in present.get(name, ())

    whole = [planned_pair for planned_pair in planned if all(has(name, planned_pair.pair) for name in outputs)]
    wanted = {pair.pair: (pair.fit_key, pair.part) for pair in whole}
    held = results.reconcile(folder.root, "metrics", wanted, unreadable)
    for name, files in present.items():
        for file in files - {folder.output(name, pair).name for pair in held}:
            if file.endswith(OUTPUTS[name]):
                remove(folder.root / name / file)
    return held


def _match(
    study: Study, ready: Sequence[PlannedPair], planned: Sequence[PlannedPair], unreadable: set[str]
) -> dict[str, float]:
    """Match what is missing, a tile of pairs per unit; seconds by pair."""
    root = study.folder.root
    wanted = {pair.pair: (pair.match_key, pair.part) for pair in planned}
    matched = set[str]().union(*(results.reconcile(root, name, wanted, unreadable) for name in results.MATCHED))
    missing = [pair for pair in ready if pair.pair not in matched]
    count = study.start_stage("match", reused=len(ready) - len(missing))
    units = [match.MatchUnit(part, tuple(members)) for part, members in _by_part(missing).items()]
    seconds: dict[str, float] = {}
    task = match.task(study.config, root, study.store)
    for unit, outcome in study.outcomes(task, units, "pairs", [len(unit.pairs) for unit in units]):
        for pair, result in zip(unit.pairs, _each(outcome, len(unit.pairs)), strict=True):
            if isinstance(result, Failure):
                _fail(study, count, pair, result)
            else:
                count.done += 1
                seconds[pair.pair] = result
    return seconds


def _fit(study: Study, ready: Sequence[PlannedPair], fitted: set[str], seconds: dict[str, float]) -> None:
    """Fit what is missing, a few pairs per unit, writing the metrics rows of each unit as it ends."""
    root = study.folder.root
    missing = [p for p in ready if p.pair not in fitted and p.pair not in study.failures.pairs]
    blocked = sum(1 for p in ready if p.pair in study.failures.pairs)
    count = study.start_stage("fit", reused=len(ready) - len(missing) - blocked)
    size = max(1, min(GROUP, math.ceil(len(missing) / (4 * study.executor.workers))))
    units = []
    for part, members in _by_part(missing).items():
        for start in range(0, len(members), size):
            group = tuple(members[start : start + size])
            names = {name for pair in group for name in (pair.moving, pair.fixed)}
            subjects = {name: study.subjects[name] for name in names}
            times = tuple(seconds.get(pair.pair) for pair in group)
            units.append(fit.FitUnit(f"{part}.{start:03d}", part, group, subjects, times))
    task = fit.task(study.config, study.folder)
    for unit, outcome in study.outcomes(task, units, "pairs", [len(unit.pairs) for unit in units]):
        rows: list[dict[str, Any]] = []
        for pair, result in zip(unit.pairs, _each(outcome, len(unit.pairs)), strict=True):
            if isinstance(result, Failure):
                _fail(study, count, pair, result)
            else:
                count.done += 1
                rows += result
        if rows:
            names_done = {row["pair"] for row in rows}
            results.merge_rows(root, "metrics", unit.part, tables.table_from_rows("metrics", rows), names_done)


def _by_part(pairs: Iterable[PlannedPair]) -> dict[str, list[PlannedPair]]:
    parts: dict[str, list[PlannedPair]] = defaultdict(list)
    for pair in pairs:
        parts[pair.part].append(pair)
    return dict(sorted(parts.items()))


def _each(outcome: Sequence[Any] | Failure, count: int) -> Sequence[Any]:
    """Results of the pairs of a unit; a unit that failed as a whole fails each of them."""
    return [outcome] * count if isinstance(outcome, Failure) else outcome


def _fail(study: Study, count: StageCount, pair: PlannedPair, failure: Failure) -> None:
    if failure.disk_full:
        raise study.disk_full(failure.message)
    count.failed += 1
    study.failures.add_pair(count.stage, Pair(pair.pair, pair.moving, pair.fixed), failure)
    LOG.warning("%s: %s failed: %s", count.stage, pair.pair, failure.message)


def _check_complete(root: Path, names: Sequence[str], wanted: Mapping[str, str], failures: FailureLog) -> None:
    """Every wanted pair is in one of the tables under its key, or in the failures table.

    Raises:
        IncompleteStudyError: naming pairs that are in neither.
    """
    have = {pair for name in names for pair, key in results.pair_keys(root, name) if wanted.get(pair) == key}
    lost = [pair for pair in wanted if pair not in have and pair not in failures.pairs]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise IncompleteStudyError(f"no result for {', '.join(lost[:5])}{more}; run the same command again")
