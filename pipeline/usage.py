"""What a unit of work took: time, bytes, memory, GPU; measured in the process that ran it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pipeline.process import own_peak_memory

_IO, _STATUS, _CLEAR = (Path("/proc/self") / name for name in ("io", "status", "clear_refs"))
_RESET_PEAK = "5"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one unit.

    Attributes:
        unit: its name.
        host: where it ran.
        started: seconds since the epoch, by the clock of that host.
        seconds: wall time.
        processor_seconds: of the whole process in that time.
        bytes_read, bytes_written: by the process, whether from disk or from its cache; None where the system does
            not count them. Units that were sent together share them.
        peak_memory_bytes: largest resident memory while it ran, of everything in the process.
        gpu_seconds: time for which it held a GPU, times the share of it; 0 on the CPU.
        failed: whether it has no result.
    """

    unit: str
    host: str
    started: float
    seconds: float
    processor_seconds: float
    bytes_read: int | None = None
    bytes_written: int | None = None
    peak_memory_bytes: int | None = None
    gpu_seconds: float = 0.0
    failed: bool = False


def measured(function: Callable[[T], object], units: Sequence[tuple[str, T]], gpu_share: float) -> list[Usage]:
    """Call `function` with each of the (name, argument) and say what that took."""
    before, host = _io_bytes(), socket.gethostname()
    _reset_peak()
    found = []
    for name, unit in units:
        started, start, processor = time.time(), time.perf_counter(), time.process_time()
        function(unit)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        found.append(Usage(name, host, started, seconds, processor, gpu_seconds=seconds * gpu_share))
    after, peak = _io_bytes(), _peak_memory()
    each: list[int | None] = [None, None]
    if before is not None and after is not None:
        each = [(late - early) // len(units) for early, late in zip(before, after, strict=True)]
    return [replace(u, bytes_read=each[0], bytes_written=each[1], peak_memory_bytes=peak) for u in found]


def _io_bytes() -> tuple[int, int] | None:
    """Bytes read and written by this process so far, on Linux."""
    try:
        counts = dict(line.split(": ") for line in _IO.read_text(encoding="utf-8").splitlines())
    except OSError:  # another system, or a container that hides it
        return None
    return int(counts["rchar"]), int(counts["wchar"])


def _reset_peak() -> None:
    """Let the kernel's high-water mark start from what is resident now."""
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="utf-8")
    except OSError:  # then the mark is that of the process so far
        return


def _peak_memory() -> int:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return own_peak_memory()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), own_peak_memory())
