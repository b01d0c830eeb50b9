"""Settings of the SAM backend, readable without torch: `segmenter:` in a configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from actors.sam_variants import PreprocessRule, SamName, variant_defaults

SIGNATURE_VERSION = 1
POINTS_PER_SIDE = 32
FAST_POINTS_PER_SIDE = 16
FAST_SKIP_BACKGROUND = 0.5
FAST_PREFILTER_SLACK = 0.1


@dataclass(frozen=True)
class EverythingConfig:
    """Parameters of everything mode; the last two trade masks for speed and are off by default.

    Attributes:
        points_per_side: the grid has points_per_side ** 2 points.
        pred_iou_threshold: keep masks with a predicted IoU above this.
        stability_threshold: keep masks with a stability score of at least this.
        stability_offset: logit offset of the stability score.
        box_nms: drop the lower-quality mask of two whose boxes have an IoU above this.
        skip_background: skip points whose 3 x 3 pixels are all darker than this fraction of the slice's Otsu
            threshold; 0 skips none. Masks of the other points stay the same.
        prefilter_slack: drop masks whose stability on the low-resolution logits is below the threshold by
            more than this, before upscaling them; None does not look.
    """

    points_per_side: int = POINTS_PER_SIDE
    pred_iou_threshold: float = 0.90
    stability_threshold: float = 0.90
    stability_offset: float = 1.0
    box_nms: float = 0.7
    skip_background: float = 0.0
    prefilter_slack: float | None = None

    def __post_init__(self) -> None:
        if self.points_per_side < 1:
            raise ValueError(f"points_per_side must be at least 1, not {self.points_per_side}")
        if not 0 < self.box_nms <= 1:
            raise ValueError(f"box_nms must lie in (0, 1], not {self.box_nms}")
        if self.skip_background < 0:
            raise ValueError(f"skip_background must not be negative, not {self.skip_background}")


@dataclass(frozen=True)
class SamConfig:
    """Settings of the SAM backend; None means the default of the variant or of the mode.

    Attributes:
        name: the variant, see `actors.sam_variants`.
        checkpoint: path or URI of the weights; None looks in the weights cache folder.
        mode: "exact" is the official generator's result (32 x 32 points); "fast" uses 16 x 16 points, skips
            those in dark background and rejects unstable masks early: it finds fewer small objects.
        pred_iou_threshold: keep masks with a predicted IoU above this.
        stability_threshold: keep masks with a stability score of at least this.
        box_nms: drop the lower-quality mask of two whose boxes have an IoU above this.
        points_per_side: the grid has points_per_side ** 2 points.
        skip_background: skip points darker than this fraction of the slice's Otsu threshold; 0 skips none.
        prefilter_slack: drop masks whose low-resolution stability misses the threshold by more than this; exact
            mode does not look unless it is given; 1 or more drops none.
        preprocess: "sam", "medsam" or "sam_med2d"; MedSAM with "sam" is how the public SAMReg code ran it.
        precision: "fp32", or "bf16" autocast on a GPU (coordinates, scores and stability stay fp32).
        compile_encoder: torch.compile the image encoder, worth it on a GPU with many slices.
    """

    name: SamName = "sam_vit_b"
    checkpoint: str | None = None
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

    def __post_init__(self) -> None:
        self.everything()

    def everything(self) -> EverythingConfig:
        """The everything-mode parameters with all defaults filled in."""
        defaults = variant_defaults(self.name)
        fast = self.mode == "fast"

        def pick(given: Any, exact: Any, quick: Any) -> Any:
            return given if given is not None else quick if fast else exact

        return EverythingConfig(
            points_per_side=pick(self.points_per_side, POINTS_PER_SIDE, FAST_POINTS_PER_SIDE),
            pred_iou_threshold=pick(self.pred_iou_threshold, defaults.pred_iou, defaults.pred_iou),
            stability_threshold=pick(self.stability_threshold, defaults.stability, defaults.stability),
            box_nms=self.box_nms,
            skip_background=pick(self.skip_background, 0.0, FAST_SKIP_BACKGROUND),
            prefilter_slack=pick(self.prefilter_slack, None, FAST_PREFILTER_SLACK),
        )

    def preprocess_rule(self) -> PreprocessRule:
        """The chosen rule, or the one the variant was trained with."""
        return self.preprocess or variant_defaults(self.name).preprocess

    def signature(self, weights_sha256: str) -> dict[str, Any]:
        """Everything that changes the output, JSON-safe."""
        return {
            "backend": "sam",
            "version": SIGNATURE_VERSION,
            "variant": self.name,
            "weights_sha256": weights_sha256,
            "preprocess": self.preprocess_rule(),
            "precision": self.precision,
            **dataclasses.asdict(self.everything()),
        }
