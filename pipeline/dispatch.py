"""Run units on Ray or in this process: the only broad `except` of the project.

A unit is a small picklable object with a `unit` name. A `Task` builds the function that runs units, once per
process, so a model is loaded once per worker. Both executors call the same function with the same number of
threads, so their results are the same to the bit.

An exception that the function raises is the unit's own failure and is not retried. A unit whose worker dies (kill,
out of memory, node lost) is run again after the others, the last time alone, when nothing else takes memory; only
one that loses its worker `attempts` times is blamed. With one attempt, no two units share a call.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pipeline.errors import UsageError
from pipeline.execution import ExecutionConfig
from pipeline.process import limit_threads, own_cores
from pipeline.usage import Usage, measured
from storage.redaction import redact

if TYPE_CHECKING:
    from actors.pool import WorkerPool

LOG = logging.getLogger("samreg")
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
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

    ledger: list[Usage]
    """What every unit so far took; whoever reads it may empty it."""

    def map_units(self, task: Task, units: Sequence[Any]) -> Iterator[tuple[Any, Any | Failure]]: ...


def attempt(function: Callable[[Any], T], unit: Any, number: int = 1) -> T | Failure:
    """Call `function(unit)`; an exception becomes a Failure."""
    try:
        return function(unit)
    except Exception as error:
        text = redact("".join(traceback.format_exception(error)))
        code = error.errno if isinstance(error, OSError) else None
        return Failure(unit.unit, type(error).__name__, redact(str(error)), text, number, code)


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
    task: Task, token: str, device: str, gpu_share: float, threads: int, units: Sequence[tuple[Any, int]]
) -> list[tuple[Any | Failure, Usage]]:
    """Run (unit, number of the attempt) one after the other; the outcome of each and what it took."""
    outcomes: list[Any | Failure] = []

    def run(unit: tuple[Any, int]) -> None:
        outcomes.append(run_in_worker(task, token, device, threads, *unit))

    used = measured(run, [(unit.unit, (unit, number)) for unit, number in units], gpu_share)
    return [
        (outcome, replace(usage, failed=isinstance(outcome, Failure)))
        for outcome, usage in zip(outcomes, used, strict=True)
    ]


def _unguarded() -> None:
    """The check of work that nobody can take away."""


class SerialExecutor(AbstractContextManager["SerialExecutor"]):
    """Runs every unit in this process, one after the other; `check` is called between them and raises to stop."""

    def __init__(self, config: ExecutionConfig, check: Callable[[], None] = _unguarded) -> None:
        self.config = config
        self.check = check
        self.active_workers = 1
        self.running = 0
        self.ledger: list[Usage] = []

    def map_units(self, task: Task, units: Iterable[Any]) -> Iterator[tuple[Any, Any | Failure]]:
        """Run `units` in order."""
        token = f"{task.name}-{id(task)}"
        device = self._device(task)
        for unit in units:
            self.check()
            share = float(device == "cuda")
            ((outcome, usage),) = run_all_in_worker(task, token, device, share, self.config.threads, [(unit, 1)])
            self.ledger.append(usage)
            yield unit, outcome
        _built.pop(token, None)

    def width(self) -> int:
        """Processes that will run units."""
        return 1

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
        self.ledger = self._serial.ledger
        self._started = False
        self._owns_ray = False
        self._pool: WorkerPool | None = None
        self._task_number = 0

    def map_units(self, task: Task, units: Sequence[Any]) -> Iterator[tuple[Any, Any | Failure]]:
        """Run `units` on the workers."""
        waiting = deque(units)
        if self._serial_first:
            yield from self._serial.map_units(task, self._while_cheap(task, waiting))
        if waiting:
            yield from self._map_on_ray(task, waiting)

    @property
    def _serial_first(self) -> bool:
        return self.config.executor == "auto" and not self._started and "RAY_ADDRESS" not in os.environ

    def width(self) -> int:
        """Processes that will run the units of a task without GPU, as the cluster is now.

        Raises:
            ExecutionError: when Ray does not start.
        """
        if self.config.workers is None and not self._serial_first:
            self._start_ray()
            self._count_workers()
        return self.workers

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
        return self._pool.count if self._pool is not None else 1

    def _map_on_ray(self, task: Task, units: Collection[Any]) -> Iterator[tuple[Any, Any | Failure]]:
        from pipeline.window import run_bounded

        self._start_ray()
        self._task_number += 1
        device, count = self._place(task)
        share = self.config.gpu_fraction if device == "cuda" else 0.0
        pool = self._pool_for(min(count, len(units)), count, share)
        arguments = (task, f"{os.getpid()}-{self._task_number}", device, share, self.config.threads)
        for unit, outcome, usage in run_bounded(pool, arguments, self.config.attempts, units):
            self.check()
            if usage is not None:
                self.ledger.append(usage)
            yield unit, outcome

    @property
    def running(self) -> int:
        """Calls in flight."""
        return self._pool.busy if self._pool is not None else 0

    def _start_ray(self) -> None:
        if self._started:
            return
        from actors.pool import connect

        limit_threads(self.config.threads)
        try:
            self._owns_ray = connect(max(self.workers, self.config.encode_workers or 0))
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS", "this machine")
            raise ExecutionError(redact(f"Ray at {address}: {error}; see samreg doctor")) from error
        self._started = True

    def _count_workers(self) -> dict[str, float]:
        """Set `workers` where they are not given: a cluster grows and shrinks; its resources."""
        from actors.pool import cluster_resources

        resources = cluster_resources()
        if self.config.workers is None and ("RAY_ADDRESS" in os.environ or not self._owns_ray):
            self.workers = max(1, int(resources.get("CPU", 1)))
        return resources

    def _place(self, task: Task) -> tuple[str, int]:
        """Device and number of workers for a task.

        Asking for a GPU that no node has would wait for ever without a word, so the cluster's resources
        decide; `device: cuda` insists, for a cluster that scales up on demand.
        """
        gpus = float(self._count_workers().get("GPU", 0.0))
        if self.config.device == "cuda" and not gpus and task.uses_gpu and "RAY_ADDRESS" not in os.environ:
            raise ExecutionError(NO_GPU)
        if task.uses_gpu and (self.config.device == "cuda" or (self.config.device == "auto" and gpus)):
            return "cuda", self.config.encode_workers or max(1, int(gpus / self.config.gpu_fraction))
        wanted = self.config.encode_workers if task.name == "encode" else None
        return "cpu", wanted or self.workers

    def _pool_for(self, count: int, most: int, num_gpus: float) -> WorkerPool:
        """The current pool if it has `count` to `most` workers, else a new one of `count`."""
        from actors.pool import WorkerPool

        pool = self._pool
        if pool is not None and pool.num_gpus == num_gpus and count <= pool.count <= most:
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


def open_executor(
    config: ExecutionConfig, check: Callable[[], None] = _unguarded, rounds: int = 1
) -> RayExecutor | SerialExecutor:
    """The executor that the configuration names, for work that comes in so many rounds."""
    return SerialExecutor(config, check) if config.executor == "serial" else RayExecutor(config, check, rounds)
