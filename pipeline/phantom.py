# mypy: disable-error-code="no-untyped-call"
"""Seeded phantom cohorts with known correspondence, for the demo and the tests.

A body with organs of different intensity is defined analytically in a template frame. Each subject is that
template seen through a known map phi from subject to template positions (pipeline/phantom_warp.py), evaluated
exactly: nothing is resampled. The pull-back field from fixed to moving positions is then known too,

    q + u(q) = phi_moving⁻¹(phi_fixed(q)).

Positions are local mm (z, y, x) as in storage/geometry.py, with arrays [..., 3]; phantoms have no rotation of
their grid, so analysis orientation is the file's own.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from pipeline.phantom_warp import Array, SubjectWarp, Triple, Variation, draw_warp, half_extent
from storage.geometry import Geometry
from storage.images import read_image
from storage.transforms import transform_signature, write_transform

Shape = tuple[int, int, int]

_EDGE = 0.6  # width of an organ's border, in-plane pixels


@dataclass(frozen=True)
class Organ:
    """An ellipsoid in units of half the field of view, from its centre, (z, y, x); label 0: context."""

    label: int
    intensity: float
    center: Triple
    radii: Triple


ORGANS = (
    Organ(0, 80, (0.0, 0.0, 0.0), (2.0, 0.80, 0.88)),  # body
    Organ(0, 245, (0.0, 0.58, 0.02), (3.0, 0.13, 0.12)),  # spine
    Organ(1, 135, (0.0, -0.08, -0.46), (0.90, 0.40, 0.28)),
    Organ(2, 185, (0.1, -0.10, 0.58), (0.70, 0.26, 0.15)),
    Organ(3, 215, (-0.1, 0.46, -0.34), (0.65, 0.15, 0.13)),
    Organ(4, 215, (0.0, 0.42, 0.38), (0.70, 0.16, 0.12)),
    Organ(5, 160, (0.1, -0.34, 0.12), (0.80, 0.26, 0.24)),  # a wall around label 6
    Organ(6, 30, (0.1, -0.34, 0.12), (0.55, 0.16, 0.15)),
)
"""Later organs lie on top of earlier ones."""


def positions(geometry: Geometry) -> Array:
    """Local mm of every voxel centre: float64 [D, H, W, 3]."""
    points: Array = np.moveaxis(np.indices(geometry.shape), 0, -1) * np.asarray(geometry.spacing_mm)
    return points


def template_labels(points: Array, geometry: Geometry) -> npt.NDArray[np.int32]:
    """Label at template positions [..., 3] mm: int32 [...]."""
    labels = np.zeros(points.shape[:-1], np.int32)
    for organ in ORGANS:
        labels[_depth(points, organ, geometry) > 0] = organ.label
    return labels


def template_intensity(points: Array, geometry: Geometry) -> npt.NDArray[np.float32]:
    """Noiseless intensity 0..255 at template positions [..., 3] mm, soft borders: float32 [...]."""
    values = np.zeros(points.shape[:-1])
    edge = _EDGE * geometry.spacing_mm[1]
    for organ in ORGANS:
        inside = 1 / (1 + np.exp(-np.clip(_depth(points, organ, geometry) * 4 / edge, -40, 40)))
        values += inside * (organ.intensity - values)
    return values.astype(np.float32)


def template_landmarks(geometry: Geometry) -> Array:
    """Five points of every labelled organ (its centre, 0.9 radii up, down, left, right): [N, 3] mm."""
    half, center = half_extent(geometry), geometry.center_mm()
    steps = np.array([(0, 0, 0), (0, -0.9, 0), (0, 0.9, 0), (0, 0, -0.9), (0, 0, 0.9)])
    rows = np.concatenate([np.asarray(o.center) + steps * o.radii for o in ORGANS if o.label])
    if geometry.shape[0] == 1:
        rows[:, 0] = 0
    return rows * half + center


def body_mask(warp: SubjectWarp, geometry: Geometry) -> npt.NDArray[np.bool_]:
    """Voxels of a subject that lie in its body: bool [D, H, W]."""
    return _depth(warp.to_template(positions(geometry)), ORGANS[0], geometry) > 0


def add_artefacts(
    image: npt.NDArray[np.float32], variation: Variation, generator: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Multiply by a smooth bias field and add noise: float32 [D, H, W]."""
    axes = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in image.shape)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    linear, square = generator.uniform(-1, 1, 3), generator.uniform(-1, 1, 3)
    field = np.tensordot(linear, grid, 1) + np.tensordot(square, grid**2, 1)
    field *= variation.bias / max(float(np.abs(field).max()), 1e-9)
    noise = generator.normal(0, 255 * variation.noise, image.shape)
    return np.clip(image * (1 + field) + noise, 0, None).astype(np.float32)


def true_ddf(moving: SubjectWarp, fixed: SubjectWarp, geometry: Geometry) -> npt.NDArray[np.float32]:
    """The pull-back field on the fixed grid, float32 [3, D, H, W] mm, as algorithms/warp.py has it."""
    points = positions(geometry)
    moved = moving.from_template(fixed.to_template(points))
    return np.moveaxis(moved - points, -1, 0).astype(np.float32)


def make_cohort(
    out_dir: str | Path,
    subjects: int = 4,
    shape: Shape = (12, 96, 96),
    seed: int = 0,
    spacing_mm: Triple = (5.0, 1.5, 1.5),
    variation: Variation | None = None,
) -> Path:
    """Write a cohort: images, labels, landmarks, the true transforms, and the manifest `cohort.csv`.

    Volumes are NIfTI; depth 1 gives PNG pictures, which have no spacing: then mm are pixels and `spacing_mm`
    is not used. `truth/<subject>.h5` takes subject to template positions; the map itself is its signature.
    Subject i is the same in cohorts of any size. A subject's group is "a" or "b" in turn.

    Returns:
        Path of the manifest.

    Raises:
        ValueError: for less than one subject, a shape that is too small, or slices thinner than wide.
    """
    if subjects < 1 or min(shape[1:]) < 32 or spacing_mm[0] < max(spacing_mm[1:]):
        raise ValueError(
            "a phantom cohort needs a subject, slices of 32 x 32 and slices no thinner than a pixel is wide; "
            f"got {subjects} subjects, shape {shape}, spacing {spacing_mm}"
        )
    folder, flat = Path(out_dir), shape[0] == 1
    folder.mkdir(parents=True, exist_ok=True)
    spread = variation or Variation()
    geometry = Geometry(shape, (1.0, 1.0, 1.0) if flat else spacing_mm, has_spacing=not flat)
    rows = []
    for index in range(subjects):
        name, generator = f"subject-{index + 1:02d}", np.random.default_rng([seed, index])
        warp = draw_warp(geometry, spread, generator)
        files = _write_subject(folder, name, warp, geometry, spread, generator)
        rows.append({"subject": name, **files, "group": "ab"[index % 2]})
    manifest = folder / "cohort.csv"
    _write_csv(manifest, list(rows[0]), [list(row.values()) for row in rows])
    return manifest


def read_warp(cohort: str | Path, subject: str) -> SubjectWarp:
    """The true map of a subject of a phantom cohort, given its manifest.

    Raises:
        FileNotFoundError: when the cohort has none for the subject.
    """
    path = Path(cohort).parent / "truth" / f"{subject}.h5"
    known = transform_signature(path)
    if known is None:
        raise FileNotFoundError(f"{path}: no known map of {subject}; the manifest must be that of a phantom cohort")
    return SubjectWarp.from_dict(known)


def _write_subject(
    folder: Path,
    name: str,
    warp: SubjectWarp,
    geometry: Geometry,
    variation: Variation,
    generator: np.random.Generator,
) -> dict[str, str]:
    ending = ".nii.gz" if geometry.has_spacing else ".png"
    files = {"image": name + ending, "label": f"{name}_label{ending}", "landmarks": f"{name}_landmarks.csv"}
    points = warp.to_template(positions(geometry))
    image = add_artefacts(template_intensity(points, geometry), variation, generator)
    _write_image(folder / files["image"], image, geometry)
    _write_image(folder / files["label"], template_labels(points, geometry).astype(np.uint8), geometry)
    axes = list("xyz" if geometry.has_spacing else "xy")
    landmarks = warp.from_template(template_landmarks(geometry))[:, ::-1][:, : len(axes)]
    _write_csv(folder / files["landmarks"], axes, [[f"{v:.4f}" for v in point] for point in landmarks])
    (folder / "truth").mkdir(exist_ok=True)
    ddf = np.moveaxis(points - positions(geometry), -1, 0).astype(np.float32)
    as_read = read_image(folder / files["image"]).geometry
    write_transform(folder / "truth" / f"{name}.h5", np.eye(4), ddf, as_read.spacing_mm, as_read, warp.to_dict())
    return files


def _write_image(path: Path, array: npt.NDArray[Any], geometry: Geometry) -> None:
    if not geometry.has_spacing:
        array = array[0].clip(0, 255).astype(np.uint8)
    image = sitk.GetImageFromArray(array)
    if geometry.has_spacing:
        image.SetSpacing(geometry.spacing_mm[::-1])
    sitk.WriteImage(image, str(path))


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def _depth(points: Array, organ: Organ, geometry: Geometry) -> Array:
    """About how deep a position lies inside an organ, mm; negative outside."""
    half = half_extent(geometry)
    scaled = ((points - geometry.center_mm()) / half - organ.center) / organ.radii
    if geometry.shape[0] == 1:
        scaled[..., 0] = 0
    depth: Array = (1 - np.linalg.norm(scaled, axis=-1)) * float(np.min(half[1:] * organ.radii[1:]))
    return depth
