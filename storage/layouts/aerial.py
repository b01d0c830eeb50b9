"""Aerial pairs of the city of Zurich as published with MultiRegEval, with the transform of every pair known.

Its cell and histology sets have the same layout.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.cohort import Pair, Subject
from storage.layouts.derived import write_points
from storage.layouts.found import Found, Layout
from storage.manifest import CohortError

TREE = """\
Zurich_patches/fold1/patch_tlevel1/info_test.csv               columns Filename, X1_Ref, ..., Y4_Trans
Zurich_patches/fold1/patch_tlevel1/A/test/zh5_03_02_R.png      near-infrared: reference, and zh5_03_02_T.png transformed
Zurich_patches/fold1/patch_tlevel1/B/test/zh5_03_02_R.png      the same in colour"""
_MODALITIES = {"A": ("A", "A"), "B": ("B", "B"), "A2B": ("A", "B"), "B2A": ("B", "A")}  # of moving and fixed
_GRID = 6  # landmarks along a side
_MARGIN = 0.1  # of the side, free of landmarks

Matrix = npt.NDArray[np.float64]


def read(found: Found, select: str) -> None:
    """Two subjects per pair, `.._R` and `.._T`; the pair registers the transformed image to the reference."""
    if select and select not in _MODALITIES:
        raise CohortError(f"--select {select}: no such modality; choose {', '.join(_MODALITIES)}")
    for listing in sorted(found.root.rglob("info_test.csv")):
        above = listing.parent.relative_to(found.root).parts
        with listing.open(newline="", encoding="utf-8-sig") as stream:
            for row in csv.DictReader(stream):
                name = row.get("Filename") or ""
                try:
                    corners = _corners(row)
                except (KeyError, TypeError, ValueError):
                    found.problems.append(f"{found.shown(listing)}, {name}: not the coordinates of 8 corners; left out")
                    continue
                _add_pair(found, listing.parent, "_".join([*above, name]), name, _MODALITIES[select or "B"], corners)


def _add_pair(
    found: Found, level: Path, pair: str, name: str, modalities: tuple[str, str], corners: tuple[Matrix, Matrix]
) -> None:
    points = _landmarks(*corners)
    for side, modality, place in (("R", modalities[1], points[0]), ("T", modalities[0], points[1])):
        subject = f"{pair}_{side}"
        folder = level / modality / "test"
        image = next(iter(sorted(folder.glob(f"{name}_{side}.*"))), folder / f"{name}_{side}.png")
        landmarks = write_points(place, found.files / f"{subject}_landmarks.csv") if len(place) else ""
        found.add(Subject(subject, str(image), landmarks=landmarks, group=pair), modality=modality, level=level.name)
    found.add_pair(Pair(pair, f"{pair}_T", f"{pair}_R"))


def _corners(row: dict[str, str]) -> tuple[Matrix, Matrix]:
    """Corners of the image, and where they lie in the reference for the transformed one: [4, 2] (x, y) px each."""
    ref, trans = (
        np.array([[float(row[f"{axis}{n}_{kind}"]) for axis in "XY"] for n in range(1, 5)]) for kind in ("Ref", "Trans")
    )
    return ref, trans


def _landmarks(ref: Matrix, trans: Matrix) -> tuple[Matrix, Matrix]:
    """Points of the reference on a regular grid and the same in the transformed image, [N, 2] (x, y) px each.

    The published corners say where in the reference the corners of the transformed image come from, so the map from
    the reference to the transformed image takes `trans` to `ref`. Points outside the transformed image are left out.
    """
    low, high = ref.min(axis=0), ref.max(axis=0)
    ticks = np.linspace(low + _MARGIN * (high - low), high - _MARGIN * (high - low), _GRID)
    fixed = np.array([[x, y] for y in ticks[:, 1] for x in ticks[:, 0]])
    matrix, *_ = np.linalg.lstsq(np.column_stack([trans, np.ones(4)]), ref, rcond=None)
    moving = np.column_stack([fixed, np.ones(len(fixed))]) @ matrix
    seen = ((moving >= low) & (moving <= high - 1)).all(axis=1)
    return fixed[seen], moving[seen]


LAYOUT = Layout(
    "aerial",
    TREE,
    "**/info_test.csv",
    read,
    "modality: B colour (the default), A near-infrared; A2B registers A to B, B2A the other way",
)
