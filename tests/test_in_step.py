"""Computations in step: the same results in the same order, and a failure that stays its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.algorithms.staged import Staged, complete
from pipeline.dispatch import Failure
from pipeline.in_step import in_step


@dataclass(frozen=True)
class Job:
    number: int
    stages: int
    hold: int = 1
    fail_at: int = -1

    @property
    def unit(self) -> str:
        return f"job {self.number}"


def runner(log: list[tuple[int, int]]) -> Callable[[Job], Staged[int]]:
    def run(job: Job) -> Staged[int]:
        for stage in range(job.stages):
            log.append((stage, job.number))
            if stage == job.fail_at:
                raise ValueError("no good")
            yield job.hold if stage == 0 else 0
        return job.number * 10

    return run


def test_stages_of_a_group_run_together_and_groups_one_after_the_other() -> None:
    log: list[tuple[int, int]] = []
    found = list(in_step(runner(log), [Job(number, 2, hold=5) for number in range(4)], hold_bytes=10))
    assert [result for result, _ in found] == [0, 10, 20, 30]
    assert log == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert all(seconds > 0 for _, seconds in found)


def test_an_exception_ends_its_own_computation_only() -> None:
    jobs = [Job(0, 3), Job(1, 3, fail_at=1), Job(2, 1), Job(3, 0)]
    first, failure, *rest = (result for result, _ in in_step(runner([]), jobs, hold_bytes=100))
    assert isinstance(failure, Failure)
    assert (failure.unit, failure.error, failure.message) == ("job 1", "ValueError", "no good")
    assert [first, *rest] == [0, 20, 30]


def test_one_alone_runs_to_its_end() -> None:
    assert complete(runner([])(Job(7, 3))) == 70
