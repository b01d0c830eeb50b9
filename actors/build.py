"""Which backend a configuration names, and what its results depend on."""

from __future__ import annotations

from typing import Any, TypeAlias

from actors.component_tree import ComponentTree, ComponentTreeConfig
from actors.sam_config import SamConfig
from actors.segmenter import Segmenter

SegmenterConfig: TypeAlias = ComponentTreeConfig | SamConfig


def build_segmenter(config: SegmenterConfig, device: str) -> Segmenter:
    """Make the backend, loading its model on `device` (`cpu` or `cuda`)."""
    if isinstance(config, ComponentTreeConfig):
        return ComponentTree(config)
    from actors.sam import SamSegmenter

    return SamSegmenter(config, device)


def segmenter_signature(config: SegmenterConfig) -> dict[str, Any]:
    """What changes the backend's output; checks that its weights can be used, so that no worker finds out.

    Raises:
        FileNotFoundError: no weights; says where to get them.
        CheckpointError: weights that are damaged, unsafe, or of another variant.
        PackageMissingError: the variant needs a package that is not installed.
    """
    if isinstance(config, ComponentTreeConfig):
        return ComponentTree(config).signature
    from actors.sam_weights import checked_sha256

    return config.signature(checked_sha256(config.name, config.checkpoint))


def uses_gpu(config: SegmenterConfig) -> bool:
    """Whether a GPU is any use to the backend."""
    return not isinstance(config, ComponentTreeConfig)
