"""Digests of the input files, which identify them in every key; a moved or touched file keeps its digest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.dispatch import Failure, attempt
from storage.atomic import replace_file
from storage.cohort import Subject
from storage.images import content_digest
from storage.places import exists, read_bytes

_RECENT_SECONDS = 2.0
_DETACHED = (".mhd", ".nhdr", ".hdr", ".img")  # headers whose data lies in another file


@dataclass(frozen=True)
class InputDigests:
    """sha256 of the files of one subject; None where the manifest gives none."""

    image: str
    label: str | None
    landmarks: str | None
    segmentation: str | None = None


@dataclass(frozen=True)
class _Files:
    subject: Subject

    @property
    def unit(self) -> str:
        return self.subject.subject


class DigestCache:
    """Digests of local files, remembered by path, size and modification time.

    A file changed within the last two seconds is never remembered: its next change might not show in its time.

    Args:
        path: of the cache.
        others: caches that are read too and stay as they are.
    """

    def __init__(self, path: Path, *others: Path) -> None:
        self.path = path
        self._known: dict[str, list[object]] = {}
        self._used: dict[str, list[object]] = {}
        for cache in (*others, path):
            if exists(cache):
                with suppress(ValueError):
                    self._known.update(json.loads(read_bytes(cache)))

    def digest(self, location: str) -> str:
        """sha256 of the bytes at a path or URI.

        Raises:
            ImageError: for a missing file.
        """
        path = Path(location)
        if not path.is_file() or path.suffix.lower() in _DETACHED:
            return content_digest(location)
        stat = path.stat()
        stamp: list[object] = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(location)
        found = str(known[2]) if known and known[:2] == stamp else content_digest(location)
        if time.time() - stat.st_mtime > _RECENT_SECONDS:
            self._used[location] = [*stamp, found]
        return found

    def save(self) -> None:
        """Write what this run used."""
        if self._used != self._known:
            with replace_file(self.path) as temporary:
                temporary.write_text(json.dumps(self._used), encoding="utf-8")


def digest_inputs(
    subjects: Iterable[Subject],
    cache: DigestCache,
    image: Callable[[Subject], str] | None = None,
    segmentations: bool = False,
) -> dict[str, InputDigests | Failure]:
    """Digests of every subject, in order; a Failure for one whose files cannot be read.

    Args:
        image: gives the digest of a subject's image, in place of reading the file.
        segmentations: whether the segmentation of a subject counts.
    """

    def digest_files(files: _Files) -> InputDigests:
        subject = files.subject
        label = cache.digest(subject.label) if subject.label else None
        landmarks = cache.digest(subject.landmarks) if subject.landmarks else None
        segmentation = cache.digest(subject.segmentation) if segmentations and subject.segmentation else None
        found = image(subject) if image else cache.digest(subject.image)
        return InputDigests(found, label, landmarks, segmentation)

    found = {subject.subject: attempt(digest_files, _Files(subject)) for subject in subjects}
    cache.save()
    return found
