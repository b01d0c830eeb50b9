"""Dispatch: order, failures as values, lost workers, and the same behaviour with Ray and without."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from actors.pool import WorkerLostError
from pipeline.dispatch import (
    ExecutionError,
    Failure,
    RayExecutor,
    SerialExecutor,
    Task,
    attempt,
    open_executor,
)
from pipeline.execution import ExecutionConfig
from pipeline.window import run_bounded
from tests.phantoms import environment


@dataclass(frozen=True)
class Number:
    value: int

    @property
    def unit(self) -> str:
        return f"n{self.value}"


def _square(unit: Number) -> int:
    if unit.value == 3:
        raise ValueError("three is refused")
    return unit.value**2


def _build_square(device: str) -> Callable[[Number], int]:
    return _square


def _deadly(folder: Path, deaths: dict[int, int], unit: Number) -> tuple[int, int]:
    """Dies by SIGKILL on the first `deaths[value]` calls, counted in files because memory dies with it."""
    call = len(list(folder.glob(f"{unit.value}-*")))
    (folder / f"{unit.value}-{call}").touch()
    if call < deaths.get(unit.value, 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return unit.value, call + 1


def _build_deadly(folder: Path, deaths: dict[int, int], device: str) -> Callable[[Number], Any]:
    return partial(_deadly, folder, deaths)


def _build_threads(device: str) -> Callable[[Number], Any]:
    return lambda unit: (os.environ["OMP_NUM_THREADS"], os.getpid())


UNITS = [Number(value) for value in range(6)]


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[RayExecutor]:
    with RayExecutor(ExecutionConfig(executor="ray", workers=2)) as executor:
        yield executor


def _outcomes(executor: RayExecutor | SerialExecutor, task: Task) -> dict[int, Any]:
    return {unit.value: outcome for unit, outcome in executor.map_units(task, UNITS)}


def test_serial_yields_results_and_failures_in_order() -> None:
    outcomes = list(SerialExecutor(ExecutionConfig()).map_units(Task("square", _build_square), UNITS))
    assert [unit.value for unit, _ in outcomes] == [0, 1, 2, 3, 4, 5]
    failure = outcomes[3][1]
    assert isinstance(failure, Failure)
    assert (failure.unit, failure.error, failure.message) == ("n3", "ValueError", "three is refused")
    assert "_square" in failure.traceback


def test_a_full_disk_is_told_from_a_fault_of_the_unit() -> None:
    def write(unit: Number) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    failure = attempt(write, Number(1))
    assert isinstance(failure, Failure)
    assert failure.disk_full


def test_auto_does_not_start_ray_for_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    executor = RayExecutor(ExecutionConfig(executor="auto", workers=2))
    monkeypatch.setattr(executor, "_map_on_ray", lambda task, units: pytest.fail("Ray was started"))
    outcomes = list(executor.map_units(Task("square", _build_square), UNITS))
    assert [unit.value for unit, _ in outcomes] == [0, 1, 2, 3, 4, 5]
    assert list(executor.map_units(Task("square", _build_square), [])) == []


def test_auto_hands_the_rest_to_ray_when_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.dispatch.RAY_START_SECONDS", 0.0)
    executor = RayExecutor(ExecutionConfig(executor="auto", workers=2))
    monkeypatch.setattr(executor, "_map_on_ray", lambda task, units: ((unit, "ray") for unit in units))
    outcomes = {unit.value: outcome for unit, outcome in executor.map_units(Task("square", _build_square), UNITS)}
    assert outcomes == {0: 0, 1: "ray", 2: "ray", 3: "ray", 4: "ray", 5: "ray"}


@pytest.mark.parametrize(("rounds", "wide"), [(1, False), (1000, True)])
def test_auto_weighs_the_work_of_every_round_to_come(monkeypatch: pytest.MonkeyPatch, rounds: int, wide: bool) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.dispatch.RAY_START_SECONDS", 10.0)
    executor = RayExecutor(ExecutionConfig(executor="auto", workers=2), rounds=rounds)
    monkeypatch.setattr(executor, "_map_on_ray", lambda task, units: ((unit, "ray") for unit in units))
    task = Task("slow", lambda device: lambda unit: time.sleep(0.02))
    assert ("ray" in [outcome for _, outcome in executor.map_units(task, UNITS)]) == wide


class _NoWorkers:
    """A pool without processes."""

    def __init__(self, count: int, num_gpus: float = 0.0, memory_bytes: int = 0) -> None:
        self.count, self.num_gpus = count, num_gpus

    def close(self) -> None:
        pass


def _widths(executor: RayExecutor, stage: str, units: int) -> set[Any]:
    """Number of the workers that each unit is run on."""
    task = Task(stage, _build_square)
    return {outcome for _, outcome in executor.map_units(task, [Number(value) for value in range(units)])}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ray as far as an executor sees it: 64 CPUs where RAY_ADDRESS leads, else as many as were asked for, listed."""
    cpus: list[int] = []

    def connect(count: int) -> bool:
        cpus.append(count)
        return True

    monkeypatch.setattr("actors.pool.connect", connect)
    monkeypatch.setattr(
        "actors.pool.cluster_resources", lambda: {"CPU": 64 if "RAY_ADDRESS" in os.environ else cpus[0]}
    )
    monkeypatch.setattr("actors.pool.WorkerPool", _NoWorkers)
    bounded: Any = lambda pool, arguments, attempts, units: ((unit, pool.count, None) for unit in units)  # noqa: E731
    monkeypatch.setattr("pipeline.window.run_bounded", bounded)
    return cpus


def test_more_encoding_workers_are_for_encoding_only(monkeypatch: pytest.MonkeyPatch, pretended: list[int]) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    executor = RayExecutor(ExecutionConfig(executor="ray", workers=4, encode_workers=16))
    assert _widths(executor, "encode", 20) == {16}
    assert pretended == [16]
    assert executor.active_workers == 16
    assert _widths(executor, "match", 20) == {4}
    assert _widths(executor, "fit", 2) == {4}  # as they are
    assert executor.active_workers == 4
    cores = RayExecutor(ExecutionConfig(executor="ray", encode_workers=512))
    assert _widths(cores, "encode", 600) == {512}
    assert cores.width() == cores.workers < 512


@pytest.mark.parametrize("executor", ["ray", "auto"])
def test_units_are_sized_for_the_cluster_before_any_ran(
    monkeypatch: pytest.MonkeyPatch, pretended: list[int], executor: Any
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert RayExecutor(ExecutionConfig(executor=executor)).width() == 64
    assert RayExecutor(ExecutionConfig(executor=executor, workers=3)).width() == 3
    assert SerialExecutor(ExecutionConfig()).width() == 1


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError, ValueError, AuthenticationError])
def test_a_cluster_that_cannot_be_used_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def init(**options: Any) -> None:
        raise error("no answer\nand much more")

    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr("ray.init", init)
    executor = RayExecutor(ExecutionConfig(executor="ray", workers=1))
    with pytest.raises(ExecutionError, match=r"^Ray at http://head:8265: no answer.*; see samreg doctor$"):
        list(executor.map_units(Task("square", _build_square), UNITS))


@pytest.mark.parametrize(("name", "kind"), [("serial", SerialExecutor), ("ray", RayExecutor), ("auto", RayExecutor)])
def test_open_executor(name: Any, kind: type) -> None:
    assert isinstance(open_executor(ExecutionConfig(executor=name)), kind)


@pytest.mark.parametrize("field", ["workers", "threads", "tile", "attempts"])
def test_counts_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"execution.{field} is 0"):
        ExecutionConfig(**{field: 0})


@pytest.mark.ray
def test_ray_gives_the_same_outcomes_as_serial(ray_executor: RayExecutor) -> None:
    task = Task("square", _build_square)
    with_ray = _outcomes(ray_executor, task)
    without = _outcomes(SerialExecutor(ExecutionConfig()), task)
    assert {v: r for v, r in with_ray.items() if v != 3} == {v: r for v, r in without.items() if v != 3}
    assert (with_ray[3].error, with_ray[3].message) == (without[3].error, without[3].message)
    assert with_ray[3].attempt == 1


@pytest.mark.ray
@pytest.mark.parametrize(
    ("deaths", "calls"),
    [
        pytest.param({}, dict.fromkeys(range(6), 1), id="nobody dies"),
        pytest.param({2: 1}, {0: 1, 1: 1, 2: 2, 3: 1, 4: 1, 5: 1}, id="one dies once"),
        pytest.param({0: 2, 5: 1}, {0: 3, 1: 1, 2: 1, 3: 1, 4: 1, 5: 2}, id="two die"),
        pytest.param({1: 9}, {0: 1, 1: None, 2: 1, 3: 1, 4: 1, 5: 1}, id="one always dies"),
    ],
)
def test_a_killed_worker_is_replaced(
    ray_executor: RayExecutor, tmp_path: Path, deaths: dict[int, int], calls: dict[int, int | None]
) -> None:
    outcomes = _outcomes(ray_executor, Task("deadly", partial(_build_deadly, tmp_path, deaths)))
    assert set(outcomes) == set(calls)
    for value, expected in calls.items():
        if expected is None:
            assert (outcomes[value].error, outcomes[value].attempt) == ("WorkerLost", 3)
        else:
            assert outcomes[value] == (value, expected)


@pytest.mark.ray
def test_dead_workers_that_are_free_cost_no_unit_more_than_one_attempt(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    """As after the loss of a node between two stages; the unit then dies once by itself."""
    for _, pid in _outcomes(ray_executor, Task("threads", _build_threads)).values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    task = Task("deadly", partial(_build_deadly, tmp_path, {0: 1}))
    assert [outcome for _, outcome in ray_executor.map_units(task, UNITS[:1])] == [(0, 2)]


class _FragileWorker:
    """A pool of one worker, which is lost with every call that holds unit 3."""

    count = 1

    def __init__(self) -> None:
        self.calls: list[list[tuple[Number, int]]] = []
        self.has_idle = True

    def submit(self, function: Any, *arguments: Any) -> int:
        self.has_idle = False
        self.calls.append(arguments[-1])
        return len(self.calls) - 1

    def wait(self, seconds: float) -> list[int]:
        return [len(self.calls) - 1]

    def collect(self, call: int) -> list[tuple[int, Any]]:
        self.has_idle = True
        if any(unit.value == 3 for unit, _ in self.calls[call]):
            raise WorkerLostError("killed")
        return [(unit.value, SimpleNamespace(seconds=0.0)) for unit, _ in self.calls[call]]


@pytest.mark.parametrize(
    ("attempts", "message"),
    [(1, "its worker died as it ran: killed"), (2, "its worker died 2 times, the last time alone: killed")],
)
def test_only_the_unit_that_loses_its_worker_is_blamed(attempts: int, message: str) -> None:
    pool: Any = _FragileWorker()
    found = {
        unit.value: outcome for unit, outcome, _ in run_bounded(pool, (Task("t", _build_square),), attempts, UNITS)
    }
    assert [value for value, outcome in found.items() if isinstance(outcome, Failure)] == [3]
    assert found[3].message == message


@pytest.mark.ray
def test_workers_keep_their_processes_and_thread_count(ray_executor: RayExecutor) -> None:
    first = _outcomes(ray_executor, Task("threads", _build_threads))
    second = _outcomes(ray_executor, Task("threads", _build_threads))
    assert {threads for threads, _ in first.values()} == {"1"}
    pids = {pid for _, pid in [*first.values(), *second.values()]}
    assert len(pids) <= 2
    assert os.getpid() not in pids


@pytest.mark.ray
def test_a_local_ray_starts_without_a_word_and_with_authentication() -> None:
    code = """
import logging, os
logging.basicConfig(level=logging.WARNING)
from actors.pool import connect, disconnect
assert connect(1)
assert not connect(1)
from ray._private.authentication.authentication_utils import is_token_auth_enabled
print(is_token_auth_enabled())
disconnect(None, stop=True)
logging.getLogger("ray._private.authentication.authentication_token_setup").warning("Token authentication is enabled")
"""
    unset = {name: value for name, value in environment().items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    done = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert len(done.stderr.splitlines()) == 1, done.stderr  # our own line, once the filter is gone


@pytest.mark.ray
def test_cuda_is_refused_where_there_is_none(ray_executor: RayExecutor) -> None:
    import ray

    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    executor = RayExecutor(ExecutionConfig(executor="ray", device="cuda"))
    with pytest.raises(ExecutionError, match="no GPU here"):
        list(executor.map_units(Task("encode", _build_square, uses_gpu=True), UNITS))
