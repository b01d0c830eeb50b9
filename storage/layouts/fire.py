"""FIRE: pairs of retinal fundus photographs with control points."""

from __future__ import annotations

import re
from pathlib import Path

from storage.cohort import Pair, Subject
from storage.layouts.derived import read_points, write_points
from storage.layouts.found import Found, Layout, one_of, visible
from storage.manifest import CohortError
from storage.sources import PICTURE_SUFFIXES, ImageError

TREE = """\
FIRE/Images/A01_1.jpg                             and A01_2.jpg; categories A, P and S
FIRE/Ground Truth/control_points_A01_1_2.txt      x1 y1 x2 y2 in pixels, optional"""
_CATEGORIES = "APS"
_IMAGE = re.compile(r"([APS]\d+)_([12])")


def read(found: Found, select: str) -> None:
    """Two subjects per pair, `A01_1` and `A01_2`; the pair registers the second to the first."""
    if set(select) - set(_CATEGORIES):
        raise CohortError(f"--select {select}: no such category; choose of A, P and S")
    folder = one_of(found.root, [*found.root.glob("Images"), *found.root.glob("*/Images")], "folder Images")
    images = {p.stem: p for p in visible(folder.iterdir()) if p.suffix.lower() in PICTURE_SUFFIXES}
    pairs = sorted(
        {match[1] for match in map(_IMAGE.fullmatch, images) if match and match[1][0] in (select or _CATEGORIES)}
    )
    for pair in pairs:
        landmarks = _control_points(found, folder.parent / "Ground Truth", pair)
        for side in ("1", "2"):
            name = f"{pair}_{side}"
            place = str(images.get(name, folder / f"{name}.jpg"))
            found.add(Subject(name, place, landmarks=landmarks.get(side, ""), group=pair), category=pair[0])
        found.add_pair(Pair(pair, f"{pair}_2", f"{pair}_1"))


def _control_points(found: Found, folder: Path, pair: str) -> dict[str, str]:
    """Landmark files of the two images of a pair, none if it has no control points."""
    source = folder / f"control_points_{pair}_1_2.txt"
    if not source.exists():
        return {}
    try:
        points = read_points(source, 4)
    except ImageError as error:
        found.problems.append(f"{pair}: {error}; listed without control points")
        return {}
    return {
        side: write_points([point[at : at + 2] for point in points], found.files / f"{pair}_{side}_landmarks.csv")
        for side, at in (("1", 0), ("2", 2))
    }


LAYOUT = Layout("fire", TREE, "**/Images/[APS][0-9]*_[12].*", read, "categories, for example S or AP (default: all)")
