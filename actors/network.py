# mypy: disable-error-code="no-untyped-call"
"""Dataset-specific segmentation networks (Case 1): any TorchScript or torch.export program of the user's.

The contract. The program takes one float32 tensor, [1, channels, D, H, W], or [1, channels, H, W] for one slice
(`dimensions: 2`), in analysis orientation (`storage.geometry`: slice axis first, towards LPS). A volume has one
channel, an RGB picture three. It returns one tensor [1, classes, ...] of the same sizes, logits or probabilities,
channel 0 the background. Networks that take another order, more channels, or return several outputs are wrapped
before they are exported. Such a file is a program: run none that you do not trust.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from actors.class_config import NetworkConfig
from actors.input_config import InputConfig
from actors.sam_variants import CheckpointError
from actors.sam_weights import file_sha256
from storage.images import Image, to_unit
from storage.segmentations import Segmentation, from_probabilities

Program = Callable[[Tensor], Any]
_RGB = 255.0
_WINDOW_SIGMA = 0.125  # of the patch, as nnU-Net weights its patches


class NetworkSegmenter:
    """Gives every voxel of an image a class and its probability."""

    def __init__(self, config: NetworkConfig, device: str) -> None:
        self.config = config
        self.device = device
        self.signature = config.signature(network_sha256(config.checkpoint))
        self.program = load_program(Path(config.checkpoint).expanduser(), device)

    def segment(self, image: Image, settings: InputConfig, segmentation: str) -> Segmentation:
        """Run the network on one image; the file of a `segmentation` is not looked at.

        Raises:
            CheckpointError: when the program fails, or returns what the contract does not allow.
            ImageError: for output that is no probability.
        """
        x = network_input(image, settings, self.config)
        sizes = tuple(x.shape[2:])
        small = _resized(x, _working_size(sizes, image.geometry.spacing_mm[3 - len(sizes) :], self.config))
        found = [self._classes(part[None].to(self.device)).cpu() for part in small]
        values = _resized(torch.cat(found), sizes)
        if self.config.dimensions == 2:
            values = values.transpose(0, 1)[None]
        name = f"{self.config.checkpoint} (segmenter.output: {self.config.output})"
        return from_probabilities(values[0].permute(1, 2, 3, 0).numpy(), name)

    def _classes(self, x: Tensor) -> Tensor:
        """Probabilities [1, classes, ...] of one input [1, channels, ...], padded and patched as configured."""
        sizes = x.shape[2:]
        multiple, patch = (self._sizes(value, len(sizes)) for value in (self.config.multiple, self.config.patch))
        assert multiple is not None
        wanted = [max(-(-n // m) * m, p) for n, m, p in zip(sizes, multiple, patch or multiple, strict=True)]
        padding = [pad for n, w in zip(reversed(sizes), reversed(wanted), strict=True) for pad in (0, w - n)]
        padded = functional.pad(x, padding)
        values = self._run(padded) if patch is None else blend_patches(self._run, padded, patch)
        inside: tuple[Any, ...] = (..., *(slice(n) for n in sizes))
        return values[inside]

    def _run(self, x: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                found = self.program(x)
        except (RuntimeError, AssertionError, TypeError) as error:  # what TorchScript and exported guards raise
            raise CheckpointError(
                f"{self.config.checkpoint}: fails on an input {list(x.shape)}: {error}; see segmenter.dimensions, "
                "segmenter.multiple and segmenter.patch"
            ) from error
        if not isinstance(found, Tensor):
            kind = type(found).__name__
            raise CheckpointError(f"{self.config.checkpoint}: returns a {kind}; wrap the network to return one tensor")
        if found.ndim != x.ndim or found.shape[0] != 1 or found.shape[2:] != x.shape[2:]:
            raise CheckpointError(
                f"{self.config.checkpoint}: returns {list(found.shape)} for an input {list(x.shape)}; "
                "expected [1, classes, ...] of the same sizes"
            )
        return found.float().softmax(1) if self.config.output == "logits" else found.float()

    @staticmethod
    def _sizes(value: tuple[int, int, int] | None, axes: int) -> tuple[int, ...] | None:
        return None if value is None else value[3 - axes :]


def network_sha256(checkpoint: str) -> str:
    """Digest of a network file, after a look at what it is.

    Raises:
        FileNotFoundError: none is named, or it is not there.
        CheckpointError: as `network_format`.
    """
    if not checkpoint:
        raise FileNotFoundError("segmenter 'network' needs segmenter.checkpoint, a TorchScript or .pt2 file")
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no network at {path}; see segmenter.checkpoint")
    network_format(path)
    return file_sha256(path)


def network_format(path: Path) -> str:
    """ "torchscript" or "export", from the names in the archive; nothing in it is run.

    Raises:
        CheckpointError: for any other file, such as a state dict.
    """
    names: set[str] = set()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.split("/", 1)[-1] for name in archive.namelist()}
    if "constants.pkl" in names:
        return "torchscript"
    if names & {"archive_format", "serialized_exported_program.json"}:
        return "export"
    raise CheckpointError(
        f"{path}: neither a TorchScript nor a torch.export file; weights alone are not enough, "
        "save the network with torch.jit.save or torch.export.save"
    )


def load_program(path: Path, device: str) -> Program:
    """Load a network onto `device`.

    Raises:
        CheckpointError: for a damaged file.
    """
    program: Any
    try:
        if network_format(path) == "torchscript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch recommends torch.export instead
                program = torch.jit.load(path, map_location=device)
            return cast(Program, program.eval())
        with path.open("rb") as stream:
            program = torch.export.load(stream)
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return cast(Program, program.module())
    except (RuntimeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be loaded as a network: {error}") from error


def network_input(image: Image, settings: InputConfig, config: NetworkConfig) -> Tensor:
    """The image as the network takes it: float32 [1, channels, D, H, W], or [D, channels, H, W] per slice."""
    values = np.asarray(image.array, dtype=np.float32)
    if config.normalise == "zscore":
        values = (values - values.mean()) / max(float(values.std()), 1e-8)
    elif config.normalise == "unit":
        values = values / np.float32(_RGB) if image.is_rgb else to_unit(image, settings.percentiles, settings.window)
    channels = np.moveaxis(values, 3, 0) if image.is_rgb else values[None]
    x = torch.from_numpy(np.ascontiguousarray(channels))
    return x.transpose(0, 1).contiguous() if config.dimensions == 2 else x[None]


def blend_patches(run: Callable[[Tensor], Tensor], x: Tensor, patch: Sequence[int]) -> Tensor:
    """Average of overlapping patches under a Gaussian weight.

    Args:
        run: maps [1, channels, *patch] to [1, classes, *patch].
        x: [1, channels, ...], no axis smaller than the patch.
        patch: sizes of the spatial axes.
    """
    weight = torch.ones(tuple(patch), device=x.device)
    for axis, size in enumerate(patch):
        place = (torch.arange(size, device=x.device) - (size - 1) / 2) / (_WINDOW_SIGMA * size)
        bell = torch.exp(-0.5 * place**2).clamp_min(1e-4)
        weight *= bell.reshape([-1 if a == axis else 1 for a in range(len(patch))])
    starts = [_starts(size, step) for size, step in zip(x.shape[2:], patch, strict=True)]
    total: Tensor | None = None
    weights = torch.zeros(x.shape[2:], device=x.device)
    for corner in product(*starts):
        box: tuple[Any, ...] = (..., *(slice(start, start + n) for start, n in zip(corner, patch, strict=True)))
        found = run(x[box].contiguous())
        if total is None:
            total = torch.zeros((1, found.shape[1], *x.shape[2:]), device=x.device)
        total[box] += found * weight
        weights[box] += weight
    assert total is not None
    return total / weights


def _starts(size: int, patch: int) -> list[int]:
    """First indices of the patches along an axis: evenly spread, overlapping by at least half."""
    count = 1 if size <= patch else 1 + int(np.ceil((size - patch) / max(1, patch // 2)))
    return sorted({round(float(start)) for start in np.linspace(0, size - patch, count)})


def _working_size(sizes: tuple[int, ...], spacing: tuple[float, ...], config: NetworkConfig) -> tuple[int, ...]:
    """Sizes of the spatial axes at the spacing that the network was trained at."""
    wanted = config.spacing_mm[3 - len(sizes) :]
    return tuple(max(1, round(n * s / w)) if w else n for n, s, w in zip(sizes, spacing, wanted, strict=True))


def _resized(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[2:]) == sizes:
        return x
    return functional.interpolate(x, sizes, mode="trilinear" if len(sizes) == 3 else "bilinear", align_corners=False)
