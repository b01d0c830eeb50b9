"""Figures of a sweep: every kind of axis draws something, and what is drawn depends on the numbers."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.sweep_figures import axis_figure
from pipeline.sweep_tables import best_distance, describe_sweep

OF_LABEL_1 = 0.1
DISTANCES = ("tre_mm", "tre_vox", "landmark_tre_mm", "landmark_tre_vox")


def _table(axes: dict[str, list[Any]], **changes: Any) -> pa.Table:
    """A row of label 0 per combination, and one of label 1 with a Dice of its own."""
    count = len(next(iter(axes.values())))
    rise = np.linspace(0, 1, count)
    columns: dict[str, Any] = {**axes, "n_pairs": [4] * count, "n_failed": [0] * count}
    columns |= {"dice": 0.5 + 0.1 * rise, "dice_sd": [0.05] * count, "dice_p30": [0.4] * count}
    columns |= {"dice_before": [0.3] * count, "dice_affine": [0.4] * count, "seconds_fit": [1.0] * count}
    for name in DISTANCES:
        known = [None] * count if name.startswith("landmark") else list(5 - rise)
        columns |= {name: pa.array(known, pa.float64()), f"{name}_sd": pa.array(known, pa.float64())}
        columns |= {f"{name}_p70": pa.array(known, pa.float64()), f"{name}_before": pa.array(known, pa.float64())}
    columns |= {"n_rois": 20 + 5 * rise, "fold_fraction": [0.0] * count}
    columns |= changes
    table = pa.table({**columns, "label": [0] * count})
    return pa.concat_tables([table, pa.table({**columns, "dice": [OF_LABEL_1] * count, "label": [1] * count})])


def _pixels(png: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize(
    ("axes", "axis"),
    [
        ({"match.epsilon": [0.6, 0.7, 0.8]}, "match.epsilon"),
        ({"match.epsilon": [0.7]}, "match.epsilon"),
        ({"match.one_to_one": [True, False]}, "match.one_to_one"),
        ({"match.scope": ["window", "volume", "window", "volume"], "k": [1, 1, 3, 3]}, "k"),
        ({"prototypes.area": [None, 0.5]}, "prototypes.area"),
        ({"k": [n // 2 for n in range(40)], "e": [n % 2 for n in range(40)]}, "e"),
    ],
    ids=["numbers", "one", "flags", "two axes", "none", "many lines"],
)
def test_an_axis_is_drawn(axes: dict[str, list[Any]], axis: str) -> None:
    others = [name for name in axes if name != axis]
    drawn = _pixels(axis_figure(_table(axes), axis, others)).astype(int)
    coloured = drawn.max(axis=-1) - drawn.min(axis=-1) > 60
    assert all(panel.sum() > 30 for panel in np.array_split(coloured, 3, axis=1))


def test_a_figure_follows_the_numbers_and_the_label() -> None:
    axes: dict[str, list[Any]] = {"match.epsilon": [0.6, 0.7, 0.8]}
    first = axis_figure(_table(axes), "match.epsilon")
    assert first == axis_figure(_table(axes), "match.epsilon")
    assert first != axis_figure(_table(axes, dice=[0.9, 0.2, 0.3]), "match.epsilon")
    of_label = axis_figure(_table(axes), "match.epsilon", label=1)
    assert of_label != first
    assert of_label == axis_figure(_table(axes, dice=[OF_LABEL_1] * 3), "match.epsilon")


def test_without_any_result_it_says_so() -> None:
    empty = pa.array([None, None], pa.float64())
    nothing = dict.fromkeys(("dice", "n_rois", *DISTANCES), empty)
    drawn = _pixels(axis_figure(_table({"match.epsilon": [0.6, 0.7]}, **nothing), "match.epsilon"))
    assert (drawn < 200).any()


def test_a_combination_without_results_leaves_the_others() -> None:
    holes = {name: pa.array([0.5, None], pa.float64()) for name in ("dice", "n_rois", *DISTANCES)}
    axes: dict[str, list[Any]] = {"match.scope": ["window", "volume"], "match.epsilon": [0.6, 0.6]}
    assert _pixels(axis_figure(_table(axes, **holes), "match.epsilon", ["match.scope"])).std() > 10


def test_landmarks_go_before_labels_and_mm_before_voxels() -> None:
    axes: dict[str, list[Any]] = {"match.epsilon": [0.6, 0.7]}
    known = pa.array([1.0, 2.0], pa.float64())
    assert best_distance(_table(axes)) == "tre_mm"
    assert best_distance(_table(axes, landmark_tre_mm=known)) == "landmark_tre_mm"
    assert best_distance(_table(axes, tre_mm=pa.array([None, None], pa.float64()))) == "tre_vox"


def test_the_printed_table_marks_the_best() -> None:
    table = describe_sweep(_table({"match.epsilon": [0.6, 0.7]}), ["match.epsilon"])
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["match.\nepsilon"] == ["0.6", "0.7"]
    assert cells["Dice"] == ["0.500 ± 0.050", "[bold]0.600 ± 0.050[/bold]"]
    assert cells["TRE mm"][1].startswith("[bold]4.000")
    assert table.caption == "before registration: Dice 0.300, TRE 5.000 mm"
