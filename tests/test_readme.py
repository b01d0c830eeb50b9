"""README.md: its commands and code run, its column tables are the schemas, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline import column_tables, phantom
from pipeline.cli import app
from tests import public_data
from tests.phantoms import REPO, environment

README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "deploy/README.md", "docs/analytics.md")


def blocks(language: str, text: str = README) -> list[str]:
    """Contents of the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def samreg_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every `samreg …` line of a shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["samreg"]:
            yield words[1:]
        elif words[:1] == ["deploy/submit.sh"]:
            yield ["submit", *words[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command and snippet of the README has been run, in order."""
    where = tmp_path_factory.mktemp("readme")
    phantom.make_cohort(where / "images", subjects=3, shape=(2, 48, 48))
    public_data.acdc(where / "ACDC" / "training", patients=1)
    shutil.copytree(REPO / "configs", where / "configs")
    commands = where / "bin"
    commands.mkdir()
    (commands / "samreg").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipeline.cli "$@"\n', encoding="utf-8")
    (commands / "samreg").chmod(0o755)
    path = {**environment(), "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    for text in blocks("bash"):
        subprocess.run(["bash", "-euxc", text], cwd=where, env=path, check=True, timeout=300)
    for text in blocks("python"):
        subprocess.run([sys.executable, "-c", text], cwd=where, env=path, check=True, timeout=120)
    return where


@pytest.mark.ray
def test_commands_and_snippets_run(folder: Path) -> None:
    assert (folder / "cohort.csv").read_text(encoding="utf-8").count("\n") == 4
    assert (folder / "study" / "report" / "index.html").exists()
    assert (folder / "study-acdc" / "transforms" / "patient001.h5").exists()
    assert len(list((folder / "study" / "transforms").glob("*.h5"))) >= 2


@pytest.mark.ray
def test_the_study_folder_is_the_one_described(folder: Path) -> None:
    layout = next(text for text in blocks("text") if "embeddings.zarr" in text)
    named = {name.rstrip("/") for line in layout.splitlines()[1:] for name in re.findall(r"[\w.]+(?:/|\.\w+)", line)}
    made = {path.name for path in (folder / "study").iterdir() if not path.name.startswith(".")}
    assert made - {"failures"} <= named


def test_the_column_tables_are_the_schemas() -> None:
    assert column_tables.replace_between(README, "columns", column_tables.column_tables()) == README


def test_the_variants_table_is_that_of_the_weights() -> None:
    assert column_tables.replace_between(README, "variants", column_tables.variants_table()) == README


def test_column_tables_need_their_markers() -> None:
    with pytest.raises(ValueError, match="<!-- columns -->"):
        column_tables.replace_between("no markers", "columns", "")


@pytest.mark.parametrize("page", PAGES)
def test_options_shown_exist(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    root = typer.main.get_command(app)
    shown = [words for block in blocks("(?:sh|bash)", text) for words in samreg_lines(block)]
    for words in shown:
        command: Any = root
        while hasattr(command, "commands"):
            assert words[0] in command.commands, f"samreg {' '.join(words)}"
            command, words = command.commands[words[0]], words[1:]
        passes_on = [root.commands["run"]] if command.context_settings.get("allow_extra_args") else []
        known = {name for each in (command, *passes_on) for parameter in each.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    path = REPO / page
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_named_exist(page: str) -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)", "\n".join(blocks("sh")) if page == "README.md" else ""):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_no_machine_of_ours_is_named() -> None:
    for page in PAGES:
        text = (REPO / page).read_text(encoding="utf-8")
        assert not [place for place in (f"{REPO}/", f"{Path.home()}/", f"{tempfile.gettempdir()}/") if place in text]
