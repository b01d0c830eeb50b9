"""Running like computations in step, stage by stage, instead of one after the other.

A stage that runs again and again finds its code and its tables in the processor's cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.algorithms.staged import Staged
from pipeline.dispatch import Failure, attempt

T = TypeVar("T")
U = TypeVar("U")


def in_step(
    function: Callable[[U], Staged[T]], units: Iterable[U], hold_bytes: int
) -> Iterator[tuple[T | Failure, float]]:
    """Result, or Failure, and seconds of `function` for each unit, in their order.

    So many units run in step as hold about `hold_bytes` together. An exception ends its own computation and no other.
    """
    group: list[_Running[T]] = []
    held = 0
    for unit in units:
        running: _Running[T] = _Running(unit, function(unit))
        held += running.advance() or 0
        group.append(running)
        if held >= hold_bytes:
            yield from _finish(group)
            group, held = [], 0
    yield from _finish(group)


@dataclass
class _Running(Generic[T]):
    unit: Any
    computation: Staged[T]
    result: T | Failure | None = None
    seconds: float = 0.0

    def advance(self) -> int | None:
        """Run the next stage; None when there is none, as after an exception."""
        start = time.perf_counter()
        found = attempt(self._next, self.unit)
        self.seconds += time.perf_counter() - start
        if not isinstance(found, Failure):
            return found
        self.result = found
        return None

    def _next(self, _unit: Any) -> int | None:
        try:
            return next(self.computation)
        except StopIteration as end:
            if self.result is None:
                self.result = end.value
            return None


def _finish(group: list[_Running[T]]) -> Iterator[tuple[T | Failure, float]]:
    left = group
    while left:
        left = [running for running in left if running.advance() is not None]
    for running in group:
        assert running.result is not None
        yield running.result, running.seconds
