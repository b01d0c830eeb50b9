"""A picture of the template of every iteration: three slices of each, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.algorithms.template import robust_range
from pipeline.atlas_folder import IterationFolder
from storage.atomic import replace_file
from storage.geometry import SliceAxis
from storage.images import read_image

_HEIGHTS = (0.3, 0.5, 0.7)  # of the slices, from the first


def draw_montage(path: Path, folders: Sequence[IterationFolder], slice_axis: SliceAxis) -> None:
    """Write the PNG.

    Args:
        folders: the reference, then the iterations.
    """
    from matplotlib.figure import Figure

    depth = read_image(folders[0].template, slice_axis).array.shape[0]
    slices = sorted({round(height * (depth - 1)) for height in _HEIGHTS})
    figure = Figure(figsize=(2.2 * len(folders), 2.4 * len(slices)), layout="constrained")
    axes = figure.subplots(len(slices), len(folders), squeeze=False)
    for column, folder in enumerate(folders):
        image = read_image(folder.template, slice_axis)
        _, y, x = image.geometry.spacing_mm
        low, high = robust_range(image.array)
        for row, index in enumerate(slices):
            axes[row, column].imshow(image.array[index], cmap="gray", vmin=low, vmax=high, aspect=y / x)
            axes[row, column].set_axis_off()
        axes[0, column].set_title(f"iteration {folder.number}" if folder.number else "reference", fontsize=9)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
