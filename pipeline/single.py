"""One pair through the whole study: what a notebook calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config import StudyConfig
from pipeline.errors import StudyError, UsageError
from pipeline.folder import StudyFolder
from pipeline.progress import SilentReporter
from pipeline.study import run_study
from storage import tables
from storage.cohort import Cohort, Pair, Subject
from storage.embeddings import EmbeddingStore
from storage.transforms import read_ddf

PAIR = Pair("moving__fixed", "moving", "fixed")
Location = str | Path | None


@dataclass(frozen=True)
class SingleResult:
    """The pair's field, float32 [3, D, H, W] mm, its table rows, and its transform file."""

    ddf: npt.NDArray[np.float32]
    metrics: pa.Table
    correspondences: pa.Table
    transform: Path


def register(config: StudyConfig, paths: Mapping[str, tuple[Location, ...]], out: Path) -> SingleResult:
    """Register one pair in the study folder `out`.

    Args:
        paths: `fixed` and `moving`, each (image, label, landmarks, segmentation).

    Raises:
        UsageError: for the folder of another study.
        StudyError: with the first failure, if there is any.
    """
    folder = StudyFolder(out)
    plan = folder.read_plan()
    if plan is not None and set(plan["subjects"]) != {PAIR.moving, PAIR.fixed}:
        raise UsageError(
            f"{out} holds a study of {len(plan['subjects'])} subjects, whose results those of this pair would replace; "
            "give another folder"
        )
    columns = ("image", "label", "landmarks", "segmentation")
    subjects = tuple(
        Subject(name, **{column: _located(path) for column, path in zip(columns, found, strict=True)})
        for name, found in paths.items()
    )
    run_study(config, Cohort(subjects), out, [PAIR], reporter=SilentReporter())
    failures = tables.read_table(out, "failures").to_pylist()
    if failures:
        raise StudyError(f"{failures[0]['stage']} failed with {failures[0]['error']}: {failures[0]['message']}")
    store = EmbeddingStore(folder.embeddings)
    path = folder.transform(PAIR.pair)
    ddf = read_ddf(path, store.geometry("fixed"), store.geometry("moving"))
    return SingleResult(ddf, tables.read_table(out, "metrics"), tables.read_table(out, "correspondences"), path)


def _located(path: Location) -> str:
    if not path:
        return ""
    return str(path) if "://" in str(path) else str(Path(path).absolute())
