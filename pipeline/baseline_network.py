# mypy: disable-error-code="no-untyped-call"
"""A registration network of the user's own as a baseline: an exported TorchScript file.

Contract. The module is called as `network(moving, fixed)`, two float32 tensors [1, 1, D, H, W] of intensities 0..1 on
the fixed grid, the moving image as it lies in world space and 0 where it does not reach. It returns a pull-back field,
a float tensor [1, 3, D, H, W] of displacements (z, y, x) in voxels of that grid: the moving image is sampled at
index + displacement. A picture has D = 1. Whatever size or spacing the network needs, it has to resample to itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.algorithms import warp
from pipeline.baseline_images import NotRegisteredError, PairImages, Registered, local_spacing
from pipeline.errors import UsageError


def open_network(path: str | Path) -> Any:
    """Load a TorchScript file for the processor.

    Raises:
        UsageError: for a file that is missing or no TorchScript.
    """
    import torch

    if not Path(path).is_file():
        raise UsageError(f"{path}: no such network; export one with torch.jit.script(network).save(FILE)")
    try:
        network = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a TorchScript file ({reason}); make one with torch.jit.script") from None
    return network.eval()


def register(network: Any, images: PairImages) -> Registered:
    """The field of a network.

    Raises:
        NotRegisteredError: for an answer that breaks the contract.
    """
    import torch

    here, there = local_spacing(images)
    still = np.zeros((3, *images.here.shape), np.float32)
    moved = warp.warp_image(images.moving, warp.moving_indices(still, here, images.moving_to_fixed, there))
    pair = [torch.from_numpy(np.ascontiguousarray(image / 255))[None, None] for image in (moved, images.fixed)]
    with torch.inference_mode():
        answer = network(*pair)
    if not isinstance(answer, torch.Tensor):
        raise NotRegisteredError(f"the network returned {type(answer).__name__}; expected one tensor [1, 3, D, H, W]")
    if tuple(answer.shape) != (1, 3, *images.here.shape):
        raise NotRegisteredError(f"the network returned {tuple(answer.shape)}; expected {(1, 3, *images.here.shape)}")
    ddf = answer[0].float().numpy() * np.asarray(here, np.float32)[:, None, None, None]
    return Registered(np.ascontiguousarray(ddf, dtype=np.float32))
