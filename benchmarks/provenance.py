"""Where and when something was measured, and by which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pipeline.process import own_cores

REPO = Path(__file__).resolve().parents[1]
COMPUTING = ("storage", "actors", "pipeline", "configs")


def provenance() -> dict[str, str]:
    """Of what is measured now."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--", *COMPUTING) else ""
    return {
        "machine": f"{_processor()}, {own_cores()} cores, load {os.getloadavg()[0]:.0f}",
        "commit": git("rev-parse", "--short=10", "HEAD") + changed,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def remember(folder: Path, what: str, anew: bool = True) -> None:
    """Note the provenance of something under a folder, if it was measured anew or has none yet."""
    path = folder / "provenance.json"
    known = remembered(folder)
    if what in known and not anew:
        return
    path.write_text(json.dumps({**known, what: provenance()}, indent=1), encoding="utf-8")


def remembered(folder: Path) -> dict[str, dict[str, str]]:
    """What was noted under a folder, by its name."""
    path = folder / "provenance.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def shown(run: Mapping[str, str]) -> str:
    """Commit, day and machine."""
    return f"commit {run['commit']}, {run['date'][:10]}, {run['machine']}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
