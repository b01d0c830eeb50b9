"""Similarities by their definitions, and the calibration of epsilon on pairs that cannot match."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.algorithms.ellipses import Gate
from pipeline.algorithms.similarity import Kind, calibrated_epsilon, compare, impossible_pairs


def whole(moving: np.ndarray, fixed: np.ndarray, kind: Kind) -> np.ndarray:
    return compare(moving, fixed, kind).blocks[0].clip(0, 1)


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_cosine_is_clipped_and_minmax_spans_the_whole_range() -> None:
    moving, fixed = unit(np.array([[1.0, 0], [0, 1]])), unit(np.array([[1.0, 0], [-1, 1]]))
    np.testing.assert_allclose(whole(moving, fixed, "cosine"), [[1, 0], [0, np.sqrt(0.5)]], atol=1e-6)
    stretched = whole(moving, fixed, "minmax")
    assert (stretched.min(), stretched.max()) == (0, pytest.approx(1))


def test_centring_tells_apart_what_shares_a_large_common_part() -> None:
    rng = np.random.default_rng(0)
    own = rng.normal(size=(20, 8))
    moving, fixed = (unit(10 + own + 0.1 * rng.normal(size=own.shape)) for _ in range(2))
    spread = {kind: np.ptp(whole(moving, fixed, kind)) for kind in ("cosine", "centred")}  # type: ignore[arg-type]
    assert spread["cosine"] < 0.1
    assert spread["centred"] > 0.9
    assert whole(moving, fixed, "centred").argmax(axis=1).tolist() == list(range(20))


@pytest.mark.parametrize("kind", ["cosine", "centred", "minmax"])
def test_no_roi(kind: str) -> None:
    assert whole(np.zeros((0, 3), np.float32), unit(np.ones((2, 3))), kind).shape == (0, 2)  # type: ignore[arg-type]


def test_pairs_of_a_band_are_those_of_the_whole_matrix() -> None:
    values = unit(np.random.default_rng(2).uniform(0.1, 1, (6, 3)))
    bands = [(slice(0, 3), slice(0, 2)), (slice(3, 6), slice(2, 6))]
    full = whole(values, values, "cosine")
    inside = np.zeros((6, 6), bool)
    for band in bands:
        inside[band] = True
    found = compare(values, values, "cosine", bands)
    i, j, similarity = found.above(0.9)
    expected = np.nonzero((full > 0.9) & inside)
    assert (i.tolist(), j.tolist()) == (expected[0].tolist(), expected[1].tolist())
    np.testing.assert_allclose(similarity, full[i, j], atol=1e-6)
    centres, variances = np.linspace(0, 50, 6)[:, None] * np.ones(2), np.tile([4.0, 0, 4.0], (6, 1))
    gate = Gate.between(centres, variances, centres, variances, 0.2)
    near = np.nonzero((full > 0.9) & inside & np.eye(6, dtype=bool))
    i, j, _ = found.above(0.9, gate)
    assert (i.tolist(), j.tolist()) == (near[0].tolist(), near[1].tolist())
    ordered = np.sort(np.where(inside, full, 0), axis=1)
    best = np.array([0, 5]), np.array([full[0, :2].argmax(), 2 + full[5, 2:].argmax()])
    expected_margin = [ordered[0, -1] - ordered[0, -2], ordered[5, -1] - ordered[5, -2]]
    np.testing.assert_allclose(found.margin(*best, full[best]), expected_margin, atol=1e-6)


def test_pairs_outside_the_window_are_stretched_as_those_inside() -> None:
    moving, fixed = (unit(np.random.default_rng(seed).normal(size=(6, 3))) for seed in (3, 4))
    windowed = compare(moving, fixed, "minmax", [(slice(0, 6), slice(2, 5))])
    everything = compare(moving, fixed, "minmax", span=windowed.span).blocks[0]
    np.testing.assert_allclose(everything[:, 2:5], windowed.blocks[0], atol=1e-6)
    assert everything.min() < 0


def test_what_is_impossible() -> None:
    area, depth = (np.array([1.0, 1.0]), np.array([3.9, 4.1, 1.0])), (np.array([0.1, 0.9]), np.array([0.1, 0.1, 0.5]))
    assert impossible_pairs(area, depth).tolist() == [[False, True, False], [True, True, False]]


def noisy(signal: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """60 x 60 similarities of noise about 0.5, the diagonal raised, half of the other pairs impossible."""
    rng = np.random.default_rng(1)
    similarity = np.clip(rng.normal(0.5, 0.1, (60, 60)), 0, 1).astype(np.float32)
    similarity[np.diag_indices(60)] = np.clip(similarity[np.diag_indices(60)] + signal, 0, 1)
    impossible = rng.random((60, 60)) < 0.5
    impossible[np.diag_indices(60)] = False
    return similarity, ~impossible, impossible


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4])
def test_false_discoveries_stay_near_the_accepted_share(rate: float) -> None:
    similarity, possible, impossible = noisy(0.4)
    epsilon = calibrated_epsilon(similarity, possible, impossible, rate)
    assert epsilon is not None
    accepted = (similarity > epsilon) & possible
    wrong = accepted.sum() - accepted[np.diag_indices(60)].sum()
    assert accepted[np.diag_indices(60)].mean() > 0.6
    assert wrong / accepted.sum() < rate + 0.1


def test_noise_alone_gives_next_to_nothing() -> None:
    similarity, possible, impossible = noisy(0.0)
    epsilon = calibrated_epsilon(similarity, possible, impossible, 0.05)
    assert epsilon is not None
    assert ((similarity > epsilon) & possible).sum() < 10


def test_without_an_impossible_pair_nothing_is_known() -> None:
    similarity, possible, _ = noisy(0.4)
    assert calibrated_epsilon(similarity, possible, np.zeros_like(possible), 0.1) is None
