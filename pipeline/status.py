"""What a study folder holds compared with what its latest run asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import results
from pipeline.folder import STAGES, StudyFolder
from storage import tables
from storage.embeddings import EmbeddingStore
from storage.places import names
from storage.signature import digest


@dataclass(frozen=True)
class StageStatus:
    """Units of one stage: subjects for encode and prototypes, pairs for match and fit.

    Nothing is missing at a stage that the latest run was not `asked` for.
    """

    stage: str
    done: int
    failed: int
    missing: int
    asked: bool = True


@dataclass(frozen=True)
class Status:
    """State of a study.

    Attributes:
        stages: in order.
        failures: (stage, unit, message) of the latest run.
    """

    stages: tuple[StageStatus, ...]
    failures: tuple[tuple[str, str, str], ...]

    @property
    def complete(self) -> bool:
        """Whether nothing failed and nothing is missing."""
        return not self.failures and not any(stage.failed or stage.missing for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"complete": self.complete}


def read_status(study: Path) -> Status:
    """Compare the folder with `plan.json`.

    Raises:
        UsageError: for a folder that no run has written to.
    """
    folder = StudyFolder(study)
    plan = folder.latest_plan()
    rows = tables.read_table(folder.root, "failures").to_pylist()
    subjects: Mapping[str, Any] = plan["subjects"]
    pairs = _planned_pairs(plan)
    failed_subjects = {stage: {r["subject"] for r in rows if r["stage"] == stage} for stage in ("encode", "prototypes")}
    failed_pairs = {stage: {r["pair"] for r in rows if r["stage"] == stage} for stage in ("match", "fit")}
    done = _done(folder, subjects, pairs, plan.get("outputs", ["transforms"]))
    lost = failed_subjects["encode"]
    counted = (
        _count("encode", subjects, done["encode"], lost, set()),
        _count("prototypes", subjects, done["prototypes"], failed_subjects["prototypes"], lost),
        _count("match", pairs, done["match"], failed_pairs["match"], set()),
        _count("fit", pairs, done["fit"], failed_pairs["fit"], failed_pairs["match"]),
    )
    last = STAGES.index(plan["until"])
    stages = tuple(
        stage if STAGES.index(stage.stage) <= last else dataclasses.replace(stage, missing=0, asked=False)
        for stage in counted
    )
    return Status(stages, tuple((r["stage"], r["pair"] or r["unit"], r["message"]) for r in rows))


def _count(
    stage: str, wanted: Mapping[str, Any], done: set[str], failed: set[str], not_reached: set[str]
) -> StageStatus:
    failed = failed - done  # in an earlier run, if the latest was killed before it wrote its own
    missing = wanted.keys() - done - failed - not_reached
    return StageStatus(stage, len(done - not_reached), len(failed), len(missing))


def _planned_pairs(plan: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Match and fit key of every pair."""
    columns = plan["pairs"] or {"pair": (), "match": (), "fit": ()}
    keys = zip(columns["match"], columns["fit"], strict=True)
    return dict(zip(columns["pair"], keys, strict=True))


def _done(
    folder: StudyFolder,
    subjects: Mapping[str, Any],
    pairs: Mapping[str, tuple[str | None, str | None]],
    outputs: Sequence[str],
) -> dict[str, set[str]]:
    """Units of each stage whose stored key is the planned one."""
    store, absent = EmbeddingStore(folder.embeddings), (None, None)
    files = {name: set(names(folder.root / name)) for name in outputs}
    matched = (found for name in results.MATCHED for found in results.pair_keys(folder.root, name))
    fitted = results.pair_keys(folder.root, "metrics")
    return {
        "encode": {n for n, k in subjects.items() if k and _digest(store.signature(n)) == k["encode"]},
        "prototypes": {
            n for n, k in subjects.items() if k and _digest(store.prototypes_signature(n)) == k["prototypes"]
        },
        "match": {pair for pair, key in matched if pairs.get(pair, absent)[0] == key},
        "fit": {
            pair
            for pair, key in fitted
            if pairs.get(pair, absent)[1] == key
            and all(folder.output(name, pair).name in files[name] for name in outputs)
        },
    }


def _digest(signature: dict[str, Any] | None) -> str | None:
    return None if signature is None else digest(signature)


def describe_status(status: Status, shown: int = 20) -> str:
    """The counts as a small table, then the first failures."""
    lines = [f"{'stage':<11}{'done':>8}{'failed':>8}{'missing':>9}"]
    lines += [
        f"{s.stage:<11}{s.done:>8}{s.failed:>8}{s.missing:>9}{'' if s.asked else '  not asked for'}"
        for s in status.stages
    ]
    lines += [f"failed {stage} {unit}: {message}" for stage, unit, message in status.failures[:shown]]
    if len(status.failures) > shown:
        lines.append(f"and {len(status.failures) - shown} more failures, see failures/")
    return "\n".join(lines)
