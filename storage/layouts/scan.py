"""Cohorts from folders that follow no particular layout."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from storage.cohort import Cohort, Subject
from storage.layouts import bids, learn2reg
from storage.layouts.found import LABEL_ENDING, stem, visible
from storage.manifest import CohortError
from storage.sources import PICTURE_SUFFIXES

_IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", *PICTURE_SUFFIXES)


def scan(path: str | Path) -> Cohort:
    """Make a cohort from what lies on disk, in name order.

    Args:
        path: a BIDS folder (sub-*/[ses-*/]anat), a Learn2Reg dataset JSON or a folder holding one, any folder
            of images: labels are found as X_gt, X_seg, X_label, X_dseg, X_mask or in labels* beside images*,
            landmarks as X_landmarks.csv; a folder of DICOM files is one subject.

    Raises:
        FileNotFoundError: when it does not exist.
        CohortError: when no image is found, or the JSON is not one of Learn2Reg's.
    """
    root = Path(path).resolve()
    if root.is_file():
        return Cohort(_listed(root))
    if not root.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    listings = learn2reg.list_files(root)
    if listings:
        return Cohort(_listed(listings[0]))
    subjects = tuple(bids.list_subjects(root))
    subjects = subjects or _scan_folder(root)
    if not subjects:
        raise CohortError(f"{path}: no image found; expected {', '.join(_IMAGE_SUFFIXES)} or DICOM folders")
    return Cohort(subjects)


def _scan_folder(root: Path) -> tuple[Subject, ...]:
    files = [p for p in visible(root.rglob("*")) if p.is_file()]
    images = [p for p in files if p.name.lower().endswith(_IMAGE_SUFFIXES)]
    by_stem = {(p.parent, stem(p)): p for p in images}
    labels = {p for p in images if LABEL_ENDING.search(stem(p)) or p.parent.name.lower().startswith("label")}
    found: list[tuple[Path, str, str]] = []
    for image in (p for p in images if p not in labels):
        beside = re.sub("(?i)^images?", "labels", image.parent.name)
        candidates = [(image.parent, f"{stem(image)}_{e}") for e in ("gt", "seg", "label", "labels", "dseg", "mask")]
        candidates += [(image.parent.parent / beside, re.sub(r"_0000$", "", stem(image)))]
        candidates += [(image.parent.parent / beside, stem(image))]
        label = next((by_stem[c] for c in candidates if by_stem.get(c, image) in labels), None)
        landmarks = image.parent / f"{stem(image)}_landmarks.csv"
        found.append((image, str(label or ""), str(landmarks) if landmarks.exists() else ""))
    found += [(folder, "", "") for folder in sorted({p.parent for p in files if _is_dicom(p)})]
    stems = [stem(path) for path, _, _ in found]
    times = Counter(stems)
    return tuple(
        Subject(stem if times[stem] == 1 else path.relative_to(root).as_posix(), str(path), label, landmarks)
        for stem, (path, label, landmarks) in zip(stems, found, strict=True)
    )


def _listed(listing: Path) -> tuple[Subject, ...]:
    images = learn2reg.listed_images(learn2reg.read_listing(listing))
    return tuple(
        Subject(stem(image), str(listing.parent / image), str(listing.parent / e["label"]) if "label" in e else "")
        for image, e in images.items()
    )


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() not in ("", ".dcm", ".ima"):
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
