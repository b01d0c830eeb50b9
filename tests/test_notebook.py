"""`samreg.open_study`: handles that read when they are asked, plots of a pair, and the example notebook."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import PIL.Image
import pytest
import SimpleITK as sitk  # noqa: N813
from matplotlib.figure import Figure

import samreg
from pipeline.errors import UsageError
from pipeline.notebook import OpenStudy
from storage import tables
from storage.embeddings import EmbeddingStore
from storage.images import read_labels
from storage.transforms import read_ddf
from tests.phantoms import REPO
from tests.sample_study import HOSTILE, write_study

PAIR = "subject-02__subject-01"
NOTEBOOK = REPO / "docs" / "first_look.ipynb"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    half_written = write_study(folder) / "metrics" / ".part.parquet.0123abcd.parquet"
    half_written.write_bytes(b"PAR1")
    return folder


@pytest.fixture(scope="module")
def study(made: Path) -> OpenStudy:
    return samreg.open_study(made / "study")


def _pixels(figure: Any) -> np.ndarray:
    """As a notebook shows it."""
    return np.asarray(PIL.Image.open(io.BytesIO(figure._repr_png_())).convert("RGB"), np.float64)


def test_tables_are_arrow_and_dask(study: OpenStudy, made: Path) -> None:
    assert study.tables == ["rois", "correspondences", "metrics", "failures", "runs"]
    stored = tables.read_table(made / "study", "metrics")
    assert study.table("metrics").to_table().equals(stored)
    assert study.table("cohort_rois").count_rows() == 0
    frame = study.frame("metrics")
    assert frame.npartitions == 2
    assert frame.dice.mean().compute() == pytest.approx(0.8)
    assert study.pair(PAIR).metrics["label"].to_pylist() == [0, 1, 2]
    assert study.pair(PAIR).matches["rank"].to_pylist() == list(range(study.pair(PAIR).matches.num_rows))
    assert set(study.subject("subject-01").rois["subject"].to_pylist()) == {"subject-01"}
    assert repr(study).endswith("3 subjects, 3 pairs, tables rois, correspondences, metrics, failures, runs)")


def test_volumes_are_dask_arrays_and_transforms_sitk(study: OpenStudy, made: Path) -> None:
    pair = study.pair(PAIR)
    image, labels, ddf = pair.fixed.image, pair.fixed.labels, pair.ddf
    assert isinstance(image, da.Array)
    assert isinstance(labels, da.Array)
    assert (image.shape, image.dtype, labels.dtype) == ((3, 64, 64), np.float32, np.int32)
    computed = image.compute()
    assert 0 <= computed.min() < 0.1
    assert 0.9 < computed.max() <= 1
    geometry = pair.fixed.geometry
    np.testing.assert_array_equal(labels.compute(), read_labels(made / "subject-01_label.nii.gz", geometry))
    path = made / "study" / "transforms" / f"{PAIR}.h5"
    np.testing.assert_array_equal(ddf.compute(), read_ddf(path, geometry, pair.moving.geometry))
    assert isinstance(pair.transform, sitk.Transform)
    fixed, moving = (sitk.ReadImage(str(made / f"subject-0{i}.nii.gz")) for i in (1, 2))
    before, after = (sitk.Resample(moving, fixed, t) for t in (sitk.Transform(3, sitk.sitkIdentity), pair.transform))
    error = [np.abs(sitk.GetArrayFromImage(i) - sitk.GetArrayFromImage(fixed)).mean() for i in (before, after)]
    assert error[1] < error[0]
    features = pair.fixed.features
    assert features is not None
    assert features.chunks == ((1, 1, 1), (2,), (4,), (4,))
    known = EmbeddingStore(made / "study" / "embeddings.zarr").read("subject-01").masks([1, 0])
    np.testing.assert_array_equal(pair.fixed.masks([1, 0]), known)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    study = samreg.open_study(write_study(tmp_path))
    image, transform = tmp_path / "subject-01.nii.gz", tmp_path / "study" / "transforms" / f"{PAIR}.h5"
    pair = study.pair(PAIR)
    volume, field = pair.fixed.image, pair.ddf
    image.unlink()
    transform.write_bytes(b"")
    assert volume.shape == field.shape[1:]
    for lazy, expected in ((volume, f"{image}: no such file"), (field, f"{transform}: not a transform that samreg")):
        with pytest.raises(ValueError, match=re.escape(expected)):
            lazy.compute()


def test_overlays_show_that_the_images_come_together(study: OpenStudy) -> None:
    figure = study.overlay(PAIR)
    before, after = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    colour = [np.abs(picture[..., 0] - picture[..., 1]).mean() for picture in (before, after)]
    assert colour[1] < 0.7 * colour[0]
    assert [axes.get_title() for axes in figure.axes] == ["before, slice 1", "after, slice 1"]
    assert _pixels(figure).std() > 10
    assert study.overlay(PAIR, 0).axes[0].get_title() == "before, slice 0"


def test_matches_are_drawn_and_joined_in_matching_colours(study: OpenStudy) -> None:
    figure = study.matches(PAIR, 1, most=3)
    here, there = figure.axes
    outlines = [
        [tuple(c.get_edgecolor()[0]) for c in axes.collections if len(c.get_edgecolor())] for axes in (here, there)
    ]
    assert outlines[0] == outlines[1]
    assert len(set(outlines[0])) == 3
    assert len(figure.artists) == 3
    assert here.get_title() == "fixed, slice 1"
    assert _pixels(figure).std() > 10


def test_the_grid_shows_the_field(study: OpenStudy) -> None:
    figure = study.grid(PAIR, 2)
    axes, bar = figure.axes
    length = np.linalg.norm(study.pair(PAIR).ddf[:, 2].compute(), axis=0)
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), length, rtol=1e-5)
    assert bar.get_ylabel() == "displacement (mm), slice 2"
    assert len(axes.lines) > 20
    assert _pixels(figure).std() > 10


def test_pictures_and_hostile_names(tmp_path: Path) -> None:
    study = samreg.open_study(write_study(tmp_path, hostile=True, shape=(1, 64, 64)))
    name = f"subject-02__{HOSTILE}"
    for figure in (study.overlay(name), study.matches(name), study.grid(name)):
        assert _pixels(figure).std() > 10
        assert HOSTILE in figure.get_suptitle()
    assert study.grid(name).axes[1].get_ylabel().startswith("displacement (px)")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda s: s.subject("subject-1"), "has no subject 'subject-1'; did you mean subject-01"),
        (lambda s: s.pair("subject-02_subject-01"), f"has no pair 'subject-02_subject-01'; did you mean {PAIR}"),
        (lambda s: s.overlay("x"), f"has no pair 'x'; did you mean {PAIR}"),
        (lambda s: s.table("metric"), "has no table 'metric'; did you mean metrics"),
        (lambda s: s.frame("cohort_rois"), "table 'cohort_rois' has no rows yet; it has rois, correspondences"),
        (lambda s: s.pair("subject-03__subject-01").ddf, "no file in transforms/: samreg status says why"),
        (lambda s: s.pair(PAIR).log_jacobian, "no file in jacobians/: run with output.jacobian=true"),
        (lambda s: s.overlay(PAIR, 3), r"slice 3 is outside 0\.\.2 of 'subject-01'"),
        (lambda s: s.matches(PAIR, 9), "slice 9 of 'subject-01' has no matched ROIs; these have: 0, 1, 2"),
        (lambda s: s.matches("subject-03__subject-01"), "'subject-03__subject-01' has no matched ROIs"),
    ],
)
def test_what_does_not_exist_is_said_with_what_does(study: OpenStudy, wrong: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        wrong(study)


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a study folder"):
        samreg.open_study(tmp_path)


def test_the_example_notebook_runs_and_holds_no_output(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    monkeypatch.chdir(made)
    names: dict[str, Any] = {}
    shown = []
    for cell in code:  # as a notebook does: the value of the last expression is shown
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            assert isinstance(last, ast.Expr)
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    assert sum(isinstance(value, Figure) for value in shown) == 3
    assert names["worst"] == "subject-03__subject-02"
