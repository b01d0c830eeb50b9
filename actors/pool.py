"""Worker processes on Ray: the connection, one generic actor, and a pool that replaces the ones that die.

The actor runs whatever function it is handed, one call at a time, so that a model loaded by one call serves
the next and the same processes serve every stage. Ray retries nothing here: `pipeline.dispatch` decides what
is run again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)


def connect(cpus: int) -> bool:
    """Connect to Ray: as it is, to the cluster that RAY_ADDRESS names, or to a new one here with `cpus` CPUs.

    Returns:
        Whether the connection is ours to end.

    Raises:
        ConnectionError: in one line, for an address that is none, a cluster that does not answer or refuses us.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        with _own_sigterm_handler():
            if "RAY_ADDRESS" in os.environ:
                ray.init(**quiet)
            else:
                with _without_note_on_tokens():
                    ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConnectionError(str(error).strip().split("\n", 1)[0]) from error
    return True


def disconnect(pool: WorkerPool | None, stop: bool) -> None:
    """End the workers of a pool and, if it is ours to `stop`, the connection."""
    if pool is not None and ray.is_initialized():
        pool.close()
    if stop:
        ray.shutdown()


def cluster_resources() -> dict[str, float]:
    """Resources of the connected cluster, by name."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keep this process's handler of SIGTERM; Ray puts its own in its place, which exits at once."""
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(ours) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours)


@contextmanager
def _without_note_on_tokens() -> Iterator[None]:
    """Hide the note, at every start of a local Ray, that its token authentication is on; it stays on."""
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Token authentication is enabled")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class WorkerLostError(RuntimeError):
    """A worker process died while it ran a unit: killed, out of memory, or its node went away."""


class UnitProcess:
    """The plain class behind an actor: calls functions in its own process."""

    def pid(self) -> int:
        """Process id, so that a log can name a worker."""
        return os.getpid()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` here."""
        return function(*args)


class WorkersNeverStartError(RuntimeError):
    """Worker processes die before they run anything; the message is that of the last one."""


class WorkerPool:
    """Actors, each running at most one call; only those that have started are given any.

    On a cluster that has lost a node, or has yet to start one, some never do: the others go on without them.

    Args:
        count: how many to ask for.
        num_gpus: of each.
        memory_bytes: of each; 0 reserves none.
    """

    def __init__(self, count: int, num_gpus: float = 0.0, memory_bytes: int = 0) -> None:
        self.count = count
        self.num_gpus = num_gpus
        self.demand = {"CPU": 1.0, "GPU": num_gpus, "memory": float(memory_bytes)}
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": num_gpus, "max_restarts": 0, "max_task_retries": 0}
        if memory_bytes:
            options["memory"] = memory_bytes
        self._actor: Any = ray.remote(**options)(UnitProcess)
        self._idle: list[Any] = []
        self._busy: dict[ray.ObjectRef[Any], Any] = {}
        self._starting: dict[ray.ObjectRef[Any], Any] = {}
        self._stillborn = 0
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        self._ask(self._actor.remote())

    def _ask(self, actor: Any) -> None:
        """Give a worker nothing before it has answered."""
        self._starting[actor.pid.remote()] = actor

    @property
    def has_idle(self) -> bool:
        """Whether a worker is free."""
        return bool(self._idle)

    @property
    def started(self) -> int:
        """Workers that have started and live."""
        return len(self._idle) + len(self._busy)

    @property
    def busy(self) -> int:
        """Calls in flight."""
        return len(self._busy)

    def submit(self, function: Callable[..., Any], *args: Any) -> ray.ObjectRef[Any]:
        """Start a call on the free worker that was used last."""
        actor = self._idle.pop()
        ref: ray.ObjectRef[Any] = actor.call.remote(function, *args)
        self._busy[ref] = actor
        return ref

    def wait(self, seconds: float) -> list[ray.ObjectRef[Any]]:
        """Wait until a call has finished or a worker has started; the finished calls, which may be none.

        Raises:
            WorkersNeverStartError: when one worker after the other dies at its start.
        """
        done, _ = ray.wait([*self._busy, *self._starting], num_returns=1, timeout=seconds)
        for ref in done:
            if ref in self._starting:
                self._settle(ref, self._starting.pop(ref))
        return [ref for ref in done if ref in self._busy]

    def _settle(self, ref: ray.ObjectRef[Any], actor: Any) -> None:
        try:
            ray.get(ref)
        except LOST as error:
            self._stillborn += 1
            if self._stillborn > 2 * self.count + 2:
                raise WorkersNeverStartError(f"no worker stays alive: {_first_line(error)}") from error
            self._start()
        else:
            self._stillborn = 0
            self._idle.insert(0, actor)

    def collect(self, ref: ray.ObjectRef[Any]) -> Any:
        """The result of a finished call; its worker becomes free again.

        Raises:
            WorkerLostError: the worker died; a new one is to take its place. A node may have gone with all of its
                workers, so the free ones have to answer before they are given anything.
        """
        actor = self._busy.pop(ref)
        try:
            result = ray.get(ref)
        except LOST as error:
            ray.kill(actor)
            self._start()
            for idle in self._idle:
                self._ask(idle)
            self._idle = []
            raise WorkerLostError(f"{type(error).__name__}: {_first_line(error)}") from error
        self._idle.append(actor)
        return result

    def close(self) -> None:
        """End every worker."""
        for actor in [*self._idle, *self._busy.values(), *self._starting.values()]:
            ray.kill(actor)
        self._idle, self._busy, self._starting = [], {}, {}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
