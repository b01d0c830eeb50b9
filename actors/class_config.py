"""Settings of the backends that give every voxel a class (Case 1, Eq. 1), readable without torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

SIGNATURE_VERSION = 1


@dataclass(frozen=True)
class LabelsConfig:
    """The ROIs are the classes of the files in the manifest's `segmentation` column.

    Attributes:
        name: selects this backend.
        classes: the classes to use; none means every class but 0, the background.
    """

    name: Literal["labels"] = "labels"
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_classes(self.classes)

    def signature(self) -> dict[str, Any]:
        """Everything that changes the output, JSON-safe."""
        return {"backend": "labels", "version": SIGNATURE_VERSION, "classes": list(self.classes)}


@dataclass(frozen=True)
class NetworkConfig:
    """The ROIs are the classes that a network of the user's finds; `actors.network` states the contract.

    Attributes:
        name: selects this backend.
        checkpoint: path of a TorchScript (`torch.jit.save`) or exported (`torch.export.save`, .pt2) program.
        classes: the classes to use; none means every class but 0, the background.
        dimensions: 3 feeds whole volumes [1, channels, D, H, W], 2 one slice at a time [1, channels, H, W].
        normalise: "zscore" (mean 0, deviation 1 over the volume), "unit" (`input.percentiles` or `input.window` to
            0..1) or "none" (the file's intensities).
        output: "logits", made probabilities by a softmax over the channels, or "probabilities".
        spacing_mm: (z, y, x) that the network was trained at; an axis of 0 is left as it is. Without it, so is
            the image.
        multiple: (z, y, x); sizes are padded with zeros, at the end, to a multiple.
        patch: (z, y, x) of a network of fixed input size; the image is covered by patches that overlap by half.
    """

    name: Literal["network"] = "network"
    checkpoint: str = ""
    classes: tuple[int, ...] = ()
    dimensions: Literal[2, 3] = 3
    normalise: Literal["zscore", "unit", "none"] = "zscore"
    output: Literal["logits", "probabilities"] = "logits"
    spacing_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    multiple: tuple[int, int, int] = (1, 1, 1)
    patch: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        _check_classes(self.classes)
        if min(self.spacing_mm) < 0:
            raise ValueError(f"segmenter.spacing_mm is {self.spacing_mm}; expected three numbers of at least 0")
        for name in ("multiple", "patch"):
            sizes = getattr(self, name)
            if sizes is not None and min(sizes) < 1:
                raise ValueError(f"segmenter.{name} is {sizes}; expected three whole numbers of at least 1")

    def signature(self, weights_sha256: str) -> dict[str, Any]:
        """Everything that changes the output, JSON-safe."""
        settings = dataclasses.asdict(self)
        del settings["name"], settings["checkpoint"]
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        return {"backend": "network", "version": SIGNATURE_VERSION, "weights_sha256": weights_sha256, **plain}


def _check_classes(classes: tuple[int, ...]) -> None:
    if 0 in classes or len(set(classes)) < len(classes):
        raise ValueError(f"segmenter.classes is {classes}; expected different numbers other than 0, the background")
