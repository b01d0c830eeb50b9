"""The SAM backend as a Segmenter."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.sam import SamSegmenter
from actors.sam_checkpoint import CheckpointError, file_sha256
from actors.sam_config import EverythingConfig, SamConfig
from actors.sam_encoder import TinyVitEncoder
from actors.sam_probe import probe, summarise_probe
from actors.sam_variants import VARIANTS
from actors.segmenter import Features, Segmenter
from tests.recipe_weights import seeded_slimsam_77

SLICES = np.random.default_rng(5).integers(0, 256, (1, 30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "slimsam.pth"
    torch.save(seeded_slimsam_77(), path)
    return path


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> SamConfig:
    return SamConfig(
        "slimsam_77",
        str(checkpoint),
        points_per_side=2,
        pred_iou_threshold=-9.0,
        stability_threshold=0.0,
        box_nms=1.0,
    )


def test_a_study_through_the_protocol(config: SamConfig, checkpoint: Path) -> None:
    sam = SamSegmenter(config)
    segmenter: Segmenter = sam
    assert segmenter.layout == {"blocks": [["sam", 0, 256, 1.0]]}
    assert segmenter.signature["weights_sha256"] == file_sha256(checkpoint)
    assert json.loads(json.dumps(segmenter.signature)) == segmenter.signature

    features = segmenter.encode(SLICES)
    assert features.values.shape == (1, 256, 64, 64)
    assert features.values.dtype == np.float32
    assert features.extent == (48.0, 64.0)
    (found,) = segmenter.everything(SLICES, features)
    assert found.masks.shape == (12, 30, 40)
    assert found.masks.dtype == bool
    assert found.quality.shape == found.stability.shape == (12,)

    stored = Features(features.values.copy(), features.extent)
    (again,) = segmenter.everything(SLICES, stored)
    np.testing.assert_array_equal(again.masks, found.masks)
    np.testing.assert_array_equal(again.quality, found.quality)

    arrays = probe("slimsam_77", checkpoint, SLICES[0], [[10.0, 7.5]])
    np.testing.assert_allclose(arrays["features"], features.values[0], atol=1e-5)
    nearest = np.abs(found.quality[:, None] - arrays["iou_multi"][0]).min(axis=0)
    assert nearest.max() < 1e-4
    assert all("NOT FINITE" not in line for line in summarise_probe(arrays))


def test_defaults_come_from_the_variant_and_the_mode() -> None:
    assert SamConfig("sam_vit_h").everything() == EverythingConfig(32, 0.90, 0.90, 1.0, 0.7, 0.0, None)
    medsam = SamConfig("medsam").everything()
    assert (medsam.pred_iou_threshold, medsam.stability_threshold) == (0.88, 0.80)
    fast = SamConfig("sam_vit_b", mode="fast").everything()
    assert fast.points_per_side == 16
    assert fast.skip_background > 0
    assert fast.prefilter_slack is not None
    assert SamConfig("sam_vit_b", mode="fast", points_per_side=24).everything().points_per_side == 24
    assert SamConfig("sam_vit_b", pred_iou_threshold=0.0).everything().pred_iou_threshold == 0.0
    for name in VARIANTS:
        SamConfig(name).everything()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean sam_vit_b"):
        SamConfig("sam_vitb")  # type: ignore[arg-type]


def test_the_signature_follows_every_setting_that_changes_the_output(config: SamConfig) -> None:
    signature = SamSegmenter(config).signature
    changes = {
        "preprocess": "medsam",
        "points_per_side": 3,
        "box_nms": 0.5,
        "precision": "bf16",
        "mode": "fast",
    }
    for key, value in changes.items():
        assert SamSegmenter(replace(config, **{key: value})).signature != signature, key  # type: ignore[arg-type]


def test_bf16_keeps_scores_and_masks_close(config: SamConfig) -> None:
    exact, half = SamSegmenter(config), SamSegmenter(replace(config, precision="bf16"))
    embedding = np.random.default_rng(0).normal(size=(1, 256, 64, 64)).astype(np.float32)
    features = Features(embedding, (48.0, 64.0))
    (reference,), (rounded,) = exact.everything(SLICES, features), half.everything(SLICES, features)
    np.testing.assert_allclose(np.sort(rounded.quality), np.sort(reference.quality), atol=0.05)
    assert rounded.quality.dtype == rounded.stability.dtype == np.float32


def test_weights_that_are_missing_or_wrong_are_refused(
    config: SamConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMREG_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="samreg weights fetch hq_sam_h"):
        SamSegmenter(SamConfig("hq_sam_h"))
    with pytest.raises(CheckpointError, match="they are slimsam_77"):
        SamSegmenter(replace(config, name="mobile_sam"))


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.models.tiny_vit", None)
    with pytest.raises(ImportError, match=r"pip install 'samreg\[mobile\]'"):
        TinyVitEncoder({})


def test_probe_refuses_odd_prompts(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"box must be x0, y0, x1, y1"):
        probe("slimsam_77", checkpoint, SLICES[0], box_xyxy=[1, 2, 3])
