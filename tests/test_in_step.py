"""Computations in step: the same results in the same order, and a failure that stays its own."""

from __future__ import annotations

from pipeline.algorithms.in_step import Staged, complete, in_step


def counted(log: list[tuple[int, int]], number: int, stages: int, hold: int, fail_at: int = -1) -> Staged[int]:
    for stage in range(stages):
        log.append((stage, number))
        if stage == fail_at:
            raise ValueError(f"computation {number}")
        yield hold if stage == 0 else 0
    return number * 10


def test_stages_of_a_group_run_together_and_groups_one_after_the_other() -> None:
    log: list[tuple[int, int]] = []
    found = list(in_step((counted(log, number, 2, hold=5) for number in range(4)), hold_bytes=10))
    assert [outcome.value for outcome in found] == [0, 10, 20, 30]
    assert log == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert all(outcome.seconds > 0 for outcome in found)


def test_an_exception_ends_its_own_computation_only() -> None:
    log: list[tuple[int, int]] = []
    jobs = [counted(log, 0, 3, 1), counted(log, 1, 3, 1, fail_at=1), counted(log, 2, 1, 1), counted(log, 3, 0, 0)]
    found = list(in_step(jobs, hold_bytes=100))
    assert [outcome.value for outcome in found] == [0, None, 20, 30]
    assert [str(outcome.error) for outcome in found] == ["None", "computation 1", "None", "None"]


def test_one_alone_runs_to_its_end() -> None:
    assert complete(counted([], 7, 3, 1)) == 70
