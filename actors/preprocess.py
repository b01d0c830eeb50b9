"""From slices to model input, and the one geometry that every later step shares.

Three coordinate systems meet here: original pixels (x, y) of a slice, pixels of the square model input, and
cells of the feature or logit grid. A variant either *pads* (longest side scaled to the model size, zeros at
the right and bottom) or *stretches* (both sides scaled to the model size). `SliceGeometry` is the only place
that knows the difference; prompts, masks and prototype pooling all go through it.

Rules (each equal to its official implementation):
    sam: Pillow bilinear on uint8, longest side to the model size; (x - mean) / std; zero padding.
    medsam: stretched by a cubic spline (scikit-image order 3, anti-aliased), truncated to uint8, then scaled
        to [0, 1] by the minimum and maximum of the slice.
    sam_med2d: (x - mean) / std; stretched by nearest neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage
from torch.nn import functional

from actors.sam_variants import PreprocessRule

PREPROCESS_RULES: tuple[str, ...] = get_args(PreprocessRule)

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class SliceGeometry:
    """How one slice lies in the model input.

    Attributes:
        height: rows of the original slice.
        width: columns of the original slice.
        model_size: side of the square model input, px.
        input_height: rows of the model input that the slice covers, from the top.
        input_width: columns of the model input that the slice covers, from the left.
        masks_via_model: logits reach the original size by way of the model size (all but MedSAM).
    """

    height: int
    width: int
    model_size: int
    input_height: int
    input_width: int
    masks_via_model: bool = True

    def to_model(self, xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Original pixels to model pixels, (..., 2) as (x, y); boxes as (..., 2, 2) corners."""
        return np.asarray(xy, dtype=np.float64) * (
            self.input_width / self.width,
            self.input_height / self.height,
        )

    def to_original(self, xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Model pixels to original pixels, the inverse of `to_model`."""
        return np.asarray(xy, dtype=np.float64) * (
            self.width / self.input_width,
            self.height / self.input_height,
        )

    def extent(self, grid: int) -> tuple[float, float]:
        """Rows and columns, in cells, that the slice covers on a square grid of `grid` cells a side."""
        return grid * self.input_height / self.model_size, grid * self.input_width / self.model_size

    def mask_maps(self, grid: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Matrices A_h [H, grid] and A_w [W, grid]: logits at original size = A_h @ logits @ A_w^T.

        They are the bilinear resizes of the official post-processing (grid to model size, crop, to original
        size; MedSAM: grid to original size) as one separable linear map, equal to them to 5e-7.
        """
        size = self.model_size if self.masks_via_model else grid
        rows = _resize_map(grid, size, self.input_height * size // self.model_size, self.height)
        columns = _resize_map(grid, size, self.input_width * size // self.model_size, self.width)
        return rows.to(device), columns.to(device)


def _resize_map(grid: int, model_size: int, covered: int, size: int) -> torch.Tensor:
    """Matrix [size, grid] of bilinear grid -> model_size, crop to `covered`, bilinear -> size."""
    impulse = torch.eye(grid)[None, None]
    model = functional.interpolate(impulse, (model_size, grid), mode="bilinear", align_corners=False)[:, :, :covered]
    return functional.interpolate(model, (size, grid), mode="bilinear", align_corners=False)[0, 0]


def slice_geometry(height: int, width: int, model_size: int, rule: PreprocessRule) -> SliceGeometry:
    """Geometry of a height x width slice under a preprocessing rule."""
    if rule != "sam":
        return SliceGeometry(height, width, model_size, model_size, model_size, masks_via_model=rule != "medsam")
    scale = model_size / max(height, width)
    return SliceGeometry(height, width, model_size, int(height * scale + 0.5), int(width * scale + 0.5))


def prepare(slices: npt.NDArray[np.uint8], model_size: int, rule: PreprocessRule) -> tuple[torch.Tensor, SliceGeometry]:
    """Model input of a batch of slices of equal size.

    Args:
        slices: uint8 [B, H, W, 3], 0..255, RGB.
        model_size: side S of the model input, px.
        rule: the variant's preprocessing.

    Returns:
        float32 [B, 3, S, S] on the CPU, and the geometry of every slice of the batch.

    Raises:
        ValueError: slices of another dtype or shape, an empty batch, an unknown rule.
    """
    if slices.dtype != np.uint8 or slices.ndim != 4 or slices.shape[3] != 3 or 0 in slices.shape:
        raise ValueError(f"slices must be uint8 [B, H, W, 3], not {slices.dtype} {list(slices.shape)}")
    geometry = slice_geometry(slices.shape[1], slices.shape[2], model_size, rule)
    if rule == "sam":
        return torch.stack([_pad_to_square(image, geometry) for image in slices]), geometry
    if rule == "medsam":
        return torch.stack([_stretch_cubic(image, model_size) for image in slices]), geometry
    if rule == "sam_med2d":
        return _stretch_nearest(slices, model_size), geometry
    raise ValueError(f"preprocess {rule!r} is none of {', '.join(PREPROCESS_RULES)}")


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    """(x - mean) / std of float32 [..., 3, H, W]."""
    mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def _pad_to_square(image: npt.NDArray[np.uint8], geometry: SliceGeometry) -> torch.Tensor:
    """SAM: resize the longest side, normalise, then pad with zeros; float32 [3, S, S]."""
    size = (geometry.input_width, geometry.input_height)
    resized = np.array(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BILINEAR))
    pixels = _normalise(torch.from_numpy(resized).permute(2, 0, 1).float())
    missing = (geometry.model_size - size[0], geometry.model_size - size[1])
    return functional.pad(pixels, (0, missing[0], 0, missing[1]))


def _stretch_cubic(image: npt.NDArray[np.uint8], model_size: int) -> torch.Tensor:
    """MedSAM: cubic stretch, truncation to uint8, min-max to [0, 1]; float32 [3, S, S]."""
    values = image.astype(np.float64)
    factors = np.array([image.shape[0] / model_size, image.shape[1] / model_size, 1.0])
    smooth = ndimage.gaussian_filter(values, np.maximum(0.0, (factors - 1) / 2), mode="mirror")
    zoomed = ndimage.zoom(smooth, 1 / factors, order=3, mode="mirror", grid_mode=True)
    stretched = np.clip(zoomed, values.min(), values.max()).astype(np.uint8).astype(np.float64)
    span = max(float(stretched.max() - stretched.min()), 1e-8)
    scaled = (stretched - stretched.min()) / span
    return torch.from_numpy(scaled.transpose(2, 0, 1).astype(np.float32))


def _stretch_nearest(slices: npt.NDArray[np.uint8], model_size: int) -> torch.Tensor:
    """SAM-Med2D: normalise, then OpenCV's nearest-neighbour stretch; float32 [B, 3, S, S]."""
    rows, columns = (
        np.minimum(np.floor(np.arange(model_size) * (size / model_size)).astype(int), size - 1)
        for size in slices.shape[1:3]
    )
    picked = slices[:, rows[:, None], columns[None, :]]
    return _normalise(torch.from_numpy(np.ascontiguousarray(picked.transpose(0, 3, 1, 2))).float())
