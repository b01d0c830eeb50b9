"""What dispatching costs: `python benchmarks/scheduler.py [--workers 64] [--subjects 1000] [--units 200000]`.

Simulated subjects, whose encoding sleeps for a known time, and light units, which do nothing, on a local Ray with as
many worker processes as a cluster would have; then the same subjects while a worker is killed every few seconds.
Sleeping takes no processor, so a machine of few cores can play a large cluster: what is measured beyond the ideal is
the driver, Ray and the start of replaced workers, all of which share these few cores. Counting starts when every
worker has started.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.dispatch import Failure, RayExecutor, Task
from pipeline.execution import ExecutionConfig
from storage.atomic import replace_file


@dataclass(frozen=True)
class Simulated:
    """A unit of known cost."""

    number: int
    seconds: float

    @property
    def unit(self) -> str:
        """Its name."""
        return f"subject-{self.number:06d}"


def _encode(folder: Path | None, unit: Simulated) -> int:
    """Sleep for the cost, and leave a file in the way that results are left."""
    if unit.seconds:
        time.sleep(unit.seconds)
    if folder is not None:
        with replace_file(folder / unit.unit) as temporary:
            temporary.write_text(str(os.getpid()), encoding="utf-8")
    return unit.number


def _build_start(folder: Path, device: str) -> Callable[[Simulated], int]:
    """A unit that loads what the others load, and says which process ran it."""

    def start(unit: Simulated) -> int:
        _encode(folder, unit)
        return os.getpid()

    return start


def _build(folder: Path | None, device: str) -> Callable[[Simulated], int]:
    return partial(_encode, folder)


def ideal_seconds(units: Sequence[Simulated], workers: int) -> float:
    """When the last of so many workers ends, each taking the next unit as soon as it is free."""
    free = [0.0] * workers
    for unit in units:
        heapq.heappush(free, heapq.heappop(free) + unit.seconds)
    return max(free)


def _resident() -> int:
    """Resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])


def _workers() -> list[int]:
    """Worker processes of this driver: grandchildren, by way of its raylet."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes()
            if title.startswith(b"ray::UnitProcess") and _parent(_parent(int(entry.name))) == os.getpid():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@contextmanager
def killing(every: float) -> Iterator[list[int]]:
    """Kill a random worker every so many seconds; the list of those killed."""
    killed: list[int] = []
    stop = threading.Event()
    chance = random.Random(0)

    def kill() -> None:
        while not stop.wait(every):
            victims = _workers()
            if victims:
                victim = chance.choice(victims)
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(victim, signal.SIGKILL)
                    killed.append(victim)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


@dataclass
class Measured:
    """One pass over units."""

    seconds: float
    processor_seconds: float
    results: Counter[int]
    failures: int
    memory: tuple[int, int, int]
    """Resident bytes at the first unit, half way and at the end."""


def run(executor: RayExecutor, task: Task, units: Sequence[Simulated]) -> Measured:
    """Dispatch the units as a study does, emptying the ledger on the way."""
    results: Counter[int] = Counter()
    failures, memory = 0, []
    start, processor = time.perf_counter(), time.process_time()
    for count, (unit, outcome) in enumerate(executor.map_units(task, units)):
        failures += isinstance(outcome, Failure)
        results[unit.number] += 1
        if count in (0, len(units) // 2, len(units) - 1):
            memory.append(_resident())
        if len(executor.ledger) > 5000:
            executor.ledger.clear()
    seconds = time.perf_counter() - start
    return Measured(seconds, time.process_time() - processor, results, failures, (memory[0], memory[1], memory[-1]))


def _shown(name: str, measured: Measured, **more: Any) -> dict[str, Any]:
    exactly_once = measured.failures == 0 and set(measured.results.values()) == {1}
    row = {
        "what": name,
        "units": len(measured.results),
        "exactly_once": exactly_once,
        "seconds": round(measured.seconds, 2),
        "driver_processor_seconds": round(measured.processor_seconds, 2),
        "driver_mib": [value >> 20 for value in measured.memory],
        **more,
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Every measurement, a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--subjects", type=int, default=1000)
    parser.add_argument("--units", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, nargs=2, default=(4.0, 12.0), help="least and most of a subject")
    parser.add_argument("--kill-every", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/scheduler"))
    given = parser.parse_args()
    chance = random.Random(1)
    subjects = [Simulated(number, chance.uniform(*given.seconds)) for number in range(given.subjects)]
    ideal = ideal_seconds(subjects, given.workers)
    for name in ("calm", "hunted"):
        shutil.rmtree(given.out / name, ignore_errors=True)
    with RayExecutor(ExecutionConfig(executor="ray", workers=given.workers)) as executor:
        start, seen = time.perf_counter(), set[int]()
        while len(seen) < given.workers:
            waiting = [Simulated(number, 1.0) for number in range(given.workers)]
            seen |= {pid for _, pid in executor.map_units(Task("start", partial(_build_start, given.out)), waiting)}
        print(json.dumps({"what": "start of the workers", "seconds": round(time.perf_counter() - start, 1)}))
        calm = run(executor, Task("encode", partial(_build, given.out / "calm")), subjects)
        _shown("subjects", calm, ideal_seconds=round(ideal, 2), overhead=round(calm.seconds / ideal - 1, 4))
        light = run(executor, Task("light", partial(_build, None)), [Simulated(n, 0.0) for n in range(given.units)])
        _shown("light units", light, units_per_second=round(given.units / light.seconds))
        with killing(given.kill_every) as killed:
            hunted = run(executor, Task("hunted", partial(_build, given.out / "hunted")), subjects)
        files = {path.name for path in (given.out / "hunted").iterdir() if not path.name.startswith(".")}
        _shown(
            "subjects, workers killed",
            hunted,
            killed=len(killed),
            ideal_seconds=round(ideal, 2),
            overhead=round(hunted.seconds / ideal - 1, 4),
            files=len(files & {unit.unit for unit in subjects}),
        )


if __name__ == "__main__":
    main()
