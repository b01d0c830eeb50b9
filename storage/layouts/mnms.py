"""M&Ms, the Multi-Centre, Multi-Vendor and Multi-Disease cardiac challenge of 2020."""

from __future__ import annotations

import csv
from pathlib import Path

from storage.cohort import Pair, Subject
from storage.layouts.derived import write_frame
from storage.layouts.found import Found, Layout, one_of, visible
from storage.manifest import CohortError
from storage.sources import ImageError

TREE = """\
OpenDataset/211230_M&Ms_Dataset_information_diagnosis_opendataset.csv     columns External code, Vendor, ED, ES
OpenDataset/Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz                      4D: the two frames are copied out of it
OpenDataset/Training/Labeled/A0S9V9/A0S9V9_sa_gt.nii.gz                   labels, 4D, optional"""
_KEPT = {"vendor": "Vendor", "centre": "Centre", "pathology": "Pathology"}
_NEEDED = ("External code", "Vendor", "ED", "ES")


def read(found: Found, select: str) -> None:
    """Two subjects per heart, `A0S9V9_ED` and `A0S9V9_ES`, copied from the cine; the pair registers ES to ED."""
    listing = _read_listing(found.root)
    for cine in visible(found.root.rglob("*_sa.nii.gz")):
        code = cine.parent.name
        row = listing.get(code)
        if row is None:
            found.problems.append(f"{found.shown(cine)}: {code} is not in the table; left out")
            continue
        for phase in ("ED", "ES"):
            _add_frame(found, cine, phase, row)
        found.add_pair(Pair(code, f"{code}_ES", f"{code}_ED"))


def _add_frame(found: Found, cine: Path, phase: str, row: dict[str, str]) -> None:
    code = cine.parent.name
    subject = f"{code}_{phase}"
    labels = cine.with_name(f"{code}_sa_gt.nii.gz")
    try:
        frame = int(float(row[phase]))  # counted from 0
    except ValueError:
        found.problems.append(f"{subject}: the table gives {row[phase]!r} for {phase}, not a frame; left out")
        return
    try:
        image = write_frame(cine, frame, found.files / f"{subject}.mha")
        label = write_frame(labels, frame, found.files / f"{subject}_gt.mha") if labels.exists() else ""
    except ImageError as error:
        found.problems.append(f"{subject}: {error}; left out")
        return
    known = {name: row.get(column) or "" for name, column in _KEPT.items()}
    found.add(Subject(subject, image, label, group=code), phase=phase, **known)


def _read_listing(root: Path) -> dict[str, dict[str, str]]:
    """Rows of the table of hearts by their code; it lies in the root, or up to two folders above it."""
    tables = [path for folder in (root, *root.parents[:2]) for path in folder.glob("*.csv") if "M&Ms" in path.name]
    path = one_of(root, tables, "table *M&Ms*.csv, here or up to two folders above")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    missing = [column for column in _NEEDED if not rows or column not in rows[0]]
    if missing:
        raise CohortError(f"{path}: no column {', '.join(missing)}; found {', '.join(rows[0]) if rows else 'no rows'}")
    return {row["External code"]: row for row in rows}


LAYOUT = Layout("mnms", TREE, "**/*_sa.nii.gz", read)
