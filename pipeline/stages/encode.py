"""Encode: image file to features and candidate masks, one subject per unit, written by the worker itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.build import build_segmenter, uses_gpu
from actors.encoder import Encoded, SliceEncoder
from actors.input_config import InputConfig
from pipeline.config import StudyConfig
from pipeline.dispatch import Task
from pipeline.keys import SubjectKeys
from storage.cohort import Subject
from storage.embeddings import EmbeddingStore
from storage.signature import check_signature

SLICES_AT_ONCE = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class EncodeUnit:
    """One subject to encode."""

    subject: str
    image: str
    signature: dict[str, Any]

    @property
    def unit(self) -> str:
        """Name in failure rows."""
        return self.subject


def plan(store: EmbeddingStore, subjects: Mapping[str, Subject], keys: Mapping[str, SubjectKeys]) -> list[EncodeUnit]:
    """Units of the subjects whose embeddings are absent, incomplete, made otherwise, or needed but dropped."""
    return [
        EncodeUnit(name, str(subjects[name].image), key.encode_signature)
        for name, key in keys.items()
        if not is_done(store, name, key)
    ]


def is_done(store: EmbeddingStore, subject: str, key: SubjectKeys) -> bool:
    """Whether nothing needs encoding: embeddings of this signature with features, or prototypes up to date."""
    if store.signature(subject) != key.encode_signature:
        return False
    return store.has_features(subject) or store.prototypes_signature(subject) == key.prototypes_signature


def task(config: StudyConfig, store: Path) -> Task:
    """The task of encoding, for `pipeline.dispatch`."""
    return Task("encode", partial(_build, config, store), uses_gpu(config.segmenter))


def _build(config: StudyConfig, store: Path, device: str) -> Callable[[EncodeUnit], Encoded]:
    encoder = SliceEncoder(partial(build_segmenter, config.segmenter, device), store, SLICES_AT_ONCE[device])
    return partial(run_unit, encoder, config.input)


def run_unit(encoder: SliceEncoder, config: InputConfig, unit: EncodeUnit) -> Encoded:
    """Encode one subject.

    Raises:
        SignatureMismatch: this worker's segmenter is not the one the driver planned with, for example because
            its node holds other weights under the same path.
        ImageError: for an image that cannot be used.
    """
    check_signature("this worker's segmenter", encoder.segmenter.signature, unit.signature["segmenter"])
    return encoder.encode(unit.subject, unit.image, unit.signature, config)
