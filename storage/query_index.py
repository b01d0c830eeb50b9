"""The query index: prototypes and geometry of all ROIs of a store in a few flat arrays, mapped into memory.

    <root>/<signature>/prototypes.npy      float16 [T, C], unit norm
                       centroid_mm.npy     float32 [T, 3] local (z, y, x); covariance_mm2.npy float32 [T, 3]
                       area_mm2.npy        float32 [T]; roi, slice, track: int32 [T]
                       index.json          subjects in order, where each begins, its slices and height

A store keeps its subjects apart, so that each is written on its own; a thousand of them take seconds to open. The
index is made once from what the store holds and is named after the signatures of the prototypes in it: when one of
them changes, it is another index, and the old one is deleted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.atomic import is_abandoned, named_error
from storage.embeddings import EmbeddingStore
from storage.signature import digest

COLUMNS = {
    "prototypes": np.float16,
    "centroid_mm": np.float32,
    "covariance_mm2": np.float32,
    "area_mm2": np.float32,
    "roi": np.int32,
    "slice": np.int32,
    "track": np.int32,
}
_VERSION = 1
_MARKER = "index.json"
_LOCK = ".lock"


class QueryIndexError(ValueError):
    """A store that no index can be made of; says why."""


@dataclass(frozen=True)
class QueryIndex:
    """The ROIs of S subjects, one after the other.

    Attributes:
        subjects: names, sorted.
        start: int64 [S + 1], first row of each subject, and the end.
        n_slices: int64 [S].
        height_mm: float64 [S], between the middles of the outer slices.
        signature: of the prototypes in it.
        columns: the arrays of `COLUMNS`, mapped, not read.
    """

    subjects: list[str]
    start: npt.NDArray[np.int64]
    n_slices: npt.NDArray[np.int64]
    height_mm: npt.NDArray[np.float64]
    signature: str
    columns: dict[str, npt.NDArray[Any]]

    def rows(self, subject: str) -> slice:
        """Rows of one subject.

        Raises:
            KeyError: for a subject that has none.
        """
        if subject not in self.subjects:
            raise KeyError(subject)
        number = self.subjects.index(subject)
        return slice(int(self.start[number]), int(self.start[number + 1]))


def open_index(store: EmbeddingStore, root: Path, wanted: Mapping[str, str] | None = None) -> QueryIndex:
    """The index of the subjects that have prototypes, made anew if the store has changed.

    Args:
        store: prototypes of the subjects.
        root: folder of the index.
        wanted: digest of the prototypes' signature of each subject; others, and prototypes made otherwise, are left
            out. None takes whatever the store holds.

    Raises:
        QueryIndexError: for a store without prototypes, with ROIs that are classes, or of different backends.
        OSError: naming the index, for example when the disk is full.
    """
    names = store.subjects() if wanted is None else sorted(wanted)
    signatures = {name: store.prototypes_signature(name) for name in names}
    known = {
        name: found
        for name, found in signatures.items()
        if found is not None and (wanted is None or digest(found) == wanted[name])
    }
    if not known:
        raise QueryIndexError(
            f"{store.root} holds no prototypes of this cohort; run samreg run --until prototypes first"
        )
    signature = digest({"version": _VERSION, "subjects": known})
    folder = root / signature
    if not (folder / _MARKER).exists():
        _write(store, list(known), folder)
    return _read(folder, signature)


def _read(folder: Path, signature: str) -> QueryIndex:
    record = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    return QueryIndex(
        record["subjects"],
        np.asarray(record["start"], np.int64),
        np.asarray(record["n_slices"], np.int64),
        np.asarray(record["height_mm"], np.float64),
        signature,
        {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS},
    )


def _write(store: EmbeddingStore, subjects: list[str], folder: Path) -> None:
    """Write aside and rename; older indices and what killed writers left go.

    The writer holds a lock in its folder while it lives.
    """
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    lock = aside / _LOCK
    try:
        aside.mkdir(parents=True)
        with lock.open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            _fill(store, subjects, aside)
            lock.unlink()
            _rename(aside, folder)
    except OSError as error:
        raise named_error(error, folder) from error.__cause__
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in folder.parent.iterdir():
        if old != folder and (not old.name.startswith(".") or is_abandoned(old / _LOCK)):
            shutil.rmtree(old, ignore_errors=True)


def _rename(aside: Path, folder: Path) -> None:
    """Put a whole index in its place, unless another process was faster; one without its marker is of no use."""
    for last in (False, True):
        try:
            aside.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (folder / _MARKER).exists():
                return
            if last:
                raise
            shutil.rmtree(folder)


def _fill(store: EmbeddingStore, subjects: list[str], folder: Path) -> None:
    """A subject at a time: nothing but one subject and the small columns is ever held."""
    start = np.cumsum([0, *(store.prototype_shape(name)[0] for name in subjects)])
    channels = store.prototype_shape(subjects[0])[1]
    shapes = {"prototypes": (channels,), "centroid_mm": (3,), "covariance_mm2": (3,)}
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=kind, shape=(int(start[-1]), *shapes.get(name, ()))
        )
        for name, kind in COLUMNS.items()
    }
    geometries = []
    for name, low, high in zip(subjects, start[:-1].tolist(), start[1:].tolist(), strict=True):
        found = store.read_prototypes(name)
        assert found is not None
        stored = found[1]
        if "roi_class" in stored:
            raise QueryIndexError(
                f"the ROIs of {name!r} are classes, which are the same in every subject; nothing to find"
            )
        if stored["prototypes"].shape[1] != channels:
            widths = f"{stored['prototypes'].shape[1]} numbers, those of {subjects[0]!r} {channels}"
            raise QueryIndexError(f"prototypes of {name!r} have {widths}: two backends in one store cannot be compared")
        for column, values in arrays.items():
            values[low:high] = stored[column]
        geometries.append(store.geometry(name))
    for values in arrays.values():
        values.flush()
    record = {
        "subjects": subjects,
        "start": start.tolist(),
        "n_slices": [geometry.shape[0] for geometry in geometries],
        "height_mm": [(geometry.shape[0] - 1) * geometry.spacing_mm[0] for geometry in geometries],
    }
    (folder / _MARKER).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
