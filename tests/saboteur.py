"""Faults at exact moments in the processes of a run: a `sitecustomize` that kills whoever touches a given path.

Each fault is (regular expression, times): the process that opens, renames or removes a path that the expression finds
dies by SIGKILL before it does so, the given number of times in all. Ray workers only; the driver is spared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.phantoms import REPO, environment

_HOOK = """
import json, os, re, signal, sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(FOLDER, "faults.json")) as stream:
    FAULTS = [(number, re.compile(pattern), times) for number, (pattern, times) in enumerate(json.load(stream))]
EVENTS = {"open", "os.rename", "os.remove"}

def hook(event, arguments):
    if event not in EVENTS or not arguments or not isinstance(arguments[0], (str, os.PathLike)):
        return
    path = os.fspath(arguments[0])
    if isinstance(path, bytes) or FOLDER in path or not sys.argv or "default_worker" not in sys.argv[0]:
        return
    for number, pattern, times in FAULTS:
        if pattern.search(path):
            for attempt in range(times):
                try:
                    os.close(os.open(os.path.join(FOLDER, f"{number}.{attempt}"), os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


def sabotaged(folder: Path, faults: Sequence[tuple[str, int]]) -> dict[str, str]:
    """The environment of a run whose Ray workers meet these faults; `folder` keeps count of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(list(faults)), encoding="utf-8")
    (folder / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
    return {**environment(), "PYTHONPATH": f"{folder}:{REPO}"}


def happened(folder: Path) -> list[str]:
    """Which fault, and which time, for every process killed."""
    return sorted(path.name for path in folder.glob("[0-9]*.[0-9]*"))


def busy_workers(ancestor: int) -> list[int]:
    """Ray workers that are running a unit: children of a raylet, which is this process or a child of it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes()
            if title.startswith(b"ray::UnitProcess.call"):
                raylet = int(_state(int(entry.name))[1])
                if ancestor in (raylet, int(_state(raylet)[1])):
                    found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return _state(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _state(pid: int) -> list[str]:
    """Its state, its parent, and more."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
