"""Progress: bars with rate and time left on a terminal, a few quiet log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

Advance = Callable[[int], None]


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
            yield lambda count: None
        elif self.console.is_terminal:
            with self._bars() as bars:
                bar = bars.add_task(name, total=total, noun=noun)
                yield lambda count: bars.advance(bar, count)
        else:
            yield from _log_stage(name, total, noun)

    def _bars(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )


def _log_stage(name: str, total: int, noun: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LOG_EVERY_SECONDS:
            last = now
            rate = done / (now - start)
            LOG.info("%s: %d of %d %s, %.2g/s, %.0f s left", name, done, total, noun, rate, (total - done) / rate)

    yield advance
    LOG.info("%s: %d of %d %s in %.1f s", name, done, total, noun, time.monotonic() - start)


class SilentReporter(Reporter):
    """Shows nothing; for notebooks and tests."""

    @contextmanager
    def stage(self, name: str, total: int, noun: str) -> Iterator[Advance]:
        """Yield a function that does nothing."""
        yield lambda count: None
