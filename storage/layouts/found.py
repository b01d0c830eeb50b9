"""What a layout is, and what its reader finds in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from storage.cohort import Pair, Subject
from storage.manifest import CohortError

LABEL_ENDING = re.compile(r"_(gt|seg|label|labels|dseg|mask)$")
_SHOWN = 8  # entries of a folder that a message names


@dataclass
class Found:
    """Subjects and pairs of a data set, in name order, and what of it cannot be used.

    Attributes:
        root: folder of the data set.
        files: folder for what the manifest needs and the data set does not hold as such: frames of 4D images, landmarks
            as CSV. It is made when something is written to it.
        columns: what else is known of a subject, by column of the manifest and subject.
        pairs: those that the data set defines; none if it leaves the choice open.
        problems: one sentence each.
    """

    root: Path
    files: Path
    subjects: list[Subject] = field(default_factory=list)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _names: set[str] = field(default_factory=set, init=False)

    def add(self, subject: Subject, **columns: str) -> None:
        """Add a subject; files that are named but missing are problems, and without its image it is left out."""
        if not Path(subject.image).exists():
            self.problems.append(f"{subject.subject}: no image {self.shown(subject.image)}; the subject is left out")
            return
        for kind in ("label", "landmarks"):
            path = getattr(subject, kind)
            if path and not Path(path).exists():
                self.problems.append(f"{subject.subject}: no {kind} {self.shown(path)}; listed without")
                subject = replace(subject, **{kind: ""})
        self.subjects.append(subject)
        self._names.add(subject.subject)
        for name, value in columns.items():
            self.columns.setdefault(name, {})[subject.subject] = value

    def add_pair(self, pair: Pair) -> None:
        """Add a pair, if both its subjects were found."""
        if {pair.moving, pair.fixed} <= self._names:
            self.pairs.append(pair)
        else:
            self.problems.append(f"pair {pair.pair}: one of its subjects is missing; the pair is left out")

    def shown(self, path: str | Path) -> str:
        """A path as messages name it, from the root of the data set."""
        return str(Path(path).relative_to(self.root)) if Path(path).is_relative_to(self.root) else str(path)


@dataclass(frozen=True)
class Layout:
    """How a public data set lies on disk.

    Attributes:
        tree: what the folder looks like, for messages.
        marker: glob below the root that matches something in this layout only.
        read: (found, select) fills `found`; raises CohortError for what concerns the whole folder.
        select: what `select` chooses, "" if there is nothing to choose.
    """

    name: str
    tree: str
    marker: str
    read: Callable[[Found, str], None]
    select: str = ""

    def fits(self, root: Path) -> bool:
        """Whether something below `root` has this layout."""
        return bool(visible(root.glob(self.marker)))


def one_of(root: Path, candidates: Iterable[Path], what: str) -> Path:
    """The only one of several files.

    Raises:
        CohortError: when there is none, or more than one.
    """
    found = visible(candidates)
    if not found:
        raise CohortError(f"{root}: no {what}; found {inside(root)}")
    if len(found) > 1:
        folders = ", ".join(os.path.relpath(path, root) for path in found[:_SHOWN])
        raise CohortError(f"{root}: {len(found)} times {what} ({folders}); give the folder of one of them")
    return found[0]


def visible(paths: Iterable[Path]) -> list[Path]:
    """Paths in order, without hidden files such as the `._X` that macOS leaves beside every X."""
    return sorted(path for path in paths if not path.name.startswith("."))


def inside(root: Path) -> str:
    """The first names in a folder, for messages."""
    names = [path.name for path in visible(root.iterdir())]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more or "nothing"


def stem(path: str | Path) -> str:
    """File name without its suffix, `.nii.gz` taken as one."""
    name = Path(path).name
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else Path(name).stem


def existing(path: Path) -> str:
    """The path if there is such a file, else ""."""
    return str(path) if path.exists() else ""
