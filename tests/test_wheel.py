"""The wheel: built from the tree, it imports outside the repository and holds nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.phantoms import REPO

SOURCES = ("pipeline", "actors", "storage", "samreg.py", "pyproject.toml", "README.md")
PACKAGES = ("pipeline", "actors", "storage")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build folder is left in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    return next((copy / "dist").glob("samreg-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel's content."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=180)
    return target


def _run(installed: Path, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=where, env=environment, capture_output=True, encoding="utf-8", timeout=240
    )


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "*.css", "*.js")
    files = {path for package in PACKAGES for kind in kinds for path in (REPO / package).rglob(kind)}
    assert held == {str(path.relative_to(REPO)) for path in files} | {"samreg.py"}


def test_every_module_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pathlib, sys\n"
        f"root = pathlib.Path({str(installed)!r})\n"
        "for path in sorted([*root.glob('samreg.py'), *(p for n in ('pipeline', 'actors', 'storage')\n"
        "                    for p in (root / n).rglob('*.py'))]):\n"
        "    name = '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')\n"
        "    module = importlib.import_module(name)\n"
        "    assert pathlib.Path(module.__file__).is_relative_to(root), module.__file__\n"
        "print('imported')\n"
    )
    done = _run(installed, tmp_path, "-c", code)
    assert done.stdout.strip().endswith("imported"), done.stderr


def test_the_command_of_the_wheel_runs_a_study(installed: Path, tmp_path: Path) -> None:
    assert "samreg = pipeline.cli:main" in next(installed.glob("samreg-*/entry_points.txt")).read_text(encoding="utf-8")
    start = ["-c", "from pipeline.cli import main; main()"]
    options = ["--subjects", "2", "--depth", "2", "--size", "48", "--set", "execution.executor=serial"]
    done = _run(installed, tmp_path, *start, "demo", "--out", "d", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d" / "study" / "report" / "index.html").exists()
