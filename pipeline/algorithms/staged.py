"""Computations that pause after each of their stages, so that many can go through them in step."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Staged: TypeAlias = Generator[int, None, T]
"""Yields after each stage; first the bytes that it will hold until its end, later whatever."""


def complete(computation: Staged[T]) -> T:
    """Run one computation to its end."""
    while True:
        try:
            next(computation)
        except StopIteration as end:
            value: T = end.value
            return value
