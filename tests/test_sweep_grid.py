"""Grids: files and options, and the tables of the paper that ship."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError, make_config
from pipeline.sweep_grid import read_grid

SHIPPED = Path(__file__).resolve().parents[1] / "configs" / "sweeps"
OF_THE_PAPER: dict[str, tuple[str, list[Any]]] = {
    "table3": ("max_pairs", [1, 3, 5, 7, 9]),
    "table4": ("epsilon", [0.7, 0.75, 0.8, 0.85, 0.9, 0.95]),
    "table5": ("slice_range", [1, 3, 5, 7, 9, 11]),
    "table6": ("one_to_one", [True, False]),
}


def test_every_shipped_grid_is_known() -> None:
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == set(OF_THE_PAPER)


@pytest.mark.parametrize("table", OF_THE_PAPER)
def test_a_table_of_the_paper_varies_one_setting_of_the_paper_s_matching(table: str) -> None:
    name, values = OF_THE_PAPER[table]
    paper = make_config({"preset": "paper"}).match
    combinations = read_grid(SHIPPED / f"{table}.yaml").combinations(make_config({}))
    assert [combination.config.match for combination in combinations] == [
        dataclasses.replace(paper, **{name: value}) for value in values
    ]


def test_options_go_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "set: {match.scope: window, fit.step: 0.1}\nmatch.epsilon: [0.5]\nfit.robust: [0, 1]\n", encoding="utf-8"
    )
    grid = read_grid(path, ["match.epsilon=0.6,0.7", "match.scope=volume,window"], ["fit.step=0.2"])
    assert grid.name == "mine"
    assert grid.axes == {
        "match.epsilon": [0.6, 0.7],
        "fit.robust": [0, 1],
        "match.scope": ["volume", "window"],
    }
    assert grid.base == {"match.scope": "window", "fit.step": 0.2}


def test_the_last_axis_runs_fastest_and_values_are_those_understood() -> None:
    grid = read_grid(None, ["match.max_pairs=1,3", "match.slice_range=1,2"])
    assert grid.name == "match.max_pairs-match.slice_range"
    found = [tuple(c.settings.values()) for c in grid.combinations(make_config({}))]
    assert found == [(1, 1.0), (1, 2.0), (3, 1.0), (3, 2.0)]
    assert isinstance(found[0][1], float)


def test_keys_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text("set: {2: 1}\n1: [3]", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown setting '2'"):
        read_grid(path).combinations(make_config({}))


def test_whole_sections_and_lists_can_be_values(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    level = "{stride: 2, control: 8.0, tau: 2.0, iterations: 3}"
    path.write_text(
        f"fit.levels: [[{level}], [{level}, {level}]]\nmatch.spatial: [{{enabled: false}}, {{weight: 0.1}}]",
        encoding="utf-8",
    )
    configs = [combination.config for combination in read_grid(path).combinations(make_config({}))]
    assert [len(config.fit.levels) for config in configs] == [1, 1, 2, 2]
    assert [(c.match.spatial.enabled, c.match.spatial.weight) for c in configs[:2]] == [(False, 0.4), (True, 0.1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing to sweep: give a grid file, or --grid"),
        ("match.epsilon: 0.7", "match.epsilon: expected a list of values to sweep over, got 0.7"),
        ("match.epsilon: []", r"match.epsilon: expected a list of values to sweep over, got \[\]"),
        ("set: 3\nmatch.epsilon: [0.7]", "set: expected a mapping of settings, got 3"),
        ("- 1", "expected a mapping of settings, got list"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_grid(path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("match.epsilon", "--grid 'match.epsilon': expected KEY=VALUE, for example match.epsilon=0.7,0.75,0.8"),
        ("match.epsilon=[0.7", "--grid .*: the value is not YAML"),
        ("match.epsilon=", r"match.epsilon: expected a list of values to sweep over, got \[\]"),
    ],
)
def test_an_option_of_another_form_is_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_grid(None, [option])
