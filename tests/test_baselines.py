"""Baselines: every tool's result lies in our convention, and a call resumes and survives what fails."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from scipy import ndimage
from typer.testing import CliRunner

from pipeline import baseline_itk, baseline_network, baseline_tools
from pipeline.algorithms import warp
from pipeline.baseline_images import NotRegisteredError, PairImages, affine_matrix, ddf_of_transform
from pipeline.baseline_methods import METHODS, Baseline, choose
from pipeline.baseline_table import method_rows
from pipeline.baselines import TABLE, run_baselines
from pipeline.cli import app
from pipeline.errors import UsageError
from storage import tables
from storage.geometry import FileGrid, Geometry
from tests.sample_study import write_study

TURNED = (0.96, -0.28, 0.0, 0.28, 0.96, 0.0, 0.0, 0.0, 1.0)


def grid(shape: tuple[int, int, int], direction: tuple[float, ...], origin: tuple[float, float, float]) -> Geometry:
    spacing = (1.5, 2.0, 4.0)
    return Geometry.from_file_grid(FileGrid(shape[::-1], spacing, origin, direction))


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    noise = ndimage.gaussian_filter(noise, [0 if n == 1 else 2.5 for n in shape])
    scaled = (noise - noise.min()) / np.ptp(noise) * 255
    return np.asarray(scaled, dtype=np.float32)


def shifted_pair(shape: tuple[int, int, int] = (16, 32, 28)) -> PairImages:
    """The same image with its grid moved by (2, -3, 1.5) mm as (z, y, x); a picture by (0, -3, 1.5)."""
    flat = shape[0] == 1
    here = Geometry(shape, (1.0 if flat else 2.0, 1.5, 1.5), source_dimension=2 if flat else 3)
    there = Geometry(shape, here.spacing_mm, (1.5, -3.0, 0.0 if flat else 2.0), source_dimension=here.source_dimension)
    image = blobs(shape)
    return PairImages(image, image, here, there)


def landmarks(images: PairImages) -> np.ndarray:
    inner = np.random.default_rng(3).uniform(0.3, 0.7, (20, 3)) * (np.array(images.here.shape) - 1)
    return np.asarray(inner * images.here.spacing_mm)


@pytest.mark.parametrize("shape", [(8, 20, 24), (1, 20, 24)])
def test_a_transform_takes_a_landmark_where_its_field_does(shape: tuple[int, int, int]) -> None:
    geometry = Geometry(shape, (3.0, 1.5, 1.2), source_dimension=2 if shape[0] == 1 else 3)
    images = PairImages(blobs(shape), blobs(shape), geometry, geometry)
    n = images.dimension
    known = sitk.AffineTransform(n)
    matrix = np.array([[1.1, 0.05, 0.02], [-0.1, 0.9, 0.0], [0.03, 0.0, 1.05]])[:n, :n]
    known.SetMatrix(matrix.ravel().tolist())
    known.SetTranslation([2.5, -1.5, 3.0][:n])
    points = landmarks(images)
    wanted = [known.TransformPoint(point[::-1][:n].tolist())[::-1] for point in points]
    ddf = ddf_of_transform(known, images.itk[0])
    np.testing.assert_allclose(warp.warp_points(points, ddf, geometry.spacing_mm)[:, 3 - n :], wanted, atol=1e-3)
    np.testing.assert_allclose(warp.apply_affine(affine_matrix(known), points)[:, 3 - n :], wanted, atol=1e-6)


def test_the_moving_image_lies_as_in_world_space() -> None:
    here = grid((6, 10, 12), TURNED, (5.0, -7.0, 30.0))
    there = grid((7, 12, 10), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0), (40.0, 35.0, 10.0))
    images = PairImages(blobs(here.shape), blobs(there.shape), here, there)
    index = (3, 4, 5)
    local = np.array(index) * there.spacing_mm
    placed = images.itk[1].TransformIndexToPhysicalPoint([5, 4, 3])[::-1]
    np.testing.assert_allclose(placed, warp.apply_affine(images.moving_to_fixed, local), atol=1e-9)
    assert images.itk[1].GetPixel(5, 4, 3) == images.moving[index]


@pytest.mark.parametrize("name", ["centre", "moments", "affine", "bspline", "demons"])
@pytest.mark.parametrize("shape", [(16, 32, 28), (1, 48, 40)])
def test_a_shift_is_found(name: str, shape: tuple[int, int, int]) -> None:
    images = shifted_pair(shape)
    found = getattr(baseline_itk, name)(images)
    points = landmarks(images)
    off = warp.warp_points(points, found.ddf, images.here.spacing_mm) - points - images.moving_to_fixed[:3, 3]
    assert np.linalg.norm(off, axis=1).mean() < (0.05 if name in ("centre", "moments") else 0.3)
    assert found.affine is not None


@pytest.mark.parametrize("name", ["affine", "bspline"])
def test_two_slices_are_a_volume(name: str) -> None:
    images = shifted_pair((2, 48, 40))
    flat = PairImages(images.fixed, images.moving, images.here, replace(images.there, origin_mm=(1.5, -3.0, 0.0)))
    points = landmarks(flat)
    off = warp.warp_points(points, getattr(baseline_itk, name)(flat).ddf, flat.here.spacing_mm) - points
    np.testing.assert_allclose(off[:, 1:].mean(axis=0), (-3.0, 1.5), atol=0.3)


def test_no_registration_is_no_displacement() -> None:
    assert not baseline_itk.identity(shifted_pair()).ddf.any()


def test_a_slice_and_a_volume_are_refused() -> None:
    one, other = shifted_pair(), shifted_pair((1, 32, 28))
    with pytest.raises(NotRegisteredError, match="slice and a volume"):
        baseline_itk.moments(PairImages(one.fixed, other.fixed, one.here, other.here))


def test_ants_takes_landmarks_where_its_field_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ants = pytest.importorskip("ants", reason="antspyx is not installed")
    import pandas as pd

    images = shifted_pair()
    points = landmarks(images)
    real, seen = ants.registration, []

    def registration(**given: Any) -> Any:
        found = real(**given)
        frame = pd.DataFrame(points[:, ::-1], columns=["x", "y", "z"])
        seen.append(ants.apply_transforms_to_points(3, frame, found["fwdtransforms"]).to_numpy()[:, ::-1])
        return found

    monkeypatch.setattr(ants, "registration", registration)
    found = baseline_tools.ants_syn(images)
    np.testing.assert_allclose(warp.warp_points(points, found.ddf, images.here.spacing_mm), seen[0], atol=0.05)
    assert np.linalg.norm(seen[0] - points - images.moving_to_fixed[:3, 3], axis=1).mean() < 0.3


@pytest.mark.parametrize("shape", [(1, 48, 40), pytest.param((16, 32, 28), marks=pytest.mark.slow)])
def test_elastix_finds_a_shift(shape: tuple[int, int, int]) -> None:
    pytest.importorskip("itk", reason="itk-elastix is not installed: pip install 'samreg[baselines]'")
    images = shifted_pair(shape)
    points = landmarks(images)
    off = warp.warp_points(points, baseline_tools.elastix(images).ddf, images.here.spacing_mm) - points
    assert np.linalg.norm(off - images.moving_to_fixed[:3, 3], axis=1).mean() < 0.3


FAKE = """#!{python}
import sys, numpy, nibabel
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if sys.argv[0].endswith("reg_transform"):
    reference = nibabel.load(sys.argv[2])
    shape = (reference.shape + (1, 1))[:3]
    n = len(reference.shape)
    field = numpy.broadcast_to(numpy.array([-1.5, 3.0, 2.0], "f4")[:n], (*shape, 1, n))  # RAS
    image = nibabel.Nifti1Image(field, reference.affine)
    image.header.set_intent({intent}, name="NREG_TRANS")
    nibabel.save(image, sys.argv[5])
"""


@pytest.mark.parametrize(("shape", "intent"), [((6, 12, 10), 1007), ((1, 12, 10), 1007), ((6, 12, 10), 1006)])
def test_niftyreg_displacements_are_turned_from_ras(
    shape: tuple[int, int, int], intent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("reg_aladin", "reg_f3d", "reg_transform"):
        (tmp_path / name).write_text(FAKE.format(python=sys.executable, intent=intent), encoding="utf-8")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = baseline_tools.niftyreg(shifted_pair(shape))
    wanted = (0.0 if shape[0] == 1 else 2.0, -3.0, 1.5)
    np.testing.assert_allclose(found.ddf, np.broadcast_to(np.reshape(wanted, (3, 1, 1, 1)), found.ddf.shape))


def test_a_command_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reg_aladin").write_text("#!/bin/sh\necho no licence to run >&2\nexit 3\n", encoding="utf-8")
    (tmp_path / "reg_aladin").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(NotRegisteredError, match="reg_aladin ended with 3: no licence"):
        baseline_tools.niftyreg(shifted_pair((6, 12, 10)))


def test_a_command_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reg_aladin").write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    (tmp_path / "reg_aladin").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(baseline_tools, "_LIMIT_SECONDS", 0.2)
    with pytest.raises(NotRegisteredError, match=r"reg_aladin took more than 0\.2 s"):
        baseline_tools.niftyreg(shifted_pair((6, 12, 10)))


class Constant(torch.nn.Module):
    """Displaces by (1, -2, 0.5) voxels; of pictures, or with half the channels, when asked to be wrong."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("shift", torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        assert float(moving.max()) <= 1.0
        field = self.shift[None, :, None, None, None] + torch.zeros_like(fixed)
        return field[:, : self.channels]


def exported(path: Path, channels: int = 3) -> Path:
    torch.jit.script(Constant(channels)).save(str(path))
    return path


def test_a_network_displaces_in_voxels(tmp_path: Path) -> None:
    network = baseline_network.open_network(exported(tmp_path / "net.pt"))
    images = shifted_pair()
    points = landmarks(images)
    found = baseline_network.register(network, images)
    moved = warp.warp_points(points, found.ddf, images.here.spacing_mm)
    np.testing.assert_allclose(moved - points, np.broadcast_to((2.0, -3.0, 0.75), points.shape), atol=1e-5)


def test_a_network_that_breaks_the_contract_is_refused(tmp_path: Path) -> None:
    network = baseline_network.open_network(exported(tmp_path / "net.pt", channels=2))
    with pytest.raises(NotRegisteredError, match=r"returned \(1, 2, 16, 32, 28\); expected \(1, 3, 16, 32, 28\)"):
        baseline_network.register(network, shifted_pair())
    (tmp_path / "text.pt").write_text("no network", encoding="utf-8")
    with pytest.raises(UsageError, match="not a TorchScript file"):
        choose(["torchscript"], tmp_path / "text.pt")


def test_a_network_is_found_from_any_folder_and_must_stay_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "net.pt")
    monkeypatch.chdir(tmp_path)
    (chosen,) = choose(["torchscript"], "net.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert callable(chosen.load())
    exported(tmp_path / "net.pt", channels=2)
    with pytest.raises(UsageError, match="has changed since"):
        chosen.load()


def test_help_names_the_methods() -> None:
    shown = CliRunner().invoke(app, ["baseline", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in METHODS)


def test_what_cannot_run_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="niftyreg cannot run here: reg_aladin, reg_f3d, reg_transform not found"):
        choose(["niftyreg"])
    with pytest.raises(UsageError, match="no baseline voxelmorph; --method takes all, identity, centre"):
        choose(["voxelmorph"])
    with pytest.raises(UsageError, match="--network FILE"):
        choose(["torchscript"])
    assert "niftyreg" not in [found.name for found in choose(["all"])]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    yield
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path)


def test_rows_have_the_columns_of_the_metrics(study: Path, tmp_path: Path) -> None:
    network = exported(tmp_path / "net.pt")
    chosen = choose(["identity", "centre", "torchscript"], network)
    summary = run_baselines(study, chosen, execution={"executor": "serial"})
    assert summary.n_failures == 0
    rows = tables.read_table(study / "baselines", TABLE).to_pylist()
    for row in rows:
        if row["method"] == "identity":
            assert row["dice"] == row["dice_before"] == row["dice_affine"]
            assert row["landmark_tre_mm"] == row["landmark_tre_mm_before"]
        if row["method"] == "centre":
            assert row["dice"] == row["dice_centered"]
        if row["method"] == "torchscript":
            assert row["dice_affine"] is None
        assert row["seconds"] > 0
        assert row["peak_memory_bytes"] > 1e7
    assert {row["label"] for row in rows} >= {0, 1, 2}
    assert {name: len(found) for name, found in method_rows(study).items()} == {
        "samreg": 2,
        "identity": 3,
        "centre": 3,
        "torchscript": 3,
    }


def test_the_same_call_again_registers_what_is_missing_or_changed(study: Path) -> None:
    serial = {"executor": "serial"}
    run_baselines(study, choose(["identity"]), execution=serial)
    again = run_baselines(study, choose(["identity", "centre"]), execution=serial)
    assert (again.done, again.reused) == ({"centre": 3}, {"identity": 3})
    subject = study.parent / "subject-03.nii.gz"
    image = sitk.ReadImage(str(subject))
    sitk.WriteImage(image + 1, str(subject))
    changed = run_baselines(study, choose(["identity"]), execution=serial)
    assert (changed.done, changed.reused) == ({"identity": 2}, {"identity": 1})
    kept = tables.read_table(study / "baselines", TABLE, ["method", "pair", "label"]).to_pylist()
    assert len(kept) == len({tuple(row.values()) for row in kept})


def test_rows_of_a_subject_that_cannot_be_read_for_a_while_stay(study: Path) -> None:
    serial = {"executor": "serial"}
    for file in study.parent.glob("subject-*"):
        os.utime(file, (1e9, 1e9))  # old enough for the cache of digests
    (study / ".digests.json").write_text("{}", encoding="utf-8")
    run_baselines(study, choose(["identity"]), execution=serial)
    before = tables.read_table(study / "baselines", TABLE)
    subject = study.parent / "subject-03.nii.gz"
    subject.rename(subject.with_suffix(".away"))
    without = run_baselines(study, choose(["identity"]), execution=serial)
    assert (without.done, without.reused, without.n_failures) == ({}, {"identity": 1}, 2)
    assert tables.read_table(study / "baselines", TABLE).equals(before)
    subject.with_suffix(".away").rename(subject)
    assert run_baselines(study, choose(["identity"]), execution=serial).reused == {"identity": 3}
    assert (study / ".digests.json").read_text(encoding="utf-8") == "{}"


def test_a_pair_that_fails_costs_only_itself(study: Path) -> None:
    (study.parent / "subject-03.nii.gz").write_bytes(b"damaged")
    result = CliRunner().invoke(
        app, ["baseline", str(study), "--method", "identity", "--method", "centre", "--executor", "serial"]
    )
    assert result.exit_code == 1, result.output
    done = {(row["method"], row["pair"]) for row in tables.read_table(study / "baselines", TABLE).to_pylist()}
    assert done == {(method, "subject-02__subject-01") for method in ("identity", "centre")}
    failed = tables.read_table(study / "baselines", "failures").to_pylist()
    assert {row["stage"] for row in failed} == {"identity", "centre"}
    assert len(failed) == 4
    assert all("subject-03" in row["message"] for row in failed)


def test_a_folder_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no registered pairs"):
        run_baselines(tmp_path, (Baseline("identity"),))
