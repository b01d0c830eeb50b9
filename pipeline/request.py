"""What a user asks for on the command line: configuration, cohort and pairs, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

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
    words = get_args(Mode)
    if pairs in words:
        overrides = [*overrides, f"pairs.mode={pairs}"]
    settings = load_config(config, overrides)
    found = read_cohort(cohort)
    if pairs is None or pairs in words:
        if settings.pairs.mode == "list":
            raise ConfigError("pairs is 'list', which needs a pairs file: add --pairs FILE")
        return Request(settings, found, None, ())
    listed, unknown = read_pairs(pairs, found)
    return Request(settings, found, listed, tuple(unknown))
