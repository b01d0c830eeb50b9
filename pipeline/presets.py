"""Named sets of overrides that a configuration can start from (`preset: paper`)."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {},
}
