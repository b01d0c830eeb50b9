"""The configuration: precedence, refusals that name the path, and the files that ship."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from actors.build import SamSettings
from pipeline.config import ConfigError, StudyConfig, load_config, make_config
from pipeline.presets import PRESETS

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    assert isinstance(load_config(path), StudyConfig)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_loads(preset: str) -> None:
    assert make_config({"preset": preset}).preset == preset


def test_the_resolved_config_loads_to_itself() -> None:
    config = make_config({"preset": "paper", "match": {"epsilon": 0.6}, "pairs": "star"})
    assert make_config(yaml.safe_load(yaml.safe_dump(config.resolved()))) == config


def test_precedence_is_defaults_preset_file_set(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("preset: paper\nmatch: {epsilon: 0.5}\nexecution: {workers: 3}\n")
    config = load_config(path, ["execution.workers=2", "pairs=intra"])
    assert config.match.epsilon == 0.5
    assert (config.execution.workers, config.pairs.mode) == (2, "intra")
    assert load_config(path, ["match.epsilon=0.9"]).match.epsilon == 0.9


def test_a_short_pairs_word_keeps_its_other_settings() -> None:
    assert load_config(None, ["pairs=knn", "pairs.k=5"]).pairs.k == 5
    assert load_config(None, ["pairs=knn", "pairs.k=5"]).pairs.mode == "knn"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"matsch": {}}, r"unknown setting 'matsch'; did you mean 'match'\?"),
        ({"match": {"epsilom": 1}}, r"unknown setting 'match.epsilom'; did you mean 'match.epsilon'\?"),
        ({"segmenter": {"min_stabilty": 1}}, r"unknown setting 'segmenter.min_stabilty'; did you mean"),
        ({"execution": {"worker": 2}}, r"'execution.worker'; did you mean 'execution.workers'\?"),
        ({"execution": {"workers": "many"}}, r"execution.workers: .*got 'many'"),
        ({"execution": {"workers": 0}}, "execution.workers is 0"),
        ({"input": {"percentiles": [99, 1]}}, "input.percentiles"),
        ({"pairs": "sta"}, "pairs.mode: .*'all', 'star'"),
        ({"preset": "papr"}, r"unknown preset 'papr'; did you mean 'paper'\?"),
        ({"segmenter": {"name": "sma"}}, "segmenter: .*'sma'"),
        ({"match": 3}, "match: "),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [("match.epsilon", "expected KEY=VALUE"), ("a=[1", "is not YAML"), ("match.epsilom=1", "match.epsilon")],
)
def test_a_bad_override_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [text])


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n", "expected a mapping"), ("a: [", "cannot be read as YAML"), (None, "no such configuration file")],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_the_sam_settings_are_those_of_the_backend() -> None:
    from actors.sam import SamConfig

    theirs = {field.name: field.default for field in dataclasses.fields(SamConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(SamSettings)}
    assert {**ours, "device": "cpu"} == {**theirs, "name": "sam"}
    assert SamSettings(variant="medsam").on_device("cuda") == SamConfig(variant="medsam", device="cuda")
