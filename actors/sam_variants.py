"""The variants of the SAM family: their defaults, and how to tell them apart by keys and shapes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PreprocessRule = Literal["sam", "medsam", "sam_med2d"]
SamName = Literal[
    "sam_vit_b",
    "sam_vit_l",
    "sam_vit_h",
    "medsam",
    "sam_med2d",
    "sam_med2d_ft",
    "slimsam_50",
    "slimsam_77",
    "hq_sam_b",
    "hq_sam_l",
    "hq_sam_h",
    "hq_sam_tiny",
    "mobile_sam",
]
TINY_VARIANTS = ("mobile_sam", "hq_sam_tiny")
NEEDS_TIMM = "MobileSAM and Light HQ-SAM need the package timm: pip install 'samreg[mobile]'"


class CheckpointError(ValueError):
    """A weights file that cannot be used as asked; the message says why and which file to use."""


class PackageMissingError(ImportError):
    """An optional package that a variant needs; the message says what to install."""


@dataclass(frozen=True)
class Variant:
    """Defaults of one variant.

    Attributes:
        preprocess: the rule it was trained with.
        pred_iou: keep masks with a predicted IoU above this.
        stability: keep masks with a stability score of at least this.
    """

    preprocess: PreprocessRule = "sam"
    pred_iou: float = 0.90
    stability: float = 0.90


# Thresholds: the paper's 0.90 / 0.90, except MedSAM, whose IoU head is untrained and which the public SAMReg
# code runs at 0.88 / 0.80.
VARIANTS: dict[str, Variant] = {
    "sam_vit_b": Variant(),
    "sam_vit_l": Variant(),
    "sam_vit_h": Variant(),
    "medsam": Variant("medsam", 0.88, 0.80),
    "sam_med2d": Variant("sam_med2d"),
    "sam_med2d_ft": Variant("sam_med2d"),
    "slimsam_50": Variant(),
    "slimsam_77": Variant(),
    "hq_sam_b": Variant(),
    "hq_sam_l": Variant(),
    "hq_sam_h": Variant(),
    "hq_sam_tiny": Variant(),
    "mobile_sam": Variant(),
}

_SIZES = {
    (768, 12, 3072): "b",
    (1024, 24, 4096): "l",
    (1280, 32, 5120): "h",
    (384, 12, 1536): "slimsam_50",
    (168, 12, 696): "slimsam_77",
}
_TINY_KEY = "image_encoder.patch_embed.seq.0.c.weight"
_HQ_KEY = "mask_decoder.hf_token.weight"


@dataclass(frozen=True)
class Identification:
    """What keys and shapes say about a state dict.

    Attributes:
        variants: the variants it can be, none when it is not a supported SAM.
        note: one sentence for the user.
    """

    variants: tuple[str, ...]
    note: str


def variant_defaults(name: str) -> Variant:
    """Defaults of a variant by name.

    Raises:
        ValueError: no such variant; names the nearest.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no SAM variant {name!r}{hint} Known: {', '.join(VARIANTS)}")
    return VARIANTS[name]


def is_tiny(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the image encoder is TinyViT (MobileSAM, Light HQ-SAM)."""
    return _TINY_KEY in weights


def identify(weights: Mapping[str, torch.Tensor]) -> Identification:
    """Tell the variant of a state dict in the official key layout, from keys and shapes alone."""
    foreign = _foreign(weights)
    if foreign:
        return Identification((), foreign)
    high_quality = _HQ_KEY in weights
    if is_tiny(weights):
        name = "hq_sam_tiny" if high_quality else "mobile_sam"
        return Identification((name,), f"{name}: TinyViT image encoder")
    dim = weights["image_encoder.patch_embed.proj.weight"].shape[0]
    depth = len({key.split(".")[2] for key in weights if key.startswith("image_encoder.blocks.")})
    mlp = weights["image_encoder.blocks.0.mlp.lin1.weight"].shape[0]
    side = 16 * weights["image_encoder.pos_embed"].shape[1]
    adapted = "image_encoder.blocks.0.Adapter.norm.weight" in weights
    size = _SIZES.get((dim, depth, mlp))
    shape = f"ViT of width {dim}, depth {depth}, MLP {mlp}, input {side} px"
    plain = not high_quality and not adapted
    if size == "b" and side == 256 and not high_quality:
        name = "sam_med2d" if adapted else "sam_med2d_ft"
        return Identification((name,), f"{name}: {shape}, {'with' if adapted else 'without'} adapters")
    if size is None or side != 1024 or adapted or (high_quality and len(size) > 1):
        return Identification((), f"no supported SAM variant: a {shape}")
    if high_quality:
        return Identification((f"hq_sam_{size}",), f"hq_sam_{size}: {shape}, HQ token")
    if plain and size == "b":
        note = (
            "sam_vit_b or medsam: equal keys and shapes, so only the file's sha256 or you can tell; "
            "they differ in preprocessing"
        )
        return Identification(("sam_vit_b", "medsam"), note)
    name = size if len(size) > 1 else f"sam_vit_{size}"
    return Identification((name,), f"{name}: {shape}")


def _foreign(weights: Mapping[str, torch.Tensor]) -> str:
    """Why a state dict is no SAM in the official layout, or an empty string."""
    if any(key.startswith(("sam_mask_decoder.", "image_encoder.trunk.")) for key in weights):
        return "a SAM 2 checkpoint: SAM 2 is not supported; use a SAM 1 file such as sam_vit_b_01ec64.pth"
    if "image_encoder.blocks.0.attn.q.weight" in weights:
        return (
            "a SlimSAM checkpoint with split q, k, v (globally pruned, widths differ per block): "
            "not supported; use SlimSAM-50-uniform.pth or SlimSAM-77-uniform.pth"
        )
    needed = ["mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight"]
    if not is_tiny(weights):
        needed += [f"image_encoder.{k}" for k in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.lin1.weight")]
    missing = [key for key in needed if key not in weights]
    return f"not a SAM checkpoint: {missing[0]} is missing ({len(weights)} keys)" if missing else ""


def check_variant(weights: Mapping[str, torch.Tensor], variant: str) -> None:
    """Refuse weights that cannot be `variant`.

    Raises:
        ValueError: no such variant.
        CheckpointError: the weights are something else; says what.
    """
    variant_defaults(variant)
    found = identify(weights)
    if variant not in found.variants:
        raise CheckpointError(f"these weights are not {variant}: they are {found.note}")
