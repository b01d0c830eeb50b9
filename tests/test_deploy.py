"""deploy/submit.sh: what it sends to a cluster, and what it refuses. A stand-in plays the `ray` command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.phantoms import REPO


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """A `ray` that writes down its arguments and the files of its working directory, then fails with 7."""
    command = tmp_path / "ray"
    command.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n'
        f'while [ "$1" != --working-dir ]; do shift; done\n(cd "$2" && find . -type f) > "{tmp_path}/files"\nexit 7\n'
    )
    command.chmod(0o755)
    return command


def _submit(ray: Path, *arguments: str, address: str | None = "http://head:8265") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY": str(ray)}
    environment.pop("RAY_ADDRESS", None)
    if address is not None:
        environment["RAY_ADDRESS"] = address
    command = ["bash", str(REPO / "deploy/submit.sh"), *arguments]
    return subprocess.run(command, env=environment, cwd=ray.parent, capture_output=True, text=True, timeout=60)


def test_only_code_is_sent_and_the_exit_code_is_the_jobs(ray: Path) -> None:
    done = _submit(ray, "configs/cardiac.yaml", "--cohort", "/d/c.csv", "--out", "/d/s", "--pairs", "star")
    assert done.returncode == 7, done.stderr
    arguments = (ray.parent / "arguments").read_text().splitlines()
    assert arguments[:4] == ["job", "submit", "--address", "http://head:8265"]
    start = arguments.index("--") + 1
    assert arguments[start:] == [
        *("python", "-m", "pipeline.cli", "run", "configs/cardiac.yaml", "--cohort", "/d/c.csv"),
        *("--out", "/d/s", "--pairs", "star", "--executor", "ray"),
    ]
    sent = (ray.parent / "files").read_text().splitlines()
    assert {path.split("/")[1] for path in sent} == {
        *("pipeline", "actors", "storage", "configs", "samreg.py", "pyproject.toml")
    }
    assert all(path.endswith((".py", ".yaml", ".toml")) for path in sent)


@pytest.mark.parametrize("option", ["--cohort", "--out", "--pairs"])
def test_relative_paths_are_refused(ray: Path, option: str) -> None:
    done = _submit(ray, option, "study/")
    assert done.returncode == 2
    assert f"{option} study/ is relative" in done.stderr
    assert not (ray.parent / "arguments").exists()


def test_a_cluster_must_be_named(ray: Path) -> None:
    done = _submit(ray, "--cohort", "/d/c.csv", address=None)
    assert done.returncode != 0
    assert "RAY_ADDRESS" in done.stderr
