# mypy: disable-error-code="no-untyped-call"
"""One slice of a subject as it was encoded, and how to draw it: for reports, contact sheets and notebooks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from storage.cohort import Subject
from storage.embeddings import EmbeddingStore
from storage.geometry import SliceAxis
from storage.images import Image, ImageError, read_image, to_unit

Grey = npt.NDArray[np.float32]
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")  # of Okabe and Ito
_AXES: tuple[SliceAxis, ...] = ("sagittal", "coronal", "axial")


def read_encoded(store: EmbeddingStore, subject: Subject) -> Image:
    """The image of a subject, in the orientation it was encoded in.

    Raises:
        ImageError: for an image that cannot be read or has changed.
        FileNotFoundError: for a subject that the store lacks.
    """
    geometry = store.geometry(subject.subject)
    image = read_image(subject.image, _AXES[geometry.world_axis()])
    if image.geometry.shape != geometry.shape:
        raise ImageError(f"{subject.image}: changed since it was encoded")
    return image


def grey_of(image: Image) -> Grey:
    """Intensities 0..1 float32 [D, H, W], the outer half percents cut off; colour becomes its mean."""
    if image.is_rgb:
        return np.asarray(image.array.mean(axis=3) / 255, np.float32)
    return to_unit(image)


def draw_grey(axes: Axes, image: Grey, aspect: float) -> None:
    """An image [H, W], 0..1, with pixels `aspect` times as high as wide."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    axes.set_axis_off()


def draw_outline(axes: Axes, mask: npt.NDArray[np.bool_], colour: str, style: str = "solid") -> None:
    """The outline of a mask [H, W] that is not empty, also along the border of the image."""
    height, width = mask.shape
    extent = (-1.0, float(width), -1.0, float(height))
    padded = np.pad(mask, 1).astype(float)
    axes.contour(padded, [0.5], colors=[colour], linewidths=1.6, linestyles=[style], extent=extent)
