# mypy: disable-error-code="no-untyped-call"
"""`samreg apply`: a transform on the user's own files.

Images, labels and ROIs of the moving image are carried onto the grid of the fixed one. Landmarks of the fixed image
go with the transform to where they lie in the moving one; landmarks of the moving image go against it, each to the
position that the transform takes there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)
from scipy.spatial import KDTree

from pipeline.algorithms.inverse_points import invert_points
from pipeline.dispatch import Failure, attempt
from pipeline.errors import StudyError, UsageError
from pipeline.pair_files import StudyPairs, bids_labels, pair_rows, read_study_pairs
from pipeline.stages.matched_rois import roi_pairs
from storage import warping
from storage.cohort import Pair
from storage.geometry import Geometry
from storage.images import read_image
from storage.landmarks import read_landmarks, rewrite_landmarks
from storage.sources import suffix
from storage.transforms import Array, Transform, from_itk, read_transform, to_itk

if TYPE_CHECKING:  # this loads torch
    from pipeline.algorithms.fit_problem import Roi

KINDS = ("image", "labels", "landmarks", "moving_landmarks", "rois")
_CLOSE = 1e-3  # of the distance between nodes, within which a point counts as found
_KEPT = (".nii.gz", ".nii", ".mha", ".nrrd", ".png", ".tif", ".tiff", ".csv")


class NoPositionError(ValueError):
    """Some landmarks come from nowhere in the fixed image; the others are written."""


@dataclass(frozen=True)
class Mapping:
    """A transform file between two images.

    Attributes:
        path: the file.
        fixed: grid of the fixed image.
        moving: grid of the moving image; None where it is not known.
        names: of the fixed and of the moving image, in the names of what is written.
        rois: reads the ROIs of the moving image that the pair was fitted to; None where there is no study.
    """

    path: Path
    fixed: Geometry
    moving: Geometry | None
    names: tuple[str, str]
    rois: Callable[[], Sequence[Roi]] | None = None


@dataclass(frozen=True)
class Job:
    """One file, and as what (of KINDS) to take it. `rois` has no file."""

    kind: str
    path: str

    @property
    def unit(self) -> str:
        """Name in messages."""
        return self.path or self.kind


@dataclass(frozen=True)
class Options:
    """How to interpolate: labels, `nearest` or `linear`, and what to fill images with where there is nothing."""

    rule: warping.LabelRule = "nearest"
    fill: float = 0.0


def pair_mapping(study: Path, name: str) -> Mapping:
    """The transform of a pair of a study.

    Raises:
        UsageError: for no study, or no such pair.
        FileNotFoundError: when the pair has no transform.
    """
    known = read_study_pairs(study)
    pair = known.find(name)
    labels = bids_labels(known.subjects)
    names = labels[pair.fixed], labels[pair.moving]
    return Mapping(known.transform(pair), *known.grids(pair), names, partial(_moving_rois, known, pair))


def file_mapping(path: Path, fixed: str | None, moving: str | None) -> Mapping:
    """A transform file between two images given as files.

    Raises:
        UsageError: without the fixed image.
        ImageError: for an image that cannot be used.
    """
    if fixed is None:
        raise UsageError(f"{path} is a transform file: give its fixed image with --fixed, its moving one with --moving")
    there = None if moving is None else read_image(moving).geometry
    return Mapping(path, read_image(fixed).geometry, there, ("fixed", "moving"))


def apply(mapping: Mapping, jobs: Sequence[Job], out: Path, options: Options) -> tuple[list[Path], list[Failure]]:
    """Write every file anew into `out`; what was written, and why the others failed.

    Raises:
        UsageError: when there is nothing to do, a file of the pair is missing, or two would have the same name.
        StudyError: when the disk is full.
    """
    targets = {job: out / _target(job, mapping) for job in jobs}
    _check(mapping, targets)
    done, failures = [], []
    for job, target in targets.items():
        failure = attempt(partial(_run, target, mapping, options), job)
        if failure is None:
            done.append(target)
        elif failure.disk_full:
            raise StudyError(f"{failure.message}; what is written is kept")
        else:
            failures.append(failure)
    return done, failures


def inverse_at(transform: Transform, points: Array) -> Array:
    """Fixed positions [N, n] that a transform takes to these moving positions [N, n]; NaN where it folds too much."""
    nodes = transform.nodes().reshape(-1, points.shape[1])
    _, nearest = KDTree(transform.at(nodes)).query(points)
    affine = np.linalg.inv(transform.affine)
    starts = np.stack([nodes[nearest], points @ affine[:-1, :-1].T + affine[:-1, -1]])
    off = [np.linalg.norm(transform.at(start) - points, axis=1) for start in starts]
    start = np.where((off[0] < off[1])[:, None], *starts)
    close = _CLOSE * float(transform.spacing.min())
    found, reached = invert_points(transform.at, points, start, close, close)
    return np.where(reached[:, None], found, np.nan)


def _check(mapping: Mapping, targets: dict[Job, Path]) -> None:
    if not targets:
        raise UsageError("nothing to apply the transform to: give --image, --labels, --landmarks or the like")
    twice = [target.name for target, count in Counter(targets.values()).items() if count > 1]
    if twice:
        raise UsageError(f"two files would be written as {twice[0]}; apply the transform to one after the other")
    for job in targets:
        if job.kind.endswith("landmarks") and mapping.moving is None:
            raise UsageError("landmarks need the grid of the moving image: give it with --moving")
        if job.kind == "rois" and mapping.rois is None:
            raise UsageError("a transform file has no ROIs: give a study and the name of a pair")


def _target(job: Job, mapping: Mapping) -> str:
    """Name of what is written: whose space it lies in, and the format of the input where that can be kept."""
    space = mapping.names[1 if job.kind == "landmarks" else 0]
    if job.kind == "rois":
        return f"rois_in-{space}.nii.gz"
    name, ending = Path(job.path.rstrip("/")).name, suffix(Path(job.path))
    stem = name[: len(name) - len(ending)] if ending else name
    kept = ending if ending in _KEPT else (".nii.gz" if mapping.fixed.has_spacing else ".png")
    return f"{stem}_in-{space}{kept}"


def _run(target: Path, mapping: Mapping, options: Options, job: Job) -> None:
    if job.kind.endswith("landmarks"):
        _move_landmarks(job.path, target, mapping, back=job.kind == "moving_landmarks")
        return
    transform = warping.read_itk_transform(mapping.path)
    if job.kind == "rois":
        warped = _warp_rois(mapping, transform)
    elif job.kind == "labels":
        labels = warping.read_moving(job.path, mapping.moving, labels=True)
        warped = warping.warp_labels(labels, transform, mapping.fixed, options.rule)
    else:
        image = warping.read_moving(job.path, mapping.moving)
        warped = warping.warp_intensities(image, transform, mapping.fixed, options.fill)
    warping.write_image(warped, target)


def _move_landmarks(path: str, target: Path, mapping: Mapping, back: bool) -> None:
    assert mapping.moving is not None
    here, there = (mapping.moving, mapping.fixed) if back else (mapping.fixed, mapping.moving)
    transform = read_transform(mapping.path)
    points = to_itk(read_landmarks(path, here), here)
    moved = inverse_at(transform, points) if back else transform.at(points)
    rewrite_landmarks(path, target, from_itk(moved, there), there)
    lost = np.flatnonzero(np.isnan(moved).any(axis=1)) + 1
    if len(lost):
        raise NoPositionError(
            f"{path}: the transform takes no position to point {', '.join(map(str, lost[:5]))} of {len(moved)}, since "
            f"it folds there; left empty in {target}"
        )


def _warp_rois(mapping: Mapping, transform: sitk.Transform) -> sitk.Image:
    """Each ROI as one frame, 1 where its interpolated mask is 0.5 or more, in the order of their ranks."""
    assert mapping.rois is not None
    assert mapping.moving is not None
    frames = []
    for roi in mapping.rois():
        volume = np.zeros(mapping.moving.shape, np.float32)
        volume[tuple(slice(o, o + n) for o, n in zip(roi.offset, roi.mask.shape, strict=True))] = roi.mask
        image = warping.from_analysis(volume, mapping.moving)
        frames.append(warping.warp_intensities(image, transform, mapping.fixed) >= 0.5)
    joined: sitk.Image = sitk.JoinSeries(frames)
    return joined


def _moving_rois(known: StudyPairs, pair: Pair) -> list[Roi]:
    """ROIs of the moving subject in the fit, in the order of their ranks.

    Raises:
        UsageError: when no ROIs were matched.
    """
    store = known.folder.store
    rows = pair_rows(known.folder.root, "correspondences", pair.pair).sort_by("rank").to_pylist()
    if not rows:
        raise UsageError(f"pair {pair.pair} has no matched ROIs")
    return [found.moving for found in roi_pairs(store.read(pair.fixed), store.read(pair.moving), rows)]
