"""The grid of a sweep: the settings that it varies, their values, and every combination of them.

A grid file maps dotted settings to lists of values; `set` in it changes other settings for the whole sweep.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, StudyConfig, parse_setting, read_yaml, with_settings
from storage.signature import digest

POOLED = ("rois", "prototypes", "tracks")
"""Sections that the prototypes are made with."""
SWEPT = (*POOLED, "match", "fit")
_ENCODED = "it decides what is encoded, and a sweep never encodes; run a study of its own for each value"
_REFUSED = {
    "input": _ENCODED,
    "segmenter": _ENCODED,
    "pairs": "all combinations register the same pairs; choose those with --pairs",
    "execution": "it changes no result; use --workers and --executor",
    "output": "it changes no result; run a study for its files",
    "atlas": "it concerns samreg atlas alone",
    "preset": "it reaches beyond them; name its settings one by one",
}


@dataclass(frozen=True)
class Combination:
    """One point of the grid.

    Attributes:
        settings: value of every axis.
        config: all settings.
    """

    settings: dict[str, Any]
    config: StudyConfig

    @property
    def key(self) -> str:
        """Digest of every setting that a sweep may change."""
        return section_digest(self.config, *SWEPT)

    def __str__(self) -> str:
        return ", ".join(f"{path}={value}" for path, value in self.settings.items())


@dataclass(frozen=True)
class Grid:
    """What varies and what is changed for all.

    Attributes:
        name: of the sweep.
        axes: dotted setting -> values.
        base: dotted setting -> value, for every combination.
    """

    name: str
    axes: Mapping[str, Sequence[Any]]
    base: Mapping[str, Any]

    def combinations(self, config: StudyConfig) -> tuple[Combination, ...]:
        """Every combination over the settings of a study, the last axis fastest.

        Raises:
            ConfigError: for a setting that is unknown, out of range or not for a sweep, or a combination given twice.
        """
        for path in (*self.base, *self.axes):
            _check_may_vary(path)
        base = with_settings(config, self.base)
        found: dict[str, Combination] = {}
        for values in itertools.product(*self.axes.values()):
            chosen = with_settings(base, dict(zip(self.axes, values, strict=True)))
            combination = Combination({path: _value(chosen, path) for path in self.axes}, chosen)
            if combination.key in found:
                raise ConfigError(f"the grid holds {combination} twice")
            found[combination.key] = combination
        return tuple(found.values())


def read_grid(path: Path | None, axes: Sequence[str] = (), base: Sequence[str] = ()) -> Grid:
    """The grid of a file, of `--grid KEY=VALUE,VALUE` options, or of both; an option goes before the file.

    Args:
        axes: texts of `--grid`.
        base: texts of `--set`.

    Raises:
        ConfigError: for a file or an option of another form, or without any axis.
    """
    given = {str(setting): values for setting, values in (read_yaml(path) if path is not None else {}).items()}
    shared = given.pop("set", None) or {}
    if not isinstance(shared, dict):
        raise ConfigError(f"{path}: set: expected a mapping of settings, got {shared!r}")
    given |= dict(parse_setting(text, "--grid", several=True) for text in axes)
    shared = {str(setting): value for setting, value in shared.items()} | dict(map(parse_setting, base))
    for setting, values in given.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{setting}: expected a list of values to sweep over, got {values!r}")
    if not given:
        raise ConfigError("nothing to sweep: give a grid file, or --grid match.epsilon=0.7,0.75,0.8")
    return Grid(path.stem if path is not None else "-".join(given), given, shared)


def section_digest(config: StudyConfig, *sections: str) -> str:
    """Digest of some sections of a configuration."""
    resolved = config.resolved()
    return digest({name: resolved[name] for name in sections})


def _check_may_vary(path: str) -> None:
    section = path.split(".", 1)[0]
    if section in _REFUSED:
        allowed = ", ".join(SWEPT[:-1])
        raise ConfigError(f"{path}: a sweep changes settings of {allowed} and {SWEPT[-1]} only: {_REFUSED[section]}")


def _value(config: StudyConfig, path: str) -> Any:
    """The value of a dotted setting, as the configuration understood it."""
    found: Any = config.resolved()
    for name in path.split("."):
        found = found[name]
    return found
