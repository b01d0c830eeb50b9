"""Which backend a configuration names, and what its results depend on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from actors.component_tree import ComponentTree, ComponentTreeConfig
from actors.segmenter import Segmenter

if TYPE_CHECKING:
    from actors.sam import SamConfig


@dataclass(frozen=True)
class SamSettings:
    """What a user sets of the SAM backend: `actors.sam.SamConfig`, which says what each means, but for the device.

    The device comes from the execution settings. Kept apart so that reading a configuration does not load torch.
    """

    name: Literal["sam"] = "sam"
    variant: str = "sam_vit_b"
    checkpoint: str | None = None
    mode: Literal["exact", "fast"] = "exact"
    pred_iou_threshold: float | None = None
    stability_threshold: float | None = None
    box_nms: float = 0.7
    points_per_side: int | None = None
    skip_background: float | None = None
    prefilter_slack: float | None = None
    preprocess: Literal["sam", "medsam", "sam_med2d"] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    compile_encoder: bool = False

    def on_device(self, device: str) -> SamConfig:
        """The backend's own settings."""
        from actors.sam import SamConfig

        settings = dataclasses.asdict(self)
        del settings["name"]
        return SamConfig(**settings, device=device)


SegmenterConfig: TypeAlias = ComponentTreeConfig | SamSettings


def build_segmenter(config: SegmenterConfig, device: str) -> Segmenter:
    """Make the backend, loading its model on `device` (`cpu` or `cuda`)."""
    if isinstance(config, ComponentTreeConfig):
        return ComponentTree(config)
    from actors.sam import SamSegmenter

    return SamSegmenter(config.on_device(device))


def segmenter_signature(config: SegmenterConfig) -> dict[str, Any]:
    """What changes the backend's output, without loading a model.

    Raises:
        FileNotFoundError: no weights; says where to get them.
    """
    if isinstance(config, ComponentTreeConfig):
        return ComponentTree(config).signature
    from actors.sam import SIGNATURE_VERSION
    from actors.sam_checkpoint import file_sha256
    from actors.sam_variants import variant_defaults
    from actors.sam_weights import resolve_weights

    return {
        "backend": config.name,
        "version": SIGNATURE_VERSION,
        "variant": config.variant,
        "weights_sha256": file_sha256(resolve_weights(config.variant, config.checkpoint)),
        "preprocess": config.preprocess or variant_defaults(config.variant).preprocess,
        "precision": config.precision,
        **dataclasses.asdict(config.on_device("cpu").everything()),
    }


def uses_gpu(config: SegmenterConfig) -> bool:
    """Whether a GPU is any use to the backend."""
    return not isinstance(config, ComponentTreeConfig)
