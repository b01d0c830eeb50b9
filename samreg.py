"""The notebook face of the project: register a pair, run a cohort, read the results. No logic of its own.

import samreg
result = samreg.register_pair("fixed.nii.gz", "moving.nii.gz")
result.ddf.shape, result.metrics, result.correspondences

study = samreg.open_study("study")
study.table("metrics"), study.subject("p01").image, study.pair("p02__p01").transform, study.overlay("p02__p01")
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from pipeline.config import StudyConfig
    from pipeline.notebook import OpenStudy
    from pipeline.study import StudySummary

__all__ = ["Registration", "load_config", "open_study", "read_table", "register_pair", "run_study", "status"]


@dataclass(frozen=True)
class Registration:
    """One registered pair.

    Attributes:
        ddf: float32 [3, D, H, W], mm along the fixed image's (z, y, x) axes, pull-back (`pipeline.algorithms.warp`);
            in analysis orientation, slice axis first.
        metrics: one row per label (label 0 is the mean over labels).
        correspondences: one row per matched ROI pair.
        transform: path of the ITK transform, or None if no folder was given to keep it in.
    """

    ddf: npt.NDArray[np.float32]
    metrics: pd.DataFrame
    correspondences: pd.DataFrame
    transform: Path | None


def load_config(config: Any = None) -> StudyConfig:
    """A configuration from a YAML path, a nested dict of settings, or nothing (the defaults)."""
    from pipeline import config as configuration

    if isinstance(config, configuration.StudyConfig):
        return config
    if isinstance(config, Mapping):
        return configuration.make_config(config)
    return configuration.load_config(config)


def register_pair(
    fixed: str | Path,
    moving: str | Path,
    config: Any = None,
    *,
    fixed_label: str | Path | None = None,
    moving_label: str | Path | None = None,
    fixed_landmarks: str | Path | None = None,
    moving_landmarks: str | Path | None = None,
    fixed_segmentation: str | Path | None = None,
    moving_segmentation: str | Path | None = None,
    out: str | Path | None = None,
) -> Registration:
    """Register one image to another: the cohort path with one pair.

    Args:
        fixed, moving: images. The same file may be both.
        config: as `load_config`.
        fixed_label, moving_label, fixed_landmarks, moving_landmarks: to evaluate against.
        fixed_segmentation, moving_segmentation: classes that become the ROIs, with `segmenter: labels`.
        out: study folder to keep; None works in a temporary one.

    Raises:
        UsageError: for settings that cannot be used, or the folder of another study.
        StudyError: with the message of the stage that failed.
    """
    from pipeline.single import register

    paths = {
        "fixed": (fixed, fixed_label, fixed_landmarks, fixed_segmentation),
        "moving": (moving, moving_label, moving_landmarks, moving_segmentation),
    }
    place = tempfile.TemporaryDirectory() if out is None else nullcontext(str(out))
    with place as folder:
        found = register(load_config(config), paths, Path(folder))
    transform = found.transform if out is not None else None
    return Registration(found.ddf, found.metrics.to_pandas(), found.correspondences.to_pandas(), transform)


def run_study(
    cohort: str | Path,
    out: str | Path,
    config: Any = None,
    pairs: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> StudySummary:
    """Run or resume a study as `samreg run` does; failures are counted in the summary and listed in its table."""
    from pipeline import study
    from pipeline.request import make_request

    request = make_request(load_config(config), Path(cohort), None if pairs is None else str(pairs))
    return study.run_study(request.config, request.cohort, out, request.pairs, request.unknown, overwrite=overwrite)


def open_study(study: str | Path) -> OpenStudy:
    """Open a study folder: its tables, volumes and transforms are read when they are asked for.

    Raises:
        UsageError: for a folder that is no study.
    """
    from pipeline.notebook import OpenStudy

    return OpenStudy(study)


def read_table(study: str | Path, name: str) -> pd.DataFrame:
    """A result table: rois, correspondences, metrics, failures, runs or units."""
    from storage import tables

    return tables.read_table(study, name).to_pandas()


def status(study: str | Path) -> dict[str, Any]:
    """Counts of done, failed and missing units per stage, and the failures."""
    from pipeline.status import read_status

    return read_status(Path(study)).to_dict()
