"""What each choice of the matching does to precision and recall, and how far a match's confidence can be trusted.

Run: python benchmarks/matching_quality.py [--data FOLDER] [--out FOLDER] [--fit] [SETTING=VALUE ...]

A ROI shows a label if it covers more than half of the ROI. A match with a label on either side is right if both show
the same. Precision is the share of right ones among these; recall is the share of labelled fixed ROIs in a right one.
Prints a Markdown table of the ablation (--fit adds the Dice after the displacement fit, without transforms), another
of confidence against truth, and draws it to reliability.png.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import accuracy
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pipeline.algorithms import metrics, warp
from pipeline.algorithms.ddf import fit_ddf
from pipeline.algorithms.fit_config import FitConfig
from pipeline.algorithms.matching import MatchConfig, Matches, match
from pipeline.config import StudyConfig, load_config
from pipeline.stages.matched_rois import roi_pairs
from pipeline.stages.roi_sets import SubjectRois, read_rois
from pipeline.study import run_study
from storage.cohort import read_cohort
from storage.embeddings import EmbeddingStore, SubjectEmbedding
from storage.geometry import moving_to_fixed
from storage.images import read_labels

BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
HEARTS, SEED = 48, 1


@dataclass(frozen=True)
class Known:
    """A subject with its ground truth: the label of every ROI (0: none), and the label map."""

    rois: SubjectRois
    stored: SubjectEmbedding
    shown: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]


def variants(base: MatchConfig) -> dict[str, MatchConfig]:
    """The recommended matching, then each of its parts changed; above it similarity alone."""
    alone = replace(base, spatial=replace(base.spatial, enabled=False))
    return {
        "similarity alone: cosine, epsilon .64": alone,
        "cosine, epsilon .80 (the paper's)": replace(alone, epsilon=0.8),
        "centred cosine, epsilon .64": replace(alone, similarity="centred"),
        "min-max, epsilon .80": replace(alone, similarity="minmax", epsilon=0.8),
        "calibrated epsilon, false discoveries 5 %": replace(alone, false_discovery=0.05),
        "calibrated epsilon, false discoveries 20 %": replace(alone, false_discovery=0.2),
        "mutual nearest": replace(alone, selection="mutual"),
        "optimal assignment": replace(alone, selection="optimal"),
        "**recommended**: consistent in space": base,
        "without the expected slice": replace(base, spatial=replace(base.spatial, depth=0.0, widening=1.0)),
        "affine alone, no neighbourhood": replace(base, spatial=replace(base.spatial, local_rounds=0)),
        "two rounds of neighbourhood": replace(base, spatial=replace(base.spatial, local_rounds=2)),
        "with votes of tracks": replace(base, spatial=replace(base.spatial, track_support=0.3)),
        "hybrid one-to-many": replace(base, one_to_one="hybrid"),
        "with centred cosine": replace(base, similarity="centred"),
        "with min-max": replace(base, similarity="minmax"),
        "with false discoveries 20 %": replace(base, false_discovery=0.2),
        "mutual nearest at the end": replace(base, selection="mutual"),
        "optimal assignment at the end": replace(base, selection="optimal"),
    }


def pair_groups(data: Path) -> dict[str, tuple[Path, list[tuple[str, str]], dict[str, str]]]:
    """Folder, (moving, fixed) images and the label of each image, of pairs of different subjects."""
    found = {}
    known = accuracy.groups(data)
    for name in ("ACDC, between subjects", "hippocampus, between subjects", "2D cardiac, between subjects"):
        folder, rows = known[name]
        labels = {row[f"{role}_image"]: row[f"{role}_label"] for _, row in rows for role in ("moving", "fixed")}
        found[name] = (folder, [(row["moving_image"], row["fixed_image"]) for _, row in rows], labels)
    folder, rows = known["M&Ms, ES to ED"]
    labels = {row["fixed_image"]: row["fixed_label"] for _, row in rows}
    ordered = [(moving, fixed) for moving in labels for fixed in labels if moving != fixed]
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(ordered))[:HEARTS])
    found["M&Ms, between subjects"] = (folder, [ordered[n] for n in chosen], labels)
    return found


def read_known(folder: Path, labels: dict[str, str], out: Path, config: StudyConfig) -> dict[str, Known]:
    """Encode the images of a group and read what is known of their ROIs."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "cohort.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = [[accuracy.subject_name(i), (folder / i).resolve(), (folder / s).resolve()] for i, s in labels.items()]
        csv.writer(stream).writerows([["subject", "image", "label"], *rows])
    run_study(config, read_cohort(out / "cohort.csv"), out / "study", until="prototypes")
    store = EmbeddingStore(out / "study" / "embeddings.zarr")
    known = {}
    for image, label in labels.items():
        name = accuracy.subject_name(image)
        rois, stored = read_rois(store, name), store.read(name)
        truth = read_labels(str(folder / label), stored.geometry)
        shown = [majority(truth[z][mask]) for mask, z in zip(stored.masks(rois.roi), rois.rois.slice, strict=True)]
        known[image] = Known(rois, stored, np.array(shown, dtype=np.int64), truth)
    return known


def majority(values: npt.NDArray[np.int32]) -> int:
    """The label of more than half of the pixels, or 0."""
    counts = np.bincount(values)
    return int(counts.argmax()) if counts.max() * 2 > len(values) else 0


def fitted_dice(moving: Known, fixed: Known, found: Matches, config: FitConfig) -> float:
    rows = [
        {"fixed_roi": int(fixed.rois.roi[j]), "moving_roi": int(moving.rois.roi[i]), "confidence": float(c)}
        for i, j, c in zip(found.moving_index, found.fixed_index, found.confidence, strict=True)
    ]
    here, there = fixed.rois.geometry, moving.rois.geometry
    between = moving_to_fixed(here, there)
    fit = fit_ddf(
        roi_pairs(fixed.stored, moving.stored, rows), here.shape, here.spacing_mm, there.spacing_mm, between, config
    )
    indices = warp.moving_indices(fit.ddf, here.spacing_mm, between, there.spacing_mm)
    moved = warp.warp_labels(moving.labels, indices)
    values = [v for v in np.unique(fixed.labels) if v and (moving.labels == v).any()]
    return float(np.mean([metrics.dice(fixed.labels == v, moved == v) for v in values]))


def outcomes(
    pairs: list[tuple[str, str]], known: dict[str, Known], config: MatchConfig
) -> Iterator[tuple[Known, Known, Matches, float]]:
    """Each pair's subjects, matches and processor seconds."""
    for moving, fixed in ((known[m], known[f]) for m, f in pairs):
        between = moving_to_fixed(fixed.rois.geometry, moving.rois.geometry)
        start = time.process_time()
        found = match(moving.rois.rois, fixed.rois.rois, between, config)
        yield moving, fixed, found, time.process_time() - start


def score(
    pairs: list[tuple[str, str]], known: dict[str, Known], config: MatchConfig, fit: FitConfig | None
) -> list[float]:
    """Precision, recall, matches a pair, milliseconds a pair and, if asked for, Dice."""
    rows = []
    for moving, fixed, found, seconds in outcomes(pairs, known, config):
        there, here = moving.shown[found.moving_index], fixed.shown[found.fixed_index]
        right = (there == here) & (here > 0)
        covered = len(np.unique(found.fixed_index[right])) / max(1, (fixed.shown > 0).sum())
        precision = right.sum() / max(1, ((there > 0) | (here > 0)).sum())
        row = [float(precision), covered, float(len(here)), 1000 * seconds]
        rows.append([*row, fitted_dice(moving, fixed, found, fit)] if fit else row)
    return list(np.mean(rows, axis=0))


def reliability(
    pairs: list[tuple[str, str]], known: dict[str, Known], config: MatchConfig
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Confidence and truth of every match with a label on either side."""
    confidence, truth = [], []
    for moving, fixed, found, _ in outcomes(pairs, known, config):
        there, here = moving.shown[found.moving_index], fixed.shown[found.fixed_index]
        counted = (there > 0) | (here > 0)
        confidence.append(found.confidence[counted].astype(np.float64))
        truth.append(there[counted] == here[counted])
    return np.concatenate(confidence), np.concatenate(truth)


def print_reliability(found: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]], path: Path) -> None:
    """Mean confidence, share of right matches and their number in each bin of confidence; the same as a picture."""
    print("\n| confidence |", " | ".join(found), "|\n|---|" + "---|" * len(found))
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for low, high in itertools.pairwise(BINS):
        cells = []
        for name, (confidence, truth) in found.items():
            inside = (confidence >= low) & (confidence < high)
            if inside.any():
                points[name].append((float(confidence[inside].mean()), float(truth[inside].mean())))
                cells.append(f"{points[name][-1][0]:.2f} → {points[name][-1][1]:.2f} ({inside.sum()})")
            else:
                cells.append("–")
        print(f"| {low:.1f} to {high:.1f} |", " | ".join(cells), "|")
    for name, values in points.items():
        axes.plot(*zip(*values, strict=True), marker="o", label=name)
    axes.set(xlabel="confidence", ylabel="share of right matches", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/quality"))
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    config = load_config(None, ["execution.executor=serial", *options.settings])
    groups = pair_groups(options.data)
    known = {
        name: read_known(folder, labels, options.out / accuracy.slug(name), config)
        for name, (folder, _, labels) in groups.items()
    }
    heads = ("precision", "recall", "matches", "ms", *(("Dice",) if options.fit else ()))
    print("| matching |", " | ".join(f"{name} ({', '.join(heads)})" for name in groups), "|")
    print("|---|" + "---|" * len(groups))
    for title, setting in variants(config.match).items():
        cells = []
        for name, (_, pairs, _) in groups.items():
            values = score(pairs, known[name], setting, config.fit if options.fit else None)
            cells.append(f"{values[0]:.2f}, {values[1]:.2f}, {values[2]:.0f}, {values[3]:.0f}")
            if options.fit:
                cells[-1] += f", **{values[4]:.3f}**"
        print(f"| {title} |", " | ".join(cells), "|", flush=True)
    found = {name: reliability(pairs, known[name], config.match) for name, (_, pairs, _) in groups.items()}
    print_reliability(found, options.out / "reliability.png")


if __name__ == "__main__":
    main()
