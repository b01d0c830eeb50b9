"""`query`: a region of one subject, found in every other subject of a study, from its prototypes alone.

STUDY/queries/<name>.parquet    one row per ROI found, the surest subject first
STUDY/queries/<name>/           contact sheets sheet-1.png ...; masks/<subject>.nii.gz when asked for
STUDY/query_index/              prototypes of all subjects in one place, made by the first query
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.algorithms.query import QueryConfig
from pipeline.algorithms.query_map import load_loops
from pipeline.config import StudyConfig, make_config
from pipeline.errors import UsageError
from pipeline.folder import StudyFolder
from pipeline.query_answers import Found, answer_with_relays
from pipeline.query_region import Region, RegionFinder, Seed
from pipeline.record import planned_subjects
from storage import tables
from storage.cohort import Subject, subject_key
from storage.query_index import QueryIndex, QueryIndexError, open_index
from storage.signature import digest

TABLE = "queries"
VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,99}")


@dataclass(frozen=True)
class Study:
    """What a query reads of a study.

    Attributes:
        folder: of the study.
        config: its settings.
        subjects: manifest rows by name.
        index: prototypes of all subjects.
    """

    folder: StudyFolder
    config: StudyConfig
    subjects: Mapping[str, Subject]
    index: QueryIndex

    def subject(self, name: str) -> Subject:
        """A subject that can be asked about.

        Raises:
            UsageError: naming the subjects most like it.
        """
        if name not in self.index.subjects:
            near = get_close_matches(name, self.index.subjects, n=3) or self.index.subjects[:3]
            raise UsageError(f"{self.folder.root} has no prototypes of {name!r}; it has those of {', '.join(near)} …")
        return self.subjects.get(name, Subject(name, ""))


@dataclass(frozen=True)
class QueryResult:
    """A query and its answers.

    Attributes:
        study: that was asked.
        name: of the query.
        subject: that the region is on.
        region: that was asked for.
        found: the answers.
        seconds: of finding the region and the answers.
    """

    study: Study
    name: str
    subject: Subject
    region: Region
    found: Found
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ranked(self) -> npt.NDArray[np.int64]:
        """Positions of the other subjects, the surest first."""
        return self.found.ranked(self.study.index.subjects.index(self.subject.subject))


def open_study(root: Path) -> Study:
    """Open a study for queries; the first time its index is made.

    Raises:
        UsageError: for a folder that is no study, or has nothing that can be compared.
    """
    folder = StudyFolder(root)
    run, plan = folder.latest_run()
    wanted = {name: keys["prototypes"] for name, keys in plan["subjects"].items() if keys is not None}
    try:
        index = open_index(folder.store, folder.root / "query_index", wanted)
    except QueryIndexError as error:
        raise UsageError(str(error)) from None
    load_loops()
    return Study(folder, make_config(run["config"]), {s.subject: s for s in planned_subjects(plan)}, index)


def ask(
    study: Study,
    subject: str,
    seed: Seed,
    settings: QueryConfig | None = None,
    *,
    name: str | None = None,
    prompt: bool = True,
) -> QueryResult:
    """Find a region of a subject in all the others.

    Args:
        settings: of the query.
        name: of the query; None makes one of subject and seed.
        prompt: whether a SAM backend may be prompted for the region.

    Raises:
        UsageError: for a subject, seed or name that cannot be used.
        ImageError: for labels that cannot be read.
    """
    row, start = study.subject(subject), time.perf_counter()
    chosen = name or f"{subject_key(subject)[:60]}_{seed.name}"
    if not _NAME.fullmatch(chosen):
        raise UsageError(f"--name {chosen!r} must be letters, digits and . _ ~ -, and begin with a letter or digit")
    region = RegionFinder(study.folder.store, study.config, row, prompt).find(seed)
    middle = time.perf_counter()
    found = answer_with_relays(study.index, subject, region, study.config.match, settings or QueryConfig())
    seconds = {"region": middle - start, "answers": time.perf_counter() - middle}
    return QueryResult(study, chosen, row, region, found, seconds)


def write_answers(result: QueryResult) -> Path:
    """Write the table of a query; sheets and masks of an earlier one of this name go."""
    root = result.study.folder.root
    shutil.rmtree(root / TABLE / result.name, ignore_errors=True)
    return tables.write_part(root, TABLE, result.name, _table(result))


def _table(result: QueryResult) -> pa.Table:
    return tables.table_from_rows(TABLE, _rows(result))


def _rows(result: QueryResult) -> Iterator[dict[str, Any]]:
    """A row per answer, by rank of the subject and by slice; one for a subject without any."""
    index, found = result.study.index, result.found
    key = digest({"index": index.signature, "version": VERSION, "region": result.region.prototypes.tolist()})
    for rank, position in enumerate(result.ranked.tolist(), 1):
        here = found.of_subject(position)
        shared = {
            "query": result.name,
            "asked": result.subject.subject,
            "subject": index.subjects[position],
            "rank": rank,
            "subject_confidence": float(found.total[position]),
            "n_rois": len(here),
            "key": key,
        }
        if not len(here):
            yield shared
        for n in here.tolist():
            row = int(found.row[n])
            place = index.columns["centroid_mm"][row].tolist()
            yield {
                **shared,
                **{name: int(index.columns[name][row]) for name in ("roi", "slice", "track")},
                "asked_slice": int(result.region.slices[found.region[n]]),
                **{name: float(getattr(found, name)[n]) for name in ("similarity", "overlap", "confidence")},
                **{f"centroid_{axis}_mm": value for axis, value in zip("zyx", place, strict=True)},
                "area_mm2": float(index.columns["area_mm2"][row]),
            }
