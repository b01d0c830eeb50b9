"""Encode: image file to features and candidate masks, one subject per unit, written by the worker itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.build import build_class_segmenter, build_segmenter, uses_gpu
from actors.class_config import LabelsConfig, NetworkConfig
from actors.class_encoder import ClassEncoder
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
    segmentation: str = ""

    @property
    def unit(self) -> str:
        """Name in failure rows."""
        return self.subject


def plan(store: EmbeddingStore, subjects: Mapping[str, Subject], keys: Mapping[str, SubjectKeys]) -> list[EncodeUnit]:
    """Units of the subjects whose embeddings are absent, incomplete, made otherwise, or needed but dropped."""
    return [
        EncodeUnit(name, subjects[name].image, key.encode_signature, subjects[name].segmentation)
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
    chosen = config.segmenter
    if isinstance(chosen, LabelsConfig | NetworkConfig):
        classes = ClassEncoder(partial(build_class_segmenter, chosen, device), store, chosen.classes)
        return partial(run_unit, classes, config.input)
    slices = SliceEncoder(partial(build_segmenter, chosen, device), store, SLICES_AT_ONCE[device])
    return partial(run_unit, slices, config.input)


def run_unit(encoder: SliceEncoder | ClassEncoder, config: InputConfig, unit: EncodeUnit) -> Encoded:
    """Encode one subject.

    Raises:
        SignatureMismatch: this worker's segmenter is not the one the driver planned with, for example because
            its node holds other weights under the same path.
        ImageError, ClassError: for an image or a segmentation that cannot be used.
    """
    check_signature("this worker's segmenter", encoder.segmenter.signature, unit.signature["segmenter"])
    if isinstance(encoder, ClassEncoder):
        return encoder.encode(unit.subject, unit.image, unit.segmentation, unit.signature, config)
    return encoder.encode(unit.subject, unit.image, unit.signature, config)
