"""One image and a few prompts through a variant, every intermediate array kept: a health check of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from actors.preprocess import prepare
from actors.sam_attention import ImageContext
from actors.sam_checkpoint import read_checkpoint
from actors.sam_decoder import PromptDecoder
from actors.sam_model import build_from_state_dict
from actors.sam_variants import PreprocessRule, variant_defaults

Arrays = dict[str, npt.NDArray[np.float32]]


@torch.inference_mode()
def probe(
    variant: str,
    checkpoint: str | Path,
    image: npt.NDArray[np.uint8],
    points_xy: npt.ArrayLike | None = None,
    box_xyxy: npt.ArrayLike | None = None,
    preprocess: PreprocessRule | None = None,
    device: str = "cpu",
) -> Arrays:
    """Load a checkpoint strictly and run the real preprocessing, encoder, prompt encoder and decoder.

    Args:
        variant: its name.
        checkpoint: weights file.
        image: uint8 [H, W, 3] RGB.
        points_xy: [P, 2] foreground points in pixels of the image, each a prompt of its own.
        box_xyxy: [4] box in pixels of the image.
        preprocess: instead of the variant's own rule.
        device: torch device.

    Returns:
        `input` [3, S, S] and `features` [C, h, w]; with points `logits_multi` [P, M, 4h, 4w], `iou_multi`
        [P, M], `logits_single`, `iou_single`; with a box `logits_boxsingle`, `iou_boxsingle`,
        `logits_boxmulti`, `iou_boxmulti`. HQ-SAM also gives `early` [E, h, w] and, with points,
        `logits_hqonly`, `iou_hqonly`. All float32.

    Raises:
        FileNotFoundError, CheckpointError: see `read_checkpoint` and `build_from_state_dict`.
        ValueError: an image, point list or box of another shape.
    """
    rule = preprocess or variant_defaults(variant).preprocess
    points = None if points_xy is None else _shaped(points_xy, (-1, 2), "points")
    box = None if box_xyxy is None else _shaped(box_xyxy, (2, 2), "box")
    model = build_from_state_dict(read_checkpoint(checkpoint).weights, variant).to(device)
    pixels, geometry = prepare(np.asarray(image)[None], model.model_size, rule)
    embedding, early = model.encode(pixels.to(device))
    decoder = model.prompt_decoder()
    context = decoder.context(embedding, early)
    arrays = {"input": pixels[0].numpy(), "features": embedding[0].cpu().numpy()}
    if early is not None:
        arrays["early"] = early[0].cpu().numpy()
    if points is not None:
        xy = torch.from_numpy(geometry.to_model(points)[:, None]).to(device)
        prompts = decoder.embed_points(xy, torch.ones(len(xy), 1, device=device))
        arrays |= _decode(decoder, context, prompts, "")
        if decoder.high_quality:
            arrays |= _outputs(decoder, context, prompts, "hqonly", multimask=False, hq_only=True)
    if box is not None:
        corners = torch.from_numpy(geometry.to_model(box).reshape(1, 4)).to(device)
        arrays |= _decode(decoder, context, decoder.embed_boxes(corners), "box")
    return arrays


def summarise_probe(arrays: Arrays) -> list[str]:
    """Health of every probed array, one line each: shape, mean, standard deviation, range, finite or not."""
    return [
        f"{name} {list(a.shape)}: mean {a.mean():.4g}, std {a.std():.4g}, {a.min():.4g} .. {a.max():.4g}"
        + ("" if np.isfinite(a).all() else ", NOT FINITE")
        for name, a in arrays.items()
    ]


def _shaped(values: npt.ArrayLike, shape: tuple[int, int], what: str) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64).reshape(shape)
    except ValueError as error:
        wanted = "x,y pairs" if what == "points" else "x0, y0, x1, y1"
        raise ValueError(f"{what} must be {wanted} in pixels, not {np.shape(values)}") from error


def _decode(decoder: PromptDecoder, context: ImageContext, prompts: torch.Tensor, prefix: str) -> Arrays:
    return {
        **_outputs(decoder, context, prompts, f"{prefix}multi", multimask=True),
        **_outputs(decoder, context, prompts, f"{prefix}single", multimask=False),
    }


def _outputs(
    decoder: PromptDecoder,
    context: ImageContext,
    prompts: torch.Tensor,
    name: str,
    multimask: bool,
    hq_only: bool = False,
) -> Arrays:
    """Logits [P, M, 4h, 4w] and predicted IoU [P, M] of prompts [P, t, C] on one image."""
    decoded = decoder.decode(context, [0] * len(prompts), prompts)
    quality, token = decoder.choose(decoded.iou, multimask)
    rows = torch.arange(len(prompts), device=prompts.device).repeat_interleave(quality.shape[1])
    logits = decoder.logits(context, decoded, rows, token.flatten(), hq_only)
    return {
        f"logits_{name}": logits.view(*quality.shape, *logits.shape[1:]).cpu().numpy(),
        f"iou_{name}": quality.cpu().numpy(),
    }
