"""Carry the cohort ROIs of one subject onto the template, as bits of a number for each voxel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.algorithms.warp import moving_indices, warp_image
from pipeline.dispatch import Task
from pipeline.stages.atlas_shape import AtlasUnit, Place
from storage.geometry import moving_to_fixed
from storage.transforms import make_ddf, read_transform

MOST = 31  # cohort ROIs that fit a number
Members = Mapping[int, int]  # row of a ROI -> place of its cohort ROI among those that are carried


def task(place: Place, members: Mapping[str, Members]) -> Task:
    """The task of carrying ROIs, for `pipeline.dispatch`.

    Args:
        members: by subject.
    """
    return Task("cohort_rois", partial(_build, place, members))


def _build(place: Place, members: Mapping[str, Members], device: str) -> Callable[[AtlasUnit], int]:
    return partial(run_unit, place, members)


def run_unit(place: Place, members: Mapping[str, Members], unit: AtlasUnit) -> int:
    """Write the bits of a subject; how many of the cohort ROIs it has."""
    here, there = place.grid(), place.grid(unit.unit)
    ddf = make_ddf(read_transform(place.folder.composed("transforms", unit.unit)), here, there)
    indices = moving_indices(ddf, here.spacing_mm, moving_to_fixed(here, there), there.spacing_mm)
    embedding = place.folder.study.store.read(unit.unit)
    bits: npt.NDArray[np.uint32] = np.zeros(here.shape, np.uint32)
    own = members.get(unit.unit, {})
    for number in sorted(set(own.values())):
        rows = [row for row, found in own.items() if found == number]
        volume = np.zeros(there.shape, np.float32)
        for row, mask in zip(rows, embedding.masks(rows), strict=True):
            volume[embedding.roi_slice[row]][mask] = 1
        bits |= np.where(warp_image(volume, indices) >= 0.5, np.uint32(1 << number), np.uint32(0))
    place.folder.put("rois", unit.index, bits)
    return len(set(own.values()))
