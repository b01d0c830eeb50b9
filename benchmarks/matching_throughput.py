"""Pairs matched per second of processor time: synthetic subjects of 20 slices x 30 ROIs, the matrix product beside.

Run: python benchmarks/matching_throughput.py [--slices 20] [--rois 30] [--pairs 100]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import time

import numpy as np

from pipeline.algorithms.consistency import SpatialConfig
from pipeline.algorithms.matching import MatchConfig, RoiSet, match

CHANNELS = 121  # of a component-tree prototype


def subjects(slices: int, rois: int, seed: int = 0) -> tuple[RoiSet, RoiSet]:
    """Two noisy copies of one random subject: every ROI has a true partner, displaced by a few mm."""
    rng = np.random.default_rng(seed)
    count = slices * rois
    shared = np.abs(rng.normal(size=(1, CHANNELS))) + 0.7 * rng.normal(size=(count, CHANNELS))
    place = rng.uniform(40, 200, size=(count, 2))
    radius = rng.uniform(4, 20, size=count)
    index = np.repeat(np.arange(slices), rois).astype(np.int32)

    def noisy() -> RoiSet:
        prototypes = shared + 0.3 * rng.normal(size=shared.shape)
        prototypes = (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).astype(np.float32)
        centroid = np.column_stack([index * 8.0, place + rng.normal(0, 2, place.shape)])
        variance = radius**2 / 4
        covariance = np.column_stack([variance, np.zeros(count), variance])
        return RoiSet(prototypes, index, centroid, np.pi * radius**2, covariance, slices)

    return noisy(), noisy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--rois", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=100)
    options = parser.parse_args()
    moving, fixed = subjects(options.slices, options.rois)
    window = MatchConfig(slice_range=11, slice_unit="slices")
    settings = {
        "matrix product alone": None,
        "Algorithm 1 (epsilon 0.8, delta s 11)": dataclasses.replace(
            window, epsilon=0.8, scope="window", spatial=SpatialConfig(enabled=False)
        ),
        "default, delta s 11": window,
        "default": MatchConfig(),
    }
    for name, config in settings.items():
        found = 0
        start = time.process_time()
        for _ in range(options.pairs):
            if config is None:
                np.clip(moving.prototypes @ fixed.prototypes.T, 0, 1)
            else:
                found = len(match(moving, fixed, np.eye(4), config).similarity)
        rate = options.pairs / (time.process_time() - start)
        print(f"{name:40s} {rate:8.1f} pairs/s  {found} matches")


if __name__ == "__main__":
    main()
