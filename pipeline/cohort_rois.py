"""`cohort_rois`: which tracks of all subjects are the same structure, from the tables of a study alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import results
from pipeline.algorithms.cohort_rois import Identity, identify
from pipeline.errors import UsageError
from pipeline.folder import StudyFolder
from storage import tables
from storage.signature import digest

NAME = "cohort_rois"
PART = "cohort"
VERSION = 1
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CohortRoiSummary:
    """What was found.

    Attributes:
        tracks: that were found in another subject; of_tracks: of all subjects.
        cohort_rois: how many; frequent: how many of them half of the subjects or more have.
        agreement: share of the matches between tracks that lead to the same cohort ROI.
    """

    tracks: int
    of_tracks: int
    cohort_rois: int
    frequent: int
    agreement: float


@dataclass(frozen=True)
class _Tracks:
    """The tracks of all subjects, by subject and number.

    Attributes:
        subjects: sorted names.
        subject, track: [T] position of the subject, number of the track.
        roi_key, roi_track: [N] every ROI as a sorted number, see `_roi_keys`, and its position among the tracks.
        columns: [T] each, what the table says of a track.
    """

    subjects: list[str]
    subject: Index
    track: Index
    roi_key: Index
    roi_track: Index
    columns: dict[str, npt.NDArray[np.float64] | Index]


def write_cohort_rois(study: Path, min_paths: float) -> CohortRoiSummary:
    """Identify the tracks of a study and write the table `cohort_rois`.

    Args:
        min_paths: see `pipeline.algorithms.cohort_rois.identify`.

    Raises:
        UsageError: for a folder without matches, a setting below 1, or matches of ROIs that `rois` lacks.
        FolderError: for a folder that is being written.
    """
    folder = StudyFolder(study)
    if min_paths < 1:
        raise UsageError(f"--min-paths is {min_paths:g}; it must be 1 or more")
    folder.latest_plan()
    with folder.lock():
        tracks = _read_tracks(study)
        left, right, confidence, keys = _read_edges(study, tracks)
        if not len(left):
            raise UsageError(f"{study} has no matches yet; run samreg run to its end first")
        found = identify(tracks.subject, left, right, confidence, min_paths)
        tables.write_part(study, NAME, PART, _table(tracks, found, matches_key(keys)))
    sizes = np.bincount(found.cluster[found.cluster >= 0])
    return CohortRoiSummary(
        tracks=int((found.cluster >= 0).sum()),
        of_tracks=len(found.cluster),
        cohort_rois=len(sizes),
        frequent=int((2 * sizes >= len(tracks.subjects)).sum()),
        agreement=float(found.agreeing.sum() / found.matches.sum()),
    )


def matches_key(keys: Iterable[str]) -> str:
    """Digest of what matches of these keys depend on."""
    return digest({"matches": sorted(set(keys)), "version": VERSION})


def remove_stale(study: Path) -> bool:
    """Remove the table if the matches are no longer those that it was made from; whether it was."""
    if not tables.has_part(study, NAME, PART):
        return False
    keys = pc.unique(tables.read_part(study, NAME, PART).column("key")).to_pylist()
    if keys == [matches_key(key for _, key in results.pair_keys(study, "correspondences"))]:
        return False
    tables.remove_part(study, NAME, PART)
    return True


def _read_tracks(study: Path) -> _Tracks:
    rois = tables.read_table(study, "rois")
    subjects = sorted(pc.unique(rois.column("subject")).to_pylist())
    subject = _positions(rois.column("subject"), subjects)
    number, z, area = (rois.column(name).to_numpy() for name in ("track", "slice", "area_mm2"))
    key, roi_track = np.unique(_roi_keys(subject, number), return_inverse=True)
    weight = np.bincount(roi_track, area)
    columns: dict[str, npt.NDArray[np.float64] | Index] = {
        f"centroid_{axis}_mm": np.bincount(roi_track, area * rois.column(f"centroid_{axis}_mm").to_numpy()) / weight
        for axis in "zyx"
    }
    columns["n_rois"] = np.bincount(roi_track)
    for name, extreme in (("first_slice", np.minimum), ("last_slice", np.maximum)):
        columns[name] = np.full(len(key), z[0] if len(z) else 0, dtype=np.int64)
        columns[name][roi_track] = z
        extreme.at(columns[name], roi_track, z)
    roi_key = _roi_keys(subject, rois.column("roi").to_numpy())
    order = np.argsort(roi_key)
    return _Tracks(subjects, key >> 32, key & 0xFFFFFFFF, roi_key[order], roi_track[order], columns)


def _roi_keys(subject: Index, number: npt.NDArray[np.integer]) -> Index:
    """One number for the ROI or track `number` of a subject."""
    return (subject.astype(np.int64) << 32) | number.astype(np.int64)


def _positions(names: pa.ChunkedArray, subjects: list[str]) -> Index:
    """Position of each name in `subjects`, -1 where it is not there."""
    found = pc.fill_null(pc.index_in(names, value_set=pa.array(subjects, pa.string())), -1)
    return np.asarray(found.to_numpy(), dtype=np.int64)


def _read_edges(study: Path, tracks: _Tracks) -> tuple[Index, Index, npt.NDArray[np.float64], set[str]]:
    """Both tracks and the confidence of every match, and the keys of the pairs; one part of the table at a time."""
    columns = ("pair", "key", "moving", "fixed", "moving_roi", "fixed_roi", "confidence")
    keys, pieces = set[str](), [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for part in tables.part_names(study, "correspondences"):
        matches = tables.read_part(study, "correspondences", part, columns)
        ends = (_ends(matches, role, tracks) for role in ("moving", "fixed"))
        pieces.append((*ends, matches.column("confidence").to_numpy()))
        keys |= set(matches.column("key").unique().to_pylist())
    left, right, confidence = (np.concatenate(piece) for piece in zip(*pieces, strict=True))
    return left, right, confidence, keys


def _ends(matches: pa.Table, role: str, tracks: _Tracks) -> Index:
    """Track of the ROI that each match has at one end."""
    key = _roi_keys(_positions(matches.column(role), tracks.subjects), matches.column(f"{role}_roi").to_numpy())
    place = np.minimum(np.searchsorted(tracks.roi_key, key), max(0, len(tracks.roi_key) - 1))
    unknown = np.flatnonzero(tracks.roi_key[place] != key) if len(tracks.roi_key) else np.arange(len(key))
    if len(unknown):
        row = matches.slice(int(unknown[0]), 1).to_pylist()[0]
        raise UsageError(
            f"pair {row['pair']!r} matches ROI {row[f'{role}_roi']} of {row[role]!r}, which the table rois lacks; "
            "run the study again to bring them in step"
        )
    return tracks.roi_track[place]


def _table(tracks: _Tracks, found: Identity, key: str) -> pa.Table:
    """Rows by cohort ROI, then subject; tracks that no match carries to another subject are left out."""
    rows = np.flatnonzero(found.cluster >= 0)
    rows = rows[np.lexsort((tracks.track[rows], tracks.subject[rows], found.cluster[rows]))]
    columns: dict[str, object] = {name: values[rows] for name, values in tracks.columns.items()}
    columns |= {
        "subject": pa.array(tracks.subjects, pa.string()).take(pa.array(tracks.subject[rows])),
        "track": tracks.track[rows],
        "cohort_roi": found.cluster[rows],
        "n_subjects": found.size[rows],
        "frequency": found.size[rows] / len(tracks.subjects),
        "n_matches": found.matches[rows],
        "support": found.agreeing[rows],
        "key": [key] * len(rows),
    }
    return pa.table(columns)
