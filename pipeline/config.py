"""The study configuration: one model that composes the settings written beside each algorithm.

YAML key = attribute name. Order of precedence: defaults, `preset`, what the file's `presets` sets for that preset, the
rest of the file, `--set`. An unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.build import SegmenterConfig
from actors.class_config import LabelsConfig, NetworkConfig
from actors.component_tree import ComponentTreeConfig
from actors.input_config import InputConfig
from actors.sam_variants import VARIANTS
from pipeline.algorithms.atlas_config import AtlasConfig
from pipeline.algorithms.evaluate_config import EvaluateConfig
from pipeline.algorithms.fit_config import FitConfig
from pipeline.algorithms.matching import MatchConfig
from pipeline.algorithms.prototypes import PrototypeConfig
from pipeline.algorithms.rois import RoiConfig
from pipeline.algorithms.tracks import TrackConfig
from pipeline.errors import UsageError
from pipeline.execution import ExecutionConfig
from pipeline.output import OutputConfig
from pipeline.pairs import PairsConfig
from pipeline.presets import PRESETS

SEGMENTERS = (ComponentTreeConfig().name, LabelsConfig().name, NetworkConfig().name, *VARIANTS)
SHORT_FOR = {"pairs": "mode", "segmenter": "name"}


class ConfigError(UsageError):
    """The configuration cannot be used; the message names the key and what is allowed."""


class StudyConfig(BaseModel):
    """Everything that a study is made with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str | None = None
    """Named set of overrides that this configuration starts from."""
    input: InputConfig = InputConfig()
    """How an image becomes 8-bit slices."""
    segmenter: Annotated[SegmenterConfig, Field(discriminator="name")] = ComponentTreeConfig()
    """Which backend finds ROIs and features."""
    rois: RoiConfig = RoiConfig()
    """Which candidate ROIs are kept."""
    prototypes: PrototypeConfig = PrototypeConfig()
    """How features are pooled over a ROI."""
    tracks: TrackConfig = TrackConfig()
    """How the ROIs of neighbouring slices are linked."""
    match: MatchConfig = MatchConfig()
    """How ROIs are paired."""
    fit: FitConfig = FitConfig()
    """How the displacement field is fitted."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured beside labels and landmarks."""
    pairs: PairsConfig = PairsConfig()
    """Which pairs of the cohort are registered."""
    atlas: AtlasConfig = AtlasConfig()
    """How `samreg atlas` makes a template."""
    output: OutputConfig = OutputConfig()
    """What is written beside tables and transforms."""
    execution: ExecutionConfig = ExecutionConfig()
    """Where it runs; never changes a result."""

    def outputs(self) -> tuple[str, ...]:
        """The files that a fitted pair leaves, by their folder (`pipeline.folder.OUTPUTS`)."""
        asked = {"transforms": True, "inverses": self.fit.diffeomorphic, "jacobians": self.output.jacobian}
        return tuple(name for name, wanted in asked.items() if wanted)

    def resolved(self) -> dict[str, Any]:
        """Plain nested dict, every default filled in."""
        return self.model_dump(mode="json")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a YAML file (None: defaults) and apply `a.b=value` overrides.

    Raises:
        ConfigError: for a file that is not a YAML mapping, an unknown key or a value out of range.
    """
    given = read_yaml(Path(path)) if path is not None else {}
    own = _own_presets(given.pop("presets", {}))
    changes: dict[str, Any] = {}
    for override in overrides:
        _merge(changes, _expand_short(_nested(*parse_setting(override))))
    preset = changes.get("preset", given.get("preset"))
    return make_config(_layered(_layered(own.get(preset, {}), _expand_short(given)), changes))


def _own_presets(presets: Any) -> dict[Any, dict[str, Any]]:
    """What a file sets with one preset only, by preset, each checked whether it is in use or not."""
    if not isinstance(presets, Mapping) or not all(isinstance(settings, Mapping) for settings in presets.values()):
        raise ConfigError(f"presets: expected settings by preset ({', '.join(PRESETS)}), got {presets!r}")
    own = {name: _expand_short(settings) for name, settings in presets.items()}
    for name, settings in own.items():
        make_config(_layered({"preset": name}, settings))
    return own


def make_config(given: Mapping[str, Any]) -> StudyConfig:
    """Check a nested dict of settings.

    Raises:
        ConfigError: for an unknown key, naming its path and the nearest right one, or a value out of range.
    """
    preset = given.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset: unknown preset {preset!r}{_suggest(str(preset), PRESETS)}")
    values = _layered(PRESETS.get(str(preset), {}), _expand_short(given))
    segmenter = values.get("segmenter")
    if isinstance(segmenter, dict):
        name = segmenter.setdefault("name", ComponentTreeConfig().name)
        if name not in SEGMENTERS:
            raise ConfigError(f"segmenter: unknown segmenter {name!r}{_suggest(str(name), SEGMENTERS)}")
    for message in _unknown_keys(StudyConfig, values, ""):
        raise ConfigError(message)
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(item) for item in error.errors())) from None


def with_settings(config: StudyConfig, changes: Mapping[str, Any]) -> StudyConfig:
    """The configuration with other values of some settings, named by their dotted paths.

    Raises:
        ConfigError: for an unknown setting, naming the nearest right one, or a value out of range.
    """
    values = config.resolved()
    for path, value in changes.items():
        _merge(values, _nested(path, value))
    return make_config(values)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; an empty one is an empty mapping.

    Raises:
        ConfigError: naming the file and what is wrong.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(loaded).__name__}")
    return loaded


def _expand_short(given: Mapping[str, Any]) -> dict[str, Any]:
    """`pairs: star` and `segmenter: slimsam_77` spelt out."""
    values = dict(given)
    for key, word in SHORT_FOR.items():
        if isinstance(values.get(key), str):
            values[key] = {word: values[key]}
    return values


def parse_setting(text: str, option: str = "--set", several: bool = False) -> tuple[str, Any]:
    """Dotted path and value of `KEY=VALUE`; the list of values of `KEY=VALUE,VALUE` if there may be several.

    Raises:
        ConfigError: naming the option.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        example = "0.7,0.75,0.8" if several else "0.75"
        raise ConfigError(f"{option} {text!r}: expected KEY=VALUE, for example match.epsilon={example}")
    try:
        return path.strip(), yaml.safe_load(f"[{value}]" if several else value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {text!r}: the value is not YAML: {error}") from None


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return typing.cast(dict[str, Any], value)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = _merged(value, {}) if isinstance(value, Mapping) else value


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    _merge(result, base)
    _merge(result, changes)
    return result


def _layered(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`; naming another segmenter drops what the base sets of its own."""
    old, new = (layer.get("segmenter") for layer in (base, changes))
    names = {str(layer["name"]) for layer in (old, new) if isinstance(layer, Mapping) and "name" in layer}
    if len(names) == 2:
        base = {**base, "segmenter": {}}
    return _merged(base, changes)


def _describe(item: Any) -> str:
    parts = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
    if parts[:1] == ["segmenter"] and parts[1:2] and parts[1] in SEGMENTERS:
        del parts[1]  # the name, by which pydantic chose the backend
    where = ".".join(parts)
    message = str(item["msg"]).removeprefix("Value error, ")
    return message if message.startswith(where) else f"{where}: {message} (got {item['input']!r})"


def _suggest(name: str, allowed: typing.Iterable[str]) -> str:
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(names)}"


def _unknown_keys(kind: Any, values: object, path: str) -> Iterator[str]:
    """Messages for keys of `values` that the type does not have, nested types included."""
    fields = _fields_of(kind, values)
    if fields is None or not isinstance(values, Mapping):
        return
    for name, value in values.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in fields:
            yield f"unknown setting {where!r}{_suggest_path(str(name), fields, path)}"
        else:
            yield from _unknown_keys(fields[name], value, where)


def _suggest_path(name: str, fields: Mapping[str, Any], path: str) -> str:
    return _suggest(f"{path}.{name}" if path else name, [f"{path}.{f}" if path else f for f in fields])


def _fields_of(kind: Any, values: object) -> dict[str, Any] | None:
    """Field names and types of a model or dataclass; for a union the member whose `name` the values give."""
    if typing.get_origin(kind) is Annotated:
        return _fields_of(typing.get_args(kind)[0], values)
    if typing.get_origin(kind) in (Union, types.UnionType):
        members = [_fields_of(member, values) for member in typing.get_args(kind)]
        known = [fields for fields in members if fields is not None]
        named = values.get("name") if isinstance(values, Mapping) else None
        fitting = [fields for fields in known if named in typing.get_args(fields.get("name"))]
        return next(iter(fitting or known), None)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: Annotated[field.annotation, None] for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind, include_extras=True)
    return None
