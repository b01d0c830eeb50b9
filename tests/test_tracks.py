"""ROIs linked through the slices of a subject."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.algorithms.track_support import favour, support
from pipeline.algorithms.tracks import TrackConfig, link

ROUND = (9.0, 0.0, 9.0)


def _link(
    rois: list[tuple[int, float, float, float]], config: TrackConfig | None = None, spread: tuple[float, ...] = ROUND
) -> list[int]:
    """Tracks of ROIs (slice, y mm, x mm, prototype angle in degrees)."""
    z, y, x, angle = np.array(rois, dtype=np.float64).reshape(-1, 4).T
    unit = np.stack([np.cos(np.radians(angle)), np.sin(np.radians(angle))], axis=1).astype(np.float32)
    place = np.stack([z * 8, y, x], axis=1)
    spreads = np.tile(spread, (len(z), 1)).reshape(-1, 3)
    return link(z.astype(np.int32), place, spreads, unit, config or TrackConfig()).tolist()


def test_a_structure_is_one_track_through_its_slices() -> None:
    two = [(z, y + z, 10.0, angle) for z in range(4) for y, angle in ((10.0, 0.0), (60.0, 90.0))]
    assert _link(two) == [0, 1] * 4


def test_neither_place_nor_looks_alone_links() -> None:
    assert _link([(0, 10, 10, 0), (1, 10, 10, 60)]) == [0, 1]
    assert _link([(0, 10, 10, 0), (1, 40, 10, 0)]) == [0, 1]
    assert _link([(0, 10, 10, 0), (1, 10, 10, 60)], TrackConfig(min_similarity=0.4)) == [0, 0]


def test_a_missing_slice_ends_a_track() -> None:
    assert _link([(0, 10, 10, 0), (2, 10, 10, 0), (3, 10, 10, 0)]) == [0, 1, 1]


def test_each_roi_has_at_most_one_successor_and_the_best_wins() -> None:
    assert _link([(0, 10, 10, 0), (1, 12, 10, 0), (1, 10, 10, 0)]) == [0, 1, 0]
    assert _link([(0, 12, 10, 0), (0, 10, 10, 0), (1, 10, 10, 0)]) == [0, 1, 1]


def test_tracks_hold_one_roi_of_a_slice_and_are_numbered_by_their_first() -> None:
    rng = np.random.default_rng(0)
    z = np.sort(rng.integers(0, 6, 80))
    rois = [(int(s), *rng.uniform(0, 20, 2), rng.uniform(0, 30)) for s in z]
    found = np.array(_link(rois))
    assert len(set(zip(found.tolist(), z.tolist(), strict=True))) == len(z)
    first = [int(np.flatnonzero(found == t)[0]) for t in range(found.max() + 1)]
    assert first == sorted(first)
    assert found.max() < 60


def test_no_roi_is_no_track() -> None:
    assert _link([]) == []


def test_the_rest_of_a_track_decides_where_one_slice_is_in_doubt() -> None:
    # moving ROIs 0, 1, 2 and fixed ROIs 0, 1, 2 are a track each; fixed ROI 3 is a stray that looks better in slice 2
    moving, fixed = np.array([0, 0, 0], np.int32), np.array([0, 0, 0, 1], np.int32)
    i, j = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 3])
    score = np.array([0.8, 0.8, 0.7, 0.75], np.float32)
    np.testing.assert_allclose(support(i, j, score, moving, fixed), [1.6 / 3] * 3 + [0], rtol=1e-6)
    voted = favour(i, j, score, moving, fixed, 0.3)
    assert voted[2] > voted[3]
    np.testing.assert_array_equal(favour(i, j, score, None, None, 0.0), score)
    assert len(favour(i[:0], j[:0], score[:0], moving, fixed, 0.3)) == 0


def test_votes_without_tracks_are_refused() -> None:
    nothing = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match=r"track_support is 0.3, which needs the tracks"):
        favour(nothing, nothing, np.zeros(0, np.float32), None, None, 0.3)
