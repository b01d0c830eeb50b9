"""The one bounded loop over Ray's workers: as many calls in flight as there are workers, whatever waits.

The driver holds the units and what is in flight; results stay in the object store for as long as it takes to fetch
them. Light units travel several to a call.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from actors.pool import WorkerLostError, WorkerPool, WorkersNeverStartError, cluster_resources
from pipeline.dispatch import ExecutionError, Failure, run_all_in_worker
from pipeline.usage import Usage

LOG = logging.getLogger("samreg")
LIGHT_SECONDS = 0.05  # units are sent together until a call takes so long
MOST_TOGETHER = 256
WAIT_SECONDS = 60.0  # between two warnings that no worker has started


def run_bounded(
    pool: WorkerPool, arguments: tuple[Any, ...], attempts: int, units: Iterable[Any]
) -> Iterator[tuple[Any, Any | Failure, Usage | None]]:
    """Outcome of each unit and what it took: a call per free worker, then those about to be blamed, one at a time."""
    queue = deque((unit, 1) for unit in units)
    suspects: deque[tuple[Any, int]] = deque()
    flying: dict[Any, list[tuple[Any, int]]] = {}
    together = 1
    while queue or suspects or flying:
        while pool.has_idle and (queue or (suspects and not flying)):
            most = 1 if attempts == 1 else min(together, math.ceil(len(queue) / (2 * pool.count)))
            sent = _take(queue, most) or [suspects.popleft()]
            flying[pool.submit(run_all_in_worker, *arguments, sent)] = sent
        for ref in _wait(pool, arguments[0].name):
            sent = flying.pop(ref)
            try:
                outcomes = pool.collect(ref)
            except WorkerLostError as error:
                names = ", ".join(unit.unit for unit, _ in sent)
                LOG.warning("%s: lost the worker of %s: %s", arguments[0].name, names, error)
                for unit, number in sent:
                    if number < attempts:
                        (suspects if number + 1 == attempts else queue).append((unit, number + 1))
                    else:
                        alone = f"{number} times, the last time alone" if number > 1 else "as it ran"
                        message = f"its worker died {alone}: {error}"
                        yield unit, Failure(unit.unit, "WorkerLost", message, "", number), None
                continue
            seconds = sum(usage.seconds for _, usage in outcomes)
            together = _how_many_together(together, seconds / len(sent))
            for (unit, _), (outcome, usage) in zip(sent, outcomes, strict=True):
                yield unit, outcome, usage


def _take(queue: deque[tuple[Any, int]], most: int) -> list[tuple[Any, int]]:
    """The next units to send in one call; one that has lost its worker before goes by itself."""
    sent: list[tuple[Any, int]] = []
    while queue and len(sent) < max(1, most) and (queue[0][1] == 1 or not sent):
        sent.append(queue.popleft())
        if sent[0][1] > 1:
            break
    return sent


def _wait(pool: WorkerPool, task: str) -> Sequence[Any]:
    """Finished calls; a line now and then while the cluster gives no worker.

    Raises:
        ExecutionError: when workers die at their start, one after the other.
    """
    try:
        done = pool.wait(WAIT_SECONDS)
    except WorkersNeverStartError as error:
        raise ExecutionError(
            f"{task}: {error}. Look at the logs of Ray's workers, and at samreg doctor there"
        ) from None
    if not done and not pool.started:
        wanted, there = ({k: v for k, v in each.items() if v} for each in (pool.demand, cluster_resources()))
        there = {name: there.get(name, 0.0) for name in wanted}
        LOG.warning("%s: waiting for workers; each wants %s, the cluster has %s in all", task, wanted, there)
    return done


def _how_many_together(before: int, seconds: float) -> int:
    """Units of so many seconds to send in one call; no more than twice as many as before."""
    return max(1, min(MOST_TOGETHER, 2 * before, int(LIGHT_SECONDS / max(seconds, 1e-6))))
