"""A whole study with SAM through the driver: the second backend of the Segmenter protocol."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from actors.sam import SamSegmenter
from actors.sam_config import SamConfig
from actors.sam_weights import file_sha256
from actors.segmenter import Features
from pipeline.cli import app
from pipeline.config import StudyConfig, make_config
from pipeline.dispatch import Task
from pipeline.errors import UsageError
from pipeline.progress import SilentReporter
from pipeline.query import ask, open_study
from pipeline.query_region import Seed
from pipeline.stages import encode
from pipeline.status import read_status
from pipeline.study import StudySummary, run_study
from storage import tables
from storage.cohort import read_cohort
from storage.embeddings import EmbeddingStore
from tests import phantoms
from tests.recipe_weights import recipe_state_dict, seeded_slimsam_77

POINTS_PER_SIDE = 4
SHAPE = (2, 64, 64)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_cohort(tmp_path_factory.mktemp("cohort"), ["a", "b"], SHAPE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "slimsam_77.pth"
    torch.save(recipe_state_dict("slimsam_77_uniform"), path)
    return path


def _config(checkpoint: Path, **execution: Any) -> StudyConfig:
    """The paper's settings with thresholds that masks of random weights pass."""
    return make_config(
        {
            "preset": "paper",
            "segmenter": {
                "name": "slimsam_77",
                "checkpoint": str(checkpoint),
                "points_per_side": POINTS_PER_SIDE,
                "pred_iou_threshold": -9.0,
                "stability_threshold": 0.0,
                "box_nms": 1.0,
            },
            "rois": {"min_area": 0, "max_area": 40000, "max_overlap": 1.0},
            "prototypes": {"min_cells": 0.0},
            "match": {"epsilon": 0.0},
            "fit": phantoms.QUICK_FIT,
            "pairs": "star",
            "execution": execution,
        }
    )


def _count_build(build: Callable[[str], Any], folder: Path, device: str) -> Any:
    """Leaves a file for every model that a process loads."""
    folder.mkdir(exist_ok=True)
    count = len(list(folder.glob(f"{os.getpid()}-*")))
    (folder / f"{os.getpid()}-{count}").touch()
    return build(device)


def _run(cohort: Path, out: Path, config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[StudySummary, int]:
    """Run a study; also how many models were loaded, none of them twice in a process."""
    loaded = out.with_name(f"{out.name}-loaded")
    original = encode.task

    def counting(config: StudyConfig, store: Path) -> Task:
        task = original(config, store)
        return replace(task, build=partial(_count_build, task.build, loaded))

    with monkeypatch.context() as patch:
        patch.setattr(encode, "task", counting)
        summary = run_study(config, read_cohort(cohort), out, reporter=SilentReporter())
    names = [path.name.split("-") for path in loaded.glob("*")]
    assert all(count == "0" for _, count in names)
    return summary, len(names)


@pytest.fixture(scope="module")
def serial(cohort: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "serial"
    with pytest.MonkeyPatch.context() as patch:
        summary, models = _run(cohort, out, _config(checkpoint, executor="serial"), patch)
    assert (summary.n_failures, models) == (0, 1)
    return out


def test_sam_serves_every_stage(serial: Path, checkpoint: Path) -> None:
    assert read_status(serial).complete
    metrics = tables.read_table(serial, "metrics").to_pylist()
    assert {row["label"] for row in metrics} == {0, 1, 2, 3}
    assert all(row["n_rois"] > 0 for row in metrics)
    rois = tables.read_table(serial, "rois").to_pylist()
    assert {(row["subject"], row["slice"]) for row in rois} == {(s, z) for s in "ab" for z in range(SHAPE[0])}
    assert len(rois) > 4 * POINTS_PER_SIDE**2
    stored = EmbeddingStore(serial / "embeddings.zarr").read("a")
    assert stored.features is not None
    assert stored.features.shape == (SHAPE[0], 256, 64, 64)
    assert stored.extent == (64.0, 64.0)
    assert stored.signature["segmenter"]["weights_sha256"] == file_sha256(checkpoint)
    assert stored.signature["segmenter"]["points_per_side"] == POINTS_PER_SIDE
    pooled = EmbeddingStore(serial / "embeddings.zarr").read_prototypes("a")
    assert pooled is not None
    np.testing.assert_allclose(np.linalg.norm(pooled[1]["prototypes"], axis=1), 1, atol=1e-5)


@pytest.mark.ray
def test_ray_gives_the_same_tables_and_each_actor_loads_once(
    serial: Path, cohort: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(checkpoint, executor="ray", workers=2)
    summary, models = _run(cohort, tmp_path / "ray", config, monkeypatch)
    assert (summary.n_failures, models) == (0, 2)
    assert phantoms.study_tables(tmp_path / "ray") == phantoms.study_tables(serial)


def test_a_second_run_encodes_nothing(
    serial: Path, cohort: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, models = _run(cohort, serial, _config(checkpoint, executor="serial"), monkeypatch)
    assert (summary.stages[0].reused, summary.stages[0].done) == (2, 0)
    assert models == 1  # of the first run


def _samreg_run(cohort: Path, out: Path, *arguments: str) -> Result:
    shared = ["run", "--cohort", str(cohort), "--out", str(out)]
    return CliRunner().invoke(app, [*shared, *arguments], catch_exceptions=False)


def test_other_weights_are_refused_in_the_same_folder(serial: Path, cohort: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save(seeded_slimsam_77(), other)
    settings = ["--set", "segmenter=slimsam_77", "--set", f"segmenter.checkpoint={other}"]
    refused = _samreg_run(cohort, serial, *settings)
    assert refused.exit_code == 2
    assert "segmenter.weights_sha256" in refused.stderr


@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_missing_weights_are_refused_before_anything_runs(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    monkeypatch.setenv("SAMREG_WEIGHTS", str(tmp_path / "weights"))
    refused = _samreg_run(cohort, tmp_path / "study", "--set", "segmenter=sam_vit_b", "--executor", executor)
    assert refused.exit_code == 2
    assert str(tmp_path / "weights" / "sam_vit_b_01ec64.pth") in refused.stderr
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth" in refused.stderr
    assert not (tmp_path / "study" / "run.yaml").exists()


def test_weights_of_another_variant_are_refused_once(cohort: Path, checkpoint: Path, tmp_path: Path) -> None:
    settings = ["--set", "segmenter=hq_sam_b", "--set", f"segmenter.checkpoint={checkpoint}"]
    refused = _samreg_run(cohort, tmp_path / "study", *settings)
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert "these weights are not hq_sam_b: they are slimsam_77" in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("executor", ["serial", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_gpu_that_is_not_there_is_refused(cohort: Path, checkpoint: Path, tmp_path: Path, executor: str) -> None:
    settings = ["--set", "segmenter=slimsam_77", "--set", f"segmenter.checkpoint={checkpoint}"]
    refused = _samreg_run(cohort, tmp_path / "study", *settings, "--device", "cuda", "--executor", executor)
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert "execution.device is cuda but there is no GPU here" in refused.stderr


def test_a_query_prompts_the_decoder_on_stored_features(serial: Path, checkpoint: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(serial, study)
    opened = open_study(study)
    stored = EmbeddingStore(study / "embeddings.zarr").read("a")
    assert stored.features is not None
    features = Features(np.asarray(stored.features[1:], np.float32), stored.extent)
    segmenter, blank = SamSegmenter(SamConfig("slimsam_77", str(checkpoint))), np.zeros((1, 64, 64, 3), np.uint8)
    for x, y in itertools.product((5, 30, 55), repeat=2):
        found = segmenter.prompt(blank, features, points=[(x + 0.5, y + 0.5)])[0]
        surest = found.masks[found.quality.argmax()]
        if surest.any():
            break
    region = ask(opened, "a", Seed("point", (x, y, 1))).region
    np.testing.assert_array_equal(region.masks[region.slices == 1][0], surest)
    stored_only = ask(opened, "a", Seed("point", (x, y, 1)), prompt=False).region
    known = stored.masks()
    assert all((mask == known).all(axis=(1, 2)).any() for mask in stored_only.masks)
    boxed = segmenter.prompt(blank, features, boxes=[(10, 10, 51, 41)])[0]
    assert boxed.masks.shape == (1, 64, 64)
    seed = Seed("box", (10, 10, 1, 50, 40, 1))
    if boxed.masks.any():
        np.testing.assert_array_equal(ask(opened, "a", seed).region.masks, boxed.masks)
    else:
        with pytest.raises(UsageError, match="SAM finds no region there"):
            ask(opened, "a", seed)


def test_a_query_prompts_no_other_weights_than_the_study_was_encoded_with(
    serial: Path, checkpoint: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    shutil.copytree(serial, study)
    other = tmp_path / "other.pth"
    torch.save({name: value * 1.01 for name, value in recipe_state_dict("slimsam_77_uniform").items()}, other)
    record = (study / "run.yaml").read_text(encoding="utf-8")
    assert str(checkpoint) in record
    (study / "run.yaml").write_text(record.replace(str(checkpoint), str(other)), encoding="utf-8")
    opened, seed = open_study(study), Seed("point", (30, 30, 1))
    with pytest.raises(UsageError, match=r"'a' was made otherwise: weights_sha256: stored .* with --stored"):
        ask(opened, "a", seed)


def test_prompts_and_slices_are_as_many(checkpoint: Path) -> None:
    segmenter, image = SamSegmenter(SamConfig("slimsam_77", str(checkpoint))), np.zeros((1, 16, 16, 3), np.uint8)
    features = Features(np.zeros((1, 256, 64, 64), np.float32), (64.0, 64.0))
    for prompts in ({}, {"points": [(1, 1)] * 2}, {"points": [(1, 1)], "boxes": [(0, 0, 1, 1)]}):
        with pytest.raises(ValueError, match="1 slices need as many points, or as many boxes"):
            segmenter.prompt(image, features, **prompts)
