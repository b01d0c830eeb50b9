"""Keys: what a stored result depends on, so that a re-run redoes exactly what a change touches.

    encode      image bytes (and those of the segmentation that the ROIs come from), input settings, segmenter signature
    prototypes  encode key, ROI, pooling and track settings
    match       both prototype keys, matching settings, the names in the rows
    fit         match key, fit settings, bytes of the labels and landmarks it is evaluated against, evaluation settings

Execution settings and file names enter no key. Raise a version when the code of a stage changes its results.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import StudyConfig
from pipeline.inputs import InputDigests
from storage.cohort import Pair
from storage.signature import digest

VERSIONS = {"encode": 1, "prototypes": 3, "match": 3, "fit": 3}


@dataclass(frozen=True)
class SubjectKeys:
    """Keys of one subject.

    Attributes:
        encode_signature: the record stored beside the embeddings.
        encode: its digest.
        prototypes_signature: the record stored beside the prototypes.
        prototypes: its digest.
    """

    encode_signature: dict[str, Any]
    encode: str
    prototypes_signature: dict[str, Any]
    prototypes: str


@dataclass(frozen=True, slots=True)
class PlannedPair:
    """One pair of the study with its keys and the Parquet part that its rows go to."""

    pair: str
    moving: str
    fixed: str
    match_key: str
    fit_key: str
    part: str


def encode_settings(config: StudyConfig, segmenter: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the encode signature that is the same for every subject."""
    return {
        "input": dataclasses.asdict(config.input),
        "segmenter": dict(segmenter),
        "version": VERSIONS["encode"],
    }


def subject_keys(config: StudyConfig, segmenter: Mapping[str, Any], inputs: InputDigests) -> SubjectKeys:
    """Keys of a subject."""
    files = {"image": inputs.image}
    if inputs.segmentation is not None:
        files["segmentation"] = inputs.segmentation
    return encoded_keys(config, _plain({**files, **encode_settings(config, segmenter)}))


def encoded_keys(config: StudyConfig, encode_signature: dict[str, Any]) -> SubjectKeys:
    """Keys of a subject whose embeddings have this signature."""
    encode = digest(encode_signature)
    prototypes_signature = _plain(
        {
            "encode": encode,
            "rois": dataclasses.asdict(config.rois),
            "prototypes": dataclasses.asdict(config.prototypes),
            "tracks": dataclasses.asdict(config.tracks),
            "version": VERSIONS["prototypes"],
        }
    )
    return SubjectKeys(encode_signature, encode, prototypes_signature, digest(prototypes_signature))


def plan_pairs(
    config: StudyConfig,
    pairs: Sequence[Pair],
    order: Sequence[str],
    inputs: Mapping[str, InputDigests],
    keys: Mapping[str, SubjectKeys],
) -> list[PlannedPair]:
    """Keys and parts of the pairs whose two subjects have inputs, in their order.

    Args:
        order: every subject of the cohort; a tile is a square of this order's index pairs.
    """
    index = {subject: position for position, subject in enumerate(order)}
    tile = config.execution.tile
    matching, fitting = digest(_match_settings(config)), digest(_fit_settings(config))
    planned = []
    for pair in pairs:
        if pair.moving not in keys or pair.fixed not in keys:
            continue
        moving, fixed = inputs[pair.moving], inputs[pair.fixed]
        match_key = digest([matching, *pair, keys[pair.moving].prototypes, keys[pair.fixed].prototypes])
        fit_key = digest([fitting, match_key, moving.label, fixed.label, moving.landmarks, fixed.landmarks])
        part = sys.intern(f"{index[pair.fixed] // tile:04d}-{index[pair.moving] // tile:04d}")
        planned.append(PlannedPair(pair.pair, pair.moving, pair.fixed, match_key, fit_key, part))
    return planned


def _match_settings(config: StudyConfig) -> Any:
    return _plain({"match": dataclasses.asdict(config.match), "version": VERSIONS["match"]})


def _fit_settings(config: StudyConfig) -> Any:
    """Settings of the fit; those of a step that is off change nothing. A refinement's images are in the match key."""
    fit = dataclasses.asdict(config.fit)
    if config.fit.refine.method == "none":
        del fit["refine"]
    evaluated = {"evaluate": dataclasses.asdict(config.evaluate)} if config.evaluate.pseudo_folds else {}
    return _plain({"fit": fit, **evaluated, "version": VERSIONS["fit"]})


def _plain(value: Any) -> Any:
    """The value as JSON gives it back (tuples become lists), so that stored and fresh signatures compare equal."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
