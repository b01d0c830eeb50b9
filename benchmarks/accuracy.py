"""Dice and landmark errors on the development data with one configuration for all of it, ANTs SyN beside.

Run: python benchmarks/accuracy.py [--data ../shared/data] [--out benchmarks/out] [SETTING=VALUE ...]
Prints two Markdown tables; with segmenter=labels the labels are the ROIs (Case 1), which bounds what ROIs can give.
Studies are kept under --out, so a second call resumes or re-uses them.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config import load_config
from pipeline.study import run_study
from storage import tables
from storage.cohort import Pair, read_cohort

Row = dict[str, str]


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def listed_pairs(folder: Path, kind: str | None = None) -> Iterator[tuple[str, Row]]:
    for row in read_csv(folder / "pairs.csv"):
        if kind in (None, row["kind"]):
            yield row["pair_id"], row


def between_hearts(data: Path) -> Iterator[tuple[str, Row]]:
    """The end-diastolic M&Ms pairs that the SyN table names by their two subjects."""
    for row in read_csv(data / "baseline_ants_syn.csv"):
        if row["dataset"] == "mnms_inter":
            files = {}
            for role, name in zip(("moving", "fixed"), row["pair"].split("__"), strict=True):
                _, vendor, code = name.split("_")
                files[f"{role}_image"] = f"{vendor}/{code}/{code}_ED.nii.gz"
                files[f"{role}_label"] = f"{vendor}/{code}/{code}_ED_gt.nii.gz"
            yield row["pair"], files


def groups(data: Path) -> dict[str, tuple[Path, list[tuple[str, Row]]]]:
    hippocampus = {r["pair"] for r in read_csv(data / "baseline_ants_syn.csv") if r["dataset"] == "msd_hippocampus"}
    acdc, mnms, crops = data / "acdc_cardiac", data / "mnms_cardiac", data / "msd_hippocampus"
    slices = data / "cardiac_2d_cohort"
    return {
        "ACDC, ES to ED": (acdc, list(listed_pairs(acdc, "intra"))),
        "ACDC, between subjects": (acdc, list(listed_pairs(acdc, "inter"))),
        "M&Ms, ES to ED": (mnms, list(listed_pairs(mnms))),
        "M&Ms, between subjects": (mnms, list(between_hearts(data))),
        "hippocampus, between subjects": (crops, [p for p in listed_pairs(crops) if p[0] in hippocampus]),
        "2D cardiac, ES to ED": (slices, list(listed_pairs(slices, "intra"))),
        "2D cardiac, between subjects": (slices, list(listed_pairs(slices, "inter"))),
    }


def subject_name(path: str) -> str:
    return path.replace("/", "_").removesuffix(".nii.gz").removesuffix(".png")


def slug(group: str) -> str:
    """Folder of a group."""
    return "_".join(re.findall("[A-Za-z0-9]+", group))


def run_group(folder: Path, rows: list[tuple[str, Row]], out: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Register the pairs of a group; the mean-over-labels metrics row of each."""
    out.mkdir(parents=True, exist_ok=True)
    labels = {row[f"{role}_image"]: row[f"{role}_label"] for _, row in rows for role in ("moving", "fixed")}
    with (out / "cohort.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["subject", "image", "label", "segmentation"])
        writer.writerows(
            [subject_name(i), (folder / i).resolve(), *[(folder / s).resolve()] * 2] for i, s in labels.items()
        )
    pairs = [Pair(name, subject_name(row["moving_image"]), subject_name(row["fixed_image"])) for name, row in rows]
    run_study(load_config(None, overrides), read_cohort(out / "cohort.csv"), out / "study", pairs)
    found = tables.read_table(out / "study", "metrics").to_pylist()
    return [row for row in found if row["label"] == 0]


def landmark_groups(data: Path) -> dict[str, tuple[Path, list[tuple[str, Row]]]]:
    names = {
        "liver under breathing": ("eth_liver_4dmri", ""),
        "retina": ("fire_retina", ""),
        "aerial": ("aerial_cell_histology_2d", "aerial"),
        "cells": ("aerial_cell_histology_2d", "cell"),
        "histology, other stain": ("histology_landmarks", ""),
    }
    found = {}
    for name, (folder, start) in names.items():
        rows = [pair for pair in listed_pairs(data / folder) if pair[1]["landmarks"] and pair[0].startswith(start)]
        found[name] = (data / folder, rows)
    return found


def run_landmarks(folder: Path, rows: list[tuple[str, Row]], out: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Register pairs whose landmarks lie in one file each; the metrics row of each."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, row in rows:
        points = read_csv(folder / row["landmarks"])
        for role in ("moving", "fixed"):
            axes = [axis for axis in ("i", "j", "k") if f"{role}_{axis}" in points[0]] or ["x", "y"]
            with (out / f"{name}_{role}.csv").open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                writer.writerows([axes, *([point[f"{role}_{axis}"] for axis in axes] for point in points)])
            lines.append([f"{name}_{role}", (folder / row[f"{role}_image"]).resolve(), f"{name}_{role}.csv"])
    with (out / "cohort.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["subject", "image", "landmarks"], *lines])
    pairs = [Pair(name, f"{name}_moving", f"{name}_fixed") for name, _ in rows]
    run_study(load_config(None, overrides), read_cohort(out / "cohort.csv"), out / "study", pairs)
    return list(tables.read_table(out / "study", "metrics").to_pylist())


def print_landmarks(options: argparse.Namespace) -> None:
    print("\n| data | pairs | unit | before | affine | **ours** | worst | refined |")
    print("|---|" + "---|" * 7)
    for name, (folder, rows) in landmark_groups(options.data).items():
        found = run_landmarks(folder, rows, options.out / slug(name), options.settings)
        unit = "mm" if found[0]["landmark_tre_mm"] is not None else "vox"
        values = {
            ending: [row[f"landmark_tre_{unit}{ending}"] for row in found]
            for ending in ("_before", "_affine", "", "_refined")
        }
        refined = "–" if None in values["_refined"] else f"{np.mean(values['_refined']):.1f}"
        cells = [f"{len(found)}", "px" if unit == "vox" else unit]
        cells += [f"{np.mean(values[e]):.1f}" for e in ("_before", "_affine")]
        cells += [f"**{np.mean(values['']):.1f}**", f"{max(values['']):.1f}", refined]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    syn = {row["pair"]: float(row["dice_syn"]) for row in read_csv(options.data / "baseline_ants_syn.csv")}
    header = ("pairs", "before", "centred", "affine", "**ours**", "worst", "refined", "SyN", "folds", "s/pair")
    print("| data |", " | ".join(header), "|")
    print("|---|" + "---|" * len(header))
    for name, (folder, rows) in groups(options.data).items():
        found = run_group(folder, rows, options.out / slug(name), options.settings)
        column: dict[str, list[float]] = defaultdict(list)
        for row in found:
            for key in ("dice_before", "dice_centered", "dice_affine", "dice", "fold_fraction", "seconds_fit"):
                column[key].append(row[key])
        mean = {key: float(np.mean(values)) for key, values in column.items()}
        refined = [row["dice_refined"] for row in found if row["dice_refined"] is not None]
        beside = [syn[row["pair"]] for row in found if row["pair"] in syn]
        cells = [
            f"{len(found)}",
            *(f"{mean[key]:.3f}" for key in ("dice_before", "dice_centered", "dice_affine")),
            f"**{mean['dice']:.3f}**",
            f"{min(column['dice']):.3f}",
            f"{np.mean(refined):.3f}" if refined else "–",
            f"{np.mean(beside):.3f}" if len(beside) == len(found) else "–",
            f"{mean['fold_fraction']:.2%}",
            f"{mean['seconds_fit']:.1f}",
        ]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    if not any(setting.startswith("segmenter=labels") for setting in options.settings):
        print_landmarks(options)


if __name__ == "__main__":
    main()
