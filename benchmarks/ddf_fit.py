"""Quality, time and memory of the displacement fit beside a dense Adam fit (`dense_adam.py`), single thread.

Run: python benchmarks/ddf_fit.py [--data ../shared/data] [--only NAME ...] [--reference-iterations 10000]
     [--reference-seconds 60] [--no-reference] [--batch 64] [SETTING=VALUE ...]   (of `fit`, for example objective=eq10)
Prints a Markdown table, one row per problem and method. Dice is hard: masks warped linearly, >= 0.5, with nothing
beyond the moving image. Folds are voxels with det J <= 0, near the ROIs (within two voxels of one) and anywhere. Time
is processor time, ours the median of three fits after the compiled loops are loaded; the reference's is extrapolated to
all its iterations where the cap stopped it, and its quality is that at the cap. `equal Dice` is the time it took to
reach our mean Dice over our time. Peak memory is what the fit adds to the process, each in a fork.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dense_adam import DenseConfig, Field, Masks, fit_dense
from scipy import ndimage

from pipeline.algorithms import fit_problem, metrics, warp
from pipeline.algorithms.ddf import fit_ddf, fit_ddfs
from pipeline.algorithms.fit_config import FitConfig
from pipeline.algorithms.fit_problem import Roi, RoiPair
from pipeline.config import load_config
from storage.geometry import moving_to_fixed
from storage.images import read_image, read_labels

Triple = tuple[float, float, float]
UNIT = (1.0, 1.0, 1.0)
NEAR_VOXELS = 2
REPEATS = 3


@dataclass(frozen=True)
class Problem:
    """K masks on the fixed and on the moving grid, and the true field [3, D, H, W] mm of a phantom."""

    name: str
    fixed: Masks
    moving: Masks
    spacing: Triple = UNIT
    moving_spacing: Triple = UNIT
    to_fixed: npt.NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.eye(4))
    truth: Field | None = None

    def pairs(self) -> list[RoiPair]:
        return [RoiPair(crop(f), crop(m)) for f, m in zip(self.fixed, self.moving, strict=True)]

    def indices(self, ddf: Field) -> Field:
        at = warp.moving_indices(ddf, self.spacing, self.to_fixed, self.moving_spacing)
        return np.asarray(at, dtype=np.float32)

    def ddf(self, indices: Field) -> Field:
        local = indices * np.asarray(self.moving_spacing)[:, None, None, None]
        world = np.einsum("ij,jzyx->izyx", self.to_fixed[:3, :3], local) + self.to_fixed[:3, 3, None, None, None]
        return np.asarray(world - warp.grid_points(indices.shape[1:], self.spacing), dtype=np.float32)

    def dice(self, indices: Field) -> list[float]:
        moved = (warp.warp_image(mask.astype(np.float32), indices) >= 0.5 for mask in self.moving)
        return [metrics.dice(fixed, mask) for fixed, mask in zip(self.fixed, moved, strict=True)]

    def quality(self, ddf: Field) -> dict[str, float]:
        near = ndimage.binary_dilation(self.fixed.any(0), iterations=NEAR_VOXELS)
        fold = metrics.jacobian_determinant(ddf, self.spacing) <= 0
        dice = self.dice(self.indices(ddf))
        row = {"dice": float(np.mean(dice)), "min": min(dice), "near": fold[near].mean(), "all": fold.mean()}
        if self.truth is not None:
            gap = (ddf - self.truth)[:, near] / np.asarray(self.spacing)[:, None]
            row["error"] = float(np.linalg.norm(gap, axis=0).mean())
        return row


def crop(mask: npt.NDArray[np.bool_]) -> Roi:
    index = np.argwhere(mask)
    low, high = index.min(0), index.max(0) + 1
    return Roi(mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], tuple(int(v) for v in low))


def phantom(side: int, count: int, seed: int = 0) -> Problem:
    """Ellipsoids in a cube seen through a smooth known displacement of up to a tenth of the side."""
    rng = np.random.default_rng(seed)
    grid = np.indices((side,) * 3).astype(np.float32)
    truth = np.zeros_like(grid)
    for _ in range(6):
        center, width = rng.uniform(0.2, 0.8, 3) * side, side * rng.uniform(0.2, 0.3)
        bump = np.exp(-0.5 * ((grid - center[:, None, None, None]) ** 2).sum(0) / width**2)
        truth += bump * rng.normal(0, side / 25, 3).astype(np.float32)[:, None, None, None]
    at, fixed, moving = grid + truth, [], []
    while len(fixed) < count:
        center, radii = rng.uniform(0.15, 0.85, 3) * side, rng.uniform(0.06, 0.12, 3) * side
        ellipsoids = [
            (((g - center[:, None, None, None]) / radii[:, None, None, None]) ** 2).sum(0) < 1 for g in (at, grid)
        ]
        if all(e.sum() > 0 for e in ellipsoids):
            fixed.append(ellipsoids[0])
            moving.append(ellipsoids[1])
    return Problem(f"phantom {side}³, K {count}", np.stack(fixed), np.stack(moving), truth=truth)


def masks_only(data: Path, name: str, count: int, suffix: str) -> Iterator[Problem]:
    """The peer's own masks, 0 to 1 as in its tests and the other way round."""
    sides = [
        np.stack([read(data / f"{name}_test{side}_mask{k}{suffix}")[0] > 0 for k in range(count)]) for side in (0, 1)
    ]
    yield Problem(f"{name} 0 to 1, K {count}", sides[1], sides[0])
    yield Problem(f"{name} 1 to 0, K {count}", sides[0], sides[1])


def read(path: Path) -> tuple[npt.NDArray[np.int32], Any]:
    image = read_image(path)
    return read_labels(path, image.geometry), image.geometry


def longitudinal(data: Path) -> Iterator[Problem]:
    with (data / "pairs.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["pair_id"].startswith("longi"):
                fixed, moving = (read(data / row[f"{side}_label"])[0] > 0 for side in ("fixed", "moving"))
                yield Problem(f"{row['pair_id']}, K 1", fixed[None], moving[None])


def acdc(data: Path) -> Iterator[Problem]:
    """Labels of the pairs as ROIs, label by label."""
    with (data / "pairs.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            (fixed, here), (moving, there) = (read(data / row[f"{side}_label"]) for side in ("fixed", "moving"))
            values = sorted((set(np.unique(fixed)) & set(np.unique(moving))) - {0})
            sides = (np.stack([labels == v for v in values]) for labels in (fixed, moving))
            spacings = (here.spacing_mm, there.spacing_mm)
            yield Problem(f"{row['pair_id']}, K {len(values)}", *sides, *spacings, moving_to_fixed(here, there))


def problems(data: Path) -> Iterator[Problem]:
    yield from masks_only(data / "roi_masks_only", "rc2d", 6, ".png")
    yield from masks_only(data / "roi_masks_only", "rc3d", 8, ".nii.gz")
    yield from acdc(data / "acdc_cardiac")
    yield from longitudinal(data / "roi_masks_only")
    for side, count in ((64, 20), (96, 20), (128, 5), (128, 20), (128, 80)):
        yield phantom(side, count)


def in_fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work` in a fork of this process, and `mib`, what it added to the memory at its peak."""

    def run(pipe: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = work()
        pipe.send({**found, "mib": found.pop("peak") / 1024 - before / 1024})

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run, args=(sender,))
    process.start()
    sender.close()
    result: dict[str, Any] = receiver.recv()
    process.join()
    return result


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def ours(problem: Problem, config: FitConfig) -> dict[str, Any]:
    pairs, shape = problem.pairs(), problem.fixed.shape[1:]
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        result = fit_ddf(pairs, shape, problem.spacing, problem.moving_spacing, problem.to_fixed, config)
        seconds.append(time.process_time() - start)
    top = peak()
    return {"seconds": statistics.median(seconds), "peak": top, **problem.quality(result.ddf)}


def reference(problem: Problem, config: DenseConfig, goal: float) -> dict[str, Any]:
    def reached(indices: Field) -> bool:
        return float(np.mean(problem.dice(indices))) >= goal

    found = fit_dense(problem.fixed, problem.moving, config, reached)
    top = peak()
    times = {"seconds": found.seconds, "iterations": found.iterations, "to_goal": found.seconds_to_goal}
    return {**times, "peak": top, **problem.quality(problem.ddf(found.indices))}


def print_row(name: str, method: str, row: dict[str, Any], mine: dict[str, Any]) -> None:
    cells = [f"{row['dice']:.3f}", f"{row['min']:.3f}", f"{row['near']:.2%}", f"{row['all']:.2%}"]
    cells += [f"{row['error']:.2f}" if "error" in row else "–", f"{row['seconds']:.2f}"]
    if row is mine:
        cells += ["", ""]
    else:
        reached = row["to_goal"]
        cells += [f"{row['seconds'] / mine['seconds']:.0f}x"]
        cells += [f"{reached / mine['seconds']:.0f}x" if reached is not None else "not reached"]
    print(f"| {name} | {method} |", " | ".join([*cells, f"{row['mib']:.0f}"]), "|", flush=True)


def batched(count: int, config: FitConfig) -> str:
    """Processor ms of each of `count` 2D pairs, one by one and in one call, and how often faster that is."""
    pairs = [plane(96 + 4 * (seed % 8), 6, seed) for seed in range(count)]

    def timed(size: int) -> float:
        start = time.process_time()
        for first in range(0, count, size):
            fit_ddfs(pairs[first : first + size], config)
        return 1e3 * (time.process_time() - start) / count

    timed(count)
    alone, together = timed(1), timed(count)
    return f"{count} pairs of 96 to 124 pixels, K 6: {alone:.1f} ms, {together:.1f} ms, {alone / together:.1f}x"


def plane(side: int, count: int, seed: int) -> fit_problem.Problem:
    """The middle slice of a phantom's regions, which two dimensions fit alone."""
    rng = np.random.default_rng(seed)
    grid = np.indices((side, side)).astype(np.float32)
    rois = []
    while len(rois) < count:
        center, radii, shift = rng.uniform(0.2, 0.8, 2) * side, rng.uniform(0.07, 0.14, 2) * side, rng.normal(0, 2, 2)
        sides = [(((grid - c[:, None, None]) / radii[:, None, None]) ** 2).sum(0) < 1 for c in (center, center + shift)]
        rois.append(RoiPair(*(crop(mask[None]) for mask in sides), 0.9))
    unit = (1.0, 1.0, 1.0)
    return fit_problem.Problem(rois, (1, side, side), unit, unit, np.eye(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="*", default=[""], help="problems whose name starts so")
    parser.add_argument("--reference-iterations", type=int, default=DenseConfig.iterations)
    parser.add_argument("--reference-seconds", type=float, default=DenseConfig.seconds)
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--batch", type=int, help="instead, so many 2D pairs one by one and in one call")
    parser.add_argument("settings", nargs="*", help="SETTING=VALUE of `fit`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(None, [f"fit.{setting}" for setting in options.settings]).fit
    if options.batch:
        print(batched(options.batch, config))
        return
    dense = DenseConfig(options.reference_iterations, options.reference_seconds)
    ours(phantom(32, 4), config)
    for warm in (plane(64, 4, 0), fit_problem.Problem(phantom(32, 4).pairs(), (32, 32, 32), UNIT, UNIT, np.eye(4))):
        fit_ddfs([warm], config)  # compiled loops are loaded once in a process, not once in a fit
    print("| problem | fit | mean Dice | min Dice | folds near | folds | error, vox | s | ratio | equal Dice | MiB |")
    print("|---|---|" + "---|" * 9)
    for problem in problems(options.data):
        if problem.name.startswith(tuple(options.only)):
            mine = in_fork(lambda problem=problem: ours(problem, config))
            print_row(problem.name, "ours", mine, mine)
            if not options.no_reference:
                row = in_fork(lambda problem=problem, goal=mine["dice"]: reference(problem, dense, goal))
                method = "dense" if row["iterations"] == dense.iterations else f"dense, {row['iterations']} steps"
                print_row(problem.name, method, row, mine)


if __name__ == "__main__":
    main()
