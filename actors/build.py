"""Which backend a configuration names."""

from __future__ import annotations

from typing import Any, TypeAlias

from actors.component_tree import ComponentTree, ComponentTreeConfig
from actors.segmenter import Segmenter

SegmenterConfig: TypeAlias = ComponentTreeConfig


def build_segmenter(config: SegmenterConfig, device: str) -> Segmenter:
    """Make the backend, loading its model on `device` (`cpu` or `cuda`)."""
    return ComponentTree(config)


def segmenter_signature(config: SegmenterConfig) -> dict[str, Any]:
    """What changes the backend's output, without loading a model."""
    return ComponentTree(config).signature


def uses_gpu(config: SegmenterConfig) -> bool:
    """Whether a GPU is any use to the backend."""
    return False
