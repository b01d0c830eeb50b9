"""Digests of the input files, which identify them in every key; a moved or touched file keeps its digest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.dispatch import Failure, attempt
from pipeline.progress import Reporter, SilentReporter
from storage.atomic import replace_file
from storage.cohort import Subject
from storage.image_files import content_digest, image_files
from storage.places import exists, read_bytes
from storage.sources import is_remote, remote_stamp

_RECENT_SECONDS = 2.0


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
    """Digests of files, remembered by size and modification time; of objects by size and version (ETag).

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
        stamp = remote_stamp(location) if is_remote(location) else _local_stamp(Path(location))
        known = self._known.get(location)
        found = str(known[1]) if known and known[0] == stamp else content_digest(location)
        if stamp is not None:
            self._used[location] = [stamp, found]
        return found

    def save(self) -> None:
        """Write what is known now."""
        known = {**self._known, **self._used}
        if known != self._known:
            with replace_file(self.path) as temporary:
                temporary.write_text(json.dumps(known), encoding="utf-8")


def _local_stamp(path: Path) -> list[list[object]] | None:
    """Name, size and time of the files of an image; None while one of them is too new."""
    if not path.exists():
        return None
    found = [(str(file), file.stat()) for file in image_files(path)]
    if any(time.time() - stat.st_mtime <= _RECENT_SECONDS for _, stat in found):
        return None
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def digest_inputs(
    subjects: Iterable[Subject],
    cache: DigestCache,
    image: Callable[[Subject], str] | None = None,
    segmentations: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, InputDigests | Failure]:
    """Digests of every subject, in order; a Failure for one whose files cannot be read.

    Args:
        image: gives the digest of a subject's image, in place of reading the file.
        segmentations: whether the segmentation of a subject counts.
        reporter: shows how far it is; objects are downloaded for it.
    """
    found: dict[str, InputDigests | Failure] = {}
    units = [_Files(subject) for subject in subjects]

    def digest_files(files: _Files) -> InputDigests:
        subject = files.subject
        label = cache.digest(subject.label) if subject.label else None
        landmarks = cache.digest(subject.landmarks) if subject.landmarks else None
        segmentation = cache.digest(subject.segmentation) if segmentations and subject.segmentation else None
        shown = image(subject) if image else cache.digest(subject.image)
        return InputDigests(shown, label, landmarks, segmentation)

    try:
        with (reporter or SilentReporter()).stage("inputs", len(units), "subjects") as advance:
            for files in units:
                found[files.unit] = attempt(digest_files, files)
                advance(1)
    finally:
        cache.save()
    return found
