"""Errors that a user can act on; the command turns them into one line and an exit code."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for cannot be done as asked; nothing was changed. Exit code 2."""


class StudyError(RuntimeError):
    """A run had to stop; nothing finished is lost. Exit code 1."""


class FolderError(UsageError):
    """The output folder cannot be used for this study; the message says what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a scheduler ends a run: it stops as after Ctrl-C."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """130 after Ctrl-C, 143 after SIGTERM."""
    return 143 if isinstance(stop, Terminated) else 130
