"""The options of the command line that take a study folder or a URL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_URL = re.compile(r"([a-z][a-z0-9+]+):/+(?=[^/])")


def parse_place(text: str) -> Path:
    """A study folder, or a URL, whose slashes pathlib would not keep."""
    from storage.places import place

    return place(text)


def refuse_urls(command: str, options: Mapping[str, Any]) -> None:
    """Refuse a URL where a command takes folders only, from which pathlib has taken one of its slashes.

    Raises:
        UsageError: saying which commands take it.
    """
    from pipeline.errors import UsageError

    for name in ("study", "out"):
        value = options.get(name)
        if isinstance(value, Path) and _URL.match(str(value)):
            url = _URL.sub(r"\1://", str(value))
            raise UsageError(
                f"samreg {command} needs a folder, not {url}. A study in an object store is for samreg run, plan, "
                f"status, doctor and submit; for the rest copy it first, as by aws s3 sync {url} study"
            )
