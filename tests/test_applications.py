"""The paper's five applications: configurations for any segmenter, and whole studies from data set to metrics."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.sam_variants import VARIANTS
from pipeline.config import StudyConfig, load_config
from pipeline.study import run_study
from storage import tables
from storage.cohort import Cohort, Pair, Subject
from storage.layouts.registry import read_layout
from tests import public_data
from tests.phantoms import REPO

SERIAL = ["execution.executor=serial"]
LAYOUT_OF = {"prostate": "promise12", "cardiac": "acdc", "lung": "learn2reg", "retina": "fire", "aerial": "aerial"}


def config_of(application: str, *overrides: str) -> StudyConfig:
    return load_config(REPO / "configs" / f"{application}.yaml", overrides)


def metrics(study: Path) -> list[dict[str, Any]]:
    """The rows of the means over labels."""
    return [row for row in tables.read_table(study, "metrics").to_pylist() if row["label"] == 0]


@pytest.mark.parametrize("application", LAYOUT_OF)
@pytest.mark.parametrize("segmenter", ["component_tree", *VARIANTS])
def test_a_segmenter_changes_nothing_else(application: str, segmenter: str) -> None:
    for preset in ("recommended", "paper"):
        plain = config_of(application, f"preset={preset}")
        changed = config_of(application, f"preset={preset}", f"segmenter={segmenter}")
        assert changed.segmenter.name == segmenter
        assert changed.model_copy(update={"segmenter": plain.segmenter}) == plain


@pytest.mark.parametrize("application", LAYOUT_OF)
def test_the_paper_preset_is_the_papers(application: str) -> None:
    config, paper = config_of(application, "preset=paper"), load_config(None, ["preset=paper"])
    for part in ("segmenter", "rois", "prototypes", "match", "fit"):
        assert getattr(config, part) == getattr(paper, part)
    assert config_of(application).segmenter.name == "component_tree"


@pytest.mark.parametrize("application", LAYOUT_OF)
def test_a_published_folder_becomes_a_study(application: str, tmp_path: Path) -> None:
    root, layout = tmp_path / "data", LAYOUT_OF[application]
    if layout == "aerial":
        public_data.aerial(root, {"zh1_01_01": np.array([[1.0, 0, 2], [0, 1, -1]])})
    else:
        getattr(public_data, layout)(root)
    found = read_layout(layout, root, tmp_path / "files")
    pairs = found.pairs[:1] or [Pair("two", found.subjects[1].subject, found.subjects[0].subject)]
    subjects = tuple(s for s in found.subjects if s.subject in pairs[0])
    summary = run_study(config_of(application, *SERIAL), Cohort(subjects), tmp_path / "study", pairs)
    assert summary.n_failures == 0
    (row,) = metrics(tmp_path / "study")
    assert (row["dice"] is not None) == all(subject.label for subject in subjects)
    assert (row["landmark_tre_vox"] is not None) == all(subject.landmarks for subject in subjects)


def sample(folder: Path, pair: str, out: Path) -> tuple[Cohort, Pair]:
    """A pair of the development data; its landmarks, which lie in one file, one file each."""
    if not folder.is_dir():
        pytest.skip(f"the sample {folder.name} is not in ../shared/data")
    with (folder / "pairs.csv").open(newline="", encoding="utf-8") as stream:
        row = next(row for row in csv.DictReader(stream) if row["pair_id"] == pair)
    subjects = []
    for role in ("moving", "fixed"):
        landmarks = ""
        if row["landmarks"]:
            with (folder / row["landmarks"]).open(newline="", encoding="utf-8") as stream:
                points = [[point[f"{role}_{axis}"] for axis in "xy"] for point in csv.DictReader(stream)]
            target = out / f"{role}.csv"
            target.write_text("".join(",".join(line) + "\n" for line in [["i", "j"], *points]), encoding="utf-8")
            landmarks = str(target)
        label = row[f"{role}_label"] and str(folder / row[f"{role}_label"])
        subjects.append(Subject(role, str(folder / row[f"{role}_image"]), label, landmarks))
    return Cohort(tuple(subjects)), Pair(pair, "moving", "fixed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("application", "folder", "pair", "overrides"),
    [
        ("prostate", "prostate_mr_us_blurred", "prmr_02", []),
        ("cardiac", "acdc_cardiac", "acdc_patient067", []),
        ("lung", "samreg_slices_2d", "lung_stack", ["input.window=null"]),  # 8 bit, not Hounsfield units
        ("retina", "fire_retina", "fire_A01", []),
        ("aerial", "aerial_cell_histology_2d", "aerial_zh18_01_02", []),
    ],
)
@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_development_samples_run_and_improve_with_the_recommended_settings(
    application: str, folder: str, pair: str, overrides: list[str], preset: str, shared_data: Path, tmp_path: Path
) -> None:
    cohort, wanted = sample(shared_data / folder, pair, tmp_path)
    config = config_of(application, f"preset={preset}", "segmenter=component_tree", *overrides, *SERIAL)
    assert run_study(config, cohort, tmp_path / "study", [wanted]).n_failures == 0
    (row,) = metrics(tmp_path / "study")
    if preset == "paper":  # its thresholds are SAM's
        return
    if row["dice"] is not None:
        assert row["dice"] > row["dice_before"]
    else:
        assert row["landmark_tre_vox"] < row["landmark_tre_vox_before"]
