"""The Hugging Face key layout of SAM (SamModel) renamed to the official one."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from actors.sam_variants import CheckpointError

_MARKERS = ("vision_encoder.", "shared_image_embedding.")
_PLACES = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
_OFFICIAL_PLACE = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"

# Applied in order to keys of SamModel; each is the inverse of a line of transformers' convert_sam_to_hf.py.
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
        (r"^vision_encoder\.", "image_encoder."),
        (r"^image_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
        (r"^image_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
        (r"^image_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
        (r"^image_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
        (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
        (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
        (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
        (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
        (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
        (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
        (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
        (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
        (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
        (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
        (r"(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.layers\.0\.", r"\1.layers.1."),
        (r"(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.proj_in\.", r"\1.layers.0."),
        (r"(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.proj_out\.", r"\1.layers.2."),
        (r"\.layer_norm(?=\d|_final_attn)", ".norm"),
    )
]


def official_layout(weights: Mapping[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """Rename a Hugging Face SamModel state dict; others pass unchanged (without SAM's two pixel constants).

    Raises:
        CheckpointError: Hugging Face layout of a model whose renaming is not known to be exact (HQ-SAM), or
            with two different positional matrices.
    """
    if not any(key.startswith(_MARKERS) for key in weights):
        return {key: value for key, value in weights.items() if key not in ("pixel_mean", "pixel_std")}
    if any(".hq_" in key or key.startswith("mask_decoder.compress_vit") for key in weights):
        raise CheckpointError(
            "HQ-SAM in the Hugging Face layout is not supported; use sam_hq_vit_b.pth (or l, h) of "
            "huggingface.co/lkeab/hq-sam"
        )
    places = [weights[key] for key in _PLACES if key in weights]
    if not places or not all(torch.equal(places[0], other) for other in places[1:]):
        raise CheckpointError("Hugging Face layout without one shared positional embedding; use the official file")
    renamed = {_OFFICIAL_PLACE: places[0]}
    for key, value in weights.items():
        if key in _PLACES:
            continue
        for pattern, replacement in _RENAMES:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    notes.append("renamed the Hugging Face key layout")
    return renamed
