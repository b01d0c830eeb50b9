"""Which pairs of a cohort are registered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import UsageError
from storage.cohort import Cohort, Pair

Mode = Literal["all", "star", "intra", "knn", "list"]


@dataclass(frozen=True)
class PairsConfig:
    """How pairs are chosen; `pairs: star` in a file is short for `pairs: {mode: star}`.

    Attributes:
        mode: `all` ordered pairs; `star`: every subject onto `reference`; `intra`: later onto earlier subjects
            of the same group, in manifest order; `knn`: onto each subject its `k` nearest by mean prototype;
            `list`: the pairs file.
        reference: fixed subject of `star`; None takes the first of the manifest.
        k: neighbours of `knn`.
    """

    mode: Mode = "all"
    reference: str | None = None
    k: int = 3

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"pairs.k is {self.k}; it must be 1 or more")


class PairsError(UsageError):
    """The pairs cannot be chosen as configured."""


def choose_pairs(config: PairsConfig, cohort: Cohort) -> tuple[Pair, ...]:
    """Pairs of the modes that need nothing but the manifest, in manifest order (fixed subject outermost).

    Raises:
        PairsError: for an unknown reference, `intra` without groups, or no pair at all.
    """
    names = [subject.subject for subject in cohort.subjects]
    if config.mode == "all":
        chosen = [(moving, fixed) for fixed in names for moving in names if moving != fixed]
    elif config.mode == "star":
        reference = config.reference or names[0]
        if reference not in names:
            raise PairsError(f"pairs.reference is {reference!r}, which is not a subject of the cohort")
        chosen = [(moving, reference) for moving in names if moving != reference]
    elif config.mode == "intra":
        chosen = _within_groups(cohort)
    elif config.mode == "list":
        raise PairsError("pairs is 'list', which needs a pairs file: add --pairs FILE")
    else:
        raise PairsError("pairs 'knn' are chosen from prototypes, after encoding")
    if not chosen:
        raise PairsError(f"pairs is {config.mode!r}, which gives no pair for {len(names)} subjects")
    return tuple(Pair(f"{moving}__{fixed}", moving, fixed) for moving, fixed in chosen)


def nearest_pairs(config: PairsConfig, descriptors: Mapping[str, npt.NDArray[np.float64]]) -> tuple[Pair, ...]:
    """Onto each subject its k nearest others by cosine; ties go to the earlier subject.

    Args:
        descriptors: subject -> [C] mean prototype, in manifest order.
    """
    names = list(descriptors)
    matrix = np.stack([descriptors[name] for name in names])
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    similarity = matrix @ matrix.T
    np.fill_diagonal(similarity, -np.inf)
    pairs = []
    for index, fixed in enumerate(names):
        order = np.argsort(-similarity[index], kind="stable")[: min(config.k, len(names) - 1)]
        pairs += [Pair(f"{names[j]}__{fixed}", names[j], fixed) for j in order]
    return tuple(pairs)


def _within_groups(cohort: Cohort) -> list[tuple[str, str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for subject in cohort.subjects:
        if subject.group:
            groups[subject.group].append(subject.subject)
    if not groups:
        raise PairsError("pairs is 'intra', but no subject of the cohort has a group")
    return [pair for members in groups.values() for pair in _later_onto_earlier(members)]


def _later_onto_earlier(members: Sequence[str]) -> list[tuple[str, str]]:
    return [(members[j], members[i]) for i in range(len(members)) for j in range(i + 1, len(members))]
