"""Where the cohort ROIs of a study lie on its atlas, from the table `cohort_rois`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc

from pipeline import atlas_reduce, cohort_rois
from pipeline.atlas_folder import write_volume
from pipeline.stages import atlas_rois as stage
from pipeline.stages.atlas_shape import AtlasUnit, Place
from storage import tables

FREQUENCY, IDENTITY = "roi_frequency.nii.gz", "roi_identity.nii.gz"


def carried_rois(study: Path) -> tuple[list[int], dict[str, dict[int, int]]]:
    """The most frequent cohort ROIs of a study, and by subject which of them each of its ROIs belongs to.

    None where `samreg cohort rois` has not been run.
    """
    if not tables.has_part(study, cohort_rois.NAME, cohort_rois.PART):
        return [], {}
    tracks = tables.read_part(study, cohort_rois.NAME, cohort_rois.PART, ["subject", "track", "cohort_roi"])
    numbers = sorted(pc.unique(tracks.column("cohort_roi")).to_pylist())[: stage.MOST]
    place = {number: position for position, number in enumerate(numbers)}
    of_track = {
        (row["subject"], row["track"]): place[row["cohort_roi"]]
        for row in tracks.to_pylist()
        if row["cohort_roi"] in place
    }
    members: dict[str, dict[int, int]] = defaultdict(dict)
    for row in tables.read_table(study, "rois", ["subject", "track", "roi"]).to_pylist():
        found = of_track.get((row["subject"], row["track"]))
        if found is not None:
            members[row["subject"]][row["roi"]] = found
    return numbers, dict(members)


def write_roi_maps(place: Place, units: Sequence[AtlasUnit], numbers: Sequence[int]) -> None:
    """Write, voxel by voxel, the largest share of the subjects that have one and the same cohort ROI there, and which.

    Args:
        units: subjects whose ROIs have been carried, see `pipeline.stages.atlas_rois`.
        numbers: of the cohort ROIs that were.
    """
    share, which = atlas_reduce.roi_frequency(place.folder, [unit.index for unit in units], numbers)
    write_volume(share, place.grid(), place.folder.maps / FREQUENCY)
    write_volume(which, place.grid(), place.folder.maps / IDENTITY)
