"""Medical Segmentation Decathlon: Task04_Hippocampus, Task05_Prostate and the other tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from storage.cohort import Subject
from storage.layouts.derived import write_frame
from storage.layouts.found import Found, Layout, one_of, stem
from storage.manifest import CohortError
from storage.sources import ImageError

TREE = """\
Task05_Prostate/dataset.json                          lists the images and names the modalities
Task05_Prostate/imagesTr/prostate_00.nii.gz           4D where there are several modalities: one is copied out of it
Task05_Prostate/labelsTr/prostate_00.nii.gz"""


def read(found: Found, select: str) -> None:
    """The training images with their labels, one modality of them; the test images have no labels and are left out."""
    listing = one_of(found.root, [*found.root.glob("dataset.json"), *found.root.glob("*/dataset.json")], "dataset.json")
    record = _read_listing(listing)
    modalities = [record["modality"][key] for key in sorted(record["modality"], key=int)]
    if select and select not in modalities:
        raise CohortError(f"--select {select}: no such modality; {listing} has {', '.join(modalities)}")
    chosen = modalities.index(select) if select else 0
    for entry in record["training"]:
        image, label = listing.parent / entry["image"], listing.parent / entry["label"]
        name, place = stem(image), str(image)
        if len(modalities) > 1:
            try:
                place = write_frame(image, chosen, found.files / f"{name}_{modalities[chosen]}.mha")
            except ImageError as error:
                found.problems.append(f"{name}: {error}; left out")
                continue
        found.add(Subject(name, place, str(label)), modality=modalities[chosen])


def _read_listing(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise CohortError(f"{path}: not a JSON file") from None
    entries = record.get("training") if isinstance(record, dict) else None
    listed = isinstance(entries, list) and all(isinstance(e, dict) and {"image", "label"} <= set(e) for e in entries)
    if not entries or not listed or not isinstance(record.get("modality"), dict):
        raise CohortError(f"{path}: no modality, or no training images with labels; not a Decathlon dataset.json")
    return dict(record)


LAYOUT = Layout(
    "msd",
    TREE,
    "**/dataset.json",
    read,
    "the modality of 4D images, as named in dataset.json: T2, ADC (default: the first)",
)
