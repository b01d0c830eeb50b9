"""The attentions of SAM's two-way transformer, folded so that image cells are never projected.

See `actors.sam_decoder` for why this is exact. Shapes: P prompts, T tokens a prompt, N cells, C channels,
heads of width d. `placed` means with the positional encoding added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from segment_anything.modeling.transformer import Attention


@dataclass(frozen=True)
class ImageContext:
    """What every prompt of an image shares; N = h * w cells, C channels, heads of width d.

    Attributes:
        cells: [I, N, C] image embedding plus the no-mask embedding.
        keys: [I, heads, d, N] first layer, tokens to image.
        values: [I, heads, N, d] first layer, tokens to image.
        queries: [I, heads, d, N] first layer, image to tokens.
        detail: [I, 32, 4h, 4w] HQ-SAM's fused early features, else None.
    """

    cells: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    detail: torch.Tensor | None


def split_heads(x: torch.Tensor, attention: Attention) -> torch.Tensor:
    """[P, n, heads * d] -> [P, heads, n, d]."""
    return x.view(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)


def head_scale(attention: Attention) -> float:
    """1 / sqrt(d)."""
    return 1 / math.sqrt(attention.internal_dim // attention.num_heads)


def attend_tokens(layer: Any, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """A layer's self attention: tokens [P, T, C] with the prompt's own embedding `start` as position."""
    if layer.skip_first_layer_pe:
        attended: torch.Tensor = layer.self_attn(q=tokens, k=tokens, v=tokens)
    else:
        attended = tokens + layer.self_attn(q=tokens + start, k=tokens + start, v=tokens)
    normed: torch.Tensor = layer.norm1(attended)
    return normed


def refine_tokens(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A layer's norm, MLP and norm after tokens [P, T, C] have read the image."""
    tokens = layer.norm2(tokens)
    refined: torch.Tensor = layer.norm3(tokens + layer.mlp(tokens))
    return refined


def read_image(attention: Attention, asking: torch.Tensor, cells: torch.Tensor, placed: torch.Tensor) -> torch.Tensor:
    """Tokens attend to cells: [P, T, C], cells [P, N, C] (`placed` with position) -> [P, T, C]."""
    prompts, count, _ = asking.shape
    queries = split_heads(attention.q_proj(asking), attention) * head_scale(attention)
    keys, values = (
        proj.weight.view(attention.num_heads, -1, cells.shape[2]) for proj in (attention.k_proj, attention.v_proj)
    )
    weights = torch.softmax((queries @ keys).flatten(1, 2) @ placed.transpose(1, 2), dim=-1)
    read = (weights.to(cells.dtype) @ cells).view(prompts, attention.num_heads, count, -1)
    values = (read @ values.transpose(1, 2)).transpose(1, 2).flatten(2) + attention.v_proj.bias
    out: torch.Tensor = attention.out_proj(values)
    return out


def messages(attention: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """What each token and head adds to a cell that attends to it fully: [P, heads * T, C].

    The output bias is dealt out over the heads, whose weights each sum to one.
    """
    values = split_heads(attention.v_proj(tokens), attention)
    out = attention.out_proj.weight.view(-1, attention.num_heads, values.shape[-1]).permute(1, 2, 0)
    added: torch.Tensor = values @ out + attention.out_proj.bias / attention.num_heads
    return added.flatten(1, 2)


def write_image(
    attention: Attention,
    placed_tokens: torch.Tensor,
    tokens: torch.Tensor,
    cells: torch.Tensor,
    placed: torch.Tensor,
) -> torch.Tensor:
    """Cells attend to tokens: adds what they read to `cells` [P, N, C] in place and returns it."""
    keys = split_heads(attention.k_proj(placed_tokens), attention) * head_scale(attention)
    asking = attention.q_proj.weight.view(attention.num_heads, -1, cells.shape[2])
    offset = keys @ attention.q_proj.bias.view(attention.num_heads, -1, 1)
    scores = torch.baddbmm(offset.flatten(1, 2), (keys @ asking).flatten(1, 2), placed.transpose(1, 2))
    weights = torch.softmax(scores.view(*keys.shape[:3], -1), dim=2).flatten(1, 2)
    return _add_product(cells, weights.transpose(1, 2), messages(attention, tokens))


def _add_product(cells: torch.Tensor, weights: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """cells += weights @ added; in-place products are not cast by autocast, so there it takes two steps."""
    if torch.is_autocast_enabled(cells.device.type):
        return cells.add_(weights @ added)
    return cells.baddbmm_(weights, added)


def first_layer(
    layer: Any, tokens: torch.Tensor, start: torch.Tensor, context: ImageContext, images: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both image attentions of the first layer from the shared projections, image by image."""
    to_image, to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    queries = split_heads(to_image.q_proj(tokens + start), to_image) * head_scale(to_image)
    runs = _runs(images)
    read = torch.cat([_read_shared(queries[part], context, image) for image, part in runs])
    tokens = refine_tokens(layer, tokens + to_image.out_proj(read.transpose(1, 2).flatten(2)))
    keys = split_heads(to_tokens.k_proj(tokens + start), to_tokens) * head_scale(to_tokens)
    added = messages(to_tokens, tokens)
    cells = context.cells.new_empty(len(tokens), *context.cells.shape[1:])
    for image, part in runs:
        weights = torch.softmax(_per_head(keys[part], context.queries[image]), dim=2).flatten(1, 2)
        cells[part] = context.cells[image]
        _add_product(cells[part], weights.transpose(1, 2), added[part])
    return tokens, cells


def _runs(images: Sequence[int]) -> list[tuple[int, slice]]:
    """Stretches of prompts of one image."""
    runs, at = [], 0
    for image, members in groupby(images):
        end = at + len(list(members))
        runs.append((image, slice(at, end)))
        at = end
    return runs


def _read_shared(queries: torch.Tensor, context: ImageContext, image: int) -> torch.Tensor:
    """First-layer attention of tokens [P, heads, T, d] to the cells of one image."""
    weights = torch.softmax(_per_head(queries, context.keys[image]), dim=-1)
    return _per_head(weights, context.values[image])


def _per_head(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[P, heads, T, m] times one matrix [m, n] per head, [heads, m, n]: [P, heads, T, n]."""
    prompts, heads, count, width = x.shape
    product = x.transpose(0, 1).reshape(heads, prompts * count, width) @ factor
    return product.view(heads, prompts, count, -1).transpose(0, 1)
