"""Which backend a configuration names, and what its results depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from actors.class_config import LabelsConfig, NetworkConfig
from actors.component_tree import ComponentTree, ComponentTreeConfig
from actors.sam_config import SamConfig
from actors.segmenter import Segmenter

if TYPE_CHECKING:  # reads images, which a configuration need not
    from actors.class_encoder import ClassSegmenter

RoiConfig: TypeAlias = ComponentTreeConfig | SamConfig
ClassConfig: TypeAlias = LabelsConfig | NetworkConfig
SegmenterConfig: TypeAlias = RoiConfig | ClassConfig


def build_segmenter(config: RoiConfig, device: str) -> Segmenter:
    """Make the backend of candidate ROIs (Case 2), loading its model on `device` (`cpu` or `cuda`)."""
    if isinstance(config, ComponentTreeConfig):
        return ComponentTree(config)
    from actors.sam import SamSegmenter

    return SamSegmenter(config, device)


def build_class_segmenter(config: ClassConfig, device: str) -> ClassSegmenter:
    """Make the backend of class ROIs (Case 1), loading its network on `device`."""
    if isinstance(config, LabelsConfig):
        from actors.class_encoder import LabelFiles

        return LabelFiles(config)
    from actors.network import NetworkSegmenter

    return NetworkSegmenter(config, device)


def segmenter_signature(config: SegmenterConfig) -> dict[str, Any]:
    """What changes the backend's output; checks that its weights can be used, so that no worker finds out.

    Raises:
        FileNotFoundError: no weights; says where to get them.
        CheckpointError: weights that are damaged, unsafe, or of another variant.
        PackageMissingError: the variant needs a package that is not installed.
    """
    if isinstance(config, ComponentTreeConfig):
        return ComponentTree(config).signature
    if isinstance(config, LabelsConfig):
        return config.signature()
    if isinstance(config, NetworkConfig):
        from actors.network import network_sha256

        return config.signature(network_sha256(config.checkpoint))
    from actors.sam_weights import checked_sha256

    return config.signature(checked_sha256(config.name, config.checkpoint))


def finds_classes(config: SegmenterConfig) -> bool:
    """Whether the ROIs are classes, paired by class (Case 1), not candidates paired by prototype (Case 2)."""
    return isinstance(config, LabelsConfig | NetworkConfig)


def reads_segmentations(config: SegmenterConfig) -> bool:
    """Whether the ROIs depend on the manifest's `segmentation` column."""
    return isinstance(config, LabelsConfig)


def uses_gpu(config: SegmenterConfig) -> bool:
    """Whether a GPU is any use to the backend."""
    return not isinstance(config, ComponentTreeConfig | LabelsConfig)
