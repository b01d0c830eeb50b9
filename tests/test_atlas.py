"""Atlases of phantoms with known deformations: unbiased, resumable, robust against bad subjects, bounded in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import SimpleITK as sitk  # noqa: N813
from typer.testing import CliRunner

from pipeline import atlas_reduce, phantom
from pipeline.algorithms import template
from pipeline.algorithms.atlas_config import AtlasConfig
from pipeline.algorithms.label_votes import mean_dice
from pipeline.algorithms.metrics import dice
from pipeline.algorithms.warp import grid_points
from pipeline.atlas import AtlasSummary, run_atlas
from pipeline.atlas_folder import BLOCK_BYTES, IterationFolder, read_map
from pipeline.cli import app
from pipeline.cohort_rois import write_cohort_rois
from pipeline.config import make_config
from pipeline.errors import FolderError, StudyError, UsageError
from pipeline.heartbeat import Heartbeat
from pipeline.phantom_warp import Variation
from pipeline.progress import Advance, Reporter, SilentReporter
from pipeline.study import run_study
from storage import tables
from storage.cohort import read_cohort
from storage.schemas import ATLAS
from storage.transforms import read_transform, to_itk
from storage.warping import read_itk_transform

NAMES = [f"subject-{n:02d}" for n in range(1, 6)]
SERIAL = {"executor": "serial"}
GENTLE = Variation(rotation_deg=6.0, scale=0.08, translation_mm=3.0, warp_mm=4.0, bias=0.05)


def atlas(study: Path, *settings: str, **more: Any) -> AtlasSummary:
    return run_atlas(study, settings, execution=SERIAL, **{"reporter": SilentReporter(), **more})


def rows(study: Path, iteration: int | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(study / "atlas" / "atlas.parquet").to_pylist()
    return [row for row in found if iteration in (None, row["iteration"])]


def voxels(path: Path) -> npt.NDArray[Any]:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def results(study: Path) -> dict[str, Any]:
    """Everything of an atlas that holds no time, to be compared."""
    root = study / "atlas"
    images = {path.name: path.read_bytes() for path in sorted(root.glob("*.nii.gz"))}
    files = [path for kind in ("transforms", "inverses") for path in sorted((root / kind).iterdir())]
    fields = {f"{path.parent.name}/{path.name}": read_transform(path).vectors.tobytes() for path in files}
    return {**images, **fields, "rows": rows(study)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five encoded phantoms and their pairs onto the first; copy before making an atlas."""
    folder = tmp_path_factory.mktemp("atlas")
    cohort = phantom.make_cohort(folder, len(NAMES), (3, 64, 64), spacing_mm=(5.0, 2.0, 2.0), variation=GENTLE)
    config = make_config({"execution": SERIAL, "pairs": "star"})
    run_study(config, read_cohort(cohort), folder / "study", until="match", reporter=SilentReporter())
    write_cohort_rois(folder / "study", 1.0)
    return folder / "study"


@pytest.fixture
def fresh(study: Path, tmp_path: Path) -> Path:
    """A copy of the study without an atlas."""
    return Path(shutil.copytree(study, tmp_path / "study", ignore=shutil.ignore_patterns("atlas"), symlinks=True))


@pytest.fixture(scope="module")
def made(study: Path) -> AtlasSummary:
    """An atlas of the study in two iterations from the first subject."""
    return atlas(study, "atlas.reference=subject-01", "atlas.iterations=2")


def shape_distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Root mean square distance of two sets of points [N, 3] after the best rigid alignment."""
    x, y = a - a.mean(axis=0), b - b.mean(axis=0)
    u, _, v = np.linalg.svd(y.T @ x)
    u[:, -1] *= np.sign(np.linalg.det(u @ v))
    return float(np.sqrt(((y - x @ (u @ v).T) ** 2).sum(axis=1).mean()))


def procrustes_mean(shapes: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Mean of sets of points [N, 3], each turned and moved onto it."""
    mean = shapes[0]
    for _ in range(5):
        turned = []
        for points in shapes:
            x, y = points - points.mean(axis=0), mean - mean.mean(axis=0)
            u, _, v = np.linalg.svd(y.T @ x)
            turned.append(x @ (u @ v).T)
        mean = np.mean(turned, axis=0)
    return mean


def atlas_points(study: Path, name: str, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where points [N, 3] of a subject, mm (x, y, z), lie on the template."""
    return read_transform(study / "atlas" / "inverses" / f"{name}.h5").at(points)


def landmarks(study: Path, name: str) -> npt.NDArray[np.float64]:
    return np.loadtxt(study.parent / f"{name}_landmarks.csv", delimiter=",", skiprows=1)


def test_the_template_has_the_mean_shape_more_nearly_than_any_subject(study: Path, made: AtlasSummary) -> None:
    truth = {name: landmarks(study, name) for name in NAMES}
    carried = [atlas_points(study, name, truth[name]) for name in NAMES]
    template_shape = np.mean(carried, axis=0)
    mean_shape = procrustes_mean(list(truth.values()))
    distances = {name: shape_distance(points, mean_shape) for name, points in truth.items()}
    assert shape_distance(template_shape, mean_shape) < 0.7 * min(distances.values()), distances


def test_another_reference_gives_nearly_the_same_template(made: AtlasSummary, study: Path, fresh: Path) -> None:
    atlas(fresh, "atlas.reference=subject-04", "atlas.iterations=1")
    shapes = []
    for where in (study, fresh):
        shapes.append(np.mean([atlas_points(where, n, landmarks(study, n)) for n in NAMES], axis=0))
    apart = shape_distance(landmarks(study, "subject-01"), landmarks(study, "subject-04"))
    assert shape_distance(*shapes) < 0.5 * apart


def test_every_output_is_there_and_lies_on_the_template(study: Path, made: AtlasSummary) -> None:
    root = study / "atlas"
    shape = voxels(root / "template.nii.gz").shape
    for name in ("variance", "log_jacobian_mean", "log_jacobian_variance", "majority", "roi_frequency", "roi_identity"):
        found = voxels(root / f"{name}.nii.gz")
        assert found.shape == shape, name
        assert np.ptp(found) > 0, name
    probability = sum(voxels(root / f"label_{k}_probability.nii.gz") for k in range(1, 7))
    assert probability.min() >= 0
    assert probability.max() <= 1 + 0.02
    assert (voxels(root / "majority.nii.gz")[probability < 0.45] == 0).all()
    assert 0.5 < voxels(root / "roi_frequency.nii.gz").max() <= 1
    assert {path.stem for path in (root / "transforms").iterdir()} == set(NAMES)
    assert (root / "montage.png").stat().st_size > 1000
    for number in (0, 1, 2):
        assert voxels(root / f"iteration_{number:02d}" / "template.nii.gz").shape == shape
    assert not list(root.rglob("volumes.zarr"))


def test_transforms_lead_to_the_template_and_back(study: Path, made: AtlasSummary) -> None:
    fixed = sitk.ReadImage(str(study / "atlas" / "majority.nii.gz"))
    for name in NAMES[:2]:
        label = sitk.ReadImage(str(study.parent / f"{name}_label.nii.gz"))
        onto = read_itk_transform(study / "atlas" / "transforms" / f"{name}.h5")
        back = read_itk_transform(study / "atlas" / "inverses" / f"{name}.h5")
        moved = sitk.Resample(label, fixed, onto, sitk.sitkNearestNeighbor, 0.0, label.GetPixelID())
        returned = sitk.Resample(moved, label, back, sitk.sitkNearestNeighbor, 0.0, label.GetPixelID())
        here, there = sitk.GetArrayViewFromImage(returned), sitk.GetArrayViewFromImage(label)
        assert mean_dice(np.int32(here), np.int32(there)) > 0.8
        assert mean_dice(np.int32(sitk.GetArrayViewFromImage(moved)), np.int32(sitk.GetArrayViewFromImage(fixed))) > 0.7


def test_rows_say_how_the_atlas_got_better(study: Path, made: AtlasSummary) -> None:
    assert pq.read_schema(study / "atlas" / "atlas.parquet").equals(ATLAS)
    assert [(row["iteration"], row["subject"]) for row in rows(study)] == [(t, n) for t in (1, 2) for n in NAMES]
    first, last = rows(study, 1), rows(study, 2)
    assert last[0]["mean_displacement"] < first[0]["mean_displacement"]
    assert last[0]["image_change"] < first[0]["image_change"]
    for row in last:
        assert row["dice_propagated"] > 0.5
        assert row["correlation"] > 0.8
        assert (row["dice_best_single"] is None) == (row["subject"] == row["best_single"])
        assert (row["dice_reference"] is None) == (row["subject"] == made.reference == "subject-01")


def test_labels_do_not_make_the_template(study: Path, made: AtlasSummary, fresh: Path) -> None:
    plan = json.loads((fresh / "plan.json").read_text(encoding="utf-8"))
    for subject in plan["manifest"].values():
        subject["label"] = subject["landmarks"] = ""
    (fresh / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    atlas(fresh, "atlas.reference=subject-01", "atlas.iterations=1")
    here, there = (where / "atlas" / "iteration_01" / "template.nii.gz" for where in (study, fresh))
    assert np.array_equal(voxels(here), voxels(there))
    assert not list((fresh / "atlas").glob("label_*"))
    assert rows(fresh)[0]["dice_propagated"] is None


def test_no_subject_is_encoded_again(study: Path, made: AtlasSummary) -> None:
    runs = tables.read_table(study / "atlas" / "iteration_02", "runs").to_pylist()
    done = {row["stage"]: row["units_done"] for row in runs}
    assert (done["encode"], done["prototypes"]) == (1, 1)


class Stopping(Reporter):
    """Ends the process, as a kill would, when a stage has done one unit."""

    def __init__(self, stage: str) -> None:
        self.last = stage

    @contextmanager
    def stage(self, name: str, total: int, noun: str) -> Iterator[Advance]:
        def advance(count: int, *_: int) -> None:
            if name == self.last:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize(("stage", "iteration"), [("fit", 2), ("propagate", 2)])
def test_a_killed_run_goes_on_to_the_same_atlas(
    study: Path, made: AtlasSummary, tmp_path: Path, stage: str, iteration: int
) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    shutil.rmtree(copy / "atlas" / f"iteration_{iteration:02d}")
    settings = ("atlas.reference=subject-01", "atlas.iterations=2")
    with pytest.raises(KeyboardInterrupt):
        atlas(copy, *settings, reporter=Stopping(stage))
    atlas(copy, *settings)
    assert results(copy) == results(study)


def test_fewer_iterations_need_no_fit_and_leave_nothing_of_the_later_ones(
    study: Path, made: AtlasSummary, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    template_1 = (copy / "atlas" / "iteration_01" / "template.nii.gz").read_bytes()
    again = atlas(copy, "atlas.reference=subject-01", "atlas.iterations=1")
    assert again.iterations[0] == made.iterations[0]
    assert (copy / "atlas" / "template.nii.gz").read_bytes() == template_1
    assert not (copy / "atlas" / "iteration_02").exists()
    assert (copy / "atlas" / "transforms" / "subject-01.h5").exists()
    assert len(rows(copy)) == len(NAMES)
    runs = tables.read_table(copy / "atlas" / "iteration_01", "runs").to_pylist()
    assert sum(row["units_done"] for row in runs if row["stage"] == "fit") == len(NAMES)


def test_a_third_iteration_goes_on_from_the_maps_of_the_second(study: Path, made: AtlasSummary, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    third = atlas(copy, "atlas.reference=subject-01", "atlas.iterations=3")
    assert third.iterations[:2] == made.iterations
    folder = IterationFolder(copy / "atlas", 3, ".nii.gz")
    grid, back = folder.study.store.geometry("template"), read_map(folder.shapes, "back")
    points = grid_points(grid.shape, grid.spacing_mm)[:, :, ::9, ::9].reshape(3, -1).T
    for name in NAMES:
        before, fitted, made_of_them = (
            read_transform(path).at(to_itk(at, grid))
            for path, at in (
                (folder.before().composed("transforms", name), back.at(points)),
                (folder.study.transform(f"{name}__template"), back.at(points)),
                (copy / "atlas" / "transforms" / f"{name}.h5", points),
            )
        )
        assert np.abs(before - fitted).max() > 0.1
        assert np.abs(made_of_them - (before + fitted) / 2).max() < 0.2


def test_bad_subjects_are_named_and_left_out(fresh: Path, tmp_path: Path) -> None:
    plan = json.loads((fresh / "plan.json").read_text(encoding="utf-8"))
    truncated, mislabelled = plan["manifest"]["subject-03"], plan["manifest"]["subject-02"]
    image = tmp_path / "truncated.nii.gz"
    image.write_bytes(Path(truncated["image"]).read_bytes()[:3000])
    truncated["image"], mislabelled["label"] = str(image), mislabelled["image"]
    (fresh / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    found = CliRunner().invoke(app, ["atlas", str(fresh), "--iterations", "1", "--executor", "serial"])
    assert found.exit_code == 1, found.output
    good = [name for name in NAMES if name not in ("subject-02", "subject-03")]
    assert [row["subject"] for row in rows(fresh)] == good
    assert {path.stem for path in (fresh / "atlas" / "transforms").iterdir()} == set(good)
    failures = tables.read_table(fresh / "atlas", "failures").to_pylist()
    named = {row["subject"] or row["pair"].partition("__")[0]: row["message"] for row in failures}
    assert set(named) == {"subject-02", "subject-03"}
    assert "truncated" in named["subject-03"]
    assert "whole" in named["subject-02"]


def test_a_subject_that_broke_leaves_the_atlas(study: Path, made: AtlasSummary, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    settings = ("atlas.reference=subject-01", "atlas.iterations=1")
    atlas(copy, *settings)
    assert (copy / "atlas" / "roi_frequency.nii.gz").exists()
    shutil.rmtree(copy / "cohort_rois")
    atlas(copy, *settings)
    assert not list((copy / "atlas").rglob("roi_*.nii.gz"))
    plan = json.loads((copy / "plan.json").read_text(encoding="utf-8"))
    plan["manifest"]["subject-03"]["image"] = str(tmp_path / "gone.nii.gz")
    (copy / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    atlas(copy, *settings)
    left = {*NAMES} - {"subject-03"}
    assert {row["subject"] for row in rows(copy)} == left
    for name in ("transforms", "inverses"):
        assert {path.stem for path in (copy / "atlas" / name).iterdir()} == left


def test_an_atlas_needs_two_subjects(fresh: Path) -> None:
    plan = json.loads((fresh / "plan.json").read_text(encoding="utf-8"))
    for name in NAMES[1:]:
        plan["manifest"][name]["image"] = str(fresh / "nothing.nii.gz")
    (fresh / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(StudyError, match="1 of 5 subjects could be registered"):
        atlas(fresh, "atlas.reference=subject-01")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("input.slice_axis=axial", "settings of atlas, match, fit can be changed"),
        ("atlas.reference=nobody", "no subject of the study"),
        ("atlas.iteration=3", "did you mean 'atlas.iterations'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(study: Path, setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        atlas(study, setting)


@pytest.mark.parametrize("name", ["067", "é: 'x'"])
def test_a_reference_is_a_name_whatever_it_looks_like(study: Path, name: str) -> None:
    found = CliRunner().invoke(app, ["atlas", str(study), "--reference", name, "--device", "cpu"])
    assert found.exit_code == 2
    assert f"atlas.reference is {name!r}, which is no subject" in found.output


def test_a_run_that_lost_its_folder_to_another_stops(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(lock: Heartbeat) -> None:
        raise FolderError("taken over")

    monkeypatch.setattr(Heartbeat, "check", lost)
    with pytest.raises(FolderError, match="taken over"):
        atlas(fresh, "atlas.iterations=1")


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a study folder"):
        atlas(tmp_path)


def test_reductions_are_those_of_numpy_in_blocks_that_fit(tmp_path: Path) -> None:
    folder, shape, n = IterationFolder(tmp_path, 1, ".nii.gz"), (6, 40, 30), 9
    generator = np.random.default_rng(5)
    images = generator.normal(size=(n, *shape)).astype(np.float32)
    images[generator.random(images.shape) < 0.1] = np.nan
    labels = generator.integers(0, 3, (n, *shape))
    shares = np.stack([255 * (labels == k) for k in (1, 2)], axis=1).astype(np.uint8)
    folder.create("images", images.shape, "float32", np.nan, 20_000)
    folder.create("shares", shares.shape, "uint8", 0, n)
    for index in range(n):
        folder.put("images", index, images[index])
        folder.put("shares", index, shares[index])
    stored = folder.volumes("images")
    assert stored.chunks[0] == 1
    assert 20_000 * 8 * np.prod(stored.chunks) <= BLOCK_BYTES
    members = [0, 2, 3, 4, 5, 7, 8]
    mean, spread = atlas_reduce.images(folder, members, AtlasConfig(average="median"))
    assert np.allclose(mean, np.nanmedian(images[members], axis=0), atol=1e-6)
    assert np.allclose(spread, template.variance(images[members]), atol=1e-6)
    found = atlas_reduce.agreement(folder, members, [4, 8])
    assert np.allclose(found.votes, (shares[members] / 255).sum(axis=0), atol=1e-5)
    assert set(np.unique(found.majority)) == {0, 4, 8}
    a, b = labels[members[1]], labels[members[4]]
    assert np.isclose(found.dice[1, 4], np.mean([dice(a == k, b == k) for k in (1, 2)]))


def test_an_atlas_of_pictures(tmp_path: Path) -> None:
    cohort = phantom.make_cohort(tmp_path, 3, (1, 64, 64), variation=GENTLE)
    config = make_config({"execution": SERIAL, "pairs": "star"})
    run_study(config, read_cohort(cohort), tmp_path / "study", until="prototypes", reporter=SilentReporter())
    summary = atlas(tmp_path / "study", "atlas.iterations=1", "atlas.sharpening=0.5")
    assert summary.n_failures == 0
    assert voxels(tmp_path / "study" / "atlas" / "template.png").shape == (64, 64)
    assert np.mean([row["dice_propagated"] for row in rows(tmp_path / "study")]) > 0.6
