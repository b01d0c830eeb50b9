"""The sign of life that the driver of a study gives while it holds the study's lock, wherever the lock is kept."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import FolderError

BEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
LOOK_SECONDS = 2.0


@dataclass
class Heartbeat:
    """A study while this driver holds it.

    Attributes:
        root: the study.
        renew: gives the sign of life. Returns None, or who has taken the study over; OSError while the lock is out
            of reach.
    """

    root: Path
    renew: Callable[[], str | None]
    _lost: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Call between units.

        Raises:
            FolderError: when another driver has taken over, as after this machine was cut off for long.
        """
        if self._lost:
            raise FolderError(f"{self.root} {self._lost}; this run stops. What it finished is kept")

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Renew in the background."""
        thread = threading.Thread(target=self._beat, name="samreg-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS):
            try:
                other = self.renew()
            except OSError as error:
                if time.monotonic() - last > STALE_SECONDS:
                    self._lost = f"has been out of reach for {STALE_SECONDS:g} s ({error}) and may be taken over"
                    return
            else:
                if other is not None:
                    self._lost = f"was taken over by {other or 'another driver'}"
                    return
                last = time.monotonic()


def own_name() -> str:
    """What this driver writes into a lock: process, host and a token that no other holder has."""
    return f"process {os.getpid()} on {socket.gethostname()} {secrets.token_hex(8)}"


def holder(text: str) -> str:
    """Process and host of a lock's text, without what follows them."""
    return " ".join(text.split()[:4])


def held_by(root: Path, by: str) -> FolderError:
    """What a driver says that finds the study held."""
    return FolderError(f"{root} is being written by {by}; the same command goes on from there")
