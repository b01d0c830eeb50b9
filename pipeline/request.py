"""What a user asks for on the command line: configuration, cohort and pairs, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from pipeline.config import ConfigError, StudyConfig, load_config
from pipeline.pairs import Mode
from storage.cohort import Cohort, Pair, read_cohort, read_pairs


@dataclass(frozen=True)
class Request:
    """A study to run.

    Attributes:
        pairs: the pairs of a file; None follows `config.pairs`.
        unknown: (row, pair, subject) of pairs in the file that name a subject outside the cohort.
    """

    config: StudyConfig
    cohort: Cohort
    pairs: tuple[Pair, ...] | None
    unknown: tuple[tuple[int, Pair, str], ...]


def read_request(config: Path | None, cohort: Path, pairs: str | None = None, overrides: Sequence[str] = ()) -> Request:
    """Read configuration, manifest and pairs.

    Args:
        pairs: a pairs file, or a mode of `pairs:`; None follows the configuration.

    Raises:
        ConfigError, CohortError, FileNotFoundError: naming the file and what is wrong.
    """
    return make_request(load_config(config, overrides), cohort, pairs)


def make_request(config: StudyConfig, cohort: Path, pairs: str | None = None) -> Request:
    """As `read_request`, with the configuration in hand.

    Raises:
        ConfigError, CohortError, FileNotFoundError: naming the file and what is wrong.
    """
    return request_pairs(config, read_cohort(cohort), pairs)


def request_pairs(config: StudyConfig, cohort: Cohort, pairs: str | None = None) -> Request:
    """As `make_request`, with the cohort in hand.

    Raises:
        ConfigError, CohortError, FileNotFoundError: naming the file and what is wrong.
    """
    if pairs in get_args(Mode):
        config = config.model_copy(update={"pairs": replace(config.pairs, mode=cast(Mode, pairs))})
        pairs = None
    if pairs is not None:
        listed, unknown = read_pairs(pairs, cohort)
        return Request(config, cohort, listed, tuple(unknown))
    if config.pairs.mode == "list":
        raise ConfigError("pairs is 'list', which needs a pairs file: add --pairs FILE")
    return Request(config, cohort, None, ())
