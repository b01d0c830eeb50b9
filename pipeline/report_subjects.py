"""The subjects of a report: what the manifest and the store say of each, and how its pairs went."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.folder import StudyFolder
from pipeline.report_data import ReportData, Values
from pipeline.report_matches import medians_by
from pipeline.report_quality import SUBJECT_MEASURES, Quality, assess
from storage.embeddings import EmbeddingStore


@dataclass(frozen=True)
class Subjects:
    """Columns of the subjects, in the order of the manifest.

    Attributes:
        names, groups, sessions, grids, states: texts.
        columns: `rois`, `roi_quality`, `pairs`, `suspect` (share of its pairs to look at) and medians over its
            pairs of `ReportData.columns`: float64 [subjects], NaN where unknown.
        quality: scores of the subjects among each other.
    """

    names: list[str]
    groups: list[str]
    sessions: list[str]
    grids: list[str]
    states: list[str]
    columns: dict[str, Values]
    quality: Quality


def read_subjects(data: ReportData) -> Subjects:
    """Summarise every subject of a study."""
    store = EmbeddingStore(StudyFolder(data.root).embeddings)
    encoded = set(store.subjects())
    failed = {row["subject"] for row in data.failures.select(["subject", "pair"]).to_pylist() if not row["pair"]}
    names = list(data.subjects or dict.fromkeys(sorted(encoded | failed - {None})))
    known = [data.subjects.get(name) for name in names]
    rois = [data.rois.get(name, (0, np.nan)) for name in names]
    columns = {
        "rois": np.array([count if name in encoded else np.nan for name, (count, _) in zip(names, rois, strict=True)]),
        "roi_quality": np.array([quality for _, quality in rois]),
        **_over_pairs(data, names),
    }
    return Subjects(
        names=names,
        groups=[subject.group if subject else "" for subject in known],
        sessions=[subject.session if subject else "" for subject in known],
        grids=[store.geometry(name).describe() if name in encoded else "" for name in names],
        states=["failed" if n in failed else "encoded" if n in encoded else "missing" for n in names],
        columns=columns,
        quality=assess(columns, SUBJECT_MEASURES),
    )


def _over_pairs(data: ReportData, names: list[str]) -> dict[str, Values]:
    """Number of pairs, share to look at, and medians over the pairs that each subject is in."""
    order = pa.array(names, pa.string())
    roles = [pc.index_in(data.means.column(role), value_set=order) for role in ("moving", "fixed")]
    both = pc.and_(*(pc.is_valid(role) for role in roles)).to_numpy(zero_copy_only=False)
    codes = [np.asarray(role.fill_null(0).to_numpy(), dtype=np.int64)[both] for role in roles]
    count = np.sum([np.bincount(found, minlength=len(names)) for found in codes], axis=0)
    suspect = np.sum([np.bincount(f, data.suspect[both], minlength=len(names)) for f in codes], axis=0)
    medians = {name: medians_by(codes, values[both], len(names)) for name, values in data.columns.items()}
    share = np.divide(suspect, count, out=np.full(len(names), np.nan), where=count > 0)
    return {"pairs": count.astype(np.float64), "suspect": share} | medians
