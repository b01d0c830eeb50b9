"""SAM's prompt and mask decoder, arranged for many prompts per image.

The weights and modules are segment-anything's; the order of the arithmetic is ours, equal up to rounding:

- Attention between a handful of tokens and thousands of image cells never projects the cells. With T tokens
  and h heads, `q·(W x + b)` becomes `(W^T q)·x` (a term constant over the cells drops out of the softmax) and
  `softmax · (W x + b)` becomes `W (softmax · x) + b`: 7 x 8 rows instead of 128 projected channels.
- Without a mask prompt the first layer sees the same cells for every prompt of an image, so its image-side
  projections are computed once per image (`ImageContext`).
- The transformer yields predicted IoU before any mask exists; masks are built only for the rows asked for.
- Masks are upscaled channels-last as matrix products, not as transposed convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import nn
from torch.nn import functional

from actors.sam_attention import (
    ImageContext,
    attend_tokens,
    first_layer,
    read_image,
    refine_tokens,
    split_heads,
    write_image,
)


@dataclass(frozen=True)
class Decoded:
    """Transformer output of P prompts.

    Attributes:
        images: for each prompt, the index of its image in the context.
        tokens: [P, T, C] IoU token, mask tokens, prompt tokens.
        cells: [P, N, C] image side.
        iou: float32 [P, 4] predicted IoU of the single mask and of the three multi-masks.
    """

    images: tuple[int, ...]
    tokens: torch.Tensor
    cells: torch.Tensor
    iou: torch.Tensor


class HqMaskDecoder(MaskDecoder):  # type: ignore[misc]
    """The parameters of HQ-SAM's mask decoder (Ke et al. 2023): SAM's plus the HQ token and its fusion."""

    def __init__(self, early_channels: int, **parameters: Any) -> None:
        super().__init__(**parameters)
        dim = self.transformer_dim
        self.hf_token = nn.Embedding(1, dim)
        self.hf_mlp = MLP(dim, dim, dim // 8, 3)
        self.compress_vit_feat = _doubled_twice(early_channels, dim, dim // 8)
        self.embedding_encoder = _doubled_twice(dim, dim // 4, dim // 8)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(dim // 8, dim // 4, 3, padding=1),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 8, 3, padding=1),
        )


def _doubled_twice(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, hidden, 2, stride=2),
        LayerNorm2d(hidden),
        nn.GELU(),
        nn.ConvTranspose2d(hidden, outputs, 2, stride=2),
    )


class PromptDecoder:
    """Prompts and image embeddings to predicted IoU and mask logits."""

    def __init__(self, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder) -> None:
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.grid: int = prompt_encoder.image_embedding_size[0]
        self.channels: int = prompt_encoder.embed_dim
        self.high_quality = isinstance(mask_decoder, HqMaskDecoder)
        # sin and cos of coordinates lose sub-pixel position in half precision: made here, in fp32.
        self.position = prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)

    def embed_points(self, xy: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Points [P, n, 2] in model pixels with labels [P, n] (1 = inside) -> prompt tokens [P, n + 1, C]."""
        with torch.autocast(xy.device.type, enabled=False):
            tokens: torch.Tensor = self.prompt_encoder(points=(xy, labels), boxes=None, masks=None)[0]
        return tokens

    def embed_boxes(self, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes [P, 4] as x0, y0, x1, y1 in model pixels -> prompt tokens [P, 2, C]."""
        with torch.autocast(boxes.device.type, enabled=False):
            tokens: torch.Tensor = self.prompt_encoder(points=None, boxes=boxes, masks=None)[0]
        return tokens

    def context(self, embedding: torch.Tensor, early: torch.Tensor | None = None) -> ImageContext:
        """Shared part of image embeddings [I, C, h, w] and, for HQ-SAM, early maps [I, E, h, w]."""
        detail = None
        if self.high_quality:
            if early is None:
                raise ValueError("HQ-SAM decodes from the early map too: encode the slices again")
            decoder: Any = self.mask_decoder
            detail = decoder.embedding_encoder(embedding) + decoder.compress_vit_feat(early)
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        cells = (embedding + no_mask).flatten(2).transpose(1, 2).contiguous()
        first: Any = self.mask_decoder.transformer.layers[0]
        to_image, to_tokens = first.cross_attn_token_to_image, first.cross_attn_image_to_token
        placed = cells + self.position.to(cells)
        return ImageContext(
            cells,
            split_heads(to_image.k_proj(placed), to_image).transpose(2, 3).contiguous(),
            split_heads(to_image.v_proj(cells), to_image).contiguous(),
            split_heads(to_tokens.q_proj(placed), to_tokens).transpose(2, 3).contiguous(),
            detail,
        )

    def decode(self, context: ImageContext, images: Sequence[int], prompts: torch.Tensor) -> Decoded:
        """Run the two-way transformer.

        Args:
            context: of I images.
            images: for each prompt the index of its image, prompts of one image side by side.
            prompts: prompt tokens [P, t, C].
        """
        decoder: Any = self.mask_decoder
        learnt = [decoder.iou_token.weight, decoder.mask_tokens.weight]
        if self.high_quality:
            learnt.append(decoder.hf_token.weight)
        start = torch.cat([torch.cat(learnt).expand(len(prompts), -1, -1), prompts], dim=1)
        position = self.position.to(context.cells)
        tokens, cells = start, context.cells
        for index, layer in enumerate(decoder.transformer.layers):
            tokens = attend_tokens(layer, tokens, start)
            if index == 0:
                tokens, cells = first_layer(layer, tokens, start, context, images)
            else:
                placed = cells + position
                asked = read_image(layer.cross_attn_token_to_image, tokens + start, cells, placed)
                tokens = refine_tokens(layer, tokens + asked)
                cells = write_image(layer.cross_attn_image_to_token, tokens + start, tokens, cells, placed)
            cells = layer.norm4(cells)
        final = decoder.transformer
        asked = read_image(final.final_attn_token_to_image, tokens + start, cells, cells + position)
        tokens = final.norm_final_attn(tokens + asked)
        with torch.autocast(tokens.device.type, enabled=False):
            iou = decoder.iou_prediction_head(tokens[:, 0].float())
        return Decoded(tuple(images), tokens, cells, iou)

    def choose(self, iou: torch.Tensor, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted IoU [P, 4] -> quality [P, M] of the masks a caller gets, and their mask tokens [P, M].

        SAM gives three masks with `multimask` and one without; HQ-SAM always one (its best multi-mask).
        """
        if not multimask:
            return iou[:, :1], torch.zeros_like(iou[:, :1], dtype=torch.long)
        if self.high_quality:
            best, token = iou[:, 1:].max(dim=1, keepdim=True)
            return best, token + 1
        return iou[:, 1:], torch.arange(1, iou.shape[1], device=iou.device).expand(len(iou), -1)

    def logits(
        self,
        context: ImageContext,
        decoded: Decoded,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        hq_only: bool = False,
    ) -> torch.Tensor:
        """Mask logits float32 [n, 4h, 4w] of chosen (prompt row, mask token) pairs, rows in ascending order.

        HQ-SAM adds its own mask to the chosen one; with `hq_only` it stands alone.
        """
        picked, pair = torch.unique_consecutive(rows, return_inverse=True)
        upscaled = self._upscale(decoded.cells[picked])
        networks: Any = self.mask_decoder.output_hypernetworks_mlps
        outputs = decoded.tokens[picked, 1:]
        kernels = torch.stack([net(outputs[:, i]) for i, net in enumerate(networks)], dim=1)
        masks = self._unfold(upscaled @ kernels.transpose(1, 2))[pair, tokens]
        if not self.high_quality:
            return masks.float()
        images = torch.tensor(decoded.images, device=picked.device)[picked]
        detailed = self._detailed(context, upscaled, outputs[:, len(networks)], images)[pair]
        return (detailed if hq_only else masks + detailed).float()

    def _upscale(self, cells: torch.Tensor) -> torch.Tensor:
        """Cells [n, N, C] -> pixels [n, N * 16, 32] in the order cell, quarter, sixteenth."""
        first, norm, _, second, _ = self.mask_decoder.output_upscaling
        n, count, _ = cells.shape
        x = functional.linear(cells, _as_matrix(first), first.bias.repeat(4))
        x = functional.gelu(
            functional.layer_norm(x.view(n, count, 4, -1), (first.out_channels,), norm.weight, norm.bias, norm.eps)
        )
        x = functional.linear(x, _as_matrix(second), second.bias.repeat(4))
        return functional.gelu(x).view(n, count * 16, second.out_channels)

    def _unfold(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [n, N * 16, M] in `_upscale` order -> maps [n, M, 4h, 4w]."""
        n, _, channels = pixels.shape
        nested = pixels.view(n, self.grid, self.grid, 2, 2, 2, 2, channels)
        return nested.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(n, channels, 4 * self.grid, 4 * self.grid)

    def _detailed(
        self, context: ImageContext, upscaled: torch.Tensor, token: torch.Tensor, images: torch.Tensor
    ) -> torch.Tensor:
        """HQ masks [n, 4h, 4w] from upscaled pixels, the HQ token [n, C] and the image of each row."""
        decoder: Any = self.mask_decoder
        if context.detail is None:
            raise ValueError("the image context lacks HQ-SAM's early features")
        maps = decoder.embedding_maskfeature(self._unfold(upscaled)) + context.detail[images]
        masks: torch.Tensor = decoder.hf_mlp(token)[:, None] @ maps.flatten(2)
        return masks.view(-1, *maps.shape[2:])


def _as_matrix(convolution: nn.ConvTranspose2d) -> torch.Tensor:
    """A 2x2 stride-2 transposed convolution as a matrix [4 * out, in], quarters row by row."""
    weight: torch.Tensor = convolution.weight
    return weight.permute(2, 3, 1, 0).flatten(0, 2)
