"""Run units on Ray or in this process: the only `ray.wait` loop and the only broad `except` of the project.

A unit is a small picklable object with a `unit` name. A `Task` builds the function that runs units, once per
process, so a model is loaded once per worker. Both executors call the same function with the same number of
threads, so their results are the same to the bit.

An exception that the function raises is the unit's own failure and is not retried. A worker that dies (kill,
out of memory, node lost) makes its unit a suspect, run again alone once everything else is done; only a unit
that loses its worker `attempts` times is blamed.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.errors import UsageError
from pipeline.execution import ExecutionConfig
from pipeline.process import limit_threads, own_cores, own_peak_memory

if TYPE_CHECKING:
    from actors.pool import WorkerPool

LOG = logging.getLogger("samreg")
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
LIGHT_SECONDS = 0.05  # units are sent together until a call takes so long
MOST_TOGETHER = 256
WAIT_SECONDS = 60.0  # between two warnings that no worker has started
RAY_START_SECONDS = 8.0  # ray.init and the first import in its workers, on two cores

NO_GPU = "execution.device is cuda but there is no GPU here; set it to cpu or auto"

T = TypeVar("T")


class ExecutionError(UsageError):
    """The study cannot run as the execution settings ask."""


class Unit(Protocol):
    """What can be dispatched."""

    @property
    def unit(self) -> str:
        """Name in failure rows and logs."""
        ...


@dataclass(frozen=True)
class Task:
    """A named function of a unit; `build` makes it, once per process.

    Attributes:
        name: the stage.
        build: picklable; takes the device (`cpu` or `cuda`) and returns the function that runs one unit.
        uses_gpu: whether a GPU is any use to it.
    """

    name: str
    build: Callable[[str], Callable[[Any], Any]]
    uses_gpu: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a unit has no result."""

    unit: str
    error: str
    message: str
    traceback: str
    attempt: int = 1
    errno: int | None = None

    @property
    def disk_full(self) -> bool:
        """Whether space or quota ran out: no fault of the unit, and nothing else can be written either."""
        return self.errno in DISK_FULL


class Executor(AbstractContextManager["Executor"], Protocol):
    """Maps a task over units, yielding each with its result or its Failure, in order of completion."""

    def map_units(self, task: Task, units: Sequence[Any]) -> Iterator[tuple[Any, Any | Failure]]: ...


def attempt(function: Callable[[Any], T], unit: Any, number: int = 1) -> T | Failure:
    """Call `function(unit)`; an exception becomes a Failure."""
    try:
        return function(unit)
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        code = error.errno if isinstance(error, OSError) else None
        return Failure(unit.unit, type(error).__name__, str(error), text, number, code)


_built: dict[str, Callable[[Any], Any]] = {}


def run_in_worker(task: Task, token: str, device: str, threads: int, unit: Any, number: int) -> Any | Failure:
    """Run one unit in a worker process, which keeps the function it built last (and so a loaded model)."""
    if token not in _built:
        _built.clear()

    def build_and_run(unit: Any) -> Any:
        if token not in _built:
            limit_threads(threads)
            _built[token] = task.build(device)
            limit_threads(threads)
        return _built[token](unit)

    return attempt(build_and_run, unit, number)


def run_all_in_worker(
    task: Task, token: str, device: str, threads: int, units: Sequence[tuple[Any, int]]
) -> tuple[list[Any | Failure], float]:
    """Run (unit, number of the attempt) one after the other; their outcomes, and the seconds they took together."""
    start = time.perf_counter()
    outcomes = [run_in_worker(task, token, device, threads, unit, number) for unit, number in units]
    return outcomes, time.perf_counter() - start


def _unguarded() -> None:
    """The check of work that nobody can take away."""


class SerialExecutor(AbstractContextManager["SerialExecutor"]):
    """Runs every unit in this process, one after the other; `check` is called between them and raises to stop."""

    def __init__(self, config: ExecutionConfig, check: Callable[[], None] = _unguarded) -> None:
        self.config = config
        self.check = check
        self.workers = self.active_workers = 1

    def map_units(self, task: Task, units: Iterable[Any]) -> Iterator[tuple[Any, Any | Failure]]:
        """Run `units` in order."""
        token = f"{task.name}-{id(task)}"
        for unit in units:
            self.check()
            yield unit, run_in_worker(task, token, self._device(task), self.config.threads, unit, 1)
        _built.pop(token, None)

    def peak_memory_bytes(self) -> int | None:
        """Largest resident memory of a worker so far."""
        return own_peak_memory()

    def _device(self, task: Task) -> str:
        if not task.uses_gpu or self.config.device == "cpu":
            return "cpu"
        import torch

        if torch.cuda.is_available():
            return "cuda"
        if self.config.device == "cuda":
            raise ExecutionError(NO_GPU)
        return "cpu"

    def __exit__(self, *error: object) -> None:
        _built.clear()


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """Runs units on a pool of Ray workers, as many in flight as there are workers.

    Ray starts at the first task that needs it, on this machine or on the cluster that RAY_ADDRESS names. The
    pool lives on from task to task; a task that asks for GPUs has its own.

    Args:
        config: where and how wide.
        check: called between units; raises to stop.
        rounds: how often such work as the present task's is to come, which counts when Ray's start is weighed.
    """

    def __init__(self, config: ExecutionConfig, check: Callable[[], None] = _unguarded, rounds: int = 1) -> None:
        self.config = config
        self.check = check
        self.rounds = rounds
        self.workers = config.workers or own_cores()
        self._serial = SerialExecutor(config, check)
        self._started = False
        self._owns_ray = False
        self._pool: WorkerPool | None = None
        self._task_number = 0

    def map_units(self, task: Task, units: Sequence[Any]) -> Iterator[tuple[Any, Any | Failure]]:
        """Run `units` on the workers."""
        waiting = deque(units)
        if self.config.executor == "auto" and not self._started and "RAY_ADDRESS" not in os.environ:
            yield from self._serial.map_units(task, self._while_cheap(task, waiting))
        if waiting:
            yield from self._map_on_ray(task, waiting)

    def _while_cheap(self, task: Task, waiting: deque[Any]) -> Iterator[Any]:
        """Units to run here: until the rest, at the pace so far, would gain more from Ray than its start costs."""
        start, count = time.perf_counter(), len(waiting)
        if task.uses_gpu and count > 1:
            return
        while waiting:
            done = count - len(waiting)
            rest = (time.perf_counter() - start) / max(1, done) * len(waiting)
            if done and rest * self.rounds * (1 - 1 / min(self.workers, len(waiting))) > RAY_START_SECONDS:
                return
            yield waiting.popleft()

    @property
    def active_workers(self) -> int:
        """Processes that run units: this one, until Ray is needed."""
        return self.workers if self._started else 1

    def _map_on_ray(self, task: Task, units: Collection[Any]) -> Iterator[tuple[Any, Any | Failure]]:
        self._start_ray()
        self._task_number += 1
        device, count = self._place(task)
        pool = self._pool_for(min(count, len(units)), self.config.gpu_fraction if device == "cuda" else 0.0)
        arguments = (task, f"{os.getpid()}-{self._task_number}", device, self.config.threads)
        for unit, outcome in _run_bounded(pool, arguments, self.config.attempts, units):
            self.check()
            yield unit, outcome

    def peak_memory_bytes(self) -> int | None:
        """Largest resident memory of a living worker so far; None before Ray has started."""
        return max(self._pool.ask(own_peak_memory), default=None) if self._pool is not None else None

    def _start_ray(self) -> None:
        from actors.pool import connect

        if self._started:
            return
        limit_threads(self.config.threads)
        self._owns_ray = connect(self.workers)
        self._started = True

    def _place(self, task: Task) -> tuple[str, int]:
        """Device and number of workers for a task.

        Asking for a GPU that no node has would wait for ever without a word, so the cluster's resources
        decide; `device: cuda` insists, for a cluster that scales up on demand.
        """
        from actors.pool import cluster_resources

        resources = cluster_resources()
        gpus = float(resources.get("GPU", 0.0))
        if self.config.workers is None:
            self.workers = max(1, int(resources.get("CPU", 1)))  # now: a cluster grows and shrinks
        if self.config.device == "cuda" and not gpus and task.uses_gpu and "RAY_ADDRESS" not in os.environ:
            raise ExecutionError(NO_GPU)
        if task.uses_gpu and (self.config.device == "cuda" or (self.config.device == "auto" and gpus)):
            return "cuda", self.config.encode_workers or max(1, int(gpus / self.config.gpu_fraction))
        wanted = self.config.encode_workers if task.name == "encode" else None
        return "cpu", wanted or self.workers

    def _pool_for(self, count: int, num_gpus: float) -> WorkerPool:
        """The current pool if it suits, else a new one; never wider than the units at hand."""
        from actors.pool import WorkerPool

        pool = self._pool
        if pool is not None and pool.num_gpus == num_gpus and pool.count >= count:
            return pool
        if pool is not None:
            pool.close()
        self._pool = WorkerPool(count, num_gpus, int((self.config.worker_gib or 0) * 2**30))
        return self._pool

    def __exit__(self, *error: object) -> None:
        self._serial.__exit__()
        if not self._started:
            return
        from actors.pool import disconnect

        disconnect(self._pool, stop=self._owns_ray)


def _run_bounded(
    pool: WorkerPool, arguments: tuple[Any, ...], attempts: int, units: Iterable[Any]
) -> Iterator[tuple[Any, Any | Failure]]:
    """The one bounded loop: a call per free worker, then the suspects one at a time."""
    from actors.pool import WorkerLostError

    queue = deque((unit, 1) for unit in units)
    suspects: deque[tuple[Any, int]] = deque()
    flying: dict[Any, list[tuple[Any, int]]] = {}
    together = 1
    while queue or suspects or flying:
        while pool.has_idle and (queue or (suspects and not flying)):
            most = min(together, math.ceil(len(queue) / (2 * pool.count)))
            sent = [(queue or suspects).popleft() for _ in range(max(1, most))]
            flying[pool.submit(run_all_in_worker, *arguments, sent)] = sent
        for ref in _wait(pool, arguments[0].name):
            sent = flying.pop(ref)
            try:
                outcomes, seconds = pool.collect(ref)
            except WorkerLostError as error:
                names = ", ".join(unit.unit for unit, _ in sent)
                LOG.warning("%s: lost the worker of %s: %s", arguments[0].name, names, error)
                for unit, number in sent:
                    if number < attempts:
                        suspects.append((unit, number + 1))
                    else:
                        message = f"its worker died {number} times, the last time alone: {error}"
                        yield unit, Failure(unit.unit, "WorkerLost", message, "", number)
                continue
            together = _how_many_together(together, seconds / len(sent))
            yield from zip((unit for unit, _ in sent), outcomes, strict=True)


def _wait(pool: WorkerPool, task: str) -> Sequence[Any]:
    """Finished calls; a line now and then while the cluster gives no worker."""
    from actors.pool import cluster_resources

    done = pool.wait(WAIT_SECONDS)
    if not done and not pool.started:
        wanted, there = ({k: v for k, v in each.items() if v} for each in (pool.demand, cluster_resources()))
        there = {name: there.get(name, 0.0) for name in wanted}
        LOG.warning("%s: waiting for workers; each wants %s, the cluster has %s in all", task, wanted, there)
    return done


def _how_many_together(before: int, seconds: float) -> int:
    """Units of so many seconds to send in one call; no more than twice as many as before."""
    return max(1, min(MOST_TOGETHER, 2 * before, int(LIGHT_SECONDS / max(seconds, 1e-6))))


def open_executor(
    config: ExecutionConfig, check: Callable[[], None] = _unguarded, rounds: int = 1
) -> RayExecutor | SerialExecutor:
    """The executor that the configuration names, for work that comes in so many rounds."""
    return SerialExecutor(config, check) if config.executor == "serial" else RayExecutor(config, check, rounds)
