"""Progress: bars with rate and time left on a terminal, a few quiet log lines elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LOG = logging.getLogger("samreg")
LOG_EVERY_SECONDS = 30.0


class Advance(Protocol):
    """Called with the number of units just finished, those of the stage that failed so far, and those running."""

    def __call__(self, count: int, failed: int = 0, running: int = 0) -> None: ...


class RateColumn(ProgressColumn):
    """Units per second of a running task."""

    def render(self, task: Task) -> Text:
        """The rate as text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2g} {task.fields['noun']}/s", style="progress.data.speed")


class Reporter:
    """Shows how the stages of a study advance."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def stage(self, name: str, total: int, noun: str) -> Iterator[Advance]:
        """Show one stage of `total` units; call the yielded function with the number just finished."""
        if total == 0:
            yield _ignore
        elif self.console.is_terminal:
            with self._bars() as bars:
                bar = bars.add_task(name, total=total, noun=noun, state="")

                def advance(count: int, failed: int = 0, running: int = 0) -> None:
                    bars.update(bar, advance=count, state=_state(failed, running))

                yield advance
        else:
            yield from _log_stage(name, total, noun)

    def _bars(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )


def _ignore(count: int, failed: int = 0, running: int = 0) -> None:
    """Show nothing."""


def _state(failed: int, running: int) -> str:
    """How many failed and run, those that are not 0."""
    counts = {"failed": failed, "running": running}
    return "".join(f", {count} {name}" for name, count in counts.items() if count).removeprefix(", ")


@dataclass
class _LogLines:
    """Lines about one stage: how many units are done, now and then until it ends, whether one has ended or not."""

    name: str
    total: int
    noun: str
    done: int = 0
    failed: int = 0
    running: int = 0
    start: float = field(default_factory=time.monotonic)

    def advance(self, count: int, failed: int = 0, running: int = 0) -> None:
        self.done, self.failed, self.running = self.done + count, failed, running

    def line(self) -> str:
        rate = self.done / (time.monotonic() - self.start)
        state = _state(self.failed, self.running)
        shown = f" ({state})" if state else ""
        pace = f"{rate:.2g}/s, {(self.total - self.done) / rate:.0f} s left" if rate else "no rate yet"
        return f"{self.name}: {self.done} of {self.total} {self.noun}{shown}, {pace}"

    def write(self, stop: threading.Event) -> None:
        while not stop.wait(LOG_EVERY_SECONDS):
            LOG.info("%s", self.line())


def _log_stage(name: str, total: int, noun: str) -> Iterator[Advance]:
    LOG.info("%s: %d %s to do", name, total, noun)
    lines, stop = _LogLines(name, total, noun), threading.Event()
    writer = threading.Thread(target=lines.write, args=(stop,), name="samreg-progress", daemon=True)
    writer.start()
    try:
        yield lines.advance
    finally:
        stop.set()
        writer.join()
    failed = f", {lines.failed} failed" if lines.failed else ""
    LOG.info("%s: %d of %d %s%s in %.1f s", name, lines.done, total, noun, failed, time.monotonic() - lines.start)


class SilentReporter(Reporter):
    """Shows nothing; for notebooks and tests."""

    @contextmanager
    def stage(self, name: str, total: int, noun: str) -> Iterator[Advance]:
        """Yield a function that does nothing."""
        yield _ignore
