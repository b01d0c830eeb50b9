"""Dice on the development data with one configuration for all of it, ANTs SyN on the same pairs beside.

Run: python benchmarks/accuracy.py [--data ../shared/data] [--out benchmarks/out] [SETTING=VALUE ...]
Prints a Markdown table; with segmenter=labels the labels are the ROIs (Case 1), which bounds what ROIs can give.
Studies are kept under --out, so a second call resumes or re-uses them.
"""

from __future__ import annotations

import argparse
import csv
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
        found = run_group(folder, rows, options.out / subject_name(name.replace(" ", "_")), options.settings)
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


if __name__ == "__main__":
    main()
