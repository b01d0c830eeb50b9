"""Pseudo-ROI evaluation: what is held out, and what the held-out ROIs are measured by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.algorithms.ddf import FitResult
from pipeline.algorithms.fit_problem import Problem, Roi, RoiPair
from pipeline.algorithms.pseudo_rois import (
    INSIDE,
    SAME,
    evaluate_held_out,
    folds,
    overlaps,
    summarise,
)
from pipeline.algorithms.roi_overlap import carry
from pipeline.algorithms.warp import affine_ddf

SHAPE = (4, 24, 24)
SPACING = (5.0, 2.0, 1.0)


def _box(z: int, y: int, x: int, height: int, width: int, depth: int = 1) -> Roi:
    return Roi(np.ones((depth, height, width), bool), (z, y, x))


def _whole(roi: Roi) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(o, o + n) for o, n in zip(roi.offset, roi.mask.shape, strict=True))] = roi.mask
    return mask


def _problem(pairs: list[RoiPair]) -> Problem:
    return Problem(pairs, SHAPE, SPACING, SPACING, np.eye(4))


def _translation(z: float, y: float, x: float) -> FitResult:
    matrix = np.eye(4)
    matrix[:3, 3] = z, y, x
    nodes = np.zeros((3, 1, 1, 1), np.float32)
    return FitResult(affine_ddf(matrix, SHAPE, SPACING), matrix, nodes, SPACING, "none", np.zeros(0, np.float32))


def _leaks(kept: Roi, held: Roi) -> bool:
    """Whether a ROI of the fit gives a held-out one away, from whole masks."""
    a, b = _whole(kept), _whole(held)
    both = (a & b).sum()
    return both / (a | b).sum() > SAME or both / min(a.sum(), b.sum()) > INSIDE


rois = st.builds(
    _box,
    st.integers(0, 2),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 10),
    st.integers(1, 10),
    st.integers(1, 2),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(RoiPair, rois, rois), min_size=1, max_size=12), st.integers(2, 20))
def test_nothing_evaluated_has_entered_its_fit(pairs: list[RoiPair], count: int) -> None:
    held_out: list[int] = []
    for kept, held in folds(pairs, count):
        assert kept
        held_out += held
        for k in kept:
            for h in held:
                assert not _leaks(pairs[k].fixed, pairs[h].fixed)
                assert not _leaks(pairs[k].moving, pairs[h].moving)
    assert len(set(held_out)) == len(held_out)


def test_the_fit_sees_neither_the_roi_nor_its_near_duplicates() -> None:
    far = [RoiPair(_box(0, 0, 0, 3, 3), _box(0, 0, 0, 3, 3)), RoiPair(_box(3, 15, 15, 4, 4), _box(3, 15, 15, 4, 4))]
    twice = [RoiPair(_box(1, 8, 8, 6, 6), _box(1, 8, 8, 6, 6)), RoiPair(_box(1, 8, 8, 6, 7), _box(1, 16, 8, 6, 6))]
    nested = RoiPair(_box(1, 5, 5, 14, 14), _box(2, 5, 5, 14, 14))
    other_slice = RoiPair(_box(2, 8, 8, 6, 6), _box(3, 3, 3, 6, 6))
    pairs = [*far, *twice, nested, other_slice]
    seen: list[set[int]] = []

    def fit(kept: Problem) -> FitResult:
        seen.append({next(k for k, pair in enumerate(pairs) if pair is one) for one in kept.pairs})
        return _translation(0, 0, 0)

    rows = evaluate_held_out(_problem(pairs), fit, 99)
    assert sorted(int(row["pair"]) for row in rows) == list(range(6))
    assert seen == [{1, 2, 3, 4, 5}, {0, 2, 3, 4, 5}, {0, 1, 5}, {0, 1, 5}, {0, 1, 2, 3, 4}]


def test_one_fold_per_roi_at_most_and_all_at_least_once() -> None:
    pairs = [RoiPair(_box(z, 6 * k, 2, 4, 4), _box(z, 6 * k, 2, 4, 4)) for z in range(4) for k in range(3)]
    assert [len(held) for _, held in folds(pairs, 5)] == [3, 3, 2, 2, 2]
    assert [len(held) for _, held in folds(pairs, 99)] == [1] * 12


def test_a_single_roi_cannot_be_held_out() -> None:
    pair = RoiPair(_box(0, 2, 2, 5, 5), _box(0, 2, 2, 5, 5))
    assert list(folds([pair, pair], 2)) == []
    assert list(folds([], 2)) == []
    nothing = evaluate_held_out(_problem([pair]), lambda kept: _translation(0, 0, 0), 2)
    assert summarise(nothing, has_spacing=True) == {"n_pseudo": 0}


def test_overlaps_are_those_of_the_whole_masks() -> None:
    rng = np.random.default_rng(3)
    made = [Roi(rng.random((2, 5, 6)) > 0.4, (int(z), int(y), int(x))) for z, y, x in rng.integers(0, 3, (6, 3))]
    iou, inside = overlaps(made)
    for a, first in enumerate(made):
        for b, second in enumerate(made):
            one, two = _whole(first), _whole(second)
            assert iou[a, b] == pytest.approx((one & two).sum() / (one | two).sum())
            assert inside[a, b] == pytest.approx((one & two).sum() / min(one.sum(), two.sum()))


def test_a_slab_is_compared_in_plane_with_its_own_slice() -> None:
    """The matched slices lie at other heights, and the map is flat: only its in-plane part counts."""
    pairs = [
        RoiPair(_box(1, 4, 4, 6, 5), _box(3, 6, 7, 6, 5)),
        RoiPair(_box(0, 15, 15, 4, 4), _box(0, 17, 18, 4, 4)),
    ]
    rows = evaluate_held_out(_problem(pairs), lambda kept: _translation(0, 2 * 2.0, 3 * 1.0), 2)
    first = next(row for row in rows if row["pair"] == 0)
    assert (first["dice"], first["tre_mm"], first["tre_vox"]) == (1.0, 0.0, 0.0)
    assert first["dice_affine"] == 1.0
    assert first["dice_before"] == pytest.approx(2 * 4 * 2 / 60)
    assert first["tre_vox_before"] == pytest.approx(np.hypot(2, 3))
    assert first["tre_mm_before"] == pytest.approx(np.hypot(4, 3))


def test_a_volume_is_compared_in_three_dimensions() -> None:
    pairs = [
        RoiPair(_box(0, 4, 4, 6, 5, depth=2), _box(1, 4, 4, 6, 5, depth=2)),
        RoiPair(_box(2, 16, 16, 4, 4), _box(2, 16, 16, 4, 4)),
    ]
    rows = evaluate_held_out(_problem(pairs), lambda kept: _translation(5.0, 0, 0), 2)
    first = next(row for row in rows if row["pair"] == 0)
    assert (first["dice_before"], first["dice"]) == (0.5, 1.0)
    assert (first["tre_mm_before"], first["tre_mm"]) == (5.0, 0.0)


def test_what_leaves_the_image_counts_zero_and_has_no_distance() -> None:
    pairs = [RoiPair(_box(0, 2, 2, 5, 5), _box(0, 2, 2, 5, 5)), RoiPair(_box(1, 12, 12, 5, 5), _box(1, 12, 12, 5, 5))]
    rows = evaluate_held_out(_problem(pairs), lambda kept: _translation(0, 0, 500.0), 2)
    assert summarise(rows, has_spacing=True) == {
        "n_pseudo": 2,
        "pseudo_dice_before": 1.0,
        "pseudo_dice_affine": 0.0,
        "pseudo_dice": 0.0,
        "pseudo_tre_mm_before": 0.0,
        "pseudo_tre_vox_before": 0.0,
    }
    assert "pseudo_tre_mm_before" not in summarise(rows, has_spacing=False)


def test_carrying_takes_the_nearest_voxel() -> None:
    roi = Roi(np.array([[[True, False], [True, True]]]), (2, 3, 4))
    indices = np.array([[2.4, 2.0, 7.0], [3.4, 4.4, 3.0], [4.49, 3.2, 4.0]]).reshape(3, 1, 1, 3)
    assert carry(roi, indices, in_plane=False).ravel().tolist() == [True, False, False]
    assert carry(roi, indices, in_plane=True).ravel().tolist() == [True, False, True]
