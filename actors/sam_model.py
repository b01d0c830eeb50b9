"""One host for the SAM family: a model built from nothing but a state dict in the official key layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import nn

from actors.sam_decoder import HqMaskDecoder, PromptDecoder
from actors.sam_encoder import TinyVitEncoder, build_vit, host_keys
from actors.sam_variants import CheckpointError, check_variant, is_tiny

TINY_MODEL_SIZE = 1024
_DECODER_HEADS = 8


class SamModel(nn.Module):
    """Image encoder, prompt encoder and mask decoder of one variant, in evaluation mode.

    Attributes:
        variant: its name, see `actors.sam_variants`.
        model_size: side of the square model input, px.
    """

    def __init__(
        self, variant: str, image_encoder: nn.Module, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder
    ) -> None:
        super().__init__()
        self.variant = variant
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.model_size: int = prompt_encoder.input_image_size[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.prompt_encoder.no_mask_embed.weight.device
        return device

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 [B, 3, S, S] -> embedding [B, 256, h, w], and HQ-SAM's early map [B, E, h, w] or None."""
        embedding, early = self.image_encoder(pixels)
        return embedding, early if isinstance(self.mask_decoder, HqMaskDecoder) else None

    def prompt_decoder(self) -> PromptDecoder:
        """Decoder over this model's weights, on their present device."""
        return PromptDecoder(self.prompt_encoder, self.mask_decoder)


def build_from_state_dict(weights: Mapping[str, torch.Tensor], variant: str) -> SamModel:
    """Build a variant and load its weights strictly.

    Args:
        weights: official key layout without prefixes, float32; the tensors are used, not copied.
        variant: one of `actors.sam_variants.VARIANTS`.

    Returns:
        The model on the CPU, in evaluation mode, without gradients.

    Raises:
        CheckpointError: the weights are of another variant, or a key is missing, unexpected or misshapen.
        PackageMissingError: MobileSAM or Light HQ-SAM without timm.
    """
    check_variant(weights, variant)
    if is_tiny(weights):
        # timm computes index buffers that no checkpoint holds, so this one is built for real.
        model = _assemble(weights, variant, TinyVitEncoder(weights))
    else:
        with torch.device("meta"):
            early = "mask_decoder.hf_token.weight" in weights
            model = _assemble(weights, variant, build_vit(weights, with_early=early))
    _load_strictly(model, host_keys(weights))
    return model.eval().requires_grad_(False)


def _assemble(weights: Mapping[str, torch.Tensor], variant: str, encoder: nn.Module) -> SamModel:
    size = TINY_MODEL_SIZE if is_tiny(weights) else 16 * weights["image_encoder.pos_embed"].shape[1]
    dim = weights["mask_decoder.iou_token.weight"].shape[1]
    layer = "mask_decoder.transformer.layers.{}.mlp.lin1.weight"
    transformer = TwoWayTransformer(
        depth=sum(layer.format(i) in weights for i in range(16)),
        embedding_dim=dim,
        mlp_dim=weights[layer.format(0)].shape[0],
        num_heads=_DECODER_HEADS,
    )
    head = "mask_decoder.iou_prediction_head.layers.{}.weight"
    parameters: dict[str, Any] = {
        "transformer_dim": dim,
        "transformer": transformer,
        "num_multimask_outputs": weights["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        "iou_head_depth": sum(head.format(i) in weights for i in range(16)),
        "iou_head_hidden_dim": weights[head.format(0)].shape[0],
    }
    early = weights.get("mask_decoder.compress_vit_feat.0.weight")
    decoder = MaskDecoder(**parameters) if early is None else HqMaskDecoder(early.shape[0], **parameters)
    prompts = PromptEncoder(
        embed_dim=dim,
        image_embedding_size=(size // 16, size // 16),
        input_image_size=(size, size),
        mask_in_chans=weights["prompt_encoder.mask_downscaling.3.weight"].shape[0],
    )
    return SamModel(variant, encoder, prompts, decoder)


def _load_strictly(model: SamModel, weights: dict[str, torch.Tensor]) -> None:
    """Load with every key and shape accounted for; the error names up to three of each kind."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [key for key in weights if key not in expected],
        "wrong shape": [
            f"{key} {list(weights[key].shape)} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in weights and tuple(weights[key].shape) != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"the weights do not fit {model.variant}: {listed}")
    model.load_state_dict(weights, strict=True, assign=True)
