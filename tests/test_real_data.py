"""The whole study on real images, and its transforms applied to the user's own files by SimpleITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from pipeline.config import load_config
from pipeline.study import run_study
from storage import tables
from storage.cohort import Pair, read_cohort
from tests.phantoms import write_csv

SERIAL = ["execution.executor=serial"]


def manifest(files: dict[str, tuple[Path, ...]]) -> list[dict[str, str]]:
    """Rows of a cohort manifest."""
    return [{"subject": n, "image": str(i.resolve()), "label": str(s.resolve())} for n, (i, s) in files.items()]


def itk_dice(fixed: Path, moving: Path, transform: Path) -> float:
    """Mean Dice over labels after resampling the moving label file onto the fixed one with a stored transform."""
    reference, labels = sitk.ReadImage(str(fixed)), sitk.ReadImage(str(moving))
    moved = sitk.Resample(labels, reference, sitk.ReadTransform(str(transform)), sitk.sitkNearestNeighbor, 0)
    a, b = sitk.GetArrayFromImage(reference), sitk.GetArrayFromImage(moved)
    return float(np.mean([2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in (1, 2, 3)]))


def test_cardiac_pair_from_files_to_transform(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "acdc_cardiac"
    files = {
        name: (folder / f"patient067_{name}.nii.gz", folder / f"patient067_{name}_gt.nii.gz") for name in ("ES", "ED")
    }
    cohort = write_csv(tmp_path / "cohort.csv", manifest(files))
    summary = run_study(load_config(None, SERIAL), read_cohort(cohort), tmp_path / "study", [Pair("beat", "ES", "ED")])
    assert summary.n_failures == 0
    row = next(r for r in tables.read_table(tmp_path / "study", "metrics").to_pylist() if r["label"] == 0)
    assert row["dice_before"] == pytest.approx(0.5335, abs=0.002)
    assert row["dice"] > 0.70
    assert row["fold_fraction"] == 0
    assert itk_dice(files["ED"][1], files["ES"][1], tmp_path / "study/transforms/beat.h5") == pytest.approx(
        row["dice"], abs=0.005
    )


def test_brain_crops_that_share_no_grid(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "msd_hippocampus"
    files = {
        n: (folder / f"images/hippocampus_{n}.nii.gz", folder / f"labels/hippocampus_{n}.nii.gz")
        for n in ("394", "355")
    }
    cohort = write_csv(tmp_path / "cohort.csv", manifest(files))
    run_study(load_config(None, SERIAL), read_cohort(cohort), tmp_path / "study", [Pair("crops", "394", "355")])
    row = next(r for r in tables.read_table(tmp_path / "study", "metrics").to_pylist() if r["label"] == 0)
    assert row["dice"] > row["dice_centered"] + 0.1
