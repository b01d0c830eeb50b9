"""How well a segmenter's ROIs cover the labelled structures of the development data, and what they cost.

Run: python benchmarks/proposals.py [--data ../shared/data] [--before CHECKOUT] [--fit] [SETTING=VALUE ...]
Prints a Markdown table. Recall is that of an oracle: the best IoU of any ROI with each label in each slice, averaged,
and the share above .5 and .7. Seconds are processor seconds to encode and segment a slice, also scaled by pixels to
256 x 256 where slices are of that order. --before runs another checkout of this project on the same images; --fit
adds the mean Dice of registration (see accuracy.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
import numpy.typing as npt

from actors.build import build_segmenter
from actors.segmenter import Segmenter
from pipeline.config import StudyConfig, load_config
from storage.images import read_image, to_uint8

Row = dict[str, Any]
SMALLEST = 20  # px of a label in a slice
SCALABLE = 128 * 128  # px of a slice from which its seconds are scaled


def data_sets(data: Path, most: int) -> dict[str, list[tuple[Path, Path]]]:
    """Images and labels of each data set, at most `most` files, evenly spaced."""
    acdc, mnms, crops = data / "acdc_cardiac", data / "mnms_cardiac", data / "msd_hippocampus"
    prostate, slices, hearts = data / "prostate_mr_us_blurred", data / "samreg_slices_2d", data / "cardiac_2d_cohort"
    found = {
        "ACDC": [(p, beside(p, "_gt")) for p in acdc.glob("*_E[DS].nii.gz")],
        "M&Ms": [(p, beside(p, "_gt")) for p in mnms.rglob("*_E[DS].nii.gz")],
        "hippocampus": [(p, crops / "labels" / p.name) for p in (crops / "images").glob("*.nii.gz")],
        "prostate MR 3D": [(p, beside(p, "_gland")) for p in prostate.glob("*_mr.nii.gz")],
        "prostate 2D": [(p, beside(p, "_gt")) for p in slices.glob("prostate_[0-9].png")],
        "2D cardiac": [(p, beside(p, "_gt")) for p in hearts.glob("*_E[DS].png")],
    }
    return {name: sorted(files)[:: max(1, -(-len(files) // most))] for name, files in found.items()}


def beside(path: Path, suffix: str) -> Path:
    stem, dot, extension = path.name.partition(".")
    return path.with_name(stem + suffix + dot + extension)


def measure(segmenter: Segmenter, files: list[tuple[Path, Path]], config: StudyConfig) -> Row:
    """Recall, ROIs and seconds of one data set."""
    best: dict[int, list[float]] = {}
    seconds = count = slices = pixels = 0.0
    for image, label in files:
        loaded = read_image(image, config.input.slice_axis)
        truth = read_image(label, config.input.slice_axis).array
        for grey, labels in zip(to_uint8(loaded, config.input.percentiles, config.input.window), truth, strict=True):
            start = time.process_time()
            found = segmenter.everything(grey[None], segmenter.encode(grey[None]))[0].masks
            seconds += time.process_time() - start
            slices, count, pixels = slices + 1, count + len(found), pixels + labels.size
            for value in np.unique(labels[labels > 0]):
                region = labels == value
                if region.sum() >= SMALLEST:
                    best.setdefault(int(value), []).append(best_overlap(found, region))
    recall = {
        str(value): [float(np.mean(ious)), *(float(np.mean(np.array(ious) > limit)) for limit in (0.5, 0.7))]
        for value, ious in sorted(best.items())
    }
    scaled = seconds / pixels * 65536 if pixels / slices >= SCALABLE else None
    return {"recall": recall, "rois": count / slices, "seconds": seconds / slices, "scaled": scaled}


def best_overlap(masks: npt.NDArray[np.bool_], region: npt.NDArray[np.bool_]) -> float:
    both = (masks & region).sum(axis=(1, 2))
    either = (masks | region).sum(axis=(1, 2))
    return float((both / either).max(initial=0))


def measure_all(options: argparse.Namespace) -> dict[str, Row]:
    config = load_config(None, options.settings)
    segmenter = build_segmenter(config.segmenter, "cpu")
    return {name: measure(segmenter, files, config) for name, files in data_sets(options.data, options.most).items()}


def fit_all(options: argparse.Namespace, out: Path) -> dict[str, float]:
    """Mean Dice of each group of pairs of accuracy.py."""
    dice = {}
    for name, (folder, rows) in accuracy.groups(options.data).items():
        place = out / accuracy.slug(name)
        found = accuracy.run_group(folder, rows, place, options.settings)
        dice[name] = float(np.mean([row["dice"] for row in found]))
    return dice


def of_checkout(checkout: Path, options: argparse.Namespace) -> Row:
    """What another checkout measures on the same images."""
    command = [sys.executable, str(Path(__file__).resolve()), "--json", "--data", str(options.data.resolve())]
    command += ["--most", str(options.most), "--out", str((options.out / "before").resolve())]
    command += ["--fit"] if options.fit else []
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run([*command, *options.settings], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def print_tables(runs: dict[str, Row]) -> None:
    """One row per data set and label, the runs beside each other in each cell."""
    print("| data | label |", "mean IoU | > .5 | > .7 | ROIs a slice | s a slice | s at 256² |")
    print("|---|---|---|---|---|---|---|---|")
    first = next(iter(runs.values()))["proposals"]
    for name, row in first.items():
        for label in row["recall"]:
            cells = []
            for column, key in enumerate(("recall", "recall", "recall", "rois", "seconds", "scaled")):
                of = [run["proposals"][name][key] for run in runs.values()]
                values = [value[label][column] for value in of] if key == "recall" else of
                form = ".1f" if key == "rois" else ".3f"
                cells.append("–" if None in values else " → ".join(f"{value:{form}}" for value in values))
            print(f"| {name} | {label} |", " | ".join(cells), "|")
    if "dice" in next(iter(runs.values())):
        print("\n| pairs | Dice |\n|---|---|")
        for name in next(iter(runs.values()))["dice"]:
            print(f"| {name} |", " → ".join(f"{run['dice'][name]:.3f}" for run in runs.values()), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="where --fit keeps its studies")
    parser.add_argument("--most", type=int, default=16, help="files of each data set")
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--json", action="store_true", help="print what was measured as one line")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    own: Row = {"proposals": measure_all(options)}
    if options.fit:
        own["dice"] = fit_all(options, options.out)
    if options.json:
        print(json.dumps(own))
        return
    print_tables({"before": of_checkout(options.before, options), "after": own} if options.before else {"": own})


if __name__ == "__main__":
    main()
