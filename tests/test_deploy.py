"""deploy/: the scripts and manifests, checked as far as a machine without those clusters allows."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.phantoms import REPO


def test_submit_sh_is_samreg_submit_of_this_checkout(tmp_path: Path) -> None:
    """A stand-in plays Python and writes down its arguments."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$PYTHONPATH" "$@" > "{tmp_path}/arguments"\nexit 7\n')
    python.chmod(0o755)
    command = ["bash", str(REPO / "deploy/submit.sh"), "configs/cardiac.yaml", "--cohort", "/d/c d.csv"]
    environment = {**os.environ, "PYTHON": str(python)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    sent = (tmp_path / "arguments").read_text().splitlines()
    assert sent == [str(REPO), "-m", "pipeline.cli", "submit", "configs/cardiac.yaml", "--cohort", "/d/c d.csv"]
