"""Image encoders of the SAM family, hosted by segment-anything (ViT) or timm (TinyViT).

Every hyper-parameter comes from the shapes of the checkpoint: nothing here names a model size. Encoders
return the neck output and, for HQ-SAM, the early map its mask decoder fuses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from segment_anything.modeling import image_encoder as vit
from segment_anything.modeling.common import LayerNorm2d, MLPBlock
from torch import nn
from torch.nn import functional

from actors.sam_variants import NEEDS_TIMM, PackageMissingError

PATCH = 16
_ROWS_AT_ONCE = 256

StateDict = Mapping[str, torch.Tensor]


class Encoder(Protocol):
    """What a SamModel needs of an image encoder."""

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 [B, 3, S, S] -> neck output [B, 256, h, w] and early map [B, E, h, w] or None."""
        ...


class LeanAttention(vit.Attention):  # type: ignore[misc]
    """ViT attention with decomposed relative positions that never holds the scores of all heads at once.

    Equal to segment-anything's up to rounding. On a CPU the global blocks run head by head and
    `_ROWS_AT_ONCE` queries at a time (0.8 GiB less for ViT-B); on a GPU scaled_dot_product_attention runs it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, H, W, C] -> [B, H, W, C]."""
        batch, rows, columns, _ = x.shape
        n = rows * columns
        qkv = self.qkv(x).reshape(batch, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, batch * self.num_heads, n, -1).unbind(0)
        grid = q.reshape(-1, rows, columns, q.shape[-1])
        near_h = vit.get_rel_pos(rows, rows, self.rel_pos_h)
        near_w = vit.get_rel_pos(columns, columns, self.rel_pos_w)
        bias_h = torch.einsum("bhwc,hkc->bhwk", grid, near_h).flatten(1, 2)
        bias_w = torch.einsum("bhwc,wkc->bhwk", grid, near_w).flatten(1, 2)
        if x.is_cuda:
            bias = (bias_h[..., :, None] + bias_w[..., None, :]).reshape(batch * self.num_heads, n, n)
            mask = bias[None].to(q.dtype)
            out = functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
        elif n <= _ROWS_AT_ONCE:
            out = self._attend(q, k, v, bias_h, bias_w)
        else:
            out = torch.empty_like(q)
            for head in range(len(q)):
                for start in range(0, n, _ROWS_AT_ONCE):
                    at = (slice(head, head + 1), slice(start, start + _ROWS_AT_ONCE))
                    out[at] = self._attend(q[at], k[at[0]], v[at[0]], bias_h[at], bias_w[at])
        out = out.view(batch, self.num_heads, rows, columns, -1).permute(0, 2, 3, 1, 4)
        projected: torch.Tensor = self.proj(out.reshape(batch, rows, columns, -1))
        return projected

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias_h: torch.Tensor, bias_w: torch.Tensor
    ) -> torch.Tensor:
        """softmax(scale * q k^T + bias) v: [b, m, d] with biases [b, m, rows] and [b, m, columns]."""
        scores = (q * self.scale) @ k.transpose(1, 2)
        grid = scores.view(*scores.shape[:2], bias_h.shape[-1], bias_w.shape[-1])
        grid += bias_h[..., None]
        grid += bias_w[..., None, :]
        return torch.softmax(scores, dim=-1) @ v


class Adapter(nn.Module):
    """SAM-Med2D's adapter: channel gate, spatial bottleneck with a skip, layer norm (its Fig. 3)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.channel = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.Sigmoid()
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(dim, dim, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, H, W, C] -> [B, H, W, C]."""
        maps = x.permute(0, 3, 1, 2)
        gate = self.channel(maps.mean(dim=(2, 3)))[:, :, None, None]
        normed: torch.Tensor = self.norm((maps + self.spatial(gate * maps)).permute(0, 2, 3, 1))
        return normed


class AdaptedMlp(MLPBlock):  # type: ignore[misc]
    """A block's MLP with SAM-Med2D's adapter beside it."""

    def __init__(self, dim: int, mlp_dim: int, hidden: int) -> None:
        super().__init__(dim, mlp_dim, nn.GELU)
        self.adapter = Adapter(dim, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, H, W, C] -> [B, H, W, C]."""
        both: torch.Tensor = super().forward(x) + self.adapter(x)
        return both


class VitEncoder(vit.ImageEncoderViT):  # type: ignore[misc]
    """segment-anything's ViT that also returns the output of its first global block when asked to."""

    def __init__(self, early_block: int | None, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.early_block = early_block

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Encoder`."""
        x = self.patch_embed(pixels) + self.pos_embed
        early = None
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.early_block:
                early = x.permute(0, 3, 1, 2)
        return self.neck(x.permute(0, 3, 1, 2)), early


def vit_parameters(weights: StateDict) -> dict[str, Any]:
    """Constructor arguments of ImageEncoderViT, read from the shapes of `image_encoder.*`."""
    dim = weights["image_encoder.patch_embed.proj.weight"].shape[0]
    depth = len({key.split(".")[2] for key in weights if key.startswith("image_encoder.blocks.")})
    grid = weights["image_encoder.pos_embed"].shape[1]
    spans = [weights[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape[0] for i in range(depth)]
    head_dim = weights["image_encoder.blocks.0.attn.rel_pos_h"].shape[1]
    windows = {(span + 1) // 2 for span in spans if span != 2 * grid - 1}
    if len(windows) > 1 or dim % head_dim:
        raise ValueError(f"inconsistent ViT shapes: windows {sorted(windows)}, width {dim}, head width {head_dim}")
    return {
        "img_size": grid * PATCH,
        "patch_size": PATCH,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": dim // head_dim,
        "mlp_ratio": weights["image_encoder.blocks.0.mlp.lin1.weight"].shape[0] / dim,
        "out_chans": weights["image_encoder.neck.0.weight"].shape[0],
        "window_size": windows.pop() if windows else 0,
        "global_attn_indexes": tuple(i for i, span in enumerate(spans) if span == 2 * grid - 1),
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "use_rel_pos": True,
    }


def build_vit(weights: StateDict, with_early: bool) -> VitEncoder:
    """Uninitialised ViT encoder whose shapes fit `weights` (keys of the official layout)."""
    parameters = vit_parameters(weights)
    global_blocks = parameters["global_attn_indexes"]
    encoder = VitEncoder(global_blocks[0] if with_early else None, **parameters)
    dim, grid = parameters["embed_dim"], parameters["img_size"] // PATCH
    for index, block in enumerate(encoder.blocks):
        side = grid if index in global_blocks else parameters["window_size"]
        block.attn = LeanAttention(dim, parameters["num_heads"], use_rel_pos=True, input_size=(side, side))
        gate = weights.get(f"image_encoder.blocks.{index}.Adapter.channel.0.weight")
        if gate is not None:
            block.mlp = AdaptedMlp(dim, block.mlp.lin1.out_features, gate.shape[0])
    return encoder


class TinyVitEncoder(nn.Module):
    """timm's TinyViT with SAM's neck; the early map is the output of the second stage (Light HQ-SAM)."""

    def __init__(self, weights: StateDict) -> None:
        super().__init__()
        self.trunk = _tiny_trunk(weights)
        channels = weights["image_encoder.neck.0.weight"].shape[:2]
        self.neck = nn.Sequential(
            nn.Conv2d(channels[1], channels[0], 1, bias=False),
            LayerNorm2d(channels[0]),
            nn.Conv2d(channels[0], channels[0], 3, padding=1, bias=False),
            LayerNorm2d(channels[0]),
        )

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Encoder`."""
        x = self.trunk.patch_embed(pixels)
        x = self.trunk.stages[1](self.trunk.stages[0](x))
        # The official layout ends a stage with its downsampling; timm starts the next one with it.
        early = self.trunk.stages[2].downsample(x)
        x = self.trunk.stages[2].blocks(early.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.neck(self.trunk.stages[3](x)), early


def _tiny_trunk(weights: StateDict) -> Any:
    """timm TinyVit shaped like `weights`, without classifier and with the last stride removed."""
    try:
        from timm.models.tiny_vit import TinyVit
    except ImportError as error:
        raise PackageMissingError(NEEDS_TIMM) from error
    first = "image_encoder.layers.{}.blocks.0."
    biases = [weights[first.format(i) + "attn.attention_biases"].shape for i in (1, 2, 3)]
    dims = [weights[f"image_encoder.layers.{i}.downsample.conv1.c.weight"].shape[:2] for i in (0, 1, 2)]
    expanded, stem = weights[first.format(0) + "conv1.c.weight"].shape[:2]
    depths = [
        1 + max(int(key.split(".")[4]) for key in weights if key.startswith(f"image_encoder.layers.{i}.blocks."))
        for i in range(4)
    ]
    trunk: Any = TinyVit(
        num_classes=0,
        embed_dims=(stem, *(int(shape[0]) for shape in dims)),
        depths=tuple(depths),
        num_heads=(1, *(int(shape[0]) for shape in biases)),
        window_sizes=(1, *(math.isqrt(shape[1]) for shape in biases)),
        mlp_ratio=weights[first.format(1) + "mlp.fc1.weight"].shape[0] / dims[0][0],
        mbconv_expand_ratio=expanded / stem,
    )
    trunk.stages[3].downsample.conv2.conv.stride = (1, 1)
    trunk.head = nn.Identity()
    return trunk


_TINY_RENAMES = (
    (re.compile(r"\.patch_embed\.seq\.0\."), ".patch_embed.conv1."),
    (re.compile(r"\.patch_embed\.seq\.2\."), ".patch_embed.conv2."),
    (re.compile(r"\.layers\.(\d+)\.downsample\."), lambda m: f".stages.{int(m[1]) + 1}.downsample."),
    (re.compile(r"\.layers\."), ".stages."),
    (re.compile(r"\.c\.weight$"), ".conv.weight"),
    (re.compile(r"^image_encoder\.(?!neck\.)"), "image_encoder.trunk."),
)
_TINY_CLASSIFIER = re.compile(r"^image_encoder\.(head|norm_head)\.")
_ADAPTER = re.compile(r"^(image_encoder\.blocks\.\d+)\.Adapter\.")


def host_keys(weights: StateDict) -> dict[str, torch.Tensor]:
    """Official key layout -> that of the modules above; the same tensors, minus TinyViT's classifier."""
    if "image_encoder.patch_embed.seq.0.c.weight" not in weights:
        return {_ADAPTER.sub(r"\1.mlp.adapter.", key): value for key, value in weights.items()}
    renamed = {}
    for official, value in weights.items():
        if _TINY_CLASSIFIER.match(official):
            continue
        key = official
        if key.startswith("image_encoder."):
            for pattern, replacement in _TINY_RENAMES:
                key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed
