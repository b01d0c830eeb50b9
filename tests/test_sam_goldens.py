"""Every array of every golden of the official SAM variants, through a real file and the public loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.preprocess import slice_geometry
from actors.sam_probe import probe
from actors.sam_variants import variant_defaults
from tests.recipe_weights import GOLDENS, load_recipe, recipe_state_dict

VARIANT_OF_GOLDEN = {
    "sam_vit_b": "sam_vit_b",
    "medsam_vit_b": "medsam",
    "sam_med2d_b": "sam_med2d",
    "slimsam_50_uniform": "slimsam_50",
    "slimsam_77_uniform": "slimsam_77",
    "sam_hq_vit_b": "hq_sam_b",
    "sam_hq_vit_tiny": "hq_sam_tiny",
    "mobile_sam": "mobile_sam",
}
EARLY_SUBSAMPLING = np.s_[:, ::8, ::8, ::48]


@pytest.fixture(scope="module")
def write_weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write a golden's weights in the variant's real wrapper; one file per key layout, removed on request."""
    files: dict[str, Path] = {}

    def write(golden: str, fingerprint: str) -> Path:
        if fingerprint not in files:
            weights = recipe_state_dict(golden)
            assert load_recipe().fingerprint(weights) == fingerprint
            path = tmp_path_factory.mktemp("weights") / f"{golden}.pth"
            wrapped: dict[str, Any] = weights
            if golden == "sam_med2d_b":
                wrapped = {
                    "model": weights,
                    "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]),
                }
            torch.save(wrapped, path)
            files[fingerprint] = path
        return files[fingerprint]

    yield write
    for path in files.values():
        path.unlink()


def check_masks(name: str, logits: np.ndarray, golden: Any, variant: str, model_size: int) -> None:
    """Compare masks at original size: area, box and stability."""
    height, width = load_recipe().test_image().shape[:2]
    geometry = slice_geometry(height, width, model_size, variant_defaults(variant).preprocess)
    rows, columns = geometry.mask_maps(logits.shape[-1])
    full = (rows @ torch.from_numpy(logits) @ columns.T).numpy()
    area = (full > 0).sum(axis=(2, 3))
    with np.errstate(invalid="ignore"):
        stability = (full > 1).sum(axis=(2, 3)) / (full > -1).sum(axis=(2, 3))
        low = (logits > 1).sum(axis=(2, 3)) / (logits > -1).sum(axis=(2, 3))
    assert np.abs(area - golden[f"area_full_{name}"]).max() <= 1e-3 * height * width
    np.testing.assert_allclose(stability, golden[f"stab_full_{name}"], atol=2e-3)
    np.testing.assert_allclose(low, golden[f"stab_low_{name}"], atol=2e-3)
    for prompt, mask in np.ndindex(area.shape):
        y, x = np.nonzero(full[prompt, mask] > 0)
        box = [x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 0, 0]
        assert np.abs(np.array(box) - golden[f"box_full_{name}"][prompt, mask]).max() <= 1


@pytest.mark.parametrize("golden", VARIANT_OF_GOLDEN)
def test_variant_equals_its_official_implementation(golden: str, write_weights: Any) -> None:
    recipe = load_recipe()
    variant = VARIANT_OF_GOLDEN[golden]
    if variant in ("mobile_sam", "hq_sam_tiny"):
        pytest.importorskip("timm", reason="MobileSAM and Light HQ-SAM need timm")
    with np.load(GOLDENS / f"{golden}.npz") as stored:
        expected = dict(stored)
    meta = json.loads(str(expected.pop("meta")))
    path = write_weights(golden, meta["weights_sha256"])
    arrays = probe(variant, path, recipe.test_image(), recipe.POINTS_XY, recipe.BOX_XYXY)
    tolerance = meta["tolerance"]

    stride, size = meta["input_stride"], meta["img_size"]
    cells = size // 16 // 8
    features = arrays["features"]
    checked = {
        "input_sub": (arrays["input"][:, ::stride, ::stride], tolerance["input_abs"]),
        "feat_sub": (features[::8, ::cells, ::cells], tolerance["feat_abs"]),
        "feat_mean_std_norm": (
            np.array([features.mean(), features.std(), np.linalg.norm(features)]) / [1, 1, features.size**0.5],
            tolerance["feat_abs"],
        ),
    }
    if "early" in arrays:
        early = arrays["early"].transpose(1, 2, 0)[None][EARLY_SUBSAMPLING]
        checked["interm0_sub"] = (early[0], tolerance["feat_abs"])
    names = sorted(key.removeprefix("logits_") for key in expected if key.startswith("logits_"))
    for name in names:
        logits = arrays[f"logits_{name}"]
        step = logits.shape[-1] // 32
        checked[f"logits_{name}"] = (logits[..., ::step, ::step], tolerance["logit_abs"])
        checked[f"iou_{name}"] = (arrays[f"iou_{name}"], tolerance["iou_abs"])
        statistics = np.stack([logits.mean(axis=(2, 3)), logits.std(axis=(2, 3), ddof=1)], axis=-1)
        checked[f"logitstat_{name}"] = (statistics, tolerance["logit_abs"])
        check_masks(name, logits, expected, variant, size)
    expected["feat_mean_std_norm"] = expected["feat_mean_std_norm"] / [1, 1, features.size**0.5]
    for key, (got, allowed) in checked.items():
        np.testing.assert_allclose(got, expected[key], rtol=0, atol=allowed, err_msg=f"{golden}: {key}")
    masks = {f"{kind}_{name}" for name in names for kind in ("stab_low", "stab_full", "area_full", "box_full")}
    assert set(expected) == set(checked) | masks


@pytest.mark.slow
def test_medsam_with_sam_preprocessing_equals_sam(write_weights: Any) -> None:
    recipe = load_recipe()
    with np.load(GOLDENS / "sam_vit_b.npz") as stored:
        meta, expected = json.loads(str(stored["meta"])), stored["feat_sub"]
    path = write_weights("sam_vit_b", meta["weights_sha256"])
    arrays = probe("medsam", path, recipe.test_image(), preprocess="sam")
    np.testing.assert_allclose(arrays["features"][::8, ::8, ::8], expected, rtol=0, atol=5e-5)
