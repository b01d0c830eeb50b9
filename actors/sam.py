"""The SAM backend: any variant of the family behind the Segmenter protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actors.everything import CPU_PASS, CUDA_PASS, PassSize, prompted_masks, segment_everything
from actors.preprocess import prepare, slice_geometry
from actors.sam_checkpoint import read_checkpoint
from actors.sam_config import SamConfig
from actors.sam_model import SamModel, build_from_state_dict
from actors.sam_weights import resolve_weights
from actors.segmenter import Candidates, Features


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
        device: torch device, `cpu` or `cuda`.
        weights: file to load instead of resolving `config.checkpoint`.

    Raises:
        FileNotFoundError: no weights; says where to get them.
        CheckpointError: weights that are not the variant, or unsafe or damaged.
    """

    def __init__(self, config: SamConfig, device: str = "cpu", weights: Path | None = None) -> None:
        self.config = config
        self.name: str = config.name
        self._everything = config.everything()
        self._rule = config.preprocess_rule()
        checkpoint = read_checkpoint(weights or resolve_weights(config.name, config.checkpoint))
        self.model: SamModel = build_from_state_dict(checkpoint.weights, config.name).to(device)
        self.decoder = self.model.prompt_decoder()
        self.notes = checkpoint.notes
        self.layout: dict[str, Any] = {"blocks": [["sam", 0, self.decoder.channels, 1.0]]}
        self.signature: dict[str, Any] = config.signature(checkpoint.sha256)
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
            return segment_everything(self.decoder, context, slices, geometry, self._everything, self._pass_size())

    def prompt(
        self,
        slices: npt.NDArray[np.uint8],
        features: Features,
        points: Sequence[tuple[float, float]] | None = None,
        boxes: Sequence[tuple[float, float, float, float]] | None = None,
    ) -> list[Candidates]:
        """Masks of one prompt in each slice.

        Args:
            slices: uint8 [B, H, W, 3]; as in `everything` only their shape is looked at, but by HQ-SAM.
            features: of the slices.
            points: (x, y) in pixels, one per slice: three masks each (HQ-SAM: one).
            boxes: (x0, y0, x1, y1) instead, edges in pixels: one mask each.

        Raises:
            ValueError: unless there is either a point or a box for every slice.
        """
        prompts = [given for given in (points, boxes) if given is not None]
        if len(prompts) != 1 or len(prompts[0]) != len(slices):
            raise ValueError(f"{len(slices)} slices need as many points, or as many boxes")
        geometry = slice_geometry(slices.shape[1], slices.shape[2], self.model.model_size, self._rule)
        if not isinstance(features, SamFeatures):
            features = self._restore(slices, features)
        place = geometry.to_model(np.asarray(prompts[0], np.float64).reshape(len(slices), -1, 2))
        xy = torch.from_numpy(place.astype(np.float32)).to(self.model.device)
        with torch.inference_mode(), self._precision():
            context = self.decoder.context(features.embedding, features.early)
            if points is None:
                tokens = self.decoder.embed_boxes(xy.flatten(1))
            else:
                tokens = self.decoder.embed_points(xy, torch.ones(len(xy), 1, device=xy.device))
            return prompted_masks(self.decoder, context, tokens, geometry, points is not None)

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
