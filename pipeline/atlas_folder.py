# mypy: disable-error-code="no-untyped-call"
"""What an atlas leaves in a study folder, and the volumes that its subjects share while it is made.

    study/atlas/
      iteration_00/template.nii.gz   the reference
      iteration_01/ ...              an ordinary study of all subjects onto the template before, and beside it
        template.nii.gz              the template that came of it
        maps/                        the other images of STUDY/atlas
        composed/                    transforms/ of the subjects onto it, and of the last iteration inverses/
        volumes.zarr                 all subjects on its grid, while it is being made
        atlas/                       rows of atlas.parquet; written last
      template.nii.gz ...            those of the last iteration

An array of `volumes.zarr` has the subjects along its first axis and one subject per chunk, so workers write side by
side; a chunk is so small that a column of all subjects' chunks fits `BLOCK_BYTES`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from pipeline.algorithms.mean_shape import FieldMap
from pipeline.folder import StudyFolder
from storage.atomic import named_error, replace_file
from storage.cohort import subject_key
from storage.geometry import Geometry
from storage.warping import from_analysis, write_image

BLOCK_BYTES = 32 << 20  # of all subjects at some voxels, a few of which each thread of a reduction holds


@dataclass(frozen=True)
class IterationFolder:
    """Paths of one iteration; number 0 holds the reference only.

    Attributes:
        atlas: STUDY/atlas.
        suffix: of templates, `.png` where images are pictures without spacing.
    """

    atlas: Path
    number: int
    suffix: str

    @property
    def root(self) -> Path:
        """The folder."""
        return self.atlas / f"iteration_{self.number:02d}"

    @property
    def study(self) -> StudyFolder:
        """The study that registers to the template before."""
        return StudyFolder(self.root)

    @property
    def template(self) -> Path:
        """The template that came of it."""
        return self.root / f"template{self.suffix}"

    @property
    def maps(self) -> Path:
        """Folder of the other images."""
        return self.root / "maps"

    @property
    def shapes(self) -> Path:
        """The mean map and its inverse."""
        return self.root / "mean_shape.npz"

    def before(self) -> IterationFolder:
        """The iteration before."""
        return IterationFolder(self.atlas, self.number - 1, self.suffix)

    def composed(self, name: str, subject: str) -> Path:
        """Transform of a subject onto the new template, or its inverse; name is `transforms` or `inverses`."""
        return self.root / "composed" / name / f"{subject_key(subject)}.h5"

    def create(self, name: str, shape: Sequence[int], dtype: str, fill: float, subjects: int = 0) -> None:
        """Make an array of `volumes.zarr` anew: [N, ...] of N subjects, or without subjects one of all of them."""
        leading = len(shape) - 3
        step = _chunk(shape, max(1, subjects))
        chunks = (*(1 if subjects and axis == 0 else n for axis, n in enumerate(shape[:leading])), *step)
        path = self.root / "volumes.zarr" / name
        shutil.rmtree(path, ignore_errors=True)
        zarr.create_array(path, shape=tuple(shape), chunks=chunks, dtype=dtype, fill_value=fill)

    def volumes(self, name: str, mode: Any = "r") -> zarr.Array[Any]:
        """An array of `volumes.zarr`."""
        return zarr.open_array(self.root / "volumes.zarr" / name, mode=mode)

    def put(self, name: str, index: int, values: npt.NDArray[Any]) -> None:
        """Write what an array holds of one subject.

        Raises:
            OSError: naming the array, for example when the disk is full.
        """
        try:
            self.volumes(name, "r+")[index] = values
        except OSError as error:
            raise named_error(error, self.root / "volumes.zarr" / name) from error.__cause__

    def drop_volumes(self) -> None:
        """Delete `volumes.zarr`."""
        shutil.rmtree(self.root / "volumes.zarr", ignore_errors=True)

    def has_inverses(self) -> bool:
        """Whether the inverses of the composed transforms are there."""
        return (self.root / "composed" / "inverses").exists()

    def drop_composed(self) -> None:
        """Delete the composed transforms and their inverses."""
        shutil.rmtree(self.root / "composed", ignore_errors=True)

    def drop_inverses(self) -> None:
        """Delete the inverses of the composed transforms, which a later iteration supersedes."""
        shutil.rmtree(self.root / "composed" / "inverses", ignore_errors=True)

    def link_subjects(self, study: StudyFolder, subjects: Sequence[str]) -> None:
        """Let this iteration's study read the subjects' embeddings and ROI tables where the main study has them."""
        embeddings = (self.study.embeddings, study.embeddings, "")
        tables = (self.root / "rois", study.root / "rois", ".parquet")
        for here, there, suffix in (embeddings, tables):
            here.mkdir(parents=True, exist_ok=True)
            for name in map(subject_key, subjects):
                link, target = here / f"{name}{suffix}", there / f"{name}{suffix}"
                if link.is_symlink() and not target.exists():
                    link.unlink()
                elif target.exists() and not link.exists():
                    link.symlink_to(os.path.relpath(target, here))


def write_maps(path: Path, **maps: FieldMap) -> None:
    """Write maps by name, whole or not at all."""
    arrays = {
        f"{name}.{part}": getattr(m, part) for name, m in maps.items() for part in ("affine", "values", "step_mm")
    }
    with replace_file(path) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)


def read_map(path: Path, name: str) -> FieldMap:
    """One of the maps of a file."""
    with np.load(path) as arrays:
        z, y, x = arrays[f"{name}.step_mm"].tolist()
        return FieldMap(arrays[f"{name}.affine"], arrays[f"{name}.values"], (z, y, x))


def write_volume(array: npt.NDArray[Any], geometry: Geometry, path: Path) -> None:
    """Write an image [D, H, W] in analysis orientation; as a picture, 8 bits from its darkest to its brightest."""
    if path.suffix == ".png":
        low, high = float(array.min()), float(array.max())
        array = np.rint(255 * (array - low) / max(high - low, 1e-12)).astype(np.uint8)
    write_image(from_analysis(array, geometry), path)


def _chunk(shape: Sequence[int], subjects: int) -> tuple[int, int, int]:
    """Chunk of the last three axes: whole slices while all subjects' fit in float64, else rows of one."""
    *leading, depth, height, width = shape
    voxels = max(1, BLOCK_BYTES // (8 * subjects * math.prod(leading[1:])))
    slices = min(depth, max(1, voxels // (height * width)))
    return slices, height if slices > 1 else min(height, max(1, voxels // width)), width
