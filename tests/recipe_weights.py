"""Weights for the SAM tests: the goldens' recipe from ../shared, and models of segment-anything itself."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

GOLDENS = Path(__file__).resolve().parents[1] / ".." / "shared" / "goldens"


def load_recipe() -> ModuleType:
    """The module that makes the goldens' weights, image and prompts; skips the test where it is absent."""
    path = GOLDENS / "recipe.py"
    if not path.is_file():
        pytest.skip("the SAM goldens and their recipe are not at ../shared/goldens")
    spec = importlib.util.spec_from_file_location("golden_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_state_dict(golden: str) -> dict[str, torch.Tensor]:
    """State dict of a golden, in the official key layout."""
    shapes = json.loads((GOLDENS / f"keys_{golden}.json").read_text(encoding="utf-8"))
    weights: dict[str, torch.Tensor] = load_recipe().make_state_dict(shapes)
    return weights


def official_slimsam_77() -> Sam:
    """segment-anything's own Sam at the size of SlimSAM-77-uniform, uninitialised beyond torch's defaults."""
    encoder = ImageEncoderViT(
        img_size=1024,
        embed_dim=168,
        depth=12,
        num_heads=12,
        mlp_ratio=696 / 168,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=(2, 5, 8, 11),
        window_size=14,
    )
    prompts = PromptEncoder(
        embed_dim=256, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    return Sam(encoder, prompts, decoder, pixel_mean=mean, pixel_std=std).eval()


def seeded_slimsam_77(seed: int = 7) -> dict[str, torch.Tensor]:
    """A SlimSAM-77 state dict with seeded normal weights, made without the goldens."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Any] = official_slimsam_77().state_dict()
    return {
        key: value + 0.02 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in weights.items()
    }
