"""The notebook module: a pair, a study, and nothing imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import samreg
from pipeline.errors import StudyError, UsageError
from tests import phantoms

QUICK = {"fit": phantoms.QUICK_FIT, "execution": {"executor": "serial"}}


def test_register_pair_is_a_study_of_one_pair(tmp_path: Path) -> None:
    folder = phantoms.write_cohort(tmp_path / "data", ["a", "b"]).parent
    images = (folder / "0.nii.gz", folder / "1.nii.gz")
    labels = {"fixed_label": folder / "0_gt.nii.gz", "moving_label": folder / "1_gt.nii.gz"}
    found = samreg.register_pair(*images, QUICK, **labels, out=tmp_path / "study")
    assert found.ddf.shape == (3, 5, 48, 48)
    assert found.transform is not None
    assert found.transform.exists()
    mean = found.metrics.set_index("label").loc[0]
    assert mean.dice > mean.dice_before
    assert len(found.correspondences) == mean.n_rois
    again = samreg.register_pair(*images, QUICK, **labels)
    assert again.transform is None
    np.testing.assert_array_equal(again.ddf, found.ddf)
    assert samreg.status(tmp_path / "study")["complete"]
    assert set(samreg.read_table(tmp_path / "study", "rois").subject) == {"fixed", "moving"}


def test_register_pair_takes_the_classes_of_segmentations(tmp_path: Path) -> None:
    folder = phantoms.write_cohort(tmp_path / "data", ["a", "b"]).parent
    classes = {"fixed_segmentation": folder / "0_gt.nii.gz", "moving_segmentation": folder / "1_gt.nii.gz"}
    found = samreg.register_pair(folder / "0.nii.gz", folder / "1.nii.gz", {**QUICK, "segmenter": "labels"}, **classes)
    assert list(found.correspondences.roi_class) == [1, 2, 3]


def test_a_failure_is_raised_with_its_reason(tmp_path: Path) -> None:
    folder = phantoms.write_cohort(tmp_path / "data", ["a"]).parent
    with pytest.raises(StudyError, match=r"encode failed with ImageError: .*nothing\.nii"):
        samreg.register_pair(folder / "0.nii.gz", tmp_path / "nothing.nii", QUICK)


def test_run_study_takes_a_manifest(tmp_path: Path) -> None:
    manifest = phantoms.write_cohort(tmp_path / "data", ["a", "b"])
    summary = samreg.run_study(manifest, tmp_path / "study", QUICK, "star")
    assert summary.n_failures == 0
    images = (manifest.parent / "0.nii.gz", manifest.parent / "1.nii.gz")
    with pytest.raises(UsageError, match=r"holds a study of 2 subjects.*give another folder"):
        samreg.register_pair(*images, QUICK, out=tmp_path / "study")
    assert set(samreg.read_table(tmp_path / "study", "metrics").pair) == {"b__a"}


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import samreg, sys; print(sorted({'torch', 'ray', 'zarr', 'numpy', 'SimpleITK'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=phantoms.REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
