"""Intensity refinement: it finds what a field still misses, and does no harm where there is nothing to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from pipeline.algorithms import metrics, warp
from pipeline.algorithms.fit_config import RefineConfig
from pipeline.config import ConfigError, make_config
from pipeline.folder import StudyFolder
from pipeline.inputs import InputDigests
from pipeline.keys import plan_pairs, subject_keys
from pipeline.progress import SilentReporter
from pipeline.stages.refine import refine
from pipeline.study import run_study
from storage import tables
from storage.cohort import Pair, read_cohort
from storage.embeddings import EmbeddingStore
from storage.transforms import read_ddf
from tests import phantoms

QUICK = RefineConfig("demons", iterations=(20, 20))
GRIDS = {
    "flat": ((1, 48, 56), (1.0, 1.0, 1.0)),
    "thick slices": ((4, 48, 56), (8.0, 1.5, 1.5)),
    "isotropic": ((26, 36, 40), (1.2, 1.2, 1.2)),
}


def textured(shape: tuple[int, int, int], flat: bool, seed: int = 3) -> np.ndarray:
    """Smooth random blobs, 0..255."""
    noise = np.random.default_rng(seed).normal(size=shape)
    blobs = ndimage.gaussian_filter(noise, (0 if flat else 2.5, 2.5, 2.5))
    return ((blobs - blobs.min()) / np.ptp(blobs) * 255).astype(np.float32)


def ripple(shape: tuple[int, int, int], spacing: tuple[float, float, float], flat: bool, size: float) -> np.ndarray:
    """A smooth field of up to `size` mm, in plane where `flat`."""
    _, y, x = warp.grid_points(shape, spacing)
    height, width = shape[1] * spacing[1], shape[2] * spacing[2]
    wave = np.sin(np.pi * y / height + 0.4) * np.cos(np.pi * x / width)
    return (size * np.stack([0 * wave if flat else 0.5 * wave, wave, -0.7 * wave])).astype(np.float32)


def error(ddf: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance, mm, away from the border."""
    inner = tuple(slice(n // 8, n - n // 8) for n in truth.shape[1:])
    return float(np.linalg.norm(ddf - truth, axis=0)[inner].mean())


@pytest.mark.parametrize("name", GRIDS)
def test_it_finds_a_small_deformation_that_the_field_misses(name: str) -> None:
    shape, spacing = GRIDS[name]
    flat = name != "isotropic"
    moving, truth = textured(shape, flat), ripple(shape, spacing, flat, 1.5 * spacing[2])
    fixed = warp.warp_image(moving, warp.moving_indices(truth, spacing, np.eye(4), spacing))
    start = np.zeros_like(truth)
    refined = refine(fixed, moving, start, spacing, spacing, np.eye(4), QUICK)
    assert refined.dtype == np.float32
    assert error(refined, truth) < 0.5 * error(start, truth)
    assert metrics.jacobian_stats(refined, spacing).fold_fraction == 0
    if name == "flat":
        assert not refined[0].any()


def test_it_composes_with_the_field_across_two_grids() -> None:
    shape, spacing, coarse = (1, 48, 56), (1.0, 1.5, 1.5), (1.0, 2.0, 1.8)
    offset = np.eye(4)
    offset[:3, 3] = (0.0, -14.0, 9.0)
    moving = textured((1, 60, 64), flat=True)
    start = np.zeros((3, *shape), np.float32)
    start[1], start[2] = 6.0, 12.0
    truth = warp.compose(start, ripple(shape, spacing, True, 3.0), spacing)
    fixed = warp.warp_image(moving, warp.moving_indices(truth, spacing, offset, coarse))
    refined = refine(0.6 * fixed + 40, moving, start, spacing, coarse, offset, QUICK)
    assert error(refined, truth) < 0.5 * error(start, truth)


def test_composition_is_that_of_the_maps() -> None:
    shape, spacing = (1, 20, 24), (1.0, 2.0, 1.5)
    u, v = ripple(shape, spacing, True, 3.0), ripple(shape, spacing, True, -1.0)[:, :, ::-1]
    points = np.array([[0.0, 12.0, 15.0], [0.0, 20.0, 9.0]])
    once = warp.warp_points(warp.warp_points(points, v, spacing), u, spacing)
    np.testing.assert_allclose(warp.warp_points(points, warp.compose(u, v, spacing), spacing), once, atol=1e-5)


@pytest.mark.parametrize("constant", ["fixed", "moving", "both"])
def test_a_constant_image_leaves_a_finite_field(constant: str) -> None:
    shape, spacing = GRIDS["thick slices"]
    flat, image = np.full(shape, 80.0, np.float32), textured(shape, True)
    fixed, moving = (flat if constant in (role, "both") else image for role in ("fixed", "moving"))
    start = ripple(shape, spacing, True, 2.0)
    refined = refine(fixed, moving, start, spacing, spacing, np.eye(4), QUICK)
    assert np.isfinite(refined).all()
    if constant == "both":
        np.testing.assert_allclose(refined, start, atol=1e-6)


def test_equal_images_stay_where_they_are() -> None:
    shape, spacing = GRIDS["isotropic"]
    image = textured(shape, False)
    refined = refine(image, image, np.zeros((3, *shape), np.float32), spacing, spacing, np.eye(4), QUICK)
    assert np.abs(refined).max() < 1e-3


def test_unrelated_images_do_not_fold_the_field() -> None:
    shape, spacing = GRIDS["flat"]
    rough = RefineConfig("demons", iterations=(40,), smoothing=0.3)
    noise = np.random.default_rng(0).uniform(0, 255, (2, *shape)).astype(np.float32)
    refined = refine(noise[0], noise[1], np.zeros((3, *shape), np.float32), spacing, spacing, np.eye(4), rough)
    assert metrics.jacobian_stats(refined, spacing).fold_fraction == 0


def test_what_lies_outside_the_moving_image_pulls_nowhere() -> None:
    shape, spacing = GRIDS["flat"]
    image = textured(shape, True)
    refined = refine(image, image[:, :, :28], np.zeros((3, *shape), np.float32), spacing, spacing, np.eye(4), QUICK)
    assert np.abs(refined).max() < 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "demon"}, "fit.refine.method: .*'none' or 'demons'"),
        ({"iterations": []}, r"fit.refine.iterations is \(\); expected counts"),
        ({"iterations": [0, 0]}, "fit.refine.iterations"),
        ({"iterations": [5, -1]}, "fit.refine.iterations"),
        ({"smoothing": 0}, "fit.refine.smoothing is 0.*above 0"),
        ({"smothing": 1}, "'fit.refine.smothing'; did you mean 'fit.refine.smoothing'"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({"fit": {"refine": given}})


def _fit_key(refine: dict[str, Any]) -> str:
    config = make_config({"fit": {"refine": refine}})
    inputs = {name: InputDigests(name, None, None) for name in "ab"}
    keys = {name: subject_keys(config, {}, found) for name, found in inputs.items()}
    return plan_pairs(config, [Pair("p", "a", "b")], ["a", "b"], inputs, keys)[0].fit_key


def test_a_result_depends_on_the_refinement_only_when_it_is_on() -> None:
    assert _fit_key({}) == _fit_key({"smoothing": 4.0})
    on = _fit_key({"method": "demons"})
    assert on not in (_fit_key({}), _fit_key({"method": "demons", "smoothing": 4.0}))


def test_a_study_reports_the_refined_field_beside_that_of_the_rois(tmp_path: Path) -> None:
    cohort = read_cohort(phantoms.write_cohort(tmp_path / "data", ["a", "b"]))
    pair = Pair("p", "b", "a")
    found = {}
    for method in ("none", "demons"):
        fit = {**phantoms.QUICK_FIT, "refine": {"method": method, "iterations": [15, 15]}}
        config = make_config({"execution": {"executor": "serial"}, "fit": fit})
        run_study(config, cohort, tmp_path / "study", [pair], reporter=SilentReporter())
        found[method] = tables.read_table(tmp_path / "study", "metrics").to_pylist()
    columns = [name for name in found["none"][0] if name.endswith("_refined")] + ["seconds_refine"]
    assert not any(row[name] is not None for row in found["none"] for name in columns)
    labelled = [name for name in columns if "landmark" not in name]
    assert all(row[name] is not None for row in found["demons"] for name in labelled)
    changed = {*columns, "key", *phantoms.TIMES}
    for off, on in zip(found["none"], found["demons"], strict=True):
        assert {k: v for k, v in off.items() if k not in changed} == {k: v for k, v in on.items() if k not in changed}
    mean = found["demons"][0]
    assert mean["dice_refined"] > mean["dice"]
    assert mean["fold_fraction_refined"] == 0

    folder = StudyFolder(tmp_path / "study")
    geometry = EmbeddingStore(folder.embeddings).read("a").geometry
    written = read_ddf(folder.transform("p"), geometry)
    assert metrics.jacobian_stats(written, geometry.spacing_mm).sdlogj == pytest.approx(
        mean["sdlogj_refined"], rel=1e-3
    )
