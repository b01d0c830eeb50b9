"""Tiny cohorts on disk with known structure, and ways to run a study on them and to compare two studies."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813

from storage import tables

REPO = Path(__file__).resolve().parents[1]
QUICK_FIT = {"levels": [{"stride": 2, "control": 8.0, "tau": 2.0, "iterations": 3}], "affine_iterations": 4}
TIMES = ("seconds_match", "seconds_fit", "seconds_refine", "seconds_inverse")


def ellipses(
    shape: tuple[int, int, int] = (5, 48, 48), shift: tuple[float, float] = (0.0, 0.0), scale: float = 1.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """A body with three bright or dark organs, moved by `shift` (y, x) pixels: image and labels 1..3."""
    _, y, x = np.indices(shape, dtype=np.float32)
    y, x = y - shift[0], x - shift[1]
    image = np.zeros(shape, np.float32)
    labels = np.zeros(shape, np.uint8)
    middle = shape[1] / 2
    image[((y - middle) / 20) ** 2 + ((x - middle) / 21) ** 2 < 1] = 60
    for label, (dy, dx, ry, rx, value) in enumerate(
        [(-7, -8, 6, 5, 140), (6, 7, 7, 6, 200), (-8, 9, 4, 5, 20)], start=1
    ):
        inside = ((y - middle - dy) / (ry * scale)) ** 2 + ((x - middle - dx) / (rx * scale)) ** 2 < 1
        image[inside], labels[inside] = value, label
    noise = np.random.default_rng(7).normal(0, 1.5, shape)
    return image + noise.astype(np.float32), labels


def write_volume(path: Path, array: npt.NDArray[Any], spacing: tuple[float, float, float] = (1.5, 1.5, 6.0)) -> Path:
    """Write [z, y, x] as an ITK image; spacing in x, y, z."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows with the keys of the first as columns."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_cohort(
    folder: Path, names: Sequence[str] = ("a", "b", "c"), shape: tuple[int, int, int] = (5, 48, 48)
) -> Path:
    """A cohort of shifted and scaled phantoms with labels; files are numbered, whatever the names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, name in enumerate(names):
        image, labels = ellipses(shape, (1.5 * (number % 4), -1.0 * (number % 3)), 1.0 + 0.04 * (number % 5))
        write_volume(folder / f"{number}.nii.gz", image)
        write_volume(folder / f"{number}_gt.nii.gz", labels)
        rows.append({"subject": name, "image": f"{number}.nii.gz", "label": f"{number}_gt.nii.gz", "group": "g"})
    return write_csv(folder / "cohort.csv", rows)


def command(*arguments: str | Path) -> list[str]:
    """The samreg command as this Python runs it."""
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment of a samreg process: this checkout importable from any folder, one thread, any locale."""
    own = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    return {**os.environ, **own}


def samreg(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, encoding="utf-8", timeout=timeout, check=False
    )


def study_tables(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The result tables of a study without their timing columns, in table order."""
    return {
        name: tables.read_table(root, name).drop_columns([c for c in TIMES if name == "metrics"]).to_pylist()
        for name in ("rois", "correspondences", "metrics", "failures")
    }


def study_bytes(root: Path) -> dict[str, bytes]:
    """Contents of the Parquet parts that hold no times."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for name in ("rois", "correspondences")
        for path in sorted((root / name).glob("*.parquet"))
    }


def write_threshold_network(path: Path, kind: str, dimensions: int, scale: float = 1.0) -> Path:
    """A network whose class 1 is where the input is positive: "script" for TorchScript, "export" for torch.export."""
    import torch

    network = (torch.nn.Conv3d if dimensions == 3 else torch.nn.Conv2d)(1, 2, 1, bias=False)
    weights = torch.tensor([-0.5 * scale, 0.5 * scale]).reshape(network.weight.shape)
    network.load_state_dict({"weight": weights})
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "script":
        torch.jit.save(torch.jit.script(network), path)
        return path
    sizes = {axis + 2: torch.export.Dim(f"n{axis}", min=1, max=512) for axis in range(dimensions)}
    example = torch.zeros(1, 1, *(4 + axis for axis in range(dimensions)))
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=(sizes,)), path)
    return path
