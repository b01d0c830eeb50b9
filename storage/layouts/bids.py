"""BIDS, the Brain Imaging Data Structure: anatomical images and their segmentations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from storage.cohort import Subject
from storage.layouts.found import LABEL_ENDING, Found, Layout, stem, visible
from storage.manifest import CohortError

TREE = """\
sub-01/anat/sub-01_T1w.nii.gz
sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz                                with sessions
derivatives/manual/sub-01/anat/sub-01_space-orig_dseg.nii.gz             labels, optional"""


def read(found: Found, select: str) -> None:
    """Every anatomical image, or those of one suffix; sessions of a person form a group."""
    for subject in list_subjects(found.root, select):
        found.add(subject)
    if select and not found.subjects:
        suffixes = {stem(subject.image).rsplit("_", 1)[-1] for subject in list_subjects(found.root)}
        raise CohortError(f"--select {select}: no such image; found {', '.join(sorted(suffixes)) or 'none at all'}")


def list_subjects(root: Path, suffix: str = "") -> Iterator[Subject]:
    """Anatomical images, in name order; with a suffix those that end with it only."""
    for anat in sorted([*root.glob("sub-*/anat"), *root.glob("sub-*/ses-*/anat")]):
        volumes = [p for p in visible(anat.iterdir()) if p.name.endswith((".nii", ".nii.gz"))]
        images = [p for p in volumes if not LABEL_ENDING.search(stem(p))]
        images = [p for p in images if not suffix or stem(p).endswith(f"_{suffix}")]
        place = anat.parent.relative_to(root)
        for image in images:
            prefix = stem(image).rsplit("_", 1)[0]
            places = [anat, *sorted(root.glob(f"derivatives/*/{place.as_posix()}/anat"))]
            label = next((p for folder in places for p in sorted(folder.glob(f"{prefix}*_dseg.nii*"))), "")
            session = place.parts[1].removeprefix("ses-") if len(place.parts) > 1 else ""
            name = "_".join(place.parts) if len(images) == 1 else stem(image)
            group = place.parts[0] if session else ""
            yield Subject(name, str(image), str(label), group=group, session=session)


LAYOUT = Layout("bids", TREE, "sub-*/**/anat", read, "suffix of the images: T1w, T2w, ... (default: all)")
