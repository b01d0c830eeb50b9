"""Digests of settings and inputs, and the error when stored results were made from other ones."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_SHOWN = 6
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


class SignatureMismatch(ValueError):  # noqa: N818 (reads as what happened, as in the messages)
    """Stored data was made from other inputs or settings than the ones asked for; names both values."""


def digest(value: Any) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of a JSON-safe value.

    Raises:
        TypeError: for something JSON cannot hold.
        ValueError: for NaN or infinity.
    """
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()[:16]


def check_signature(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise SignatureMismatch naming the entries of `what` (say, "embedding of subject p01") that differ."""
    differences = [
        f"{name}: stored {left!r}, asked for {right!r}" for name, left, right in _differing(found, wanted, "")
    ]
    if differences:
        more = "" if len(differences) <= _SHOWN else f" (and {len(differences) - _SHOWN} more)"
        raise SignatureMismatch(f"{what} was made otherwise: {'; '.join(differences[:_SHOWN])}{more}")


def _differing(found: dict[str, Any], wanted: dict[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    rows: list[tuple[str, Any, Any]] = []
    for name in sorted(found.keys() | wanted.keys()):
        left, right = found.get(name), wanted.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            rows += _differing(left, right, f"{prefix}{name}.")
        elif json.dumps(left, sort_keys=True) != json.dumps(right, sort_keys=True):
            rows.append((prefix + name, left, right))
    return rows
