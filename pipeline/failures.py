"""Failures of a run as rows: what failed, at which stage, and which pairs that cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.dispatch import Failure
from storage import tables
from storage.cohort import Pair


@dataclass
class FailureLog:
    """Failures of the current run, written as one part per stage.

    The table describes the latest run only: what failed before is tried again, and fails again or is gone.
    """

    root: Path
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    subjects: dict[str, str] = field(default_factory=dict)
    """Failed subjects and why, in a sentence."""
    pairs: set[str] = field(default_factory=set)

    def add_subject(self, stage: str, subject: str, failure: Failure) -> None:
        """Record that a subject failed at a stage."""
        self.subjects[subject] = f"{stage} failed with {failure.error}: {failure.message}"
        self._add(stage, failure, subject=subject)

    def add_pair(self, stage: str, pair: Pair, failure: Failure, subject: str | None = None) -> None:
        """Record that a pair failed at a stage; `subject` when one of the two is to blame."""
        self.pairs.add(pair.pair)
        self._add(stage, failure, subject=subject, pair=pair.pair)

    def block(self, pair: Pair) -> bool:
        """Record the pair as failed if one of its subjects has failed; whether it has."""
        for role, subject in (("moving", pair.moving), ("fixed", pair.fixed)):
            if subject in self.subjects:
                message = f"{role} subject {subject!r}: {self.subjects[subject]}"
                self.add_pair("match", pair, Failure(pair.pair, "SubjectFailed", message, ""), subject)
                return True
        return False

    @property
    def total(self) -> int:
        """Failures at all stages."""
        return sum(len(rows) for rows in self.rows.values())

    def write(self) -> None:
        """Replace the failures table by what was recorded."""
        for part in tables.part_names(self.root, "failures"):
            if part not in self.rows:
                tables.remove_part(self.root, "failures", part)
        for stage, rows in self.rows.items():
            ordered = sorted(rows, key=lambda row: (row["unit"], row["pair"] or ""))
            tables.write_part(self.root, "failures", stage, tables.table_from_rows("failures", ordered))

    def _add(self, stage: str, failure: Failure, subject: str | None = None, pair: str | None = None) -> None:
        self.rows.setdefault(stage, []).append(
            {
                "stage": stage,
                "unit": failure.unit,
                "subject": subject,
                "pair": pair,
                "error": failure.error,
                "message": failure.message,
                "traceback": failure.traceback,
                "attempt": failure.attempt,
            }
        )
