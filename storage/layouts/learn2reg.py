"""Learn2Reg tasks of 2021 and later: LungCT, AbdomenCTCT, NLST and others with a dataset JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.cohort import Pair, Subject
from storage.layouts.derived import read_points, write_points
from storage.layouts.found import Found, Layout, existing, one_of, stem, visible
from storage.manifest import CohortError
from storage.sources import ImageError

TREE = """\
LungCT/LungCT_dataset.json                      lists the images, labels or masks, and the pairs
LungCT/imagesTr/LungCT_0001_0000.nii.gz
LungCT/labelsTr/LungCT_0001_0000.nii.gz         labels, optional; without them masksTr serves as label
LungCT/keypointsTr/LungCT_0001_0000.csv         optional: voxels without a header, rows correspond within a case"""
_CASE = re.compile(r"(.+_\d{4})_\d{4}")
_PARTS = ("training", "validation", "registration_val", "test", "testing", "registration_test")
_PAIRS = {"val": "registration_val", "training": "training_paired_images", "test": "registration_test"}


def read(found: Found, select: str) -> None:
    """Every listed image, in the group of its case; pairs of one part of the data set."""
    part = select or "val"
    if part not in _PAIRS:
        raise CohortError(f"--select {select}: no such part; choose {', '.join(_PAIRS)}")
    folders = [found.root, *(path for path in sorted(found.root.iterdir()) if path.is_dir())]
    listing = one_of(found.root, [file for folder in folders for file in list_files(folder)], "*_dataset.json")
    record = read_listing(listing)
    for image, entry in listed_images(record).items():
        _add_image(found, listing.parent, image, entry)
    pairs = list(_listed_pairs(record.get(_PAIRS[part])))
    for moving, fixed in pairs:
        found.add_pair(Pair(f"{moving}__{fixed}", moving, fixed))
    if select and not pairs:
        found.problems.append(f"{listing.name}: no pairs under {_PAIRS[part]}")


def list_files(root: Path) -> list[Path]:
    """Dataset JSON files in a folder, that of BIDS left out."""
    return [path for path in visible(root.glob("*dataset*.json")) if path.name != "dataset_description.json"]


def read_listing(path: Path) -> dict[str, Any]:
    """A dataset JSON.

    Raises:
        CohortError: when it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise CohortError(f"{path}: not a JSON file") from None
    if not isinstance(record, dict) or not listed_images(record):
        raise CohortError(f"{path}: no images under training, validation or test; expected a Learn2Reg dataset")
    return record


def listed_pairs(listing: Path, part: str) -> list[tuple[str, str]]:
    """Subjects (moving, fixed) of the pairs of a part of a dataset JSON: val, training or test.

    Raises:
        CohortError: for a file that is none, or a part without pairs.
    """
    if part not in _PAIRS:
        raise CohortError(f"{part} is no part of a dataset; choose {', '.join(_PAIRS)}")
    pairs = list(_listed_pairs(read_listing(listing).get(_PAIRS[part])))
    if not pairs:
        raise CohortError(f"{listing}: no pairs under {_PAIRS[part]}")
    return pairs


def listed_images(record: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The other files of every image, by its path: `label`, `mask`, `keypoints`, ... as far as they are listed."""
    images: dict[str, dict[str, str]] = {}
    for part in _PARTS:
        for image, entry in _images_below(record.get(part)):
            place = Path(image).as_posix()  # "./a" and "a" are one
            images[place] = images.get(place) or entry
    return images


def _images_below(entry: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Images below an entry of the JSON, which nests them in several ways."""
    if isinstance(entry, str):
        yield entry, {}
    elif isinstance(entry, list):
        for item in entry:
            yield from _images_below(item)
    elif isinstance(entry, dict) and "image" in entry:
        beside = {key: value for key, value in entry.items() if key != "image" and isinstance(value, str)}
        for image, _ in _images_below(entry["image"]):
            yield image, beside
    elif isinstance(entry, dict):
        yield from _images_below(list(entry.values()))


def _listed_pairs(entries: Any) -> Iterator[tuple[str, str]]:
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or not {"moving", "fixed"} <= set(entry):
            raise CohortError(f"a pair of the dataset JSON is {entry!r}; expected moving and fixed")
        yield stem(entry["moving"]), stem(entry["fixed"])


def _add_image(found: Found, folder: Path, image: str, entry: dict[str, str]) -> None:
    name = stem(image)
    label = _beside(folder / image, folder, entry, "label") or _beside(folder / image, folder, entry, "mask")
    keypoints = _beside(folder / image, folder, entry, "keypoint", ".csv")
    landmarks = ""
    if keypoints:
        try:
            landmarks = write_points(read_points(Path(keypoints), 3, ","), found.files / f"{name}_keypoints.csv")
        except (ImageError, FileNotFoundError) as error:
            found.problems.append(f"{name}: {error}; listed without keypoints")
    case = _CASE.fullmatch(name)
    found.add(Subject(name, str(folder / image), label, landmarks, group=case[1] if case else ""))


def _beside(image: Path, root: Path, entry: dict[str, str], kind: str, suffix: str = ".nii.gz") -> str:
    """The file of a kind that goes with an image: as listed, else by the names of the folders, else ""."""
    listed = entry.get(kind) or entry.get(f"{kind}s")
    if listed:
        return str(root / listed)
    if "images" not in image.parent.name:
        return ""
    beside = image.parent.with_name(image.parent.name.replace("images", f"{kind}s"))
    return existing(beside / f"{stem(image)}{suffix}")


LAYOUT = Layout("learn2reg", TREE, "**/*_dataset.json", read, "the pairs: val (the default), training or test")
