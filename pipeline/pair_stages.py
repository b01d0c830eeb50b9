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
from pipeline.errors import FolderError, StudyError
from pipeline.failures import FailureLog
from pipeline.folder import OUTPUTS, StudyFolder
from pipeline.keys import PlannedPair
from pipeline.stages import fit, match
from storage import tables
from storage.cohort import Pair, subject_key
from storage.places import names, remove

if TYPE_CHECKING:
    from pipeline.study import StageCount, Study

LOG = logging.getLogger("samreg")
GROUP = 16  # most pairs in one unit of fitting


class IncompleteStudyError(StudyError):
    """Rows are missing although every unit ended, as when someone deletes files during a run."""


def check_removal(study: Study, pairs: Sequence[Pair], planned: Sequence[PlannedPair], overwrite: bool) -> None:
    """Refuse to remove fits that the run does not make again, unless `overwrite` asks for it.

    Those are of pairs that are no longer asked for and, where the run ends before the fit, those made otherwise.

    Raises:
        FolderError: saying how many.
    """
    root, again = study.folder.root, study.asks_for("fit")
    wanted = {pair.pair: pair.fit_key for pair in planned}
    fitted = dict(results.held_keys(root, "metrics"))
    current = {pair for pair, key in fitted.items() if wanted.get(pair, key) == key}
    stay = {pair.pair for pair in pairs if again or pair.pair in current or pair.pair not in wanted}
    lost = set(map(subject_key, fitted)).union(*_files(study.folder).values()) - set(map(subject_key, stay))
    if lost and not overwrite:
        raise FolderError(
            f"{root}: this run would remove {len(lost)} fitted pairs that it does not make again; choose another "
            "--out, or add --overwrite"
        )
    if lost:
        LOG.warning("removing %d fitted pairs, which this run does not make again", len(lost))
    if again and len(current) < len(fitted):
        LOG.info("%d fitted pairs were made otherwise and are made again", len(fitted) - len(current))


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
    fitted, leftover = _holding(study, planned, unreadable)
    seconds = _match(study, ready, planned, unreadable)
    if study.asks_for("fit"):
        _fit(study, ready, fitted, seconds, leftover)
        wanted = {pair.pair: pair.fit_key for pair in ready}
        _check_complete(study.folder.root, ("metrics",), wanted, study.failures)
    else:
        wanted = {pair.pair: pair.match_key for pair in ready}
        _check_complete(study.folder.root, results.MATCHED, wanted, study.failures)


def _files(folder: StudyFolder) -> dict[str, set[str]]:
    """`subject_key` of the pairs that have a file, by output."""
    return {
        name: {
            file.removesuffix(ending) for file in names(folder.root / name) if file.endswith(ending) and file[0] != "."
        }
        for name, ending in OUTPUTS.items()
    }


def _holding(
    study: Study, planned: Sequence[PlannedPair], unreadable: set[str]
) -> tuple[set[str], dict[str, list[Path]]]:
    """Pairs whose metrics and files still hold; of the others, the files that a new fit does not replace.

    Rows made otherwise, and files of pairs that are not to be fitted, are removed. A row says that all files of its
    pair were made with it, so what a new fit leaves is to go before its rows are written.
    """
    folder, present = study.folder, _files(study.folder)
    outputs = study.config.outputs() if folder.keep_transforms else ()
    wanted = {pair.pair: (pair.fit_key, pair.part) for pair in planned}
    held = results.reconcile(folder.root, "metrics", wanted, unreadable)
    stay = set(map(subject_key, unreadable | (wanted.keys() if study.asks_for("fit") else held)))
    for name, found in present.items():
        for key in found - stay:
            remove(folder.root / name / f"{key}{OUTPUTS[name]}")
    whole = {pair for pair in held if all(subject_key(pair) in present[name] for name in outputs)}
    beside = [name for name in OUTPUTS if name not in outputs and present[name]]
    leftover = {
        pair: [folder.output(name, pair) for name in beside if subject_key(pair) in present[name]]
        for pair in (wanted.keys() - whole if beside else ())
    }
    return whole, leftover


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


def _fit(
    study: Study,
    ready: Sequence[PlannedPair],
    fitted: set[str],
    seconds: Mapping[str, float],
    leftover: Mapping[str, Sequence[Path]],
) -> None:
    """Fit what is missing, a few pairs per unit, writing the metrics rows of each unit as it ends."""
    root = study.folder.root
    missing = [p for p in ready if p.pair not in fitted and p.pair not in study.failures.pairs]
    blocked = sum(1 for p in ready if p.pair in study.failures.pairs)
    count = study.start_stage("fit", reused=len(ready) - len(missing) - blocked)
    size = min(GROUP, math.ceil(len(missing) / (4 * study.executor.width()))) if missing else 1
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
            for path in (path for pair in names_done for path in leftover.get(pair, ())):
                remove(path)
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
