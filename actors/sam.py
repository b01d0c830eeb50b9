"""The SAM backend: any variant of the family behind the Segmenter protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from actors.everything import CPU_PASS, CUDA_PASS, EverythingConfig, PassSize, segment_everything
from actors.preprocess import PreprocessRule, prepare, slice_geometry
from actors.sam_checkpoint import read_checkpoint
from actors.sam_model import SamModel, build_from_state_dict
from actors.sam_variants import variant_defaults
from actors.sam_weights import resolve_weights
from actors.segmenter import Candidates, Features

SIGNATURE_VERSION = 1
FAST_POINTS_PER_SIDE = 16
FAST_SKIP_BACKGROUND = 0.5
FAST_PREFILTER_SLACK = 0.1


@dataclass(frozen=True)
class SamConfig:
    """Settings of the SAM backend; None means the default of the variant or of the mode.

    Attributes:
        variant: one of `actors.sam_variants.VARIANTS`.
        checkpoint: path or URI of the weights; None looks in the weights cache folder.
        device: torch device, "cpu" or "cuda".
        mode: "exact" is the official generator's result (32 x 32 points); "fast" uses 16 x 16 points, skips
            those in dark background and rejects unstable masks early: it finds fewer small objects.
        pred_iou_threshold: keep masks with a predicted IoU above this.
        stability_threshold: keep masks with a stability score of at least this.
        box_nms: drop the lower-quality mask of two whose boxes have an IoU above this.
        points_per_side: the grid has points_per_side ** 2 points.
        skip_background: see EverythingConfig.
        prefilter_slack: see EverythingConfig; "off" in exact mode unless given.
        preprocess: "sam", "medsam" or "sam_med2d"; MedSAM with "sam" is how the public SAMReg code ran it.
        precision: "fp32", or "bf16" autocast on a GPU (coordinates, scores and stability stay fp32).
        compile_encoder: torch.compile the image encoder, worth it on a GPU with many slices.
    """

    variant: str = "sam_vit_b"
    checkpoint: str | None = None
    device: str = "cpu"
    mode: Literal["exact", "fast"] = "exact"
    pred_iou_threshold: float | None = None
    stability_threshold: float | None = None
    box_nms: float = 0.7
    points_per_side: int | None = None
    skip_background: float | None = None
    prefilter_slack: float | None = None
    preprocess: PreprocessRule | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    compile_encoder: bool = False

    def everything(self) -> EverythingConfig:
        """The everything-mode parameters with all defaults filled in."""
        defaults = variant_defaults(self.variant)
        fast = self.mode == "fast"

        def pick(given: Any, exact: Any, quick: Any) -> Any:
            return given if given is not None else quick if fast else exact

        return EverythingConfig(
            points_per_side=pick(self.points_per_side, 32, FAST_POINTS_PER_SIDE),
            pred_iou_threshold=pick(self.pred_iou_threshold, defaults.pred_iou, defaults.pred_iou),
            stability_threshold=pick(self.stability_threshold, defaults.stability, defaults.stability),
            box_nms=self.box_nms,
            skip_background=pick(self.skip_background, 0.0, FAST_SKIP_BACKGROUND),
            prefilter_slack=pick(self.prefilter_slack, None, FAST_PREFILTER_SLACK),
        )


@dataclass(frozen=True)
class SamFeatures(Features):
    """Features that still hold the device tensors, so that everything mode need not encode again.

    Attributes:
        embedding: [B, C, h, w] on the device.
        early: HQ-SAM's early map [B, E, h, w], else None.
    """

    embedding: torch.Tensor
    early: torch.Tensor | None


class SamSegmenter:
    """A SAM variant as `actors.segmenter.Segmenter`.

    Args:
        config: settings.
        weights: file to load instead of resolving `config.checkpoint`.

    Raises:
        FileNotFoundError: no weights; says where to get them.
        CheckpointError: weights that are not the variant, or unsafe or damaged.
    """

    name = "sam"

    def __init__(self, config: SamConfig, weights: Path | None = None) -> None:
        self.config = config
        self._everything = config.everything()
        self._rule = config.preprocess or variant_defaults(config.variant).preprocess
        checkpoint = read_checkpoint(weights or resolve_weights(config.variant, config.checkpoint))
        self.model: SamModel = build_from_state_dict(checkpoint.weights, config.variant).to(config.device)
        self.decoder = self.model.prompt_decoder()
        self.notes = checkpoint.notes
        self.layout: dict[str, Any] = {"blocks": [["sam", 0, self.decoder.channels, 1.0]]}
        self.signature: dict[str, Any] = {
            "backend": self.name,
            "version": SIGNATURE_VERSION,
            "variant": config.variant,
            "weights_sha256": checkpoint.sha256,
            "preprocess": self._rule,
            "precision": config.precision,
            **vars(self._everything),
        }
        self._encode = torch.compile(self.model.encode) if config.compile_encoder else self.model.encode

    def encode(self, slices: npt.NDArray[np.uint8]) -> SamFeatures:
        """Encode uint8 [B, H, W, 3] slices, 0..255 RGB."""
        pixels, geometry = prepare(slices, self.model.model_size, self._rule)
        with torch.inference_mode(), self._precision():
            embedding, early = self._encode(self._to_device(pixels))
        extent = geometry.extent(self.decoder.grid)
        return SamFeatures(embedding.float().cpu().numpy(), extent, embedding, early)

    def everything(self, slices: npt.NDArray[np.uint8], features: Features) -> list[Candidates]:
        """Candidate ROIs of every slice, by decreasing predicted IoU.

        Features that come from the store suffice, except for HQ-SAM, which then encodes the slices again.
        """
        geometry = slice_geometry(slices.shape[1], slices.shape[2], self.model.model_size, self._rule)
        if not isinstance(features, SamFeatures):
            features = self._restore(slices, features)
        with torch.inference_mode(), self._precision():
            context = self.decoder.context(features.embedding, features.early)
            return segment_everything(
                self.decoder, context, slices, geometry, self._everything, self._pass_size()
            )

    def _restore(self, slices: npt.NDArray[np.uint8], features: Features) -> SamFeatures:
        if self.decoder.high_quality:
            return self.encode(slices)
        embedding = torch.from_numpy(np.asarray(features.values, dtype=np.float32)).to(self.model.device)
        return SamFeatures(features.values, features.extent, embedding, None)

    def _pass_size(self) -> PassSize:
        return CUDA_PASS if self.model.device.type == "cuda" else CPU_PASS

    def _to_device(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.model.device.type != "cuda":
            return pixels
        return pixels.pin_memory().to(self.model.device, non_blocking=True)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """fp32 without TF32 in convolutions, or bf16 autocast."""
        half = torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), half:
            yield
