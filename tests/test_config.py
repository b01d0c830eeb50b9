"""The configuration: precedence, refusals that name the path, and the files that ship."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from actors.sam_config import SamConfig
from actors.sam_variants import VARIANTS, SamName
from pipeline.config import ConfigError, StudyConfig, load_config, make_config
from pipeline.presets import PRESETS
from tests.phantoms import environment

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
    path.write_text("preset: paper\nmatch: {epsilon: 0.5}\nexecution: {workers: 3}\n", encoding="utf-8")
    config = load_config(path, ["execution.workers=2", "pairs=intra"])
    assert config.match.epsilon == 0.5
    assert (config.execution.workers, config.pairs.mode) == (2, "intra")
    assert load_config(path, ["match.epsilon=0.9"]).match.epsilon == 0.9


def test_a_file_may_set_something_with_one_preset_only(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "preset: paper\nmatch: {epsilon: 0.5}\n"
        "presets:\n  recommended: {rois: {max_area: 0.1}, match: {epsilon: 0.7, max_pairs: 9}}\n"
        "  paper: {pairs: intra}\n",
        encoding="utf-8",
    )
    assert (load_config(path).rois.max_area, load_config(path).pairs.mode) == (7000, "intra")
    other = load_config(path, ["preset=recommended"])
    assert (other.rois.max_area, other.match.epsilon, other.match.max_pairs, other.pairs.mode) == (0.1, 0.5, 9, "all")
    assert load_config(path, ["preset=recommended", "rois.max_area=0.2"]).rois.max_area == 0.2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("presets: {papr: {}}", r"unknown preset 'papr'; did you mean 'paper'\?"),
        ("presets: {paper: {roi: {}}}", r"unknown setting 'roi'; did you mean 'rois'\?"),
        ("presets: paper", "presets: expected settings by preset .*got 'paper'"),
        ("presets: {paper: fast}", "presets: expected settings by preset"),
    ],
)
def test_settings_of_a_preset_not_in_use_are_checked_too(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


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
        ({"segmenter": {"name": "sma"}}, "segmenter: unknown segmenter 'sma'"),
        ({"segmenter": "slimsam_7"}, r"unknown segmenter 'slimsam_7'; did you mean 'slimsam_77'\?"),
        ({"segmenter": {"name": "medsam", "mode": "quick"}}, r"segmenter.mode: .*'exact' or 'fast' \(got 'quick'\)"),
        ({"segmenter": {"name": "medsam", "points_per_side": 0}}, "points_per_side must be at least 1"),
        (
            {"segmenter": {"name": "medsam", "chekpoint": "x"}},
            "'segmenter.chekpoint'; did you mean 'segmenter.checkpoint'",
        ),
        ({"match": 3}, "match: "),
        ({"match": {"max_pairs": -1}}, "match.max_pairs is -1; expected a number of 0 or more"),
        ({"match": {"slice_range": -1}}, "match.slice_range is -1"),
        ({"match": {"epsilon": 75}}, r"match.epsilon is 75.*must be in \[0, 1\]"),
        ({"match": {"spatial": {"prior_mm": 0}}}, "match.spatial.prior_mm is 0.*expected a number above 0"),
        ({"rois": {"max_per_slice": -1}}, "rois.max_per_slice is -1"),
        ({"segmenter": {"max_rois": -1}}, "segmenter.max_rois is -1"),
        ({"fit": {"affine_prior_mm": 0}}, "fit.affine_prior_mm is 0.*expected a number above 0"),
        ({"fit": {"smoothness": -1}}, "fit.smoothness is -1.*expected a number of 0 or more"),
        ({"fit": {"levels": [{"stride": 2, "control": 4, "tau": 0, "iterations": 4}]}}, "fit.levels.tau is 0"),
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
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("name", ["component_tree", *VARIANTS])
def test_a_segmenter_is_one_word(name: str) -> None:
    config = make_config({"segmenter": name})
    assert config.segmenter.name == name
    assert make_config(yaml.safe_load(yaml.safe_dump(config.resolved()))) == config
    assert load_config(None, [f"segmenter={name}"]) == config


def test_the_word_and_its_settings_come_in_any_order() -> None:
    expected = SamConfig("slimsam_77", "/w.pth", points_per_side=8)
    settings = ["segmenter=slimsam_77", "segmenter.checkpoint=/w.pth", "segmenter.points_per_side=8"]
    assert load_config(None, settings).segmenter == expected
    assert load_config(None, settings[::-1]).segmenter == expected


def test_naming_another_segmenter_drops_the_settings_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("preset: paper\nsegmenter: {name: slimsam_77, checkpoint: /w.pth, mode: fast}\n", encoding="utf-8")
    assert load_config(path).segmenter == SamConfig("slimsam_77", "/w.pth", mode="fast")
    assert load_config(path, ["segmenter.mode=exact"]).segmenter == SamConfig("slimsam_77", "/w.pth")
    assert load_config(path, ["segmenter=medsam"]).segmenter == SamConfig("medsam")
    assert load_config(path, ["segmenter=component_tree"]).segmenter.name == "component_tree"
    path.write_text("preset: paper\nsegmenter: {checkpoint: /h.pth}\n", encoding="utf-8")
    assert load_config(path).segmenter == SamConfig("sam_vit_h", "/h.pth")


def test_variants_bring_their_own_defaults_and_every_one_yields() -> None:
    medsam = make_config({"segmenter": "medsam"}).segmenter
    assert isinstance(medsam, SamConfig)
    assert medsam.preprocess_rule() == "medsam"
    assert medsam.everything().stability_threshold == 0.80
    as_sam = make_config({"segmenter": {"name": "medsam", "preprocess": "sam", "stability_threshold": 0.7}}).segmenter
    assert isinstance(as_sam, SamConfig)
    assert as_sam.preprocess_rule() == "sam"
    assert as_sam.everything().stability_threshold == 0.7
    assert as_sam.signature("digest") != medsam.signature("digest") != medsam.signature("other weights")


@pytest.mark.parametrize("preset", ["paper", "official-demo"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_papers_presets_take_any_variant(preset: str, name: str) -> None:
    config = make_config({"preset": preset, "segmenter": name})
    assert config.segmenter == SamConfig(name)  # type: ignore[arg-type]
    assert (config.rois.min_area, config.rois.max_area, config.rois.area_unit) == (200, 7000, "ref200")
    assert config.rois.max_overlap == {"paper": 0.8, "official-demo": 0.9}[preset]
    assert config.rois.min_stability == 0.0


def test_the_variants_are_the_names() -> None:
    assert get_args(SamName) == tuple(VARIANTS)


def test_reading_a_configuration_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.config import make_config; make_config({'preset': 'paper', 'segmenter': 'medsam'});"
        "print(sorted({'torch', 'torchvision', 'ray', 'segment_anything', 'SimpleITK', 'zarr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
