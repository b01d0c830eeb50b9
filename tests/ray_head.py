"""A Ray head of its own, as `ray start --head` on a cluster: with dashboard, jobs and token authentication."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.phantoms import environment


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: of its dashboard.
        environment: in which a command is authenticated.
        cluster: address for a driver.
    """

    address: str
    environment: dict[str, str]
    cluster: str


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def started(cpus: int = 2) -> Iterator[Head]:
    """Start a head in a process group of its own, and end it with all its processes."""
    gcs, dashboard, client = free_ports(3)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets want a short path
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    variables = {**environment(), **token, "RAY_USAGE_STATS_ENABLED": "0"}
    variables.pop("RAY_ADDRESS", None)
    options = [
        *("--head", "--block", f"--num-cpus={cpus}", f"--port={gcs}", f"--ray-client-server-port={client}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"),
        *("--object-store-memory=100000000", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"),
    ]
    command = [str(Path(sys.executable).with_name("ray")), "start", *options]
    with (Path(folder) / "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_until_it_answers(address, process, Path(folder) / "start.log")
        yield Head(address, variables, f"127.0.0.1:{gcs}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
        except urllib.error.HTTPError:
            return  # it wants the token, so it lives
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None:
                break
            time.sleep(0.3)
        else:
            return
    raise RuntimeError(f"the head did not start: {log.read_text(encoding='utf-8')}")
