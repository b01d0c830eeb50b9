"""Cohort manifests and pair lists: who is registered to whom."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage.atomic import replace_file
from storage.manifest import CohortError, read_rows
from storage.sources import PICTURE_SUFFIXES, is_remote

__all__ = [
    "Cohort",
    "CohortError",
    "Pair",
    "Subject",
    "read_cohort",
    "read_pairs",
    "scan",
    "subject_key",
    "write_cohort",
]

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", *PICTURE_SUFFIXES)
_LABEL_ENDING = re.compile(r"_(gt|seg|label|labels|dseg|mask)$")
_RESERVED = ("zarr.json",)  # a name that the Zarr format gives to its own file
_PATHS = ("image", "label", "landmarks", "segmentation")


@dataclass(frozen=True)
class Subject:
    """One row of the manifest.

    Attributes:
        subject: unique name.
        image: absolute path or URI.
        label: label map, or "" when there is none; landmarks likewise.
        group: free text, "" when not given; session likewise.
        segmentation: class labels or class probabilities that become the ROIs (`segmenter: labels`), or "".
    """

    subject: str
    image: str
    label: str = ""
    landmarks: str = ""
    group: str = ""
    session: str = ""
    segmentation: str = ""


@dataclass(frozen=True)
class Cohort:
    """The subjects in the order of the manifest."""

    subjects: tuple[Subject, ...]

    def by_name(self) -> dict[str, Subject]:
        """Subjects by name."""
        return {subject.subject: subject for subject in self.subjects}


class Pair(NamedTuple):
    """Register `moving` to `fixed` (subject names)."""

    pair: str
    moving: str
    fixed: str


def subject_key(name: str) -> str:
    """File name for a subject or pair: the name itself when that is safe, else a slug with a hash."""
    if _SAFE.fullmatch(name) and name.lower() not in _RESERVED:
        return name
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-_")[:40]
    return f"{slug or 'subject'}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def read_cohort(path: str | Path) -> Cohort:
    """Read a manifest, CSV or Parquet: columns subject, image, optional label, landmarks, segmentation, group, session.

    Paths may be URIs or relative to the manifest; they are not opened here, so a missing image fails alone.

    Raises:
        FileNotFoundError: when the manifest is missing.
        CohortError: for missing columns, empty names or images, duplicate subjects, no rows.
    """
    manifest = Path(path).resolve()
    optional = ("label", "landmarks", "segmentation", "group", "session")
    rows = read_rows(manifest, required=("subject", "image"), optional=optional)
    subjects: list[Subject] = []
    first_row: dict[str, int] = {}
    for number, row in rows:
        for column in ("subject", "image"):
            if not row[column]:
                raise CohortError(f"{path}, row {number}: empty {column}")
        if row["subject"] in first_row:
            raise CohortError(
                f"{path}, row {number}: subject {row['subject']!r} appears before in row "
                f"{first_row[row['subject']]}; names must be unique"
            )
        first_row[row["subject"]] = number
        located = {column: _locate(row[column], manifest.parent) for column in _PATHS}
        subjects.append(Subject(row["subject"], **located, group=row["group"], session=row["session"]))
    if not subjects:
        raise CohortError(f"{path}: the manifest lists no subjects")
    return Cohort(tuple(subjects))


def read_pairs(path: str | Path, cohort: Cohort) -> tuple[tuple[Pair, ...], list[tuple[int, Pair, str]]]:
    """Read a pair list, CSV or Parquet: columns moving, fixed, optional pair (default "moving__fixed").

    Returns:
        The pairs of known subjects, and (row, pair, missing subject) for each that names an unknown one.

    Raises:
        FileNotFoundError: when the list is missing.
        CohortError: for missing columns, empty cells, duplicate pair names, no rows.
    """
    names = cohort.by_name()
    pairs: list[Pair] = []
    unknown: list[tuple[int, Pair, str]] = []
    first_row: dict[str, int] = {}
    for number, row in read_rows(Path(path), required=("moving", "fixed"), optional=("pair",)):
        if not row["moving"] or not row["fixed"]:
            raise CohortError(f"{path}, row {number}: empty {'fixed' if row['moving'] else 'moving'}")
        pair = Pair(row["pair"] or f"{row['moving']}__{row['fixed']}", row["moving"], row["fixed"])
        if pair.pair in first_row:
            raise CohortError(f"{path}, row {number}: pair {pair.pair!r} appears before in row {first_row[pair.pair]}")
        first_row[pair.pair] = number
        missing = [name for name in (pair.moving, pair.fixed) if name not in names]
        if missing:
            unknown.append((number, pair, missing[0]))
        else:
            pairs.append(pair)
    if not first_row:
        raise CohortError(f"{path}: the list holds no pairs")
    return tuple(pairs), unknown


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
        return Cohort(_scan_learn2reg(root))
    if not root.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    listings = [p for p in sorted(root.glob("*dataset*.json")) if p.name != "dataset_description.json"]
    if listings:
        return Cohort(_scan_learn2reg(listings[0]))
    subjects = _scan_bids(root) if any(root.glob("sub-*/")) else ()
    subjects = subjects or _scan_folder(root)
    if not subjects:
        raise CohortError(f"{path}: no image found; expected {', '.join(_IMAGE_SUFFIXES)} or DICOM folders")
    return Cohort(subjects)


def write_cohort(cohort: Cohort, path: str | Path) -> None:
    """Write a manifest, CSV or (by the suffix) Parquet; local paths below its folder become relative."""
    manifest = Path(path).resolve()
    columns = [f.name for f in fields(Subject)]
    rows = [
        [_relative(getattr(s, c), manifest.parent) if c in _PATHS else getattr(s, c) for c in columns]
        for s in cohort.subjects
    ]
    with replace_file(manifest) as temporary:
        if manifest.suffix == ".parquet":
            pq.write_table(pa.table({c: [row[i] for row in rows] for i, c in enumerate(columns)}), temporary)
        else:
            with temporary.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream, lineterminator="\n").writerows([columns, *rows])


def _locate(path: str, folder: Path) -> str:
    if not path or is_remote(path):
        return path
    return str((folder / Path(path).expanduser()).absolute())


def _relative(path: str, folder: Path) -> str:
    if path and not is_remote(path) and Path(path).is_relative_to(folder):
        return Path(path).relative_to(folder).as_posix()
    return path


def _scan_folder(root: Path) -> tuple[Subject, ...]:
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    images = [p for p in files if p.name.lower().endswith(_IMAGE_SUFFIXES)]
    by_stem = {(p.parent, _stem(p)): p for p in images}
    labels = {p for p in images if _LABEL_ENDING.search(_stem(p)) or p.parent.name.lower().startswith("label")}
    found: list[tuple[Path, str, str]] = []
    for image in (p for p in images if p not in labels):
        beside = re.sub("(?i)^images?", "labels", image.parent.name)
        candidates = [(image.parent, f"{_stem(image)}_{e}") for e in ("gt", "seg", "label", "labels", "dseg", "mask")]
        candidates += [(image.parent.parent / beside, re.sub(r"_0000$", "", _stem(image)))]
        candidates += [(image.parent.parent / beside, _stem(image))]
        label = next((by_stem[c] for c in candidates if by_stem.get(c, image) in labels), None)
        landmarks = image.parent / f"{_stem(image)}_landmarks.csv"
        found.append((image, str(label or ""), str(landmarks) if landmarks.exists() else ""))
    found += [(folder, "", "") for folder in sorted({p.parent for p in files if _is_dicom(p)})]
    stems = [_stem(path) for path, _, _ in found]
    return tuple(
        Subject(stem if stems.count(stem) == 1 else path.relative_to(root).as_posix(), str(path), label, landmarks)
        for stem, (path, label, landmarks) in zip(stems, found, strict=True)
    )


def _scan_bids(root: Path) -> tuple[Subject, ...]:
    subjects = []
    for anat in sorted([*root.glob("sub-*/anat"), *root.glob("sub-*/ses-*/anat")]):
        volumes = [p for p in sorted(anat.iterdir()) if p.name.endswith((".nii", ".nii.gz"))]
        images = [p for p in volumes if not _LABEL_ENDING.search(_stem(p))]
        place = anat.parent.relative_to(root)
        for image in images:
            prefix = _stem(image).rsplit("_", 1)[0]
            places = [anat, *sorted(root.glob(f"derivatives/*/{place.as_posix()}/anat"))]
            label = next((p for folder in places for p in sorted(folder.glob(f"{prefix}*_dseg.nii*"))), "")
            session = place.parts[1].removeprefix("ses-") if len(place.parts) > 1 else ""
            name = "_".join(place.parts) if len(images) == 1 else _stem(image)
            subjects.append(Subject(name, str(image), str(label), session=session))
    return tuple(subjects)


def _scan_learn2reg(listing: Path) -> tuple[Subject, ...]:
    try:
        record = json.loads(listing.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise CohortError(f"{listing}: not a JSON file") from None
    images: dict[str, str] = {}
    for part in ("training", "validation", "registration_val", "test", "testing", "registration_test"):
        for image, label in _listed(record.get(part) if isinstance(record, dict) else None):
            images[image] = images.get(image) or label
    if not images:
        raise CohortError(f"{listing}: no images under training, validation or test; expected a Learn2Reg dataset")
    return tuple(
        Subject(_stem(Path(image)), _locate(image, listing.parent), _locate(label, listing.parent))
        for image, label in images.items()
    )


def _listed(entry: Any) -> list[tuple[str, str]]:
    """(image, label or "") of every image below an entry of the JSON, which nests them in several ways."""
    if isinstance(entry, str):
        return [(entry, "")]
    if isinstance(entry, list):
        return [image for item in entry for image in _listed(item)]
    if not isinstance(entry, dict):
        return []
    if "image" in entry:
        label = entry.get("label", "")
        return [(image, label if isinstance(label, str) else "") for image, _ in _listed(entry["image"])]
    return [image for item in entry.values() for image in _listed(item)]


def _stem(path: Path) -> str:
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() not in ("", ".dcm", ".ima"):
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"
