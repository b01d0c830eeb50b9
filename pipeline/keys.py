"""Keys: what a stored result depends on, so that a re-run redoes exactly what a change touches.

    encode      image bytes, input settings, segmenter signature
    prototypes  encode key, ROI and pooling settings
    match       both prototype keys, matching settings, the names in the rows
    fit         match key, fit settings, bytes of the labels and landmarks it is evaluated against

Execution settings and file names enter no key. Raise a version when the code of a stage changes its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import StudyConfig
from pipeline.inputs import InputDigests
from storage.cohort import Pair
from storage.signature import digest

VERSIONS = {"encode": 1, "prototypes": 2, "match": 2, "fit": 1}


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


@dataclass(frozen=True)
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
    encode_signature = _plain({"image": inputs.image, **encode_settings(config, segmenter)})
    encode = digest(encode_signature)
    prototypes_signature = _plain(
        {
            "encode": encode,
            "rois": dataclasses.asdict(config.rois),
            "prototypes": dataclasses.asdict(config.prototypes),
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
    planned = []
    for pair in pairs:
        if pair.moving not in keys or pair.fixed not in keys:
            continue
        match_key = _match_key(config, pair, keys)
        fit_key = _fit_key(config, match_key, inputs[pair.moving], inputs[pair.fixed])
        part = f"{index[pair.fixed] // tile:04d}-{index[pair.moving] // tile:04d}"
        planned.append(PlannedPair(pair.pair, pair.moving, pair.fixed, match_key, fit_key, part))
    return planned


def _match_key(config: StudyConfig, pair: Pair, keys: Mapping[str, SubjectKeys]) -> str:
    return digest(
        _plain(
            {
                "pair": [pair.pair, pair.moving, pair.fixed],
                "prototypes": [keys[pair.moving].prototypes, keys[pair.fixed].prototypes],
                "match": dataclasses.asdict(config.match),
                "version": VERSIONS["match"],
            }
        )
    )


def _fit_key(config: StudyConfig, match_key: str, moving: InputDigests, fixed: InputDigests) -> str:
    return digest(
        _plain(
            {
                "match": match_key,
                "fit": _fit_settings(config),
                "labels": [moving.label, fixed.label],
                "landmarks": [moving.landmarks, fixed.landmarks],
                "version": VERSIONS["fit"],
            }
        )
    )


def _fit_settings(config: StudyConfig) -> dict[str, Any]:
    """Settings of the fit; those of a refinement that is off change nothing. Its images are in the match key."""
    settings = dataclasses.asdict(config.fit)
    if config.fit.refine.method == "none":
        del settings["refine"]
    return settings


def _plain(value: Any) -> Any:
    """The value as JSON gives it back (tuples become lists), so that stored and fresh signatures compare equal."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
