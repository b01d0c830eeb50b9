"""PROMISE12: T2-weighted MR of the prostate."""

from __future__ import annotations

from collections import Counter

from storage.cohort import Subject
from storage.layouts.found import Found, Layout, existing

TREE = """\
TrainingData/Case00.mhd                    and its voxels, Case00.raw
TrainingData/Case00_segmentation.mhd       labels, optional, and Case00_segmentation.raw"""
_CASE = "Case[0-9][0-9].mhd"


def read(found: Found, select: str) -> None:
    """Every case; its folder is part of the name where training and test cases share a number."""
    headers = sorted(found.root.rglob(_CASE))
    times = Counter(header.stem for header in headers)
    for header in headers:
        name = header.stem if times[header.stem] == 1 else f"{header.parent.name}_{header.stem}"
        if not any(header.with_suffix(suffix).exists() for suffix in (".raw", ".zraw")):
            found.problems.append(f"{name}: {found.shown(header)} has no voxels beside it (.raw or .zraw); left out")
            continue
        found.add(Subject(name, str(header), existing(header.with_name(f"{header.stem}_segmentation.mhd"))))


LAYOUT = Layout("promise12", TREE, f"**/{_CASE}", read)
