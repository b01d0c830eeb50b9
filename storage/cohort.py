"""Cohort manifests and pair lists: who is registered to whom."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage.atomic import replace_file
from storage.manifest import CohortError, read_rows
from storage.sources import is_remote

__all__ = [
    "Cohort",
    "CohortError",
    "Pair",
    "Subject",
    "read_cohort",
    "read_pairs",
    "subject_key",
    "write_cohort",
    "write_pairs",
]

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
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
        CohortError: for missing columns, empty names or images, subjects whose names are the same or, as names of
            files, differ in case only, which not every disk tells apart, no rows.
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
        key = subject_key(row["subject"]).lower()
        if key in first_row:
            raise CohortError(
                f"{path}, row {number}: subject {row['subject']!r} appears before in row {first_row[key]}; "
                "names must be unique, whatever the case of their letters"
            )
        first_row[key] = number
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


def write_cohort(cohort: Cohort, path: str | Path, more: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Write a manifest, CSV or (by the suffix) Parquet; local paths below its folder become relative.

    Args:
        more: further columns, for the user's own use: values by subject, "" for those that are not in it.
    """
    manifest = Path(path).resolve()
    columns = [f.name for f in fields(Subject)]
    extra = more or {}
    rows = [
        [_relative(getattr(s, c), manifest.parent) if c in _PATHS else getattr(s, c) for c in columns]
        + [values.get(s.subject, "") for values in extra.values()]
        for s in cohort.subjects
    ]
    _write_table([*columns, *extra], rows, manifest)


def write_pairs(pairs: Sequence[Pair], path: str | Path) -> None:
    """Write a pair list, CSV or (by the suffix) Parquet."""
    _write_table(["moving", "fixed", "pair"], [[p.moving, p.fixed, p.pair] for p in pairs], Path(path).resolve())


def _write_table(columns: list[str], rows: list[list[str]], path: Path) -> None:
    with replace_file(path) as temporary:
        if path.suffix == ".parquet":
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
