"""A finished study without a run: a phantom cohort, its true fields as transforms, its labels as ROIs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline import phantom
from pipeline.folder import StudyFolder
from storage import tables
from storage.cohort import Cohort, Subject, read_cohort, subject_key, write_cohort
from storage.embeddings import EmbeddingStore
from storage.images import read_image, read_labels
from storage.signature import digest
from storage.transforms import write_transform

HOSTILE = '<img src=x onerror="document.title=1"></script><script>document.title=1</script> & $x$'


def write_study(root: Path, hostile: bool = False, shape: tuple[int, int, int] = (3, 64, 64)) -> Path:
    """Write `root/cohort.csv` and `root/study` of three subjects and two pairs; a third pair failed."""
    made = phantom.make_cohort(root, subjects=3, shape=shape)
    cohort = read_cohort(made)
    if hostile:
        first = cohort.subjects[0]
        renamed = Subject(HOSTILE, first.image, first.label, first.landmarks, "<b>g</b>")
        cohort = Cohort((renamed, *cohort.subjects[1:]))
        write_cohort(cohort, made)
    folder = StudyFolder(root / "study")
    folder.root.mkdir()
    subjects = list(cohort.subjects)
    truth = {s.subject: phantom.read_warp(made, f"subject-{i:02d}") for i, s in enumerate(subjects, 1)}
    rois = {s.subject: _encode(folder, s) for s in subjects}
    pairs = [(subjects[1], subjects[0]), (subjects[2], subjects[1])]
    for quality, (moving, fixed) in zip((0.9, 0.7), pairs, strict=True):
        geometry = read_image(fixed.image).geometry
        ddf = phantom.true_ddf(truth[moving.subject], truth[fixed.subject], geometry)
        write_transform(
            folder.transform(_name(moving, fixed)), np.eye(4), ddf, geometry.spacing_mm, geometry, {"key": "k"}
        )
        _write_rows(folder, moving, fixed, rois, quality)
    _write_records(folder, subjects, pairs)
    return folder.root


def _name(moving: Subject, fixed: Subject) -> str:
    return f"{moving.subject}__{fixed.subject}"


def _encode(folder: StudyFolder, subject: Subject) -> list[tuple[int, int]]:
    """Store every label of every slice as a ROI; (slice, label) of each."""
    geometry = read_image(subject.image).geometry
    labels = read_labels(subject.label, geometry)
    shape = (geometry.shape[1], geometry.shape[2])
    store, rois = EmbeddingStore(folder.embeddings), []
    with store.writer(subject.subject, {"s": 1}, geometry, {"blocks": []}, (4.0, 4.0), shape) as writer:
        for z, plane in enumerate(labels):
            values = [int(v) for v in np.unique(plane) if v]
            masks = plane[None] == np.array(values, dtype=np.int32)[:, None, None]
            ones = np.ones(len(values))
            writer.add_slice(z, np.zeros((2, 4, 4)), masks, ones, ones)
            rois += [(z, v) for v in values]
    rows = [
        {"subject": subject.subject, "roi": i, "track": i, "slice": z, "area_mm2": 1.0, **_nowhere()}
        for i, (z, _) in enumerate(rois)
    ]
    tables.write_part(folder.root, "rois", subject_key(subject.subject), tables.table_from_rows("rois", rows))
    store.write_prototypes(subject.subject, {"p": 1}, {"roi": np.arange(len(rois))})
    return rois


def _nowhere() -> dict[str, float]:
    return {f"centroid_{axis}_mm": 0.0 for axis in "zyx"}


def _write_rows(folder: StudyFolder, moving: Subject, fixed: Subject, rois: dict[str, Any], quality: float) -> None:
    pair = _name(moving, fixed)
    names = {"pair": pair, "moving": moving.subject, "fixed": fixed.subject, "key": "k"}
    here, there = rois[fixed.subject], rois[moving.subject]
    both = [roi for roi in here if roi in there]
    matches = [
        {
            **names,
            "fixed_roi": here.index(roi),
            "moving_roi": there.index(roi),
            "fixed_slice": roi[0],
            "moving_slice": roi[0],
            "similarity": 0.95 - 0.01 * rank,
            "rank": rank,
            "confidence": 1.0,
        }
        for rank, roi in enumerate(both)
    ]
    part = subject_key(pair)
    tables.write_part(folder.root, "correspondences", part, tables.table_from_rows("correspondences", matches))
    dice = {"dice_before": 0.5, "dice_centered": 0.55, "dice_affine": 0.7, "dice": quality}
    tre = {"tre_mm_before": 6.0, "tre_mm_affine": 3.0, "tre_mm": 1.0}
    fit = {
        "sdlogj": 0.1,
        "fold_fraction": 0.0,
        "n_rois": len(both),
        "n_slices": 3,
        "fallback": "none",
        "flag": "",
    }
    rows = [
        {**names, "label": label, **dice, **tre, **fit, "seconds_match": 0.01, "seconds_fit": 0.5} for label in range(3)
    ]
    tables.write_part(folder.root, "metrics", part, tables.table_from_rows("metrics", rows))


def _write_records(folder: StudyFolder, subjects: list[Subject], done: list[tuple[Subject, Subject]]) -> None:
    pairs = [*done, (subjects[2], subjects[0])]
    failed = _name(*pairs[-1])
    failure = {
        "stage": "fit",
        "unit": failed,
        "pair": failed,
        "error": "ImageError",
        "message": f"{HOSTILE}: labels are on another grid",
        "traceback": "Traceback …",
        "attempt": 1,
    }
    tables.write_part(folder.root, "failures", "fit", tables.table_from_rows("failures", [failure]))
    run = {"run": "r1", "stage": "fit", "units_done": 2, "units_failed": 1, "seconds": 1.5, "workers": 1}
    tables.write_part(folder.root, "runs", "r1", tables.table_from_rows("runs", [run]))
    (folder.root / "run.yaml").write_text(yaml.safe_dump({"config": {}, "versions": {"python": "3"}}), encoding="utf-8")
    plan = {
        "subjects": {s.subject: {"encode": digest({"s": 1}), "prototypes": digest({"p": 1})} for s in subjects},
        "until": "fit",
        "outputs": ["transforms"],
        "pairs": {
            "pair": [_name(*pair) for pair in pairs],
            "moving": [moving.subject for moving, _ in pairs],
            "fixed": [fixed.subject for _, fixed in pairs],
            **dict.fromkeys(("match", "fit"), ["k"] * len(pairs)),
        },
        "manifest": {s.subject: {k: v for k, v in asdict(s).items() if k != "subject"} for s in subjects},
    }
    (folder.root / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
