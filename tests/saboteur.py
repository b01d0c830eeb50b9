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
    (folder / "faults.json").write_text(json.dumps(list(faults)))
    (folder / "sitecustomize.py").write_text(_HOOK)
    return {**environment(), "PYTHONPATH": f"{folder}:{REPO}"}


def happened(folder: Path) -> list[str]:
    """Which fault, and which time, for every process killed."""
    return sorted(path.name for path in folder.glob("[0-9]*.[0-9]*"))
