"""Which pairs of a cohort are registered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.algorithms import cohort_graph
from pipeline.errors import UsageError
from storage.cohort import Cohort, Pair

Mode = Literal["all", "star", "intra", "knn", "tree", "list"]
MEDOID = "medoid"


@dataclass(frozen=True)
class PairsConfig:
    """How pairs are chosen; `pairs: star` in a file is short for `pairs: {mode: star}`.

    `knn`, `tree` and the medoid compare subjects by what their ROIs look like, see `pipeline.algorithms.descriptors`.

    Attributes:
        mode: `all` pairs; `star`: every subject onto `reference`; `intra`: later onto earlier subjects of the same
            group, in manifest order; `knn`: onto each subject its `k` most similar; `tree`: the spanning tree of the
            most similar subjects and random pairs, which connects the cohort; `list`: the pairs file.
        reference: fixed subject of `star`: a name, or `medoid` for the subject most similar to all others; None takes
            the first of the manifest.
        k: neighbours of `knn`.
        extra: random pairs of `tree`, per subject.
        seed: of the random pairs.
        ordered: whether `all` and `knn` may hold a pair in both directions; false keeps later onto earlier only.
    """

    mode: Mode = "all"
    reference: str | None = None
    k: int = 3
    extra: int = 1
    seed: int = 0
    ordered: bool = True

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("extra", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"pairs.{name} is {getattr(self, name)}; it must be {least} or more")

    @property
    def by_similarity(self) -> bool:
        """Whether the pairs depend on the ROIs of the subjects, and so can be chosen after encoding only."""
        return self.mode in ("knn", "tree") or (self.mode == "star" and self.reference == MEDOID)


class PairsError(UsageError):
    """The pairs cannot be chosen as configured."""


def choose_pairs(config: PairsConfig, cohort: Cohort) -> tuple[Pair, ...] | None:
    """Pairs in manifest order (fixed subject outermost); None for those that `similar_pairs` chooses later.

    Raises:
        PairsError: for an unknown reference, `intra` without groups, no pair at all, or two of one name.
    """
    names = [subject.subject for subject in cohort.subjects]
    chosen: list[tuple[str, str]] = []
    if config.mode == "list":
        raise PairsError("pairs is 'list', which needs a pairs file: add --pairs FILE")
    if config.mode == "intra":
        chosen = _within_groups(cohort)
    elif config.mode == "all" and not config.ordered:
        chosen = _later_onto_earlier(names)
    elif config.mode == "all":
        chosen = [(moving, fixed) for fixed in names for moving in names if moving != fixed]
    elif config.mode == "star" and not config.by_similarity:
        chosen = _onto(config.reference or names[0], names)
    if not chosen and not (config.by_similarity and len(names) > 1):
        raise PairsError(f"pairs is {config.mode!r}, which gives no pair for {len(names)} subjects")
    return None if config.by_similarity else _named(chosen)


def similar_pairs(config: PairsConfig, names: Sequence[str], similarity: cohort_graph.Similarity) -> tuple[Pair, ...]:
    """Pairs of the modes that are `by_similarity`, in manifest order.

    Args:
        names: subjects in manifest order.
        similarity: see `pipeline.algorithms.cohort_graph`.

    Raises:
        PairsError: for two pairs of one name.
    """
    if len(names) < 2:
        return ()
    if config.mode == "star":
        return _named(_onto(names[cohort_graph.medoid(similarity)], names))
    if config.mode == "tree":
        tree = cohort_graph.spanning_tree(similarity)
        more = cohort_graph.random_edges(config.extra * len(names), len(names), tree, config.seed)
        edges = np.concatenate([tree, more])
    else:
        neighbours = cohort_graph.nearest(similarity, config.k)
        edges = np.column_stack([np.repeat(np.arange(len(names)), neighbours.shape[1]), neighbours.ravel()])
        if not config.ordered:
            edges = np.unique(np.sort(edges, axis=1), axis=0)
    order = np.argsort(edges[:, 0], kind="stable")
    return _named([(names[moving], names[fixed]) for fixed, moving in edges[order]])


def count_pairs(config: PairsConfig, cohort: Cohort) -> int:
    """How many pairs there will be; for `knn` with `ordered` off, at most.

    Raises:
        PairsError: as `choose_pairs`.
    """
    chosen = choose_pairs(config, cohort)
    if chosen is not None:
        return len(chosen)
    n = len(cohort.subjects)
    every = n * (n - 1) // 2
    if config.mode == "star":
        return n - 1
    if config.mode == "tree":
        return min(n - 1 + config.extra * n, every)
    directed = n * min(config.k, n - 1)
    return directed if config.ordered else min(directed, every)


def _onto(reference: str, names: Sequence[str]) -> list[tuple[str, str]]:
    if reference not in names:
        raise PairsError(
            f"pairs.reference is {reference!r}, which is not a subject of the cohort; give one, or {MEDOID!r}"
        )
    return [(moving, reference) for moving in names if moving != reference]


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


def _named(chosen: Sequence[tuple[str, str]]) -> tuple[Pair, ...]:
    found: dict[str, Pair] = {}
    for moving, fixed in chosen:
        pair = Pair(f"{moving}__{fixed}", moving, fixed)
        other = found.setdefault(pair.pair, pair)
        if other != pair:
            raise PairsError(
                f"{other.moving!r} onto {other.fixed!r} and {moving!r} onto {fixed!r} are both called {pair.pair!r}; "
                "rename a subject, or give a pairs file with the column pair"
            )
    return tuple(found.values())
