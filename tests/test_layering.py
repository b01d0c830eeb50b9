"""The import chain storage <- actors <- pipeline, pure algorithms, and Ray in three files only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
OURS = ("storage", "actors", "pipeline")
MAY_IMPORT = {"storage": {"storage"}, "actors": {"storage", "actors"}, "pipeline": set(OURS)}
RAY_FILES = {"actors/pool.py", "pipeline/dispatch.py", "pipeline/submit.py"}
PURE = {
    "numpy",
    "scipy",
    "SimpleITK",
    "torch",
    "numba",
    "sys",
    "math",
    "dataclasses",
    "typing",
    "collections",
    "functools",
    "itertools",
    "time",
    "heapq",
}
FILES = sorted(path for package in OURS for path in (REPO / package).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_imports_follow_the_chain(path: Path) -> None:
    name = str(path.relative_to(REPO))
    package = name.split("/", 1)[0]
    imported = _imports(path)
    ours = {module.split(".")[0] for module in imported} & set(OURS)
    assert ours <= MAY_IMPORT[package]
    if name not in RAY_FILES:
        assert not {module for module in imported if module.split(".")[0] == "ray"}


@pytest.mark.parametrize("path", sorted((REPO / "pipeline/algorithms").glob("*.py")), ids=lambda path: path.stem)
def test_algorithms_are_pure(path: Path) -> None:
    for module in _imports(path):
        allowed = module.split(".")[0] in PURE | {"__future__"} or module.startswith("pipeline.algorithms")
        assert allowed or module == "pipeline", f"{path.name} imports {module}"


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_init_files_hold_a_docstring_only(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_broad_except_only_in_dispatch(path: Path) -> None:
    if path.name == "dispatch.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            caught = {item.id for item in ast.walk(node.type) if isinstance(item, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"{path}:{node.lineno}"
