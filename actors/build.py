"""Which backend a configuration names, and what its results depend on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from actors import sam
from actors.component_tree import ComponentTree, ComponentTreeConfig
from actors.sam_checkpoint import file_sha256
from actors.sam_variants import variant_defaults
from actors.sam_weights import resolve_weights
from actors.segmenter import Segmenter


@dataclass(frozen=True)
class NamedSamConfig(sam.SamConfig):
    """The SAM backend as a member of the union; its device comes from the execution settings."""

    name: Literal["sam"] = "sam"


SegmenterConfig: TypeAlias = ComponentTreeConfig | NamedSamConfig


def build_segmenter(config: SegmenterConfig, device: str) -> Segmenter:
    """Make the backend, loading its model on `device` (`cpu` or `cuda`)."""
    if isinstance(config, ComponentTreeConfig):
        return ComponentTree(config)
    return sam.SamSegmenter(dataclasses.replace(config, device=device))


def segmenter_signature(config: SegmenterConfig) -> dict[str, Any]:
    """What changes the backend's output, without loading a model.

    Raises:
        FileNotFoundError: no weights; says where to get them.
    """
    if isinstance(config, ComponentTreeConfig):
        return ComponentTree(config).signature
    return {
        "backend": config.name,
        "version": sam.SIGNATURE_VERSION,
        "variant": config.variant,
        "weights_sha256": file_sha256(resolve_weights(config.variant, config.checkpoint)),
        "preprocess": config.preprocess or variant_defaults(config.variant).preprocess,
        "precision": config.precision,
        **dataclasses.asdict(config.everything()),
    }


def uses_gpu(config: SegmenterConfig) -> bool:
    """Whether a GPU is any use to the backend."""
    return not isinstance(config, ComponentTreeConfig)
