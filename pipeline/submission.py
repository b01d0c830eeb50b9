# mypy: disable-error-code="no-untyped-call"
"""A Learn2Reg or LUMIR submission that `samreg export --format learn2reg` wrote: checked, and scored as evaluators do.

Each displacement file is read again, so what is checked and scored is what would be handed in.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from pipeline.algorithms import learn2reg
from pipeline.dispatch import Failure, attempt
from pipeline.errors import UsageError
from pipeline.pair_files import PairUnit, StudyPairs, learn2reg_names
from storage import tables
from storage.cohort import Pair
from storage.geometry import Geometry, to_file_axes
from storage.images import read_labels
from storage.landmarks import local_to_voxels, read_landmarks
from storage.layouts.learn2reg import listed_pairs

Row = dict[str, Any]
TABLE = "submission"


class SubmissionError(ValueError):
    """A displacement file that an evaluator would refuse."""


def wanted_pairs(known: StudyPairs, listing: Path, part: str) -> tuple[list[str], list[str]]:
    """Pairs of the study that a dataset JSON lists under a part, and what it lists that the study lacks.

    Raises:
        CohortError: for a file that is no dataset JSON, or a part that it has no pairs of.
        UsageError: when the study has none of them.
    """
    by_subjects = {(pair.moving, pair.fixed): pair.pair for pair in known.pairs.values()}
    listed = listed_pairs(listing, part)
    names = [by_subjects[each] for each in listed if each in by_subjects]
    if not names:
        first = " to ".join(listed[0])
        raise UsageError(f"{known.folder.root} has none of the {len(listed)} pairs that {listing} lists, as {first}")
    return names, [f"{moving} to {fixed}" for moving, fixed in listed if (moving, fixed) not in by_subjects]


def score_submission(known: StudyPairs, out: Path, pairs: Collection[Pair]) -> tuple[Path, list[Failure]]:
    """Check and score the files of these pairs in `out`; a row each in the table `submission` there.

    Raises:
        UsageError: when the package of the surface distance is not installed.
    """
    _surface_distance()
    rows: list[Row] = []

    def score(unit: PairUnit) -> None:
        rows.append(_score(known, unit.pair, out / names[unit.unit]))

    names = learn2reg_names(pairs)
    failures = [failure for pair in pairs if (failure := attempt(score, PairUnit(pair))) is not None]
    return tables.write_part(out, TABLE, "all", tables.table_from_rows(TABLE, rows)), failures


def _score(known: StudyPairs, pair: Pair, path: Path) -> Row:
    """The row of one pair.

    Raises:
        SubmissionError: for a file that is missing or of another shape, and for landmarks that do not correspond.
        ImageError: for labels or landmarks that cannot be read.
    """
    fixed, moving = known.grids(pair)
    field = _read_field(path, fixed)
    row = {
        "pair": pair.pair,
        "moving": pair.moving,
        "fixed": pair.fixed,
        "file": path.name,
        "l2r_sdlogj": learn2reg.sdlogj(field),
        "lumir_ndv_percent": learn2reg.ndv_percent(field),
    }
    here, there = known.subjects[pair.fixed], known.subjects[pair.moving]
    if here.label and there.label:
        row |= _label_scores(_file_labels(here.label, fixed), _file_labels(there.label, moving), field)
    if here.landmarks and there.landmarks:
        points = [
            local_to_voxels(read_landmarks(subject.landmarks, geometry), geometry)
            for subject, geometry in ((here, fixed), (there, moving))
        ]
        if len(points[0]) != len(points[1]):
            raise SubmissionError(f"{len(points[0])} fixed but {len(points[1])} moving landmarks; rows must correspond")
        errors = learn2reg.landmark_errors(points[0], points[1], field, moving.file_grid().spacing)
        row["l2r_tre_mm"] = float(errors.mean())
    return row


def _read_field(path: Path, fixed: Geometry) -> npt.NDArray[np.float32]:
    if not path.exists():
        raise SubmissionError(f"{path} is missing: export the pair with --format learn2reg")
    field = np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))).T
    expected = (*fixed.file_grid().size, 3)
    if field.shape != expected:
        raise SubmissionError(f"{path} has the shape {field.shape}; the fixed image asks for {expected}")
    return field


def _file_labels(path: str, geometry: Geometry) -> npt.NDArray[np.int32]:
    """Labels (I, J, K) on the axes of the file."""
    return to_file_axes(read_labels(path, geometry), geometry).T


def _label_scores(fixed: npt.NDArray[np.int32], moving: npt.NDArray[np.int32], field: npt.NDArray[np.float32]) -> Row:
    """Means over the labels that both images hold; none where there are none."""
    labels = learn2reg.shared_labels(fixed, moving)
    if not labels:
        return {}
    distance, moved = _surface_distance(), learn2reg.warp_labels(moving, field)
    pairs = [(fixed == label, moved == label) for label in labels]
    dice = [distance.compute_dice_coefficient(a, b) for a, b in pairs]
    hd95 = [
        distance.compute_robust_hausdorff(distance.compute_surface_distances(a, b, np.ones(3)), 95.0) for a, b in pairs
    ]
    return {"l2r_dice": float(np.mean(dice)), "l2r_hd95_vox": float(np.mean(hd95))}


def _surface_distance() -> Any:
    try:
        return importlib.import_module("surface_distance")
    except ImportError:
        raise UsageError("--scores needs the evaluator's surface distance: pip install 'samreg[learn2reg]'") from None
